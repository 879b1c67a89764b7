"""Exact tensor attention as a function: checks, the mask, and the two passes as one differentiable operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.precision import autocast_dtype, full_precision
from provenn.core.sequences.attention import wide
from provenn.core.sequences.masks import Mask
from provenn.core.sequences.streaming import BLOCK
from provenn.nn._kronecker_attention_blocks import Problem, backward_pass, forward_pass


def tensor_attention(
    q: Float[Tensor, "*batch queries head"],
    ks: Sequence[Float[Tensor, "*batch _ head"]],
    vs: Sequence[Float[Tensor, "*batch _ value"]],
    mask: Mask | None = None,
    scale: float | None = None,
    block: int = BLOCK,
    *,
    causal: bool = False,
) -> Float[Tensor, "*batch queries value"]:
    r"""Attend to tuples of tokens, one of each key matrix: D⁻¹ exp(scale · Q (K₁ ⊘ ⋯ ⊘ K_{k−1})ᵀ) (V₁ ⊘ ⋯ ⊘ V_{k−1}).

    For order k = 3 query i scores the pair (j, l) by scale · Σ_c q_ic k₁_jc k₂_lc; one softmax runs over all pairs, and
    a pair's value is v₁_j ∘ v₂_l. Order 2 is ordinary attention with scale 1/d.

    Args:
        q: Queries.
        ks: k − 1 key matrices; their numbers of tokens S₁, …, S_{k−1} may differ.
        vs: As many value matrices, each with the tokens of its keys.
        mask: Broadcastable to (..., L, S₁, …, S_{k−1}); for order 3, (S₁, S₂) hides pairs from all queries. Boolean:
            True where a query may look. Floating-point: added to the scores, a constant; −∞ hides.
        scale: Factor of the scores; default 1/d.
        block: Scores alive at once.
        causal: Whether query i sees only tuples of positions up to S − L + i (the last query stands where the last
            key does); all key matrices then have one length S ≥ L.

    Shape:
        q (..., L, d), k_m (..., S_m, d), v_m (..., S_m, e) → (..., L, e).

    Returns:
        The output in the type of ``q``, computed in float32 at least. A query that sees nothing gets 0. It is
        differentiable once by q, ks and vs; ``torch.func.vmap`` and forward mode are not supported.

    Raises:
        TypeError: ``ks`` or ``vs`` is one tensor, types differ, or ``mask`` is neither boolean nor floating-point.
        ValueError: ``ks`` and ``vs`` differ in length, are empty, or shapes do not fit; ``mask`` requires a gradient;
            ``causal`` with key matrices of different lengths, or shorter than the queries; ``block`` < 1.

    Cost: time O(L · ΠS_m · (d + e)), backward 2.5 times that since scores are computed again; memory O(block) beside
    operands and output, in training too: the backward pass keeps one number a query.

    Source: the paper's introduction, where it defines exact tensor attention and its order-k form.
    """
    ks, vs = as_list("ks", ks), as_list("vs", vs)
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, ks, vs = q.to(dtype), [k.to(dtype) for k in ks], [v.to(dtype) for v in vs]
    check_integer("block", block, at_least=1)
    check_factors(q, ks, vs, causal)
    scale = 1 / q.shape[-1] if scale is None else scale
    check_number("scale", scale)
    lead, queries = q.shape[:-2], q.shape[-2]
    count = math.prod(lead)
    mask, mask_index = _flat_mask(mask, lead, queries, [k.shape[-2] for k in ks], q.device)
    operands = [one.to(wide(q.dtype)).reshape(count, *one.shape[-2:]) for one in (q, *ks, *vs)]
    with full_precision(q.device):
        # Compilers get an operator that they do not look into: a loop over blocks would unroll.
        if torch.compiler.is_compiling():
            packed: Tensor = _forward_operator(mask, mask_index, float(scale), causal, block, operands)
        else:
            packed = _TensorAttention.apply(mask, mask_index, float(scale), causal, block, *operands)
    return packed[..., :-1].to(q.dtype).reshape(*lead, queries, vs[0].shape[-1])


def as_list(name: str, given: Any) -> list[Tensor]:
    """Return a sequence of tensors as a list; one tensor, which would be cut along its batch, is refused."""
    if isinstance(given, Tensor):
        raise TypeError(f"{name} must be a sequence of tensors, got one tensor of shape {tuple(given.shape)}")
    return list(given)


def check_factors(q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], causal: bool) -> None:
    """Check that queries, keys and values fit together.

    Raises:
        TypeError: Their types differ.
        ValueError: Their numbers or shapes do not fit.
    """
    if len(ks) != len(vs) or not ks:
        raise ValueError(f"ks and vs must be equally many, at least one, got {len(ks)} and {len(vs)}")
    if q.ndim < 2 or q.shape[-1] == 0:
        raise ValueError(f"q must be (..., queries, head) with at least one feature, got {tuple(q.shape)}")
    for place, (k, v) in enumerate(zip(ks, vs, strict=True)):
        if k.ndim != q.ndim or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
            raise ValueError(f"ks[{place}] must fit q of shape {tuple(q.shape)}, got {tuple(k.shape)}")
        if v.shape[:-1] != k.shape[:-1] or v.shape[-1] != vs[0].shape[-1]:
            raise ValueError(
                f"vs[{place}] must have the tokens of ks[{place}], {tuple(k.shape)}, and the features of vs[0], "
                f"{vs[0].shape[-1]}, got {tuple(v.shape)}"
            )
    types = {one.dtype for one in (q, *ks, *vs)}
    if len(types) > 1 or not q.is_floating_point():
        raise TypeError(f"q, ks and vs must share a floating-point type, got {', '.join(sorted(map(str, types)))}")
    lengths = [k.shape[-2] for k in ks]
    if causal and (len(set(lengths)) > 1 or lengths[0] < q.shape[-2]):
        raise ValueError(
            f"causal needs key matrices of one length, at least that of the queries, got {lengths} and {q.shape[-2]}"
        )


def _flat_mask(
    mask: Tensor | None, lead: Sequence[int], queries: int, lengths: Sequence[int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Flatten a mask to (rows, L or 1, M or 1, S or 1), and say which of its rows each leading index uses."""
    if mask is None:
        return None, None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean or floating-point, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("mask must be a constant, got one that requires a gradient")
    full = (*lead, queries, *lengths)
    own = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    if len(own) != len(full) or any(size not in (1, whole) for size, whole in zip(own, full, strict=True)):
        raise ValueError(f"mask must be broadcastable to {full}, got {tuple(mask.shape)}")
    mask, heads = mask.reshape(own), len(lead)
    left = own[heads + 1 : -1]
    if any(size != 1 for size in left):  # a product of lengths cannot be broadcast in part
        mask = mask.expand(*own[: heads + 1], *lengths[:-1], own[-1])
    rows = math.prod(own[:heads])
    index = torch.arange(rows, device=device).reshape(own[:heads]).expand(tuple(lead)).reshape(-1)
    columns = math.prod(mask.shape[heads + 1 : -1])
    return mask.reshape(rows, own[heads], columns, own[-1]), index


