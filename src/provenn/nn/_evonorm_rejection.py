"""What turns a candidate layer down before it is trained in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from provenn.core.experiment.checks import check_integer, check_number
from provenn.nn._evonorm_anchors import NormActAnchor
from provenn.nn._evonorm_graph import NormActGraph


@dataclass(frozen=True)
class NormActRejection:
    """Tests of quality and of stability that a candidate must pass on every anchor.

    Quality: after a short training the validation accuracy is at least ``min_accuracy``. Stability: the norm g(θ) of
    the loss's gradient by the convolutions' weights θ stays within ``max_gradient_norm`` while θ ascends g.

    Args:
        quality_steps: Steps of the short training; 0 leaves out the test.
        min_accuracy: The accuracy to reach.
        stability_steps: Steps of the ascent; 0 leaves out the test.
        stability_lr: Its step size.
        max_gradient_norm: The largest norm allowed.

    Raises:
        ValueError: A number out of range.
        TypeError: A number of the wrong type.

    Cost: of :meth:`reason`, on every anchor a training of ``quality_steps`` and ``stability_steps`` second-order
    backward passes; it ends at the first failure.

    Source: arXiv 2004.02967, on rejection: 20 % after 100 steps; 100 steps of ascent, 10⁸.
    """

    quality_steps: int = 100
    min_accuracy: float = 0.2
    stability_steps: int = 100
    stability_lr: float = 0.1
    max_gradient_norm: float = 1e8

    def __post_init__(self) -> None:
        check_integer("quality_steps", self.quality_steps, at_least=0)
        check_number("min_accuracy", self.min_accuracy, at_least=0, at_most=1)
        check_integer("stability_steps", self.stability_steps, at_least=0)
        check_number("stability_lr", self.stability_lr, above=0)
        check_number("max_gradient_norm", self.max_gradient_norm, above=0)

    def reason(self, graph: NormActGraph, anchors: Sequence[NormActAnchor]) -> str | None:
        """Return ``"quality"`` or ``"stability"`` if a candidate fails a test, else ``None``.

        Args:
            graph: The candidate.
            anchors: Where it is tried.
        """
        if self.quality_steps:
            for anchor in anchors:
                if anchor.accuracy(graph, self.quality_steps) < self.min_accuracy:
                    return "quality"
        for anchor in anchors:
            if not self.worst_gradient_norm(graph, anchor) <= self.max_gradient_norm:
                return "stability"
        return None

    def worst_gradient_norm(self, graph: NormActGraph, anchor: NormActAnchor) -> float:
        """Return the largest gradient norm that the ascent meets; it stops where that is over the limit.

        Args:
            graph: The candidate.
            anchor: The network, with fresh weights, and the data, of which the first batch is used.

        Returns:
            The norm; infinity where a norm or its gradient is not finite.
        """
        network = anchor.build(graph).train()
        weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
        x, y = next(anchor.batches())
        worst = 0.0
        for _ in range(self.stability_steps):
            norm = _gradient_norm(network, weights, x, y)
            if not math.isfinite(norm.item()):
                return math.inf
            worst = max(worst, norm.item())
            if worst > self.max_gradient_norm or not norm.requires_grad:
                break
            uphill = torch.autograd.grad(norm, weights, materialize_grads=True, allow_unused=True)
            if not all(bool(one.isfinite().all()) for one in uphill):
                return math.inf
            with torch.no_grad():
                torch._foreach_add_(weights, list(uphill), alpha=self.stability_lr)
        return worst


def _gradient_norm(network: nn.Module, weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    loss = functional.cross_entropy(network(x), y)
    first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True, allow_unused=True)
    return torch.linalg.vector_norm(torch.cat([one.flatten() for one in first]))
