"""Attention in blocks as one differentiable operation: no L · S tensor is made, or kept for the backward pass.

The two passes make one ``autograd.Function`` that ``torch.func`` can transform; ``torch.compile`` and ``torch.export``
see them as operators that they do not look into, since a loop over blocks would unroll. Another kernel, such as one
for a GPU, joins by :func:`register_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from provenn.core.sequences._blocks import Problem, backward_pass, forward_pass
from provenn.core.sequences.attention import Keys, Outputs, Queries, ScoreTerms, Values

BLOCK = 2**20
"""Scores alive at once: 4 MB in float32, what a processor's cache holds, whatever batch, heads and lengths."""


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_index: Tensor | None,
    mask: Tensor | None,
    mask_index: Tensor | None,
    slopes: Tensor | None,
    activation: str,
    scale: float,
    constant: float,
    causal: bool,
    size: int,
) -> Tensor:
    problem = Problem(q, k, bias, bias_index, mask, mask_index, slopes, activation, scale, constant, causal)
    return forward_pass(problem, v, size)


def _blocked_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_index: Tensor | None,
    mask: Tensor | None,
    mask_index: Tensor | None,
    slopes: Tensor | None,
    activation: str,
    scale: float,
    constant: float,
    causal: bool,
    size: int,
    needs_bias: bool,
    needs_mask: bool,
) -> list[Tensor]:
    problem = Problem(q, k, bias, bias_index, mask, mask_index, slopes, activation, scale, constant, causal)
    return backward_pass(problem, v, gradient, size, [needs_bias, needs_mask])


Forward = Callable[..., Tensor]
Backward = Callable[..., list[Tensor]]


class Kernel(NamedTuple):
    """The two passes of a kernel, as functions and as operators that compilers do not look into."""

    forward: Forward
    backward: Backward
    forward_operator: Forward
    backward_operator: Backward


_KERNELS: dict[str, Kernel] = {}

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? bias_index, Tensor? mask, Tensor? mask_index, Tensor? slopes, "
    "str activation, float scale, float constant, bool causal, int size"
)
_FORWARD_SCHEMA = f"({_OPERANDS}) -> Tensor"
_BACKWARD_SCHEMA = f"(Tensor gradient, {_OPERANDS}, bool needs_bias, bool needs_mask) -> Tensor[]"


def register_kernel(name: str, forward: Forward, backward: Backward) -> None:
    """Make a kernel known to :func:`streaming_attention`.

    Args:
        name: Its name.
        forward: Takes what the blocked forward pass takes.
        backward: Takes what the blocked backward pass takes; returns contiguous gradients by q, k, v, bias and mask,
            the last two empty where not wanted.
    """
    operator = torch.library.custom_op
    forward_operator = operator(f"provenn::{name}_attention", forward, mutates_args=(), schema=_FORWARD_SCHEMA)
    backward_operator = operator(
        f"provenn::{name}_attention_backward", backward, mutates_args=(), schema=_BACKWARD_SCHEMA
    )
    forward_operator.register_fake(_forward_shape)
    backward_operator.register_fake(_backward_shapes)
    _KERNELS[name] = Kernel(forward, backward, forward_operator, backward_operator)


def _forward_shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _backward_shapes(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_index: Tensor | None,
    mask: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    wanted = ((bias, rest[-2]), (mask, rest[-1]))
    extra = [torch.empty_like(one) if need and one is not None else q.new_empty(0) for one, need in wanted]
    return [*(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (q, k, v)), *extra]


register_kernel("blocked", _blocked, _blocked_backward)


def streaming_attention(
    q: Queries,
    k: Keys,
    v: Values,
    activation: str,
    terms: ScoreTerms,
    kernel: str = "blocked",
    block: int = BLOCK,
) -> Outputs:
    """Attend without holding the weights.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        activation: φ, a key of :data:`~provenn.core.sequences.attention.ACTIVATIONS`.
        terms: What the scores are made of beside the products.
        kernel: ``"blocked"``, or the name of a registered one.
        block: Scores alive at once.

    Shape:
        q (..., L, d), k (..., S, d), v (..., S, e) → (..., L, e), with the same leading dimensions.

    Returns:
        The output, differentiable once by q, k, v, bias and additive mask (``torch.func.vmap`` and ``vjp`` included;
        forward mode and second derivatives want the reference).

    Cost: time of the reference, less what causality hides (backward: 7 products of blocks against 6, since weights
    are computed again); memory O((L + S)·(d + e) + block) beside the mask.
    """
    lead, (queries, keys) = q.shape[:-2], (q.shape[-2], k.shape[-2])
    count = math.prod(lead)
    constant = float(terms.bias) if not isinstance(terms.bias, Tensor) else 0.0
    bias, bias_index = _broadcast_rows(terms.bias if isinstance(terms.bias, Tensor) else None, lead, q.device)
    mask, mask_index = _broadcast_rows(terms.mask, lead, q.device)
    slopes = terms.alibi_slopes
    if slopes is not None:
        slopes = slopes.detach().to(torch.promote_types(q.dtype, torch.float32)).expand(lead).reshape(count)
    output: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q.reshape(count, queries, q.shape[-1]),
        k.reshape(count, keys, k.shape[-1]),
        v.reshape(count, keys, v.shape[-1]),
        bias,
        bias_index,
        mask,
        mask_index,
        slopes,
        activation,
        terms.scale,
        constant,
        terms.causal,
        block,
        kernel,
    )
    return output.reshape(*lead, queries, v.shape[-1])