def _problem(
    mask: Tensor | None, index: Tensor | None, scale: float, causal: bool, block: int, operands: Sequence[Tensor]
) -> Problem:
    half = len(operands) // 2 + 1
    return Problem(operands[0], operands[1:half], operands[half:], mask, index, scale, causal, block)


def _forward(
    mask: Tensor | None, index: Tensor | None, scale: float, causal: bool, block: int, operands: list[Tensor]
) -> Tensor:
    return forward_pass(_problem(mask, index, scale, causal, block, operands))


def _backward(
    gradient: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    scale: float,
    causal: bool,
    block: int,
    operands: list[Tensor],
) -> list[Tensor]:
    return backward_pass(_problem(mask, index, scale, causal, block, operands), packed, gradient)


_ARGUMENTS = "Tensor? mask, Tensor? index, float scale, bool causal, int block, Tensor[] operands"
_forward_operator = torch.library.custom_op(
    "provenn::tensor_attention", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_backward_operator = torch.library.custom_op(
    "provenn::tensor_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor packed, {_ARGUMENTS}) -> Tensor[]",
)


@_forward_operator.register_fake
def _forward_shape(
    mask: Tensor | None, index: Tensor | None, scale: float, causal: bool, block: int, operands: list[Tensor]
) -> Tensor:
    q, last = operands[0], operands[-1]
    return q.new_empty(q.shape[0], q.shape[1], last.shape[2] + 1)


@_backward_operator.register_fake
def _backward_shapes(gradient: Tensor, packed: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in rest[-1]]


def _save_for_compiled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    mask, index, *options, operands = inputs
    ctx.save_for_backward(output, mask, index, *operands)
    ctx.options = options


def _compiled_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    packed, mask, index, *operands = ctx.saved_tensors
    return (*[None] * 5, _backward_operator(gradient, packed, mask, index, *ctx.options, operands))


_forward_operator.register_autograd(_compiled_backward, setup_context=_save_for_compiled)


class _TensorAttention(torch.autograd.Function):
    """Arguments: mask, its index, scale, causal, block; then q, the keys and the values."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _forward(*arguments[:5], list(arguments[5:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[:2], *inputs[5:])
        ctx.options = inputs[2:5]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        packed, mask, index, *operands = ctx.saved_tensors
        found = _TensorAttentionBackward.apply(gradients[0], packed, mask, index, *ctx.options, *operands)
        return (*[None] * 5, *found)


class _TensorAttentionBackward(torch.autograd.Function):
    """The backward pass, which refuses a second derivative where it would otherwise be lost without a word."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_backward(*arguments[:7], list(arguments[7:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("tensor_attention has no second derivative")
