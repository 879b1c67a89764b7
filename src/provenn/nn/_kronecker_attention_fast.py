"""Tensor attention in almost linear time: monomials of queries and keys, whose sums over tokens factorise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.core.numerics.precision import autocast_dtype, full_precision
from provenn.core.sequences.attention import wide
from provenn.core.sequences.streaming import BLOCK
from provenn.nn._kronecker_attention_exact import as_list, check_factors
from provenn.nn._kronecker_attention_polynomial import (
    MAX_RANK,
    Plan,
    PolynomialReport,
    monomials,
    polynomial_plan,
    rounding_error,
)


def tensor_attention_poly(
    q: Float[Tensor, "*batch queries head"],
    ks: Sequence[Float[Tensor, "*batch _ head"]],
    vs: Sequence[Float[Tensor, "*batch _ value"]],
    degree: int | None = None,
    tol: float = 1e-3,
    bound: float | None = None,
    basis: str = "taylor",
    causal: bool = False,
    *,
    max_rank: int = MAX_RANK,
) -> tuple[Float[Tensor, "*batch queries value"], PolynomialReport]:
    r"""Approximate :func:`tensor_attention` (scale 1/d) with a polynomial of degree g in place of exp.

    With all r = C(d + g, g) monomials U₁ = φ(Q) w, U_m = φ(K_{m−1}), the sum over tuples never runs over tuples:
    (U₂ ⊘ U₃)ᵀ(V₁ ⊘ V₂) = (U₂ᵀV₁) ∘ (U₃ᵀV₂).

    Args:
        q: Queries.
        ks: k − 1 key matrices.
        vs: As many value matrices, each with the tokens of its keys.
        degree: g; default the smallest that keeps ``tol``.
        tol: Largest relative error of an entry exp(score), for any entries within the bound.
        bound: B, which no entry of q and ks exceeds in magnitude; default the largest there is.
        basis: ``"taylor"``, or ``"chebyshev"`` (interpolation on [−Bᵏ, Bᵏ]), which needs a lower degree.
        causal: As in :func:`tensor_attention`: the factors become running totals.
        max_rank: Largest r.

    Shape:
        q (..., L, d), k_m (..., S_m, d), v_m (..., S_m, e) → (..., L, e).

    Returns:
        The output in the type of ``q``, and what the approximation is made of. Sums of alternating terms lose precision
        like exp(2Bᵏ): they are computed in float32 where that is below the polynomial's own error, else in float64.

    Raises:
        TypeError: ``ks`` or ``vs`` is one tensor, or types differ.
        ValueError: An entry exceeds ``bound``; the rank needed is above ``max_rank`` (the message says it); a
            denominator is not positive, as odd Taylor polynomials have it far below zero; or ``ks`` and ``vs`` do not
            fit; or ``tol`` is below what rounding allows. What is checked by value is not checked under
            ``torch.compile``, where the choice of the degree also breaks the graph; the layer chooses when it is built.

    Cost: time O((L + Σ S_m) r e), almost linear in the tokens as long as B = o((log n)^(1/k)), since the degree grows
    with Bᵏ and log 1/ε; memory O((L + Σ S_m) r); the causal form's running totals hold O(block + r e) (under a
    compiler O(block + r e) a head), and O(L r e) in training.

    Source: the paper's upper bound (the near-linear algorithm for bounded entries) and its proof.
    """
    ks, vs = as_list("ks", ks), as_list("vs", vs)
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, ks, vs = q.to(dtype), [k.to(dtype) for k in ks], [v.to(dtype) for v in vs]
    check_factors(q, ks, vs, causal)
    if bound is None:
        bound = _largest(q, ks)
    else:
        check_number("bound", bound, above=0)
        check_bound(q, ks, bound)
    plan = polynomial_plan(q.shape[-1], len(ks) + 1, bound, degree, tol, basis, max_rank)
    return attend_by_plan(q, ks, vs, plan, causal), plan.report


def _largest(q: Tensor, ks: Sequence[Tensor]) -> float:
    found = [one.detach().abs().amax() for one in (q, *ks) if one.numel()]
    return float(torch.stack(found).amax()) if found else 0.0


def check_bound(q: Tensor, ks: Sequence[Tensor], bound: float) -> None:
    """Check by value that no entry exceeds the bound; under a compiler, which cannot, do nothing.

    Raises:
        ValueError: One does, or is NaN.
    """
    if torch.compiler.is_compiling():
        return
    largest = _largest(q, ks)
    if not largest <= bound * (1 + 1e-6):  # entries clipped to it may be rounded up
        raise ValueError(f"bound must be at least the largest entry of q and ks, {largest:g}, got {bound:g}")


def attend_by_plan(q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], plan: Plan, causal: bool) -> Tensor:
    """Attend with the monomials and weights of a plan; operands are not checked.

    Raises:
        ValueError: A denominator is not positive (checked where the plan's error allows it).
    """
    report, dtype = plan.report, wide(q.dtype)
    degree = report.degree
    if rounding_error(report.bound ** (len(ks) + 1), dtype) > report.entry_error:
        dtype = torch.float64
    with full_precision(q.device):
        features = monomials(q.to(dtype), degree) * q.new_tensor(plan.weights, dtype=dtype)
        keys = [monomials(k.to(dtype), degree) for k in ks]
        # A column of ones among the values turns the same sums into denominators.
        values = [torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], dim=-1) for v in vs]
        sums = _running_sums(features, keys, values) if causal else torch.matmul(features, _totals(keys, values))
        denominators = sums[..., -1:]
        if report.entry_error >= 1 and not torch.compiler.is_compiling() and not bool((denominators > 0).all()):
            raise ValueError(
                f"degree = {degree} gives denominators that are not positive, down to {float(denominators.min()):g}"
            )
        return (sums[..., :-1] / denominators).to(q.dtype)


def _totals(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Return the elementwise product of the factors U_mᵀV_m, (..., r, e)."""
    return _multiply([torch.matmul(u.mT, v) for u, v in zip(keys, values, strict=True)])


def _multiply(factors: Sequence[Tensor]) -> Tensor:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result


def _running_sums(features: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Return numerators and denominators of causal attention: every factor is summed up to the query's position.

    Tokens come in chunks: inside one, sums run by ``cumsum``; before it, only each factor's total is kept.
    """
    queries, length = features.shape[-2], keys[0].shape[-2]
    first = length - queries
    totals = [torch.matmul(u[..., :first, :].mT, v[..., :first, :]) for u, v in zip(keys, values, strict=True)]
    # A chunk may depend on the batch's size only where nothing is traced: each size would take a program of its own.
    width = math.prod(totals[0].shape[-2:] if torch.compiler.is_compiling() else totals[0].shape)
    step = max(1, BLOCK // max(1, width))
    outputs = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        rows = slice(first + start, first + stop)
        runs = [
            total.unsqueeze(-3) + (u[..., rows, :, None] * v[..., rows, None, :]).cumsum(dim=-3)
            for total, u, v in zip(totals, keys, values, strict=True)
        ]
        totals = [run[..., -1, :, :] for run in runs]
        chunk = features[..., start:stop, None, :]
        outputs.append(torch.matmul(chunk, _multiply(runs)).squeeze(-2))
    return torch.cat(outputs, dim=-2) if outputs else features.new_zeros(*features.shape[:-1], values[0].shape[-1])
