"""The PQ Index, the Gini index, and the bound on how many weights to retain."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from provenn.core.experiment.checks import check_number

_CHUNK = 1 << 18
"""Elements whose powers are held at once: small enough for a processor's cache, large enough to hide the loop."""


def check_exponents(p: float, q: float) -> None:
    """Check that 0 < p < q."""
    check_number("p", p, above=0)
    check_number("q", q, above=0)
    if p >= q:
        raise ValueError(f"p must be < q, got p={p!r} and q={q!r}")


def pq_index(
    x: Num[Tensor, "..."],
    p: float = 0.5,
    q: float = 1.0,
    mask: Bool[Tensor, "..."] | None = None,
    dim: int | tuple[int, ...] | None = None,
) -> Float[Tensor, "..."]:
    r"""Measure how unequal magnitudes are: 0 for all equal, towards 1 − d^{1/q − 1/p} for one non-zero entry.

    .. math:: I_{p,q}(w) = 1 - d^{1/q - 1/p}\, \lVert w \rVert_p / \lVert w \rVert_q

    Args:
        x: Weights; signs do not matter.
        p: The smaller exponent, > 0.
        q: The larger exponent, > p.
        mask: True where an entry counts; d and both norms are of these entries alone. ``None``: all count.
        dim: Dimensions to reduce; ``None`` reduces all.

    Shape:
        ``x`` and ``mask`` alike; the result has ``x``'s shape without ``dim``, float64.

    Returns:
        The index. A group that is empty or all zero gives 0, the latter with a warning. Values in (−1e-5, 0), which
        are rounding, give 0.

    Raises:
        ValueError: Not 0 < p < q, or ``mask`` differs from ``x`` in shape.

    Cost: one pass over ``x``, O(d) time. Reducing all dimensions takes O(1) memory beyond ``x`` (powers are summed in
    float64, chunk by chunk), reducing some takes a float64 copy of ``x``.

    Source: Definition 1 of the paper; the treatment of empty groups and of rounding as in the authors' code.
    """
    check_exponents(p, q)
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}")
    if dim is None:
        sum_p, sum_q, largest, count = _sums(x.reshape(-1), None if mask is None else mask.reshape(-1), p, q)
    else:
        kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        magnitudes = x.abs().double().masked_fill(~kept, 0)
        largest = magnitudes.amax(dim, keepdim=True)
        # Dividing by the largest magnitude leaves the index as it is and keeps the powers from under- or overflowing.
        scaled = magnitudes / torch.where(largest > 0, largest, 1)
        sum_p, sum_q, count = _power(scaled, p).sum(dim), _power(scaled, q).sum(dim), kept.sum(dim)
        largest = largest.amax(dim)
    zero = largest == 0
    if bool((zero & (count > 0)).any()):
        warnings.warn("a group of weights is all zero: its PQ index is set to 0", stacklevel=2)
    safe = torch.where(zero, 1, count.double())
    index = 1 - (torch.where(zero, 1.0, sum_p) / safe) ** (1 / p) / (torch.where(zero, 1.0, sum_q) / safe) ** (1 / q)
    return torch.where(zero | ((index > -1e-5) & (index < 0)), 0.0, index)


def _power(magnitudes: Tensor, exponent: float) -> Tensor:
    if exponent == 1:
        return magnitudes
    return magnitudes.sqrt() if exponent == 0.5 else magnitudes**exponent


