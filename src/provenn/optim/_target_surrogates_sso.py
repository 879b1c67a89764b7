"""The optimizer: one gradient of the loss in target space, many parameter steps on its surrogate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.optim._target_surrogates_armijo import ArmijoGD
from provenn.optim._target_surrogates_metrics import METRICS, adapt, row_hessians
from provenn.optim._target_surrogates_steps import SCHEDULES, Schedule, scheduled, search_target_step
from provenn.optim._target_surrogates_surrogate import (
    REDUCTIONS,
    BregmanDivergence,
    Reduction,
    TargetSurrogate,
    samples,
)

Forward = Callable[[], Tensor]
TargetLoss = Callable[[Tensor], Tensor]
Inner = Callable[[list[Tensor]], torch.optim.Optimizer]

_GRADIENT_TOL = 1e-6
_COUNTS = ("oracle", "value", "forward", "backward")


class SSOCalls(NamedTuple):
    """What an :class:`SSO` optimizer has evaluated so far.

    Args:
        oracle: Gradients of the loss by the targets.
        value: Values of the loss without a gradient, for the line search.
        forward: Forward passes of the model.
        backward: Backward passes of the model.

    Source: arXiv 2302.02607 counts its algorithms' progress in calls of the oracle.
    """

    oracle: int
    value: int
    forward: int
    backward: int


class SSO(torch.optim.Optimizer):
    """Surrogate optimization in target space: one gradient by the model's outputs, m steps of the parameters on it.

    For losses whose gradient by the model's outputs is dear (a simulator, an expert), and the model cheap beside it.
    ``step(closure)`` takes a closure of its own kind, which returns two functions: one that computes the targets of a
    batch with their graph, and the loss of given targets::

        optimizer = SSO(model.parameters(), eta=smooth_target_step("cross-entropy"), inner_steps=20)
        for x, y in batches:
            loss = optimizer.step(lambda: (lambda: model(x), lambda z: cross_entropy(z, y)))

    It minimises :class:`TargetSurrogate` at the present targets by ``inner_steps`` steps of a new inner optimizer, or
    until the gradient's norm is 1e-6. With one step of SGD this is SGD. Dropout has to be off, and batch normalization
    in evaluation mode if the targets of a batch are to depend on the parameters alone.

    Args:
        params: Parameters, or groups of them; the options are common to all groups.
        eta: η, the step size in target space, for one sample's loss; :func:`smooth_target_step` knows it without
            tuning. With ``target_line_search`` it is where the search begins.
        inner_steps: m.
        inner: ``"armijo"``, :class:`ArmijoGD`, or what makes an optimizer of parameters whose ``step`` takes a closure.
        schedule: ``"constant"``; ``"sqrt"``, η/√t; or ``"exponential"``, η T^(−t/T).
        total_steps: T.
        metric: What target space is measured by: ``"euclidean"``; from gradients of one sample's loss, summed over rows
            and steps, ``"adagrad-norm"`` (one number), ``"diag-adagrad"`` and ``"adagrad"`` (K × K); ``"adam"``, with
            moments of each column, which also averages gradients; ``"newton"``, each row's Hessian of the loss; or a
            :class:`BregmanDivergence`. All are divided by η.
        target_line_search: Whether η is searched at every step (SSO-SLS), by values of the loss.
        c: Armijo's constant, in the inner optimizer and the search of η.
        reduction: How the loss reduces its rows, the targets' first dimension.
        eps: Added to an adaptive metric.

    Shape:
        Parameters of any shape; targets (n, …) with K numbers a row.

    Raises:
        ValueError: ``eta`` ≤ 0, ``inner_steps`` < 1, ``c`` outside (0, 1), ``eps`` < 0; a choice is unknown;
            ``"exponential"`` without ``total_steps``; ``target_line_search`` with another metric than
            ``"euclidean"``; ``params`` are complex.
        TypeError: In :meth:`step`: the closure returns no pair of functions.
        RuntimeError: In :meth:`step`: the targets' shape changes, or at the first step their values at the same
            parameters; the loss or its gradient is not finite. The parameters are then as they were.

    Cost: a step takes one gradient of the loss, and at most m forward and backward passes of the model, with
    ``"armijo"`` one more forward pass a trial; the first step one more. ``"newton"`` takes one batched backward pass
    through the loss' gradient, with K vectors. Memory of one copy of the parameters, beside the inner optimizer's.

    Source: arXiv 2302.02607, the algorithm SSO; metrics and line search as in the authors' code, whose η is 1/(2η)
    here, and whose data-indexed moments are here those of columns.
    """

    def __init__(
        self,
        params: Iterable[Any],
        eta: float = 1.0,
        inner_steps: int = 10,
        inner: Literal["armijo"] | Inner = "armijo",
        schedule: Schedule = "constant",
        total_steps: int | None = None,
        metric: Literal["euclidean", "adagrad-norm", "diag-adagrad", "adagrad", "adam", "newton"]
        | BregmanDivergence = "euclidean",
        target_line_search: bool = False,
        c: float = 0.5,
        reduction: Reduction = "mean",
        eps: float = 1e-8,
    ) -> None:
        check_number("eta", eta, above=0)
        check_integer("inner_steps", inner_steps, at_least=1)
        check_number("c", c, above=0, below=1)
        check_number("eps", eps, at_least=0)
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("reduction", reduction, REDUCTIONS)
        if not callable(inner):
            check_choice("inner", inner, ("armijo",))
        if not isinstance(metric, BregmanDivergence):
            check_choice("metric", metric, METRICS)
        if total_steps is not None:
            check_integer("total_steps", total_steps, at_least=1)
        elif schedule == "exponential":
            raise ValueError("total_steps must be given with schedule 'exponential', got None")
        if target_line_search and metric != "euclidean":
            raise ValueError(f"target_line_search needs metric 'euclidean', got {metric!r}")
        self._inner, self._metric = inner, metric
        defaults = {
            "eta": eta,
            "inner_steps": inner_steps,
            "schedule": schedule,
            "total_steps": total_steps,
            "target_line_search": target_line_search,
            "c": c,
            "reduction": reduction,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner": self._inner, "_metric": self._metric}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: Parameters; options, where there are any, as in the first group.

        Raises:
            ValueError: An option differs from the first group's, or a parameter is complex.
        """
        common = {name: self.param_groups[0][name] for name in self.defaults} if self.param_groups else {}
        for name, value in common.items():
            if param_group.get(name, value) != value:
                raise ValueError(f"{name} must be {value!r} in all groups, got {param_group[name]!r}")
        check_number("eta", param_group.get("eta", self.defaults["eta"]), above=0)
        super().add_param_group({**common, **param_group})
        if any(one.is_complex() for one in self.param_groups[-1]["params"]):
            raise ValueError("params must be real, got a complex parameter")

    @property
    def calls(self) -> SSOCalls:
        """What was evaluated so far."""
        state = self._progress()
        return SSOCalls(*(state[name] for name in _COUNTS))

    @property
    def eta(self) -> float:
        """η of the last step, or what the first begins with."""
        return float(self._progress()["eta"])

    @property
    def _params(self) -> list[Tensor]:
        return [one for group in self.param_groups for one in group["params"] if one.requires_grad]

    def _progress(self) -> dict[str, Any]:
        state: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        if not state:
            eta = self.param_groups[0]["eta"]
            state.update(steps=0, eta=eta, found=eta, **dict.fromkeys(_COUNTS, 0))
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], tuple[Forward, TargetLoss]]) -> Tensor:  # type: ignore[override]
        """Take one outer step: one gradient of the loss, m inner steps.

        Args:
            closure: Returns the pair of functions: ``forward()``, the targets of one batch with their graph, and
                ``target_loss(z)``, the loss of targets z of that batch.

        Returns:
            The loss before the step.

        Raises:
            TypeError: The closure is missing, or returns something else.
            RuntimeError: As in the class.
        """
        forward, target_loss = _pair(closure)
        state, start = self._progress(), [one.detach().clone() for one in self._params]
        try:
            with torch.enable_grad():
                z = self._targets(forward)
            if state["steps"] == 0:
                self._check_repeats(forward, z)
            surrogate, loss = self._surrogate(z.detach(), target_loss)
            self._minimize(surrogate, forward, z)
        except BaseException:
            torch._foreach_copy_(self._params, start)
            raise
        finally:
            self.zero_grad()
        return loss

    def _targets(self, forward: Forward) -> Tensor:
        self._progress()["forward"] += 1
        z = forward()
        if not isinstance(z, Tensor) or z.dim() == 0:
            raise TypeError(f"closure's forward must return a tensor of targets, one row a sample, got {z!r}")
        if torch.is_grad_enabled() and not z.requires_grad:
            raise RuntimeError("closure's forward must compute the targets with their graph, got a tensor without one")
        return z

    def _check_repeats(self, forward: Forward, z: Tensor) -> None:
        """At the first step, compute the targets once more: noise in them would be taken for the parameters' work."""
        again = self._targets(forward)
        slack = 100 * torch.finfo(z.dtype).eps
        if again.shape != z.shape or not torch.allclose(again, z, rtol=slack, atol=slack, equal_nan=True):
            raise RuntimeError(
                "targets must be the same in shape and value while the parameters are, and two calls of the closure's "
                "forward differ: switch dropout off, and draw the batch outside of it"
            )

    def _surrogate(self, z: Tensor, target_loss: TargetLoss) -> tuple[TargetSurrogate, Tensor]:
        """Ask the oracle; return the surrogate there, and the loss."""
        group, state = self.param_groups[0], self._progress()
        loss, gradient, hessian = self._oracle(z, target_loss)
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise RuntimeError(f"the loss' gradient by the targets must be finite, got one that is not at loss {loss}")
        state["steps"] += 1
        scale = samples(z, group["reduction"])
        eta = group["eta"]
        if group["target_line_search"]:
            state["found"], trials = search_target_step(
                target_loss, z, gradient, float(loss), state["found"], group["c"], scale
            )
            state["value"] += trials
            eta = state["found"]
        state["eta"] = scheduled(group["schedule"], eta, state["steps"], group["total_steps"])
        metric: Any = self._metric
        if not isinstance(metric, BregmanDivergence):
            metric, gradient = adapt(metric, state, gradient, scale, group["eps"], hessian)
        surrogate = TargetSurrogate(z, gradient, state["eta"], loss_t=loss, metric=metric, reduction=group["reduction"])
        return surrogate, loss

    @torch.enable_grad()
    def _oracle(self, z: Tensor, target_loss: TargetLoss) -> tuple[Tensor, Tensor, Tensor | None]:
        newton = self._metric == "newton"
        leaf = z.detach().requires_grad_()
        loss = target_loss(leaf)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            raise TypeError(f"closure's target_loss must return a scalar that can be differentiated, got {loss!r}")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=newton)
        self._progress()["oracle"] += 1
        hessian = row_hessians(gradient, leaf) if newton else None
        return loss.detach(), gradient.detach(), hessian

    def _minimize(self, surrogate: TargetSurrogate, forward: Forward, z: Tensor) -> None:
        """Take the inner steps; the first gradient uses the forward pass that gave the targets."""
        params, group, state = self._params, self.param_groups[0], self._progress()
        inner = ArmijoGD(params, c=group["c"]) if self._inner == "armijo" else self._make_inner(params)
        ready = [z]
        norm = 0.0

        def evaluate() -> Tensor:
            nonlocal norm
            value = surrogate(ready.pop() if ready else self._targets(forward))
            if torch.is_grad_enabled():
                state["backward"] += 1
                gradients = torch.autograd.grad(value, params, allow_unused=True)
                for one, gradient in zip(params, gradients, strict=True):
                    one.grad = gradient
                present = [gradient for gradient in gradients if gradient is not None]
                norm = torch.stack(torch._foreach_norm(present)).norm().item()
            return value.detach()

        for _ in range(group["inner_steps"]):
            inner.step(evaluate)
            if norm <= _GRADIENT_TOL or (isinstance(inner, ArmijoGD) and not inner.accepted):
                break

    def _make_inner(self, params: list[Tensor]) -> torch.optim.Optimizer:
        assert callable(self._inner)
        return self._inner(params)


def _pair(closure: Any) -> tuple[Forward, TargetLoss]:
    if not callable(closure):
        raise TypeError(f"closure must be a function that returns the pair (forward, target_loss), got {closure!r}")
    returned = closure()
    if not (isinstance(returned, tuple) and len(returned) == 2 and all(callable(one) for one in returned)):
        raise TypeError(
            "closure must return the pair (forward, target_loss): a function that computes the targets with their "
            f"graph, and a function from targets to the loss; got {returned!r}"
        )
    return returned
