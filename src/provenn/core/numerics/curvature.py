"""Curvature of a network's loss without forming matrices: products with Hessian, Gauss–Newton and Fisher matrices.

All act on one vector that lays the trainable parameters end to end, in the order of ``model.parameters()``. ``loss``
is ``loss(outputs, targets) → one value a sample``; curvature is that of the mean over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from provenn.core.experiment.checks import check_choice, check_integer

SampleLoss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]
Matrix = Literal["hessian", "gauss-newton", "empirical-fisher"]


class CurvatureOperator:
    """v ↦ M v for a curvature matrix M of the mean loss over some batches.

    ``hessian``: ∇²L. ``gauss-newton``: mean of Jᵀ H_ℓ J, with J the outputs' Jacobian and H_ℓ the loss' Hessian by the
    outputs; for a loss that is a log-likelihood of an exponential family (cross-entropy on logits, squared error) it
    is the Fisher matrix. ``empirical-fisher``: mean of g gᵀ over the samples' gradients g.

    The model runs in the mode that it is in, and its buffers stay as they are.

    Args:
        model: The network; its parameters are read at every product, so the operator follows training.
        loss: ``loss(outputs, targets)`` → (batch,).
        batches: Inputs and targets; each product runs through all of them.
        matrix: Which matrix.

    Raises:
        ValueError: ``matrix`` is unknown, there is no batch or no sample, or no trainable parameter.

    Cost: a product takes about 4 forward passes over the batches (``hessian``, ``gauss-newton``) or 3
    (``empirical-fisher``), and the memory of one batch's backward pass beside a few vectors.

    Source: Pearlmutter, Neural Computation 6 (1994); Schraudolph, Neural Computation 14 (2002).
    """

    def __init__(
        self, model: nn.Module, loss: SampleLoss, batches: Sequence[Batch], matrix: Matrix = "hessian"
    ) -> None:
        check_choice("matrix", matrix, ("hessian", "gauss-newton", "empirical-fisher"))
        self.samples = sum(len(x) for x, _ in batches)
        if self.samples == 0:
            raise ValueError("batches must hold at least one sample, got none")
        self._model, self._loss, self._batches = model, loss, list(batches)
        self._product = {
            "hessian": self._hessian,
            "gauss-newton": self._gauss_newton,
            "empirical-fisher": self._fisher,
        }[matrix]
        self.dim = sum(one.numel() for one in trainable(model).values())
        if self.dim == 0:
            raise ValueError("model must have trainable parameters, got none")

    def __call__(self, v: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        """Return M v.

        Raises:
            ValueError: ``v`` has another length.
        """
        parameters = trainable(self._model)
        direction = _like(parameters, v)
        total = torch.zeros_like(v)
        for x, y in self._batches:
            product = self._product(parameters, direction, x, y)
            total.add_(_flat(product, parameters), alpha=len(x) / self.samples)
        return total

    def _outputs(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return _call(self._model, parameters, x)

    def _hessian(self, parameters: Any, direction: Any, x: Tensor, y: Tensor) -> Any:
        gradient = grad(lambda p: self._loss(self._outputs(x, p), y).mean())
        return jvp(gradient, (parameters,), (direction,))[1]

    def _gauss_newton(self, parameters: Any, direction: Any, x: Tensor, y: Tensor) -> Any:
        def mean(outputs: Tensor) -> Tensor:
            return self._loss(outputs, y).mean()

        pushed = jvp(partial(self._outputs, x), (parameters,), (direction,))
        curved = jvp(grad(mean), (pushed[0],), (pushed[1],))[1]
        return vjp(partial(self._outputs, x), parameters)[1](curved)[0]

    def _fisher(self, parameters: Any, direction: Any, x: Tensor, y: Tensor) -> Any:
        def losses(p: Any) -> Tensor:
            return self._loss(self._outputs(x, p), y)

        slopes = jvp(losses, (parameters,), (direction,))[1]
        return vjp(losses, parameters)[1](slopes / len(x))[0]


def per_sample_gradients(
    model: nn.Module, loss: SampleLoss, x: Tensor, y: Tensor, chunk_size: int | None = None
) -> Float[Tensor, "samples parameters"]:
    """Return the gradient of every sample's loss, one a row.

    Args:
        model: The network; what mixes samples of a batch (batch normalisation in training mode) sees batches of one.
        loss: ``loss(outputs, targets)`` → (batch,).
        x: Inputs, a sample each.
        y: Targets.
        chunk_size: Samples whose activations are held at once; ``None``: all.

    Raises:
        ValueError: ``chunk_size`` < 1.

    Cost: one vectorised forward and backward pass; samples · parameters numbers for the result.
    """
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, at_least=1)
    parameters = trainable(model)

    def one(p: Mapping[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return loss(_call(model, p, sample.unsqueeze(0)), target.unsqueeze(0)).sum()

    if len(x) == 0:
        return next(iter(parameters.values())).new_zeros(0, sum(p.numel() for p in parameters.values()))
    gradients = vmap(grad(one), in_dims=(None, 0, 0), randomness="different", chunk_size=chunk_size)(parameters, x, y)
    return torch.cat([gradients[name].flatten(1) for name in parameters], dim=1)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name, detached."""
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}


def _call(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run the model with other parameters; its buffers are read from copies, which running statistics may change."""
    buffers = {name: one.clone() for name, one in model.named_buffers()}
    outputs: Tensor = functional_call(model, {**parameters, **buffers}, (x,))
    return outputs


def _like(parameters: Mapping[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    sizes = [one.numel() for one in parameters.values()]
    if v.shape != (sum(sizes),):
        raise ValueError(f"v must have shape ({sum(sizes)},), got {tuple(v.shape)}")
    pieces = zip(parameters.items(), v.split(sizes), strict=True)
    return {name: piece.view_as(one) for (name, one), piece in pieces}


def _flat(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in parameters])
