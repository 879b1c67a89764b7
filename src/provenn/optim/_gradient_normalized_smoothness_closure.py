"""Values, gradients and curvature of a closure over parameters, as functions of one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from provenn.optim._gradient_normalized_smoothness_search import Point

_ROWS = 256
"""Rows of a Jacobian or a Hessian that one batched backward pass computes: bounds its memory."""

Closure = Callable[[], Any]


class _RetainGraph(TorchFunctionMode):
    """Inside, ``Tensor.backward`` keeps the graph, so that it can be differentiated once more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            kwargs["retain_graph"] = True
        return func(*args, **kwargs)


class Evaluated(NamedTuple):
    """What a closure gave: the point, the loss as returned, and the outputs if it returned them."""

    point: Point
    loss: Any
    outputs: Tensor | None


class ClosureFunction:
    """A closure's value as a function of its parameters laid end to end.

    The gradient is what the closure's own ``backward()`` leaves, or else is computed from the loss' graph.

    Args:
        params: The parameters, of one real type on one device.
        closure: Returns the loss, or the loss and the outputs.

    Raises:
        ValueError: The parameters are complex, or differ in type or device.
    """

    def __init__(self, params: Sequence[Tensor], closure: Closure) -> None:
        self._params, self._closure = list(params), closure
        self._sizes = [one.numel() for one in self._params]
        kinds = {(one.dtype, one.device) for one in self._params}
        if len(kinds) > 1 or not self._params[0].is_floating_point():
            named = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"params must share one floating-point type, not complex, and one device, got {named}")
        # No factorisation exists in half precision.
        self._dtype = torch.promote_types(self._params[0].dtype, torch.float32)

    def x(self) -> Tensor:
        """Return the parameters as a new vector."""
        return torch.cat([one.detach().flatten() for one in self._params]).to(self._dtype)

    def move(self, x: Tensor) -> None:
        """Set the parameters to a vector's pieces."""
        with torch.no_grad():
            for one, piece in zip(self._params, x.split(self._sizes), strict=True):
                one.copy_(piece.view(one.shape))

    def at(self, x: Tensor) -> Point:
        """Move to a vector and evaluate there; what differs by rounding to the parameters' type is no error."""
        self.move(x)
        return self.evaluate(graph=False).point

    def evaluate(self, graph: bool) -> Evaluated:
        """Call the closure where the parameters are; with ``graph`` its loss can be differentiated afterwards."""
        for one in self._params:
            one.grad = None
        with torch.enable_grad(), _RetainGraph() if graph else nullcontext():
            returned = self._closure()
        loss, outputs = returned if isinstance(returned, tuple) else (returned, None)
        gradient = self._left_behind() if any(one.grad is not None for one in self._params) else None
        if gradient is None:
            gradient = self._flat(self._grads(loss, create_graph=False, retain_graph=graph))
        return Evaluated(Point(self.x(), float(loss), gradient.detach().to(self._dtype)), loss, outputs)

    def _left_behind(self) -> Tensor:
        if any(one.grad is not None and one.grad.is_sparse for one in self._params):
            raise RuntimeError("GradientNormalizedNewton does not support sparse gradients")
        return self._flat([torch.zeros_like(one) if one.grad is None else one.grad for one in self._params])

    def hessian(self, loss: Tensor) -> Tensor:
        """Return the loss' Hessian, by batched backward passes through its gradient."""
        gradient = self._differentiable_gradient(loss)
        if gradient is None:
            return self._params[0].new_zeros(len(self.x()), len(self.x()))
        return _symmetric(self._rows(gradient)).to(self._dtype)

    def hessian_product(self, loss: Tensor) -> Callable[[Tensor], Tensor]:
        """Return v ↦ ∇²f v."""
        gradient = self._differentiable_gradient(loss)
        if gradient is None:
            return torch.zeros_like
        return lambda v: self._pulled(gradient, v).to(v)

    def gauss_newton(self, loss: Tensor, outputs: Tensor) -> Tensor:
        """Return JᵀKJ, with J the outputs' Jacobian and K the loss' Hessian by the outputs."""
        J = self._rows(outputs.flatten())
        slope = self._output_gradient(loss, outputs)
        if slope is None:
            return J.new_zeros(J.shape[1], J.shape[1]).to(self._dtype)
        KJ = [
            torch.autograd.grad(slope, outputs, some.view(-1, *outputs.shape), is_grads_batched=True, retain_graph=True)
            for some in J.mT.contiguous().split(_ROWS)
        ]
        return _symmetric(torch.cat([one.flatten(1) for (one,) in KJ]) @ J).to(self._dtype)

    def gauss_newton_product(self, loss: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """Return v ↦ JᵀKJ v."""
        slope = self._output_gradient(loss, outputs)
        if slope is None:
            return torch.zeros_like
        # Jᵀw is linear in w; what it gives back along v, differentiated by w, is Jv.
        w = torch.zeros_like(outputs, requires_grad=True)
        pulled = self._flat(self._grads(outputs, w, create_graph=True))

        def product(v: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, w, v.to(pulled), retain_graph=True)
            (curved,) = torch.autograd.grad(slope, outputs, pushed, retain_graph=True)
            return self._flat(self._grads(outputs, curved, retain_graph=True)).to(v)

        return product

    def _differentiable_gradient(self, loss: Tensor) -> Tensor | None:
        """Return the gradient with its graph; ``None`` where the loss is linear."""
        gradient = self._flat(self._grads(loss, create_graph=True))
        return gradient if gradient.requires_grad else None

    @staticmethod
    def _output_gradient(loss: Tensor, outputs: Tensor) -> Tensor | None:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        return slope if slope.requires_grad else None

    def _grads(
        self, of: Tensor, weights: Tensor | None = None, *, create_graph: bool = False, retain_graph: bool = True
    ) -> list[Tensor]:
        if not isinstance(of, Tensor) or not of.requires_grad:
            raise RuntimeError(
                "closure must return the loss with the graph that it was computed by, or call backward() on it (the "
                f"exact and the Gauss-Newton hessian need the graph), got {of!r}"
            )
        with torch.enable_grad():
            return list(
                torch.autograd.grad(
                    of,
                    self._params,
                    weights,
                    create_graph=create_graph,
                    retain_graph=retain_graph or create_graph,
                    materialize_grads=True,
                )
            )

    def _pulled(self, of: Tensor, weights: Tensor) -> Tensor:
        return self._flat(self._grads(of, weights.to(of), retain_graph=True))

    def _rows(self, of: Tensor) -> Tensor:
        """Return the Jacobian of a vector by the parameters."""
        unit = torch.eye(len(of), dtype=of.dtype, device=of.device)
        rows = []
        for some in unit.split(_ROWS):
            pieces = torch.autograd.grad(
                of, self._params, some, is_grads_batched=True, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([piece.flatten(1) for piece in pieces], dim=1))
        return torch.cat(rows)

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.flatten() for one in tensors])


def _symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part: autograd's rows differ from its columns by rounding."""
    return (matrix + matrix.mT) / 2
