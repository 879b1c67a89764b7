"""What the scans in one and two dimensions share: one layout of operands, and the read-out by a gating matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer

METHODS = ("recurrent", "parallel")
_TRAILING = {
    "source": ("T", "K", "V"),
    "transition": ("T", "T"),
    "mark": ("O", "Q", "T"),
    "direct": ("O", "Q", "K", "V"),
}


class Operands(NamedTuple):
    """Operands with batch and heads as one leading dimension n, and gates as matrices.

    q (n, *grid, d_k, J_Q), k (n, *grid, d_k, J_K), v (n, *grid, d_v, J_V); sources (n, *grid, J_T, J_K·J_V);
    transitions (n, *grid, J_T, J_T); marks (n, *grid, J_O·J_Q, J_T); direct (n, *grid, J_O·J_Q, J_K·J_V).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sources: list[Tensor]
    transitions: list[Tensor]
    marks: list[Tensor]
    direct: Tensor


class Layout(NamedTuple):
    """What puts an output back: batch, heads, the sizes of state tracking, and whether they were given."""

    batch: int
    heads: int
    sizes: dict[str, int]
    tracked: bool


def check_method(method: str, levels: int) -> None:
    """Check the two arguments that say how a scan is computed.

    Raises:
        ValueError: An unknown method, or ``levels`` below 0.
        TypeError: ``levels`` is no integer.
    """
    check_choice("method", method, METHODS)
    check_integer("levels", levels, at_least=0)


def arrange(
    q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Sequence[Tensor]], axes: int
) -> tuple[Operands, Layout]:
    """Check operands on a grid of ``axes`` dimensions and bring them to one layout.

    Args:
        q: (batch, *grid, heads, d_k), or with state tracking (batch, *grid, heads, d_k, J_Q).
        k: As ``q``, J_K.
        v: As ``q``, d_v and J_V.
        gates: The lists ``"source"``, ``"transition"``, ``"mark"`` and ``"direct"`` of gates (batch, *grid, heads), or
            with state tracking with their matrices' dimensions behind.
        axes: 1 or 2.

    Raises:
        ValueError: A shape that does not fit, by the argument's name.
    """
    tracked = q.ndim == axes + 4
    if not tracked and q.ndim != axes + 3:
        raise ValueError(
            f"q must be (batch, {'x, y' if axes == 2 else 'time'}, heads, d_k[, J_Q]), got {tuple(q.shape)}"
        )
    if not tracked:
        q, k, v = q[..., None], k[..., None], v[..., None]
        gates = {
            name: [gate[(...,) + (None,) * len(_TRAILING[name])] for gate in group] for name, group in gates.items()
        }
    lead = q.shape[: axes + 2]
    for name, one, width in (("k", k, q.shape[-2]), ("v", v, v.shape[-2])):
        if one.ndim != q.ndim or one.shape[:-2] != lead or one.shape[-2] != width:
            raise ValueError(f"{name} must fit q of shape {tuple(q.shape)}, got {tuple(one.shape)}")
    sizes = {"Q": q.shape[-1], "K": k.shape[-1], "V": v.shape[-1]}
    for name, group in gates.items():
        for gate in group:
            _check_gate(name, gate, lead, sizes)
    dtype = q.dtype
    for one in (k, v, *(gate for group in gates.values() for gate in group)):
        dtype = torch.promote_types(dtype, one.dtype)
    spread = {name: [_leading(gate, axes).to(dtype) for gate in group] for name, group in gates.items()}
    operands = Operands(
        *(_leading(one, axes).to(dtype) for one in (q, k, v)),
        [gate.flatten(-2) for gate in spread["source"]],
        spread["transition"],
        [gate.flatten(-3, -2) for gate in spread["mark"]],
        spread["direct"][0].flatten(-4, -3).flatten(-2),
    )
    return operands, Layout(q.shape[0], q.shape[axes + 1], sizes, tracked)


def _check_gate(name: str, gate: Tensor, lead: torch.Size, sizes: dict[str, int]) -> None:
    """Check a gate's shape; the first gate with a dimension of state tracking decides its size."""
    trailing = _TRAILING[name]
    fits = gate.ndim == len(lead) + len(trailing) and gate.shape[: len(lead)] == lead
    if fits:
        found = gate.shape[len(lead) :]
        fits = all(sizes.setdefault(axis, size) == size for axis, size in zip(trailing, found, strict=True))
    if not fits:
        raise ValueError(f"{name} must be {tuple(lead)} with {', '.join(trailing)} of {sizes}, got {tuple(gate.shape)}")


def _leading(tensor: Tensor, axes: int) -> Tensor:
    """Move heads next to the batch and merge the two."""
    return tensor.movedim(axes + 1, 1).flatten(0, 1)


def restore(output: Tensor, layout: Layout) -> Tensor:
    """Turn (n, *grid, d_v, J_O) back into (batch, *grid, heads, d_v[, J_O])."""
    back = output.unflatten(0, (layout.batch, layout.heads)).movedim(1, -3)
    return back if layout.tracked else back[..., 0]


def gated_attention(gating: Tensor, q: Tensor, k: Tensor, v: Tensor, outputs: int) -> Tensor:
    """Return (G ∘ QKᵀ)V, with G's state-tracking dimensions contracted where there are any.

    Args:
        gating: G, (…, cells·J_O·J_Q, cells·J_K·J_V).
        q: (…, cells, d_k, J_Q).
        k: (…, cells, d_k, J_K).
        v: (…, cells, d_v, J_V).
        outputs: J_O.

    Returns:
        (…, cells, d_v, J_O).
    """
    cells, (jq, jk, jv) = q.shape[-3], (one.shape[-1] for one in (q, k, v))
    if outputs == jq == jk == jv == 1:
        return ((gating * (q[..., 0] @ k[..., 0].mT)) @ v[..., 0])[..., None]
    scores = torch.einsum("...adq,...bdk->...aqbk", q, k)
    split = gating.unflatten(-1, (cells, jk, jv)).unflatten(-4, (cells, outputs, jq))
    weights = torch.einsum("...aqbk,...aoqbkl->...aobl", scores, split)
    return torch.einsum("...aobl,...bvl->...avo", weights, v)


def written(sources: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return Σ over cells of S k vᵀ: (…, rows, d_k·d_v), from sources (…, rows, cells·J_K·J_V)."""
    split = sources.unflatten(-1, (k.shape[-3], k.shape[-1], v.shape[-1]))
    keys = torch.einsum("...rakl,...adk->...radl", split, k)
    return torch.einsum("...radl,...avl->...rdv", keys, v).flatten(-2)


def read(marks: Tensor, q: Tensor, states: Tensor, outputs: int) -> Tensor:
    """Return M qᵀC of cells, (…, cells, d_v, J_O): marks (…, cells·J_O·J_Q, rows), states (…, rows, d_k·d_v)."""
    split = marks.unflatten(-2, (q.shape[-3], outputs, q.shape[-1]))
    queries = torch.einsum("...aoqr,...adq->...aord", split, q)
    return torch.einsum("...aord,...rdv->...avo", queries, states.unflatten(-1, (q.shape[-2], -1)))