def _broadcast_rows(
    operand: Tensor | None, lead: Sequence[int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Flatten an operand's own leading dimensions, and say which of its rows each leading index uses."""
    if operand is None:
        return None, None
    operand = operand.reshape((1,) * max(0, 2 - operand.ndim) + operand.shape)
    own = (1,) * (len(lead) + 2 - operand.ndim) + operand.shape[:-2]
    index = torch.arange(math.prod(own), device=device).reshape(own).expand(*lead).reshape(math.prod(lead))
    return operand.reshape(math.prod(own), *operand.shape[-2:]), index


_TENSORS = 8  # the leading tensor arguments of both functions' apply, from q to slopes


# ``no_type_check`` keeps run-time checkers of signatures out of what compilers trace.


@no_type_check
class _Attention(torch.autograd.Function):
    """Arguments: q, k, v, bias, bias_index, mask, mask_index, slopes, then plain values; the last names the kernel."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        kernel = _KERNELS[arguments[-1]]
        run = kernel.forward_operator if torch.compiler.is_compiling() else kernel.forward
        return run(*arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.options = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        bias, mask = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        arguments = (gradients[0], *ctx.saved_tensors, *ctx.options[:-1], bias, mask, ctx.options[-1])
        # The compiler cannot trace a function inside a function's backward, and needs none: the operator is opaque.
        run = _AttentionBackward.forward if torch.compiler.is_compiling() else _AttentionBackward.apply
        dq, dk, dv, dbias, dmask = run(*arguments)
        by_terms = (dbias if bias else None, None, dmask if mask else None, None, None)
        return (dq, dk, dv, *by_terms, *(None for _ in ctx.options))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        flat = _flatten_map(size, in_dims[:_TENSORS], arguments[:_TENSORS])
        output: Tensor = _Attention.apply(*flat, *arguments[_TENSORS:])  # type: ignore[no-untyped-call]
        return output.unflatten(0, (size, -1)), 0


@no_type_check
class _AttentionBackward(torch.autograd.Function):
    """Arguments: the gradient by the output, then as above with needs_bias and needs_mask before the kernel's name."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        kernel = _KERNELS[arguments[-1]]
        run = kernel.backward_operator if torch.compiler.is_compiling() else kernel.backward
        return tuple(run(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f'the {ctx.kernel} back end has no second derivative; backend="reference" has')

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size = info.batch_size
        gradient = _leading(arguments[0], in_dims[0], size).flatten(0, 1)
        tensors = arguments[1 : _TENSORS + 1]
        flat = _flatten_map(size, in_dims[1 : _TENSORS + 1], tensors, own_rows=True)
        outputs = _AttentionBackward.apply(  # type: ignore[no-untyped-call]
            gradient, *flat, *arguments[_TENSORS + 1 :]
        )
        return tuple(one.unflatten(0, (size, -1)) if one.ndim == 3 else one for one in outputs), tuple(
            0 if one.ndim == 3 else None for one in outputs
        )


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _flatten_map(
    size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None], own_rows: bool = False
) -> list[Tensor | None]:
    """Fold a mapped dimension into the leading one of every operand.

    ``own_rows`` gives each of the mapped calls its own rows of bias and mask even where they are shared, so that their
    gradients come out apart.
    """
    flat = [None if one is None else _leading(one, dim, size) for one, dim in zip(tensors, in_dims, strict=True)]
    for place in (3, 5):  # bias and mask, each followed by its index
        operand, index = flat[place], flat[place + 1]
        if operand is None or index is None:
            continue
        if in_dims[place] is None and not own_rows:
            flat[place] = operand[:1]
        else:
            flat[place + 1] = index + operand.shape[1] * torch.arange(size, device=index.device)[:, None]
    return [None if one is None else one.flatten(0, 1) for one in flat]
