"""Sigmoid attention as a function: checks, the bias, and the choice of a back end."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_number
from provenn.core.numerics.precision import autocast_dtype, full_precision
from provenn.core.sequences.attention import ScoreTerms, reference_attention, wide
from provenn.core.sequences.masks import Mask, visible_keys
from provenn.core.sequences.streaming import BLOCK, streaming_attention
from provenn.nn._sigmoid_attention_backends import load_triton, why_not_triton

Backend = Literal["auto", "reference", "blocked", "triton"]
BACKENDS = ("auto", "reference", "blocked", "triton")


def sigmoid_attention(
    q: Float[Tensor, "*batch queries head"],
    k: Float[Tensor, "*batch keys head"],
    v: Float[Tensor, "*batch keys value"],
    mask: Mask | None = None,
    bias: Float[Tensor, "..."] | float | str | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    *,
    is_causal: bool = False,
    alibi_slopes: Float[Tensor, " heads"] | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "*batch queries value"]:
    r"""Attend with elementwise sigmoid weights: σ(scale · QKᵀ − m\|i − j\| + mask + bias) V.

    No row is normalised: every key adds its own term, so adding a key changes an output by that term alone, and
    blocks of keys (a cache, say) add up exactly where the bias is a number.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Broadcastable to (..., L, S). Boolean: True where a query may look (as in
            ``scaled_dot_product_attention``). Floating-point: added to the scores; −∞ hides.
        bias: b. ``None`` or ``"-log_n"``: −log S, of the number of keys given (at another length it is another bias;
            pass a number to keep one). ``"visible"``: −log of the number of keys that each query may see. A number.
            A tensor broadcastable to (..., L, 1); it may be learned.
        scale: Factor of the products; default 1/√d.
        backend: ``"reference"`` holds all L · S weights, and every transform of torch works on it. ``"blocked"``
            holds one block of them, forward and backward, and differentiates once (``torch.func.vjp`` and ``vmap``
            included, forward mode not). ``"triton"`` is a fused CUDA kernel. ``"auto"`` takes triton where it can,
            else the reference where all weights fit in one block, else blocked.
        is_causal: Whether no query looks at later keys. The last query stands where the last key does.
        alibi_slopes: m of each head, for ALiBi; a constant.
        dropout_p: Share of weights dropped, the rest scaled up; always applied if positive. Reference only.

    Shape:
        q (..., L, d), k (..., S, d), v (..., S, e) → (..., L, e).

    Returns:
        The output in the type of ``v``; scores and weights are computed in float32 at least, under autocast too
        (where q, k, v are first cast as for ``scaled_dot_product_attention``). A query that sees no key gets 0.

    Raises:
        TypeError: ``mask`` is neither boolean nor floating-point, or q, k, v differ in type.
        ValueError: Shapes do not fit, an unknown ``bias`` or ``backend``, ``dropout_p`` outside [0, 1) or with
            another back end than the reference, or ``alibi_slopes`` that require a gradient.
        RuntimeError: ``backend="triton"`` without CUDA or without triton.

    Cost: time O(L·S·(d + e)); memory O(L·S) for the reference, O((L + S)·(d + e) + block²) for the others.

    Source: equations 1 and 2, and Algorithm 1 (FlashSigmoid), of the paper.
    """
    return attend(q, k, v, mask, bias, scale, backend, is_causal, alibi_slopes, dropout_p)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    bias: Tensor | float | str | None,
    scale: float | None,
    backend: str,
    is_causal: bool,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`sigmoid_attention`, and the weights where they are needed, which takes the reference."""
    check_choice("backend", backend, BACKENDS)
    check_number("dropout_p", dropout_p, at_least=0, below=1)
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with full_precision(q.device):
            return attend(q, k, v, mask, bias, scale, backend, is_causal, alibi_slopes, dropout_p, need_weights)
    _check_operands(q, k, v, mask, alibi_slopes)
    terms = ScoreTerms(
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        bias=_bias_term(bias, q, k, mask, is_causal),
        mask=mask,
        causal=is_causal,
        alibi_slopes=alibi_slopes,
    )
    chosen = "reference" if need_weights else _chosen_backend(backend, q, k, v, terms, dropout_p)
    if chosen == "reference":
        return reference_attention(q, k, v, "sigmoid", terms, dropout_p)
    if dropout_p > 0:
        raise ValueError(f'dropout_p must be 0 with backend={backend!r}, got {dropout_p}; "reference" drops weights')
    return streaming_attention(q, k, v, "sigmoid", terms, kernel=chosen), None


def _check_operands(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None) -> None:
    if min(q.ndim, k.ndim, v.ndim) < 2 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ValueError(
            f"k must share the leading dimensions of q and v, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"k must have the features of q, at least one, got {k.shape[-1]} and {q.shape[-1]}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"v must have as many tokens as k, got {v.shape[-2]} and {k.shape[-2]}")
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must share a floating-point type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask must be boolean or floating-point, got {mask.dtype}")
        _check_broadcast("mask", mask, (*q.shape[:-1], k.shape[-2]))
    if slopes is not None:
        if slopes.requires_grad:
            raise ValueError("alibi_slopes must be constants, got a tensor that requires a gradient")
        _check_broadcast("alibi_slopes", slopes, q.shape[:-2])


def _check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.ndim > len(shape) or any(own not in (1, size) for own, size in pairs):
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got {tuple(tensor.shape)}")


def _bias_term(
    bias: Tensor | float | str | None, q: Tensor, k: Tensor, mask: Mask | None, causal: bool
) -> Tensor | float:
    queries, keys = q.shape[-2], k.shape[-2]
    if isinstance(bias, Tensor):
        _check_broadcast("bias", bias, (*q.shape[:-1], 1))
        return bias
    if bias is None or bias == "-log_n":
        return _minus_log(keys, q)
    if bias == "visible":
        if mask is None and not causal:
            return _minus_log(keys, q)
        # A query that sees nothing gets weights σ(−∞) = 0 whatever its bias, which must stay finite.
        seen = visible_keys(queries, keys, mask, causal, q.device).clamp(min=1)
        return -seen.to(wide(q.dtype)).log()
    if isinstance(bias, str):
        raise ValueError(f'bias must be "-log_n", "visible", a number or a tensor, got {bias!r}')
    if math.isnan(bias):
        raise ValueError(f"bias must not be NaN, got {bias}")
    return float(bias)


def _minus_log(keys: int, q: Tensor) -> Tensor | float:
    if torch.compiler.is_compiling():  # a number would tie what is traced to this number of keys
        return -q.new_full((), max(keys, 1), dtype=torch.float64).log().to(wide(q.dtype))
    return -math.log(max(keys, 1))


def _chosen_backend(backend: str, q: Tensor, k: Tensor, v: Tensor, terms: ScoreTerms, dropout_p: float) -> str:
    if backend in ("reference", "blocked"):
        return backend
    if backend == "auto" and dropout_p > 0:
        return "reference"
    if backend == "triton" or q.is_cuda:
        refusal = why_not_triton(q, v, terms)
        if refusal is None:
            return load_triton()
        if backend == "triton":
            raise RuntimeError(f'backend="triton" cannot run here: {refusal}')
    return "reference" if math.prod(q.shape[:-1]) * k.shape[-2] <= BLOCK else "blocked"
