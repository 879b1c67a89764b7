"""Linear recurrences on a grid, where two states meet at every cell, and on any directed acyclic graph.

The grid advances along its anti-diagonals, whose cells do not depend on each other: X + Y − 1 rounds for X·Y cells. A
graph advances by generations: all states whose sources are done. In both the derivative is again such a recurrence, on
the reversed grid or graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

GridStates = tuple[Tensor, Tensor]


class GridTransitions(NamedTuple):
    """How the states that enter a cell leave it, each (X, Y, …), broadcasting against the sources.

    ``ahead_ahead``: along the first axis in, along it out; ``side_ahead``: along the second in, along the first out;
    ``ahead_side``: along the first in, along the second out; ``side_side``: along the second in and out.
    """

    ahead_ahead: Tensor
    side_ahead: Tensor
    ahead_side: Tensor
    side_side: Tensor


def grid_recurrence(
    ahead: Shaped[Tensor, "x y *state"], side: Shaped[Tensor, "x y *state"], transitions: GridTransitions
) -> GridStates:
    """Solve the recurrence of a grid whose cells pass one state along each axis.

    With A and S the states that leave a cell along the first and the second axis, and α, σ the sources:
    A[x, y] = α[x, y] + t_aa A[x−1, y] + t_sa S[x, y−1] and S[x, y] = σ[x, y] + t_as A[x−1, y] + t_ss S[x, y−1];
    nothing enters from outside.

    Args:
        ahead: α, what a cell adds to the state that leaves along the first axis.
        side: σ, the same for the second axis.
        transitions: The four gates of each cell.

    Shape:
        Sources (X, Y, *state); gates (X, Y, …), which broadcast against them. A and S are shaped as the sources.

    Returns:
        A and S.

    Raises:
        ValueError: The shapes do not fit.

    Cost: O(X·Y) work in X + Y − 1 rounds of at most X cells; time and memory grow with X·(X + Y), as the diagonals are
    stored as a band, so that the shorter axis should come first. Differentiable twice and more.

    Source: Pöppel, Freinschlag, Schmied, Lin & Hochreiter, "pLSTM", 2025, section 3.
    """
    shape = torch.broadcast_shapes(ahead.shape, side.shape)
    dtype = torch.promote_types(ahead.dtype, side.dtype)
    for name, gate in zip(GridTransitions._fields, transitions, strict=True):
        if gate.ndim != len(shape) or gate.shape[:2] != shape[:2] or not _broadcasts(gate.shape, shape):
            raise ValueError(f"{name} must fit sources of shape {tuple(shape)}, got {tuple(gate.shape)}")
        dtype = torch.promote_types(dtype, gate.dtype)
    sources = (one.to(dtype).expand(shape) for one in (ahead, side))
    states: GridStates = _Grid.apply(*sources, *(gate.to(dtype) for gate in transitions))  # type: ignore[no-untyped-call]
    return states


def _broadcasts(shape: torch.Size, wanted: torch.Size) -> bool:
    return all(size in (1, goal) for size, goal in zip(shape, wanted, strict=True))


@no_type_check  # a signature check inside would break the graph that torch.compile traces
class _Grid(torch.autograd.Function):
    """The grid's recurrence; adjoints enter where states leave, and move against both axes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ahead: Tensor, side: Tensor, aa: Tensor, sa: Tensor, as_: Tensor, ss: Tensor) -> GridStates:
        return _sweep(ahead, side, GridTransitions(aa, sa, as_, ss))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[2:], *output)

    @staticmethod
    def backward(ctx: Any, grad_ahead: Tensor, grad_side: Tensor) -> tuple[Tensor, ...]:
        *gates, out_ahead, out_side = ctx.saved_tensors
        aa, sa, as_, ss = (gate.conj() for gate in gates)
        # The adjoints that leave a cell backwards are those of the states that entered it.
        backward = _Grid.apply(  # type: ignore[no-untyped-call]
            (aa * grad_ahead + as_ * grad_side).flip(0, 1),
            (sa * grad_ahead + ss * grad_side).flip(0, 1),
            *(gate.flip(0, 1) for gate in (aa, as_, sa, ss)),
        )
        costate_ahead = grad_ahead + _shift(backward[0].flip(0, 1), 0, -1)
        costate_side = grad_side + _shift(backward[1].flip(0, 1), 1, -1)
        in_ahead, in_side = _shift(out_ahead, 0, 1).conj(), _shift(out_side, 1, 1).conj()
        products = (costate_ahead * in_ahead, costate_ahead * in_side, costate_side * in_ahead, costate_side * in_side)
        reduced = (product.sum_to_size(gate.shape) for product, gate in zip(products, gates, strict=True))
        return costate_ahead, costate_side, *reduced


