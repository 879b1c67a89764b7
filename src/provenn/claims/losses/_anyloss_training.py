"""Perceptrons trained for every fold and learning rate of a table at once, as columns of one batched computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from provenn.claims.claim import Point
from provenn.claims.losses._anyloss_tables import Folds
from provenn.core.experiment.seeding import generator
from provenn.losses import StratifiedBatchSampler

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (rows, columns) and classes (rows, columns), in float64, to the sum of the columns' losses."""
HIDDEN = 16


@dataclass(frozen=True)
class Trained:
    """Trained perceptrons.

    Args:
        logits: ``logits(fold, rows)`` gives (rows, rates).
        training: The logits of the training parts, (folds, rows, rates).
    """

    logits: Callable[[int, Tensor], Tensor]
    training: Tensor


def _columns(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Sum the losses of (folds, rows, rates) logits; each is a problem of its own."""
    folds, rows, rates = logits.shape
    flat = logits.double().permute(1, 0, 2).reshape(rows, folds * rates)
    return loss(flat, y.T[:, :, None].expand(rows, folds, rates).reshape(rows, folds * rates))


def train_single_layer(
    folds: Folds, loss: Loss, rates: Sequence[float], steps: int, curve: str
) -> Generator[Point, None, Trained]:
    """Descend by full-batch gradients from zero weights, as the paper does.

    Yields:
        The training loss at the middle rate, the mean over folds, every 250 steps.
    """
    middle = slice(len(rates) // 2, len(rates) // 2 + 1)
    lr = folds.x.new_tensor(rates)
    x = _bordered(folds.x)
    theta = x.new_zeros(len(x), x.shape[2], len(rates), requires_grad=True)
    for step in range(1, steps + 1):
        value = _columns(loss, x @ theta, folds.y)
        (slope,) = torch.autograd.grad(value, theta)
        with torch.no_grad():
            theta -= lr * slope
        if step % 250 == 0 or step == steps:
            shown = _columns(loss, (x @ theta.detach())[..., middle], folds.y)
            yield Point(curve, step, shown.item() / len(x))
    final = theta.detach()
    return Trained(lambda fold, rows: _bordered(rows) @ final[fold], x @ final)


def _bordered(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


class HiddenLayer:
    """Perceptrons d–16–1 with batch-normalised sigmoids; their weights lie flat, (folds, rates, parameters)."""

    def __init__(self, features: int) -> None:
        self.sizes = (features * HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, 1)
        self.features = features

    def start(self, folds: int, rates: int, draws: torch.Generator) -> Tensor:
        """Draw He-normal and Glorot-uniform weights, a set a fold, the same for every rate."""
        first = torch.randn(folds, 1, self.sizes[0], generator=draws) * math.sqrt(2 / self.features)
        last = (2 * torch.rand(folds, 1, HIDDEN, generator=draws) - 1) * math.sqrt(6 / (HIDDEN + 1))
        zeros, ones = torch.zeros_like(last), torch.ones_like(last)
        return torch.cat([first, zeros, ones, zeros, last, zeros[..., :1]], dim=-1).repeat(1, rates, 1)

    def hidden(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return the hidden layer's inputs, (folds, rows, rates, units)."""
        folds, rates, _ = weights.shape
        first, bias, *_ = weights.split(self.sizes, dim=-1)  # type: ignore[no-untyped-call, unused-ignore]
        wide = first.reshape(folds, rates, self.features, HIDDEN).permute(0, 2, 1, 3).reshape(folds, self.features, -1)
        inputs: Tensor = (x @ wide).reshape(folds, x.shape[1], rates, HIDDEN) + bias[:, None]
        return inputs

    def output(self, weights: Tensor, hidden: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the logits, (folds, rows, rates)."""
        _, _, gain, shift, last, bias = weights.split(self.sizes, dim=-1)  # type: ignore[no-untyped-call, unused-ignore]
        scale = gain[:, None] * (variance + 1e-5).rsqrt()
        units = torch.sigmoid((hidden - mean) * scale + shift[:, None])
        logits: Tensor = (units * last[:, None]).sum(-1) + bias[:, None, :, 0]
        return logits


def moments(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the rows."""
    mean = hidden.mean(1, keepdim=True)
    return mean, (hidden - mean).square().mean(1, keepdim=True)


def train_hidden_layer(
    folds: Folds, loss: Loss, rates: Sequence[float], epochs: int, batch_size: int, seed: int, curve: str
) -> Generator[Point, None, Trained]:
    """Train by Adam on stratified batches, in float32.

    Yields:
        The mean training loss of every tenth epoch and of the last.

    Returns:
        The perceptrons, normalised by the moments of the whole training part.
    """
    x, y = folds.x.float(), folds.y
    count = len(x)
    layer = HiddenLayer(x.shape[2])
    weights = layer.start(count, len(rates), generator(seed, "weights")).to(x.device).requires_grad_()
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    lr = x.new_tensor(rates)[:, None]
    draws = [generator(seed, "batches", fold) for fold in range(count)]
    samplers = [StratifiedBatchSampler(*one) for one in zip(y, [batch_size] * count, draws, strict=True)]
    which = torch.arange(count, device=x.device)[:, None]
    step = 0
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in zip(*samplers, strict=True):
            step += 1
            picked = torch.tensor(batch, device=x.device)
            hidden = layer.hidden(weights, x[which, picked])
            value = _columns(loss, layer.output(weights, hidden, *moments(hidden)), y[which, picked])
            losses.append(value.detach())
            (slope,) = torch.autograd.grad(value, weights)
            first.lerp_(slope, 0.1)
            second.mul_(0.999).addcmul_(slope, slope, value=0.001)
            with torch.no_grad():
                root = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
                weights -= lr / (1 - 0.9**step) * first / root
        if epoch % 10 == 0 or epoch == epochs:
            yield Point(curve, step, torch.stack(losses).mean().item() / (count * len(rates)))
    final = weights.detach()
    hidden = layer.hidden(final, x)
    mean, variance = moments(hidden)

    def logits(fold: int, rows: Tensor) -> Tensor:
        one = slice(fold, fold + 1)
        inputs = layer.hidden(final[one], rows[None].float())
        return layer.output(final[one], inputs, mean[one], variance[one])[0].double()

    return Trained(logits, layer.output(final, hidden, mean, variance).double())
