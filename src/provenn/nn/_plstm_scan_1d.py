"""The scan along a sequence: step by step, or by levels of chunks that double."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F

from provenn.core.sequences.scans import linear_recurrence, matrix_recurrence
from provenn.nn._plstm_operands import Operands, arrange, check_method, gated_attention, read, restore, written


def plstm_scan_1d(
    q: Shaped[Tensor, "batch time heads *query"],
    k: Shaped[Tensor, "batch time heads *key"],
    v: Shaped[Tensor, "batch time heads *value"],
    source: Shaped[Tensor, "batch time heads *source"],
    transition: Shaped[Tensor, "batch time heads *transition"],
    mark: Shaped[Tensor, "batch time heads *mark"],
    direct: Shaped[Tensor, "batch time heads *direct"],
    *,
    method: Literal["recurrent", "parallel"] = "parallel",
    levels: int = 6,
) -> Shaped[Tensor, "batch time heads *output"]:
    r"""Run pLSTM along a sequence, whose steps are joined by one edge each.

    .. math::
        C_t = f_t C_{t-1} + s_t k_t v_t^\top, \qquad h_t = \mu_t q_t^\top C_{t-1} + \delta_t (q_t^\top k_t) v_t

    What a step writes goes to the edge behind it; it reads the edge before it, so that its own value comes through δ.

    With state tracking, C has J_T slices, f is J_T × J_T, s is (J_T, J_K, J_V), μ is (J_O, J_Q, J_T), δ is
    (J_O, J_Q, J_K, J_V), q, k, v have J_Q, J_K, J_V columns, and the output has J_O.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        source: s.
        transition: f.
        mark: μ.
        direct: δ.
        method: ``"recurrent"``: all states, one a step. ``"parallel"``: chunks of 2^levels steps, in each of which a
            gating matrix G is put together by doubling and the output is (G ∘ QKᵀ)V; states pass between chunks.
        levels: Doublings, for ``"parallel"``; does not change the result.

    Shape:
        Without state tracking q, k (batch, time, heads, d_k), v (batch, time, heads, d_v), gates (batch, time, heads),
        output as v. With it, the dimensions above come behind: q (batch, time, heads, d_k, J_Q), output
        (batch, time, heads, d_v, J_O), and so on.

    Returns:
        h.

    Raises:
        TypeError: ``levels`` is no integer.
        ValueError: Shapes that do not fit, an unknown ``method``, or ``levels`` below 0.

    Cost: recurrent O(T d_k d_v) time and memory; parallel O(T (c + d_k) d) time and O(T c + T d_k d_v / c) memory with
    chunks of c = 2^levels steps, in ``levels`` rounds and one recurrence over T/c chunks.

    Source: Pöppel et al., "pLSTM", 2025, sections 3 and 4; levels as in the authors' ``plstm_1d``.
    """
    check_method(method, levels)
    gates = {"source": [source], "transition": [transition], "mark": [mark], "direct": [direct]}
    operands, layout = arrange(q, k, v, gates, 1)
    if q.shape[1] == 0:
        return restore(operands.v.new_zeros(*operands.v.shape[:-1], layout.sizes["O"]), layout)
    solve = _recurrent if method == "recurrent" else _parallel
    return restore(solve(operands, layout.sizes["O"], levels), layout)


def _recurrent(operands: Operands, outputs: int, levels: int) -> Tensor:
    q, k, v = (one[:, :, None] for one in operands[:3])  # every step is a chunk of its own
    states = _states_before(operands.transitions[0], written(operands.sources[0], k, v))
    direct = gated_attention(operands.direct, q, k, v, outputs)
    return (read(operands.marks[0], q, states, outputs) + direct)[:, :, 0]


def _states_before(transitions: Tensor, writes: Tensor) -> Tensor:
    """Return the states that enter each step: C_0 = 0 … C_{T−1}."""
    one = transitions.shape[-1] == 1
    states = linear_recurrence(transitions, writes) if one else matrix_recurrence(transitions, writes)
    return torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), 1)


def _parallel(operands: Operands, outputs: int, levels: int) -> Tensor:
    length = operands.q.shape[1]
    levels = min(levels, (length - 1).bit_length())
    size = 1 << levels
    missing = -length % size
    q, k, v = (_padded(one, missing).unflatten(1, (-1, size)) for one in operands[:3])
    t, s, m, g = (
        _padded(one, missing)
        for one in (operands.transitions[0], operands.sources[0], operands.marks[0], operands.direct)
    )
    for _ in range(levels):
        t, s, m, g = _double(t, s, m, g)
    output = gated_attention(g, q, k, v, outputs)
    if q.shape[1] > 1:
        output = output + read(m, q, _states_before(t, written(s, k, v)), outputs)
    return output.flatten(1, 2)[:, :length]


def _padded(one: Tensor, missing: int) -> Tensor:
    return F.pad(one, (0, 0) * (one.ndim - 2) + (0, missing)) if missing else one


def _double(t: Tensor, s: Tensor, m: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join every two neighbouring chunks: what leaves the first enters the second."""
    (t1, s1, m1, g1), (t2, s2, m2, g2) = ([one[:, start::2] for one in (t, s, m, g)] for start in (0, 1))
    above = torch.zeros_like(g1)
    return (
        t2 @ t1,
        torch.cat((t2 @ s1, s2), -1),
        torch.cat((m1, m2 @ t1), -2),
        torch.cat((torch.cat((g1, above), -1), torch.cat((m2 @ s1, g2), -1)), -2),
    )
