"""The forward gradient: an exact directional derivative times its direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.parameters import flat_view
from provenn.core.numerics.gradient_free import Closure, Evaluations, GradientFreeOptimizer, NonFiniteLossError
from provenn.core.numerics.zeroth_order import SeededDirection
from provenn.optim._zo_bench_estimate import Estimate
from provenn.optim._zo_bench_rules import apply


class ForwardGradient(GradientFreeOptimizer):
    """SGD on the forward gradient ⟨∇f, v⟩ v, v ~ N(0, I): unbiased, without back-propagation and without μ.

    The derivative comes from forward-mode differentiation of whatever the closure computes::

        optimizer = ForwardGradient(model, lambda model, x, y: loss_fn(model(x), y), lr=1e-3)
        optimizer.step(batch=(x, y))

    Args:
        model: The model whose trainable parameters are stepped, which is in evaluation mode within a step; or, as with
            torch's optimizers, parameters or groups of them, which have their own ``lr`` and ``weight_decay``.
        loss_fn: ``loss_fn(model, *batch)`` → the loss, where :meth:`step` is given a batch.
        lr: Step size.
        num_queries: q, directions averaged in a step.
        weight_decay: λ; λθ is added to the estimate.
        generator: Draws the seed of all directions, once. ``None``: torch's global generator.

    Shape:
        Parameters of any shape; real, contiguous.

    Raises:
        ValueError: ``lr`` ≤ 0, ``num_queries`` < 1 or ``weight_decay`` < 0.
        NotImplementedError: An operation of the loss has no forward-mode rule; torch's message names it.
        RuntimeError: The loss does not depend on the parameters, or was NaN or infinite in ten steps in a row, each of
            which is skipped and counted.

    Cost: a query is a forward pass on values and tangents, about two passes' work; memory of one copy of the
    parameters (v) and twice a forward pass's activations. No graph is kept.

    Source: arXiv 2402.11592, section 3; Baydin et al., arXiv 2202.08587.
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Callable[..., Tensor] | None = None,
        lr: float = 1e-3,
        num_queries: int = 1,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("num_queries", num_queries, at_least=1)
        self.loss_fn, self.num_queries = loss_fn, num_queries
        whole = isinstance(model, nn.Module)
        params = [one for one in model.parameters() if one.requires_grad] if whole else model
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, generator, model if whole else None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: Parameters and their options.

        Raises:
            ValueError: An option is out of bounds, or a parameter complex or not contiguous.
        """
        group = {**self.defaults, **param_group}
        check_number("lr", group["lr"], above=0)
        check_number("weight_decay", group["weight_decay"], at_least=0)
        super().add_param_group(param_group)

    def step(self, closure: Closure | None = None, *, batch: Sequence[Any] = ()) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the loss. ``None``: the loss is ``loss_fn(model, *batch)``.
            batch: What ``loss_fn`` takes beside the model.

        Returns:
            The loss.

        Raises:
            TypeError: There is neither a closure nor a ``loss_fn`` with its model.
            RuntimeError: The loss was NaN or infinite in ten steps in a row.
        """
        if closure is None:
            if self.loss_fn is None or self.model is None:
                raise TypeError("step needs a closure, or an optimizer made with model and loss_fn")
            loss_fn, model = self.loss_fn, self.model
            return super().step(lambda: loss_fn(model, *batch))
        return super().step(closure)

    def _take_step(self, loss: Evaluations) -> None:
        tensors = self.tensors
        options = {tensor: group for group in self.param_groups for tensor in group["params"]}
        directions = [SeededDirection(tensors, self.draw_seed(query)) for query in range(self.num_queries)]
        slopes = [closure_derivative(loss, one) / self.num_queries for one in directions]
        apply(Estimate(tensors, directions, slopes), "sgd", options, {})


@torch.no_grad()
def closure_derivative(loss: Evaluations, direction: SeededDirection) -> float:
    """Return the derivative of a closure's loss along a direction over tensors that the closure reads.

    The tensors carry their tangents in place while the closure runs, so it need not be a function of parameters.

    Args:
        loss: Evaluates the loss.
        direction: Over what the loss depends on.

    Raises:
        NonFiniteLossError: Loss or derivative is NaN or infinite.
        RuntimeError: The loss carries no derivative.
    """
    with forward_ad.dual_level():
        for index, tensor in enumerate(direction.tensors):
            tangent = torch.empty_like(tensor, requires_grad=False)
            entries = flat_view(tangent)
            for _, piece, noise in direction.pieces(index):
                entries[piece] = noise
            # The copy takes the tangent along, as a tensor of its own; this one goes before the next is made.
            tensor.copy_(forward_ad.make_dual(tensor.detach(), tangent))
        value = loss.evaluate()
        slope = forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) else None
        if slope is None:
            raise RuntimeError("the closure's loss carries no derivative: it does not depend on the parameters")
        found, at = float(slope), float(value)
    if not (math.isfinite(at) and math.isfinite(found)):
        raise NonFiniteLossError(f"the loss was {at}, its derivative {found}")
    return found
