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
        if func is torch.Tensor.backward:
            kwargs = {**(kwargs or {}), "retain_graph": True}
        return func(*args, **(kwargs or {}))


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
        calls_backward: Whether the closure is known to call ``backward()``; noticed otherwise, by one call more.

    Raises:
        ValueError: The parameters are complex, or differ in type or device.
    """

    def __init__(self, params: Sequence[Tensor], closure: Closure, calls_backward: bool = False) -> None:
        self._params, self._closure, self.calls_backward = list(params), closure, calls_backward
        self._sizes = [one.numel() for one in self._params]
        self._moved = False
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
        for one, piece in zip(self._params, x.split(self._sizes), strict=True):
            # By .data, graphs do not notice: those of the products below are only used with x back in place.
            one.data.copy_(piece.view(one.shape))
        self._moved = True

    def at(self, x: Tensor) -> Point:
        """Move to a vector and evaluate there; what differs by rounding to the parameters' type is no error."""
        self.move(x)
        return self.evaluate(graph=False).point

    def evaluate(self, graph: bool) -> Evaluated:
        """Call the closure where the parameters are; with ``graph`` its loss can be differentiated afterwards."""
        returned = self._called(retain=graph and self.calls_backward)
        if graph and not self.calls_backward and any(one.grad is not None for one in self._params):
            self.calls_backward = True
            returned = self._called(retain=True)
        loss, outputs = returned if isinstance(returned, tuple) else (returned, None)
        gradient = self._left_behind() if any(one.grad is not None for one in self._params) else None
        if gradient is None:
            gradient = self._flat(self._grads(loss, create_graph=False, retain_graph=graph))
        return Evaluated(Point(self.x(), float(loss), gradient.detach().to(self._dtype)), loss, outputs)

    def _called(self, retain: bool) -> Any:
        for one in self._params:
            one.grad = None
        # To watch for backward() costs time at every operation, so that only closures that call it are watched.
        with torch.enable_grad(), _RetainGraph() if retain else nullcontext():
            return self._closure()

    def _left_behind(self) -> Tensor:
        if any(one.grad is not None and one.grad.is_sparse for one in self._params):
            raise RuntimeError("GradientNormalizedNewton does not support sparse gradients")
        return self._flat([torch.zeros_like(one) if one.grad is None else one.grad for one in self._params])

    @torch.enable_grad()
    def hessian(self, loss: Tensor) -> Tensor:
        """Return the loss' Hessian, by batched backward passes through its gradient."""
        gradient = self._differentiable_gradient(loss)
        if gradient is None:
            return self._params[0].new_zeros(len(self.x()), len(self.x()))
        return _symmetric(self._rows(gradient)).to(self._dtype)

    @torch.enable_grad()
    def hessian_product(self, loss: Tensor) -> Callable[[Tensor], Tensor]:
        """Return v ↦ ∇²f v."""
        gradient = self._differentiable_gradient(loss)
        if gradient is None:
            return torch.zeros_like
        return self.at_home(lambda v: self._flat(self._grads(gradient, v.to(gradient))).to(v))

    @torch.enable_grad()
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

    @torch.enable_grad()
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

        return self.at_home(product)

    def _differentiable_gradient(self, loss: Tensor) -> Tensor | None:
        """Return the gradient with its graph; ``None`` where the loss is linear."""
        gradient = self._flat(self._grads(loss, create_graph=True))
        return gradient if gradient.requires_grad else None

    @staticmethod
    def _output_gradient(loss: Tensor, outputs: Tensor) -> Tensor | None:
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        return slope if slope.requires_grad else None

    def _grads(
        self, of: Any, weights: Tensor | None = None, *, create_graph: bool = False, retain_graph: bool = True
    ) -> list[Tensor]:
        if not isinstance(of, Tensor) or not of.requires_grad:
            raise RuntimeError(
                "closure must return the loss with the graph that it was computed by, or call backward() on it (the "
                f"exact and the Gauss-Newton hessian need the graph), got {of!r}"
            )
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

    def at_home(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a product that first moves back to where the parameters are now, if trials have moved them."""
        x, self._moved = self.x(), False

        def there(v: Tensor) -> Tensor:
            if self._moved:
                self.move(x)
                self._moved = False
            return product(v)

        return there

    def _rows(self, of: Tensor) -> Tensor:
        """Return the Jacobian of a vector by the parameters."""
        unit = torch.eye(len(of), dtype=of.dtype, device=of.device)
        rows = []
        for some in unit.split(_ROWS):
            pieces = torch.autograd.grad(
                of, self._params, some, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            # materialize_grads would make zeros without the dimension of the batch.
            sized = [
                some.new_zeros(len(some), size) if piece is None else piece.reshape(len(some), size)
                for piece, size in zip(pieces, self._sizes, strict=True)
            ]
            rows.append(torch.cat(sized, dim=1))
        return torch.cat(rows)

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.flatten() for one in tensors])


def _symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part: autograd's rows differ from its columns by rounding."""
    return (matrix + matrix.mT) / 2
