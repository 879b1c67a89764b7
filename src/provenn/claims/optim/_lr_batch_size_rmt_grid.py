"""One perceptron trained at many learning rates at once, side by side in batched products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded

SIZES = (64, 32, 10)


def final_losses(arm: str, rates: Tensor, x: Tensor, y: Tensor, batch: int, steps: int, seed: int) -> Tensor:
    """Return the loss on all data after so many steps of SGD or Adam at each rate; NaN or infinity where it diverged.

    All rates start from the same weights and see the same batches.
    """
    with seeded(seed, "weights"):
        model = mlp(SIZES, nn.Tanh)
    shape = (len(rates), 1, 1)
    # A bias is a matrix of one row; a weight is transposed, as batched products want it.
    parameters = [
        one.detach().reshape(len(one), -1).T.to(x.device).repeat(shape).requires_grad_() for one in model.parameters()
    ]
    lr = rates.to(x).view(shape)
    means = [torch.zeros_like(one) for one in parameters]
    squares = [torch.zeros_like(one) for one in parameters]
    draws = generator(seed, "batches", batch)
    for step in range(1, steps + 1):
        picked = torch.randperm(len(x), generator=draws)[:batch].to(x.device)
        gradients = torch.autograd.grad(_losses(parameters, x[picked], y[picked]).sum(), parameters)
        with torch.no_grad():
            if arm == "Adam":
                gradients = _adam(gradients, means, squares, step)
            for one, gradient in zip(parameters, gradients, strict=True):
                one.sub_(lr * gradient)
    with torch.no_grad():
        return _losses(parameters, x, y)


def _adam(gradients: tuple[Tensor, ...], means: list[Tensor], squares: list[Tensor], step: int) -> tuple[Tensor, ...]:
    """Return Adam's directions at its default betas and epsilon, and update its moments."""
    torch._foreach_lerp_(means, list(gradients), 0.1)
    torch._foreach_mul_(squares, 0.999)
    torch._foreach_addcmul_(squares, list(gradients), list(gradients), 0.001)
    root = math.sqrt(1 - 0.999**step)
    return tuple(
        mean / (1 - 0.9**step) / (square.sqrt() / root + 1e-8) for mean, square in zip(means, squares, strict=True)
    )


def _losses(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of every network."""
    first, first_bias, second, second_bias = parameters
    hidden = torch.tanh(torch.baddbmm(first_bias, x.expand(len(first), *x.shape), first))
    outputs = torch.baddbmm(second_bias, hidden, second)
    labels = y.expand(len(first), len(y))
    return nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").mean(dim=1)