def _shift(states: Tensor, dim: int, by: int) -> Tensor:
    """Move all cells one place along an axis; zeros come in."""
    zero = torch.zeros_like(states.narrow(dim, 0, min(1, states.shape[dim])))
    kept = states.narrow(dim, 0 if by > 0 else min(1, states.shape[dim]), max(0, states.shape[dim] - 1))
    return torch.cat((zero, kept) if by > 0 else (kept, zero), dim)


def _sweep(ahead: Tensor, side: Tensor, transitions: GridTransitions) -> GridStates:
    rows, columns = ahead.shape[:2]
    if rows * columns == 0:
        return ahead.clone(), side.clone()
    # Row d of the band holds the cells (x, d − x), each at place x, and a row of zeros stands for cells off the grid.
    x = torch.arange(rows, device=ahead.device)
    y = torch.arange(rows + columns - 1, device=ahead.device)[:, None] - x
    index = torch.where((y >= 0) & (y < columns), x * columns + y, rows * columns)
    band = [_band(one, index) for one in (ahead, side, *transitions)]
    left = torch.zeros_like(band[0][0])
    below = left
    aheads, sides = [], []
    for a, s, aa, sa, as_, ss in zip(*(one.unbind(0) for one in band), strict=True):
        moved = torch.cat((torch.zeros_like(left[:1]), left[:-1]))
        left, below = a + aa * moved + sa * below, s + as_ * moved + ss * below
        aheads.append(left)
        sides.append(below)
    x, y = x[:, None], torch.arange(columns, device=ahead.device)
    return torch.stack(aheads)[x + y, x], torch.stack(sides)[x + y, x]


def _band(cells: Tensor, index: Tensor) -> Tensor:
    flat = cells.flatten(0, 1)
    return torch.cat((flat, flat.new_zeros(1, *flat.shape[1:])))[index]


class AcyclicSchedule:
    """The order in which the states of a directed acyclic graph can be computed, generation by generation.

    Args:
        pairs: (2, P): the state that is passed on, and the state that it enters; equal pairs are allowed.
        states: How many states there are, numbered from 0.

    Shape:
        ``pairs`` (2, P).

    Raises:
        ValueError: A number out of range, or a cycle, which the message lists.

    Cost: O(states + P) once, on the CPU.

    Source: Kahn, "Topological sorting of large networks", CACM 5 (1962).
    """

    def __init__(self, pairs: Int[Tensor, "2 pairs"], states: int) -> None:
        if pairs.ndim != 2 or len(pairs) != 2:
            raise ValueError(f"pairs must be (2, P), got {tuple(pairs.shape)}")
        if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= states):
            raise ValueError(f"pairs must name states 0 … {states - 1}, got {int(pairs.min())} … {int(pairs.max())}")
        self.pairs, self.states = pairs, states
        generation = _generations(pairs.cpu().numpy(), states)
        order = torch.from_numpy(generation)[pairs[1].cpu()]
        # Nothing enters the first generation; the others are computed from the pairs that enter them.
        last = int(order.max()) if order.numel() else 0
        self.rounds = [torch.nonzero(order == step).flatten().to(pairs.device) for step in range(1, last + 1)]


