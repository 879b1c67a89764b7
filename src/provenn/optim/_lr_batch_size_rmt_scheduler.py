"""A learning rate and momentum that follow the curvature: Polyak's optimum for a spectrum measured as training goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator
from provenn.core.numerics.curvature import Batch
from provenn.core.numerics.spectra import stochastic_lanczos
from provenn.optim._lr_batch_size_rmt_products import Curvature, CurvatureMatrix, LossFn, measuring, noise_variance
from provenn.optim._lr_batch_size_rmt_rules import (
    polyak_parameters,
    spiked_wigner_edge,
    spiked_wishart_edge,
    wigner_spike,
    wishart_spike,
)

Product = Callable[[Tensor], Tensor]
Seen = Callable[[list[Batch]], Product]
"""Makes products with the curvature over batches."""

_BULK = 1e-3
"""Ritz values below this share of the largest are the bulk near zero."""

_PARTS = 8
"""Small batches of the subsample from which the noise is estimated."""


class SpectralLRScheduler(LRScheduler):
    """Set rate and momentum to Polyak's optimum for the spectrum of the curvature, measured every so often.

    Stochastic Lanczos quadrature on a random subsample gives L, the largest Ritz value, and ℓ, the smallest above
    L/1000. Then μ = ((√L − √ℓ)/(√L + √ℓ))² and lr = 2(1 + μ)/(L + ℓ), which is (2/(√L + √ℓ))² unless μ is clipped. A
    measurement without positive curvature changes nothing. For AdamW the spectrum is that of D^(−1/2) M D^(−1/2), D its
    denominators √v̂ + ε (before the first step |gradient| + ε), and μ is β₁; where the optimizer averages gradients, lr
    is divided by 1 − β₁ (by 1 − dampening). Weight decay is not counted.

    The optimum is a quadratic's with exact gradients: at the edge of stability, with no room for the noise of batches
    or for curvature that rises before the next measurement. On small batches bound it by ``lr_max``.

    It measures at construction and then at every ``interval``-th ``step()``; all parameter groups get the same values.

    Args:
        optimizer: SGD without Nesterov's momentum, Adam or AdamW, over all trainable parameters of the model.
        model: The network; measured in eval mode and left as found.
        loss_fn: ``loss_fn(outputs, targets)`` → the mean over samples, or one value a sample.
        dataset: Pairs of input and target.
        interval: Calls of ``step`` between measurements: 1 if it is called once an epoch.
        batch: B_c, samples of a measurement.
        steps: Lanczos steps.
        matrix: ``"hessian"`` or ``"ggn"``.
        train_batch: Samples of a training batch, whose curvature is larger by its noise: L is carried from B_c to it by
            :func:`spiked_wigner_edge`, with σ² estimated within the subsample (the Gauss–Newton matrix: by
            :func:`spiked_wishart_edge`, with s² from the quadrature). ``None``: L as measured.
        lr_min: Least rate.
        lr_max: Largest rate; ``None``: no bound.
        momentum_max: Largest momentum.
        seed: Seed of subsamples and Lanczos vectors.

    Attributes:
        largest, smallest: L and ℓ of the latest measurement.

    Raises:
        ValueError: ``batch`` or ``train_batch`` is out of range, ``steps`` < 2, another number is out of range, the
            optimizer uses Nesterov's momentum or leaves out parameters, the loss is not finite or not a mean.
        TypeError: The optimizer is of another class.

    Cost: ``steps`` products with the curvature of ``batch`` samples a measurement (about 4 passes each), and ``steps``
    vectors of memory; with ``train_batch`` 8 more products, and 8 of smaller batches.

    Source: arXiv 2006.09092, on-the-fly learner; Polyak, USSR Comput. Math. Math. Phys. 4 (1964).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        loss_fn: LossFn,
        dataset: Dataset,
        interval: int = 1,
        batch: int = 256,
        steps: int = 30,
        *,
        matrix: CurvatureMatrix = "hessian",
        train_batch: int | None = None,
        lr_min: float = 0.0,
        lr_max: float | None = None,
        momentum_max: float = 0.99,
        seed: int = 0,
    ) -> None:
        _check_optimizer(optimizer, model)
        self._curvature = Curvature(model, loss_fn, dataset, matrix)
        check_integer("interval", interval, at_least=1)
        check_integer("batch", batch, at_least=2, at_most=self._curvature.samples)
        check_integer("steps", steps, at_least=2)
        if train_batch is not None:
            check_integer("train_batch", train_batch, at_least=1, at_most=self._curvature.samples)
        check_number("lr_min", lr_min, at_least=0)
        if lr_max is not None:
            check_number("lr_max", lr_max, above=0, at_least=lr_min)
        check_number("momentum_max", momentum_max, at_least=0, below=1)
        self.interval, self.batch, self.steps, self.train_batch, self.seed = interval, batch, steps, train_batch, seed
        self.lr_min, self.lr_max, self.momentum_max = lr_min, lr_max, momentum_max
        self.largest, self.smallest = float("nan"), float("nan")
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group; where a measurement is due, take it and set the momentum."""
        groups = self.optimizer.param_groups
        if self.last_epoch % self.interval == 0:
            self.largest, self.smallest = self._measure()
            if self.largest > 0:
                momentum = min(polyak_parameters(self.largest, self.smallest)[1], self.momentum_max)
                return [self._set(group, momentum) for group in groups]
        return [group["lr"] for group in groups]

    def _set(self, group: dict[str, Any], momentum: float) -> float:
        """Set a group's momentum and return its rate."""
        # Heavy ball's optimum at any fixed momentum, and at Polyak's momentum his rate.
        lr = 2 * (1 + momentum) / (self.largest + self.smallest)
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
            lr /= 1 - momentum
        else:
            group["momentum"] = momentum
            lr /= 1 - group["dampening"]
        lr = max(lr, self.lr_min)
        return lr if self.lr_max is None else min(lr, self.lr_max)

    def _measure(self) -> tuple[float, float]:
        """Return L and ℓ."""
        draws = generator(self.seed, "measurement", self.last_epoch)
        picked = torch.randperm(self._curvature.samples, generator=draws, device=draws.device)[: self.batch]
        batches = self._curvature.batches(picked)
        with measuring(self._curvature.model):
            self._curvature.check_loss(batches)
            seen = self._as_seen(batches)
            whole = seen(batches)
            like = self._curvature.vector()
            spectrum = stochastic_lanczos(whole, like, self.steps, generator=draws)
            nodes = spectrum.nodes
            largest = nodes[-1].item()
            if not largest > 0:
                return largest, largest
            smallest = nodes[nodes > _BULK * largest][0].item()
            if self.train_batch not in (None, self.batch):
                if self._curvature.matrix == "hessian":
                    noise = self._noise(picked, whole, seen, draws)
                else:
                    noise = max(0.0, spectrum.moment(1).item() * len(like) - largest) / max(1, len(like) - 1)
                largest = self._at_train_batch(largest, noise, len(like))
        return largest, min(smallest, largest)

    def _noise(self, picked: Tensor, whole: Product, seen: Seen, draws: torch.Generator) -> float:
        """Estimate σ² from small batches of the subsample."""
        assert self.train_batch is not None
        size = min(self.train_batch, self.batch // 2)
        orders = [torch.randperm(self.batch, generator=draws, device=draws.device)[:size] for _ in range(_PARTS)]
        parts = (seen(self._curvature.batches(picked[order])) for order in orders)
        return noise_variance(whole, parts, self._curvature.vector(), size, self.batch, draws)

    def _at_train_batch(self, largest: float, noise: float, dim: int) -> float:
        """Carry the largest eigenvalue from the subsample's size to the training batch's."""
        assert self.train_batch is not None
        n = self._curvature.samples
        if self._curvature.matrix == "hessian":
            lam = wigner_spike(largest, noise, dim, self.batch, n)
            return spiked_wigner_edge(lam, noise, dim, self.train_batch, n)
        lam = wishart_spike(largest, noise, dim, self.batch, n)
        return spiked_wishart_edge(lam, noise, dim, self.train_batch, n)

    def _as_seen(self, batches: list[Batch]) -> Seen:
        """Return what makes products with the curvature that the optimizer's steps see."""
        if isinstance(self.optimizer, SGD):
            return self._curvature.operator
        scale = self._denominators(batches).rsqrt()

        def preconditioned(some: list[Batch]) -> Product:
            inner = self._curvature.operator(some)
            return lambda v: scale * inner(scale * v)

        return preconditioned

    def _denominators(self, batches: list[Batch]) -> Tensor:
        """Return Adam's √v̂ + ε; before its first step, that of the subsample's gradient."""
        model, pieces = self._curvature.model, []
        wanted = [one for one in model.parameters() if one.requires_grad]
        epsilon = {one: group["eps"] for group in self.optimizer.param_groups for one in group["params"]}
        beta2 = {one: group["betas"][1] for group in self.optimizer.param_groups for one in group["params"]}
        fresh = [one for one in wanted if "exp_avg_sq" not in self.optimizer.state.get(one, {})]
        gradients = dict(zip(fresh, self._gradients(fresh, batches), strict=True))
        for one in wanted:
            if one in gradients:
                root = gradients[one].abs()
            else:
                state = self.optimizer.state[one]
                root = (state["exp_avg_sq"] / (1 - beta2[one] ** float(state["step"]))).sqrt()
            pieces.append((root + epsilon[one]).flatten())
        return torch.cat(pieces)

    def _gradients(self, parameters: list[nn.Parameter], batches: list[Batch]) -> list[Tensor]:
        if not parameters:
            return []
        total = [torch.zeros_like(one) for one in parameters]
        for x, y in batches:
            with torch.enable_grad():
                loss = self._curvature.loss_fn(self._curvature.model(x), y).mean() * (len(x) / self.batch)
                found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, list(found))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the optimizer's own state: where it is, and the latest measurement."""
        kept = ("last_epoch", "_step_count", "_last_lr", "base_lrs", "largest", "smallest")
        return {name: getattr(self, name) for name in kept}


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    if not isinstance(optimizer, (SGD, Adam, AdamW)):
        raise TypeError(f"optimizer must be SGD, Adam or AdamW, got {type(optimizer).__name__}")
    if any(group.get("nesterov") for group in optimizer.param_groups):
        raise ValueError("optimizer must not use nesterov: Polyak's optimum is heavy ball's")
    held = {one for group in optimizer.param_groups for one in group["params"]}
    left_out = [name for name, one in model.named_parameters() if one.requires_grad and one not in held]
    if left_out:
        raise ValueError(f"optimizer must hold every trainable parameter of the model, leaves out {left_out[0]}")