def _sums(x: Tensor, mask: Tensor | None, p: float, q: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum |x|ᵖ and |x|^q of the kept entries in one pass, relative to the largest magnitude met so far."""
    sum_p = sum_q = largest = torch.zeros((), dtype=torch.float64, device=x.device)
    count = torch.zeros((), dtype=torch.long, device=x.device)
    for start in range(0, x.numel(), _CHUNK):
        magnitudes = x[start : start + _CHUNK].abs().double()
        if mask is not None:
            kept = mask[start : start + _CHUNK]
            magnitudes, count = magnitudes.masked_fill(~kept, 0), count + kept.sum()
        else:
            count = count + magnitudes.numel()
        before, largest = largest, torch.maximum(largest, magnitudes.amax())
        unit = torch.where(largest > 0, largest, 1)
        magnitudes = magnitudes / unit
        sum_p = sum_p * (before / unit) ** p + _power(magnitudes, p).sum()
        sum_q = sum_q * (before / unit) ** q + _power(magnitudes, q).sum()
    return sum_p, sum_q, largest, count


def gini_index(
    x: Num[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None, dim: int | None = None
) -> Float[Tensor, "..."]:
    r"""Measure how unequal magnitudes are by the Gini index: 0 for all equal, 1 − 1/n for one non-zero of n.

    .. math:: G = \frac{2 \sum_i i\, x_{(i)}}{n \sum_i x_{(i)}} - \frac{n + 1}{n}, \quad x_{(1)} \le x_{(2)} \le \dots

    Args:
        x: Weights; signs do not matter.
        mask: True where an entry counts; n is their number. ``None``: all count.
        dim: Dimension to reduce; ``None`` reduces all.

    Shape:
        ``x`` and ``mask`` alike; the result has ``x``'s shape without ``dim``, float64.

    Returns:
        The index; 0 for a group that is empty or all zero.

    Raises:
        ValueError: ``mask`` differs from ``x`` in shape.

    Cost: a sort, O(d log d) time and O(d) memory.

    Source: Hurley & Rickard, "Comparing measures of sparsity", IEEE Trans. Inf. Theory 55 (2009); used beside the
    PQ Index in the paper.
    """
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}")
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if dim is None:
        x, kept, dim = x.reshape(-1), kept.reshape(-1), 0
    magnitudes = x.abs().double().masked_fill(~kept, 0).movedim(dim, -1)
    n = kept.sum(dim).double()
    # Entries that do not count are zeros at the head of the order: ranks are counted from the tail.
    tail = torch.arange(magnitudes.shape[-1] - 1, -1, -1, device=x.device)
    ranks = n[..., None] - tail
    total = magnitudes.sum(-1)
    safe_n, safe_total = torch.where(n > 0, n, 1), torch.where(total > 0, total, 1)
    gini = 2 * (ranks * magnitudes.sort(-1).values).sum(-1) / (safe_n * safe_total) - (safe_n + 1) / safe_n
    return torch.where(total > 0, gini, 0.0)


def retain_bound(
    index: Float[Tensor, "..."], d: Int[Tensor, "..."] | int, p: float = 0.5, q: float = 1.0, eta: float = 0.0
) -> Int[Tensor, "..."]:
    r"""Bound from below how many of d weights a PQ Index says are worth keeping.

    If the entries outside the r largest satisfy :math:`\sum_{out} |w|^p \le \eta \sum_{in} |w|^p`, then

    .. math:: r \ge d\,(1 + \eta)^{-q/(q-p)} (1 - I)^{pq/(q-p)}

    Args:
        index: The PQ Index I of the weights.
        d: Their number.
        p: The smaller exponent of the index.
        q: The larger exponent of the index.
        eta: η, the share that may be lost, ≥ 0.

    Shape:
        ``index`` and ``d`` broadcast together.

    Returns:
        The bound, rounded up to an integer.

    Raises:
        ValueError: Not 0 < p < q, or ``eta`` < 0.

    Cost: O(1) an index.

    Source: Theorem 2 of the paper.
    """
    check_exponents(p, q)
    check_number("eta", eta, at_least=0)
    share = (1 + eta) ** (-q / (q - p)) * (1 - index.double()) ** (p * q / (q - p))
    count = torch.as_tensor(d, device=index.device) * share
    # A bound that is an integer but for rounding must not be pushed to the next one.
    return torch.ceil(count * (1 - 1e-12)).long()