def acyclic_recurrence(
    sources: Shaped[Tensor, "states *state"], weights: Shaped[Tensor, "pairs ..."], schedule: AcyclicSchedule
) -> Shaped[Tensor, "states *state"]:
    """Solve C_j = x_j + Σ_{(i → j)} w_ij C_i on a directed acyclic graph.

    Args:
        sources: x.
        weights: w, one a pair of the schedule, broadcasting against a state.
        schedule: The graph.

    Shape:
        ``sources`` (states, *state); ``weights`` (P, …), with as many dimensions. The result is shaped as ``sources``.

    Returns:
        C.

    Raises:
        ValueError: The shapes do not fit the schedule.

    Cost: O(states + P) work in as many rounds as the longest path has pairs; the derivative is one more recurrence.
    Differentiable twice and more.

    Source: as :func:`grid_recurrence`.
    """
    pairs = schedule.pairs.shape[1]
    if sources.shape[0] != schedule.states or weights.shape[0] != pairs or weights.ndim != sources.ndim:
        raise ValueError(
            f"sources and weights must be ({schedule.states}, …) and ({pairs}, …) with equally many dimensions, got "
            f"{tuple(sources.shape)} and {tuple(weights.shape)}"
        )
    if not _broadcasts(weights.shape[1:], sources.shape[1:]):
        raise ValueError(f"weights must fit states of shape {tuple(sources.shape[1:])}, got {tuple(weights.shape)}")
    if weights.is_complex():
        sources = sources.to(torch.promote_types(sources.dtype, weights.dtype))
    solved: Tensor = _Acyclic.apply(sources, weights, schedule, False)  # type: ignore[no-untyped-call]
    return solved


@no_type_check  # a signature check inside would break the graph that torch.compile traces
class _Acyclic(torch.autograd.Function):
    """The graph's recurrence; adjoints run through the reversed graph with the same weights.

    The rounds serve that graph too, from the last to the first: all that leaves a state is in later rounds than what
    enters it.
    """

    @staticmethod
    def forward(sources: Tensor, weights: Tensor, schedule: AcyclicSchedule, backwards: bool) -> Tensor:
        states = sources.clone()
        origin, target = schedule.pairs
        rounds = schedule.rounds
        if backwards:
            origin, target, rounds = target, origin, rounds[::-1]
        for entering in rounds:
            passed = weights[entering] * states[origin[entering]]
            states.index_add_(0, target[entering], passed.to(states.dtype))
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, weights, ctx.schedule, ctx.backwards = inputs
        ctx.save_for_backward(weights, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, states = ctx.saved_tensors
        costate = _Acyclic.apply(grad, weights.conj(), ctx.schedule, not ctx.backwards)  # type: ignore[no-untyped-call]
        origin, target = ctx.schedule.pairs
        if ctx.backwards:
            origin, target = target, origin
        grad_weights = (costate[target] * states[origin].conj()).sum_to_size(weights.shape)
        return costate, grad_weights, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], sources: Tensor, weights: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        # States of equally many dimensions: the mapped one comes second, and of size 1 where only the other has it.
        one, other = (
            tensor.unsqueeze(1) if dim is None else tensor.movedim(dim, 1)
            for tensor, dim in zip((sources, weights), in_dims, strict=False)
        )
        one = one.expand(-1, info.batch_size, *one.shape[2:])
        states: Tensor = _Acyclic.apply(one, other, *rest)  # type: ignore[no-untyped-call]
        return states, 1


def _generations(pairs: np.ndarray, states: int) -> np.ndarray:
    """Return for each state the length of the longest path that ends there."""
    origin, target = pairs
    waiting = np.bincount(target, minlength=states)
    by_origin = target[np.argsort(origin, kind="stable")]
    first = np.searchsorted(np.sort(origin), np.arange(states + 1))
    generation = np.full(states, -1)
    ready, step = np.flatnonzero(waiting == 0), 0
    while len(ready):
        generation[ready] = step
        reached = np.concatenate([by_origin[first[one] : first[one + 1]] for one in ready])
        np.subtract.at(waiting, reached, 1)
        ready, step = np.unique(reached[waiting[reached] == 0]), step + 1
    if states and generation.min() < 0:
        raise ValueError(f"pairs must not contain a cycle, got {_cycle(origin, target, generation < 0)}")
    return generation


def _cycle(origin: np.ndarray, target: np.ndarray, left: np.ndarray) -> str:
    """Name a cycle among the states that no order reaches: each of them is entered by another one of them."""
    inside = left[origin] & left[target]
    enters = dict(zip(target[inside].tolist(), origin[inside].tolist(), strict=True))
    path = [int(np.flatnonzero(left)[0])]
    while path[-1] not in path[:-1]:
        path.append(enters[path[-1]])
    cycle = path[path.index(path[-1]) :][::-1]
    return " → ".join(map(str, cycle))
