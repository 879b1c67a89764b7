"""Gradient descent whose step sizes are found by backtracking."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number


class ArmijoGD(torch.optim.Optimizer):
    """Gradient descent with Armijo's backtracking line search.

    A step tries α, and α ← shrink · α until

        f(θ − α∇f) ≤ f(θ) − c α ‖∇f‖²;

    the next one begins with growth^(1/n_batches) times the α that held. Where none holds, the parameters stay. On the
    losses of batches this is stochastic line search (SLS).

    Args:
        params: Parameters, or groups of them.
        lr: The first α. In groups of different ``lr`` one search finds the factor that multiplies all.
        c: The share of the decrease that the slope promises which a step must keep.
        shrink: What α is multiplied by after a failure.
        growth: What it is multiplied by over an epoch.
        n_batches: Steps an epoch.
        max_trials: Trials a step.

    Shape:
        Parameters of any shape.

    Raises:
        ValueError: ``lr`` ≤ 0, ``c`` or ``shrink`` outside (0, 1), ``growth`` < 1, ``n_batches`` or ``max_trials`` < 1.
        RuntimeError: In :meth:`step`: a gradient is sparse.

    Cost: a step takes one gradient and one value a trial; two copies of the parameters while it lasts.

    Source: arXiv 2302.02607, the inner optimizer of its experiments (constants of the authors' code); Vaswani et al.,
    arXiv 1905.09997.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 10.0,
        c: float = 0.5,
        shrink: float = 0.9,
        growth: float = 1.8,
        n_batches: int = 1,
        max_trials: int = 100,
    ) -> None:
        check_number("c", c, above=0, below=1)
        check_number("shrink", shrink, above=0, below=1)
        check_number("growth", growth, at_least=1)
        check_integer("n_batches", n_batches, at_least=1)
        check_integer("max_trials", max_trials, at_least=1)
        rest = {"c": c, "shrink": shrink, "growth": growth, "n_batches": n_batches, "max_trials": max_trials}
        self.accepted = True
        super().__init__(params, {"lr": lr, **rest})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "accepted": self.accepted}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: Parameters and their options, of which only ``lr`` is the group's own.

        Raises:
            ValueError: Its ``lr`` ≤ 0.
        """
        check_number("lr", param_group.get("lr", self.defaults["lr"]), above=0)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Returns the loss, the same function at every call; where gradients are enabled, which is at the
                first call alone, it also computes the parameters' gradients.

        Returns:
            The loss before the step. Whether a trial held is left in ``accepted``.

        Raises:
            TypeError: There is no closure.
            RuntimeError: A gradient is sparse.
        """
        if not callable(closure):
            raise TypeError(f"closure must evaluate the loss, got {closure!r}")
        with torch.enable_grad():
            loss = closure()
        pairs = [(p, p.grad, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if any(gradient.is_sparse for _, gradient, _ in pairs):
            raise RuntimeError("ArmijoGD does not support sparse gradients")
        if pairs:
            self._search(closure, float(loss), pairs)
        return loss

    def _search(self, closure: Callable[[], Any], loss: float, pairs: list[tuple[Tensor, Tensor, float]]) -> None:
        group, state = self.param_groups[0], self.state[self.param_groups[0]["params"][0]]
        factor = state["factor"] * group["growth"] ** (1 / group["n_batches"]) if state else 1.0
        params = [one for one, _, _ in pairs]
        start = [one.detach().clone() for one in params]
        directions = [gradient * lr for _, gradient, lr in pairs]
        slope = sum(lr * gradient.norm().double().square() for _, gradient, lr in pairs)
        promised = group["c"] * float(slope)
        for _ in range(group["max_trials"]):
            torch._foreach_copy_(params, torch._foreach_add(start, directions, alpha=-factor))
            self.accepted = float(closure()) <= loss - factor * promised
            if self.accepted:
                break
            factor *= group["shrink"]
        else:
            torch._foreach_copy_(params, start)
        state["factor"] = factor
