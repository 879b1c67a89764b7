"""TrAct's weight gradient, gᵀx (xᵀx / b + λ I)⁻¹, and the two layers' backward passes that return it."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, unfold

from provenn.core.experiment.checks import check_number

_PATCH_ENTRIES = 1 << 24
"""Entries of unfolded images that exist at once."""


def tract_weight_grad(
    x: Float[Tensor, "rows inputs"], grad_out: Float[Tensor, "rows outputs"], lambda_: float = 0.1
) -> Float[Tensor, "outputs inputs"]:
    """Return the weight gradient whose step best realises a gradient step on the outputs, gᵀx (xᵀx / b + λ I)⁻¹.

    Args:
        x: Inputs of a linear layer.
        grad_out: g, the loss' gradient by the layer's outputs.
        lambda_: λ > 0, how dear a large step of the weights is; → ∞ gives the ordinary gradient over λ.

    Shape:
        (rows, inputs) and (rows, outputs) → (outputs, inputs).

    Returns:
        The gradient, to step against.

    Raises:
        ValueError: ``lambda_`` ≤ 0, or ``x`` and ``grad_out`` have different numbers of rows.
        TypeError: ``lambda_`` is no number.

    Cost: rows · inputs · (inputs + outputs) for the products and inputs³ / 3 for the solution; where there are fewer
    rows than inputs, rows² · inputs and rows³ / 3.

    Source: the paper's equation for ΔW*, in both its forms.
    """
    check_number("lambda_", lambda_, above=0)
    if len(x) != len(grad_out):
        raise ValueError(f"x and grad_out must have the same rows, got {len(x)} and {len(grad_out)}")
    return _solve(grad_out.T @ x, x, lambda_)


def _solve(plain: Tensor, x: Tensor, lambda_: float) -> Tensor:
    """Return G (xᵀx / b + λ I)⁻¹ for the ordinary gradient G = gᵀx, by the smaller of the two Gram matrices."""
    rows, inputs = x.shape
    if rows == 0:
        return torch.zeros_like(plain)
    if rows < inputs:  # the same by Woodbury's identity
        inner = _ridge(x @ x.T / rows, lambda_)
        return (plain - torch.cholesky_solve(x @ plain.T, inner).T @ x / rows) / lambda_
    return torch.cholesky_solve(plain.T, _ridge(x.T @ x / rows, lambda_)).T


def _ridge(gram: Tensor, lambda_: float) -> Tensor:
    """Return the Cholesky factor of a Gram matrix (or several) plus λ on its diagonal."""
    gram.diagonal(dim1=-2, dim2=-1).add_(lambda_)
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in at least float32: half precision cannot hold a Gram matrix."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@no_type_check  # a signature check inside would break the graph that torch.compile traces
class LinearFunction(torch.autograd.Function):
    """A linear layer's outputs, with TrAct's weight gradient."""

    @staticmethod
    def forward(x, weight, bias, lambda_):
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.lambda_ = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        into_x = into_weight = into_bias = None
        rows = grad_out.reshape(-1, grad_out.shape[-1])
        if ctx.needs_input_grad[0]:
            into_x = (grad_out @ weight.to(grad_out.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            flat, wide = _wide(x.reshape(-1, x.shape[-1]), rows)
            into_weight = _solve(wide.T @ flat, flat, ctx.lambda_).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            into_bias = rows.sum(0).to(ctx.bias_dtype)
        return into_x, into_weight, into_bias, None


@no_type_check
class Conv2dFunction(torch.autograd.Function):
    """A convolution's outputs, with TrAct's weight gradient over patches."""

    @staticmethod
    def forward(x, weight, bias, stride, padding, dilation, groups, lambda_):
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.geometry, ctx.lambda_ = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        low = grad_out.dtype
        wide, wide_grad, wide_weight = _wide(x, grad_out, weight)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        at_once = wide.dtype == low and needs_weight  # else the weight's gradient needs a wider type than the others
        into_x, gradient, into_bias = _plain(grad_out, x.to(low), weight.to(low), ctx, [needs_x, at_once, needs_bias])
        into_weight = None
        if needs_weight:
            if not at_once:
                gradient = _plain(wide_grad, wide, wide_weight, ctx, [False, True, False])[1]
            solved = _solve_patches(gradient, wide, ctx.geometry, grad_out.shape[2:].numel(), ctx.lambda_)
            into_weight = solved.to(weight.dtype)
        return (
            None if into_x is None else into_x.to(x.dtype),
            into_weight,
            None if into_bias is None else into_bias.to(ctx.bias[1]),
            *[None] * 5,
        )


def _plain(grad_out: Tensor, x: Tensor, weight: Tensor, ctx: Any, mask: list[bool]) -> Any:
    """Return the ordinary gradients of a convolution's input, weight and bias, those that the mask asks for."""
    stride, padding, dilation, groups = ctx.geometry
    sizes = None if ctx.bias is None else ctx.bias[0]
    back = torch.ops.aten.convolution_backward
    return back(grad_out, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, mask)


def _solve_patches(plain: Tensor, x: Tensor, geometry: Any, places: int, lambda_: float) -> Tensor:
    """Return the gradient of a convolution's weights, group by group; a row is a patch of an image."""
    stride, padding, dilation, groups = geometry
    kernel = tuple(plain.shape[2:])
    rows, inputs = len(x) * places, plain[0].numel()
    if rows == 0:
        return torch.zeros_like(plain)
    flat = plain.reshape(groups, -1, inputs)

    if rows < inputs:
        a = _rows(unfold(x, kernel, dilation, padding, stride).unflatten(1, (groups, inputs)))
        solved = torch.stack([_solve(one, own, lambda_) for one, own in zip(flat, a, strict=True)])
    else:
        size = max(1, _PATCH_ENTRIES // (places * inputs * groups))
        gram = flat.new_zeros(groups, inputs, inputs)
        for part in x.split(size):
            gram += _gram(unfold(part, kernel, dilation, padding, stride).unflatten(1, (groups, inputs)))
        solved = torch.cholesky_solve(flat.mT, _ridge(gram.div_(rows), lambda_)).mT
    return solved.reshape(plain.shape)


def _rows(patches: Tensor) -> Tensor:
    """Return patches (images, groups, inputs, places) with a patch a row, (groups, rows, inputs)."""
    return patches.permute(1, 0, 3, 2).flatten(1, 2)


def _gram(patches: Tensor) -> Tensor:
    """Return aᵀa for each group's rows; image by image where that is smaller than a copy with a patch a row."""
    if patches.shape[2] <= patches.shape[3]:
        return (patches @ patches.mT).sum(0)
    a = _rows(patches)
    return a.mT @ a
