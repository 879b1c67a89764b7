"""The layers for sequences and for grids."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice
from provenn.nn._plstm_gates import SHUT, Gate, Projections, Transition, check_mode
from provenn.nn._plstm_operands import check_method
from provenn.nn._plstm_scan_1d import plstm_scan_1d
from provenn.nn._plstm_scan_2d import plstm_scan_2d

FLIPS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (1, 2))
"""The axes of (batch, X, Y, …) that each orientation runs against."""


class PLSTM1d(nn.Module):
    r"""pLSTM on sequences: linear attention whose state is written, kept and read through gates.

    A causal depthwise convolution precedes queries, keys and gates; values, and the gated passthrough, see the input.

    Args:
        dim: Features, in and out.
        heads: Heads.
        states: Dimensions of state tracking, J_T = J_V = J_O: 1 for a number as transition, else matrices
            U diag(tanh 5λ) V with orthogonal U, V.
        convolution: Steps that the convolution spans; 0 leaves it out.
        constant_gates: Whether source, transition, mark and direct gates are learned constants ("const STM").
        method: As in :func:`plstm_scan_1d`.
        levels: As in :func:`plstm_scan_1d`.

    Shape:
        x (batch, time, dim) → (batch, time, dim).

    Returns:
        Calling it returns the output, which depends on no later input.

    Raises:
        TypeError: A number that must be an integer is none.
        ValueError: ``dim`` not divisible by ``heads`` times ``states``, an argument out of bounds, or another shape.

    Cost: that of four dim × dim projections and of :func:`plstm_scan_1d`.

    Source: Pöppel et al., "pLSTM", 2025, section 4; starts of the gates as in the authors' ``plstm_1d_layer``.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        states: int = 1,
        convolution: int = 4,
        constant_gates: bool = False,
        method: Literal["recurrent", "parallel"] = "parallel",
        levels: int = 6,
    ) -> None:
        super().__init__()
        check_method(method, levels)
        check_width("convolution", convolution)
        self.dim, self.method, self.levels = dim, method, levels
        self.projections = Projections(dim, heads, states)
        self.convolution = nn.Conv1d(dim, dim, convolution, groups=dim) if convolution else None
        self.source = Gate(dim, (heads, states, 1, states), SHUT, constant_gates)
        self.transition = Transition(dim, (heads,), states, constant_gates)
        self.mark = Gate(dim, (heads, states, 1, states), SHUT, constant_gates)
        self.direct = Gate(dim, (heads, states, 1, 1, states), SHUT, constant_gates)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Run the layer.

        Args:
            x: Features of each step.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, time, {self.dim}), got {tuple(x.shape)}")
        seen = x
        if self.convolution is not None:
            before = self.convolution.kernel_size[0] - 1
            seen = self.convolution(F.pad(x.mT, (before, 0))).mT
        heard = plstm_scan_1d(
            *self.projections(seen, x),
            torch.sigmoid(self.source(seen)),
            self.transition(seen),
            torch.sigmoid(self.mark(seen)),
            torch.sigmoid(self.direct(seen)),
            method=self.method,
            levels=self.levels,
        )
        return self.projections.finish(heard, x)


def check_width(name: str, width: int, odd: bool = False) -> None:
    """Check the width of a convolution, 0 for none.

    Raises:
        ValueError: It is below 0, or even where it must be odd.
    """
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"{name} must be an integer, got {width!r}")
    if width < 0 or (odd and width and width % 2 == 0):
        raise ValueError(f"{name} must be {'odd, or 0' if odd else 'at least 0'}, got {width}")


class PLSTM2d(nn.Module):
    r"""pLSTM on grids: each cell passes its states to its neighbours along both axes, in up to four orientations.

    ``mode="P"`` (propagation): an angle a = σ(b + wᵀx/(2·dim)) of every head and orientation splits all that enters a
    cell: t^rl = t^ru = aτ and t^dl = t^du = 1 − t^rl, s^r = aσ(·) and s^d = 1 − s^r, so that with τ = 1 activation is
    conserved and moves along its direction. ``mode="D"`` (diffusion): t^rl, t^du and one of t^ru and t^dl are free in
    [−1, 1]; the fourth is zero, so that one path alone joins two cells and nothing grows.

    Args:
        dim: Features, in and out.
        heads: Heads.
        mode: How activation moves.
        chirality: Of ``mode="D"``: ``"L"`` keeps t^ru (down, then right), ``"R"`` t^dl (right, then down).
        orientations: How many of none, first axis, second axis, both are flipped, each with gates of its own; their
            read-outs are added. 1, 2 or 4.
        levels: As in :func:`plstm_scan_2d`.
        states: As in :class:`PLSTM1d`; in P-mode 1 stands for the identity.
        convolution: Side of the centred depthwise convolution before queries, keys and gates, odd; 0 leaves it out.
        constant_gates: As in :class:`PLSTM1d`; the angle is constant too.
        method: As in :func:`plstm_scan_2d`.

    Shape:
        x (batch, X, Y, dim) → (batch, X, Y, dim), for any X and Y.

    Returns:
        Calling it returns the output.

    Raises:
        TypeError: A number that must be an integer is none.
        ValueError: ``dim`` not divisible by ``heads`` times ``states``, an argument out of bounds, or another shape.

    Cost: that of four dim × dim projections and of :func:`plstm_scan_2d` for ``orientations`` times the heads.

    Source: Pöppel et al., "pLSTM", 2025, section 4; starts of the gates as in the authors' ``plstm_2d_layer_fused``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mode: Literal["P", "D"] = "P",
        chirality: Literal["L", "R"] = "L",
        orientations: int = 4,
        levels: int = 6,
        *,
        states: int = 1,
        convolution: int = 3,
        constant_gates: bool = False,
        method: Literal["recurrent", "parallel"] = "parallel",
    ) -> None:
        super().__init__()
        check_method(method, levels)
        check_mode(mode, chirality)
        check_choice("orientations", orientations, (1, 2, 4))
        check_width("convolution", convolution, odd=True)
        self.dim, self.mode, self.chirality, self.orientations = dim, mode, chirality, orientations
        self.method, self.levels = method, levels
        self.projections = Projections(dim, heads, states)
        padding = convolution // 2
        self.convolution = nn.Conv2d(dim, dim, convolution, groups=dim, padding=padding) if convolution else None
        places, ways = (orientations, heads), 1 if mode == "P" else 2
        if mode == "P":
            start = torch.linspace(-2, 2, heads) if heads > 1 else torch.zeros(1)
            self.angle = Gate(dim, places, start, constant_gates)
        self.source, self.mark = (
            nn.ModuleList(Gate(dim, (*places, states, 1, states), SHUT, constant_gates) for _ in range(ways))
            for _ in range(2)
        )
        self.transition = nn.ModuleList(
            Transition(dim, places, states, constant_gates) for _ in range(1 if mode == "P" else 3)
        )
        self.direct = Gate(dim, (heads, states, 1, 1, states), SHUT, constant_gates)

    def forward(self, x: Float[Tensor, "batch x y dim"]) -> Float[Tensor, "batch x y dim"]:
        """Run the layer.

        Args:
            x: Features of each cell.
        """
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, X, Y, {self.dim}), got {tuple(x.shape)}")
        seen = x
        if self.convolution is not None:
            seen = self.convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = self.projections(seen, x)
        source, transition, mark = self.gates(seen)
        direct = torch.sigmoid(self.direct(seen))
        # Orientations stand beside the heads: (batch, X, Y, orientations, heads, …), flipped each by its own axes.
        heard = plstm_scan_2d(
            *(_turned(one[:, :, :, None].expand(-1, -1, -1, self.orientations, *one.shape[3:])) for one in (q, k, v)),
            tuple(map(_turned, source)),
            tuple(map(_turned, transition)),
            tuple(map(_turned, mark)),
            torch.zeros_like(direct).repeat(1, 1, 1, self.orientations, 1, 1, 1, 1),
            method=self.method,
            levels=self.levels,
        )
        heads = self.projections.heads
        there = heard.unflatten(3, (self.orientations, heads))
        back = sum(there[:, :, :, place].flip(axes) for place, axes in enumerate(FLIPS[: self.orientations]))
        own = torch.einsum("...dq,...dk,...oqkl,...vl->...vo", q, k, direct, v)
        return self.projections.finish(back + own, x)

    def gates(self, seen: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return sources (s^r, s^d), transitions (t^rl, t^ru, t^dl, t^du) and marks (μ^l, μ^u), not flipped.

        Each is (batch, X, Y, orientations, heads, …) with the dimensions of state tracking behind.
        """
        sources = [torch.sigmoid(one(seen)) for one in self.source]
        marks = [torch.sigmoid(one(seen)) for one in self.mark]
        moves = [one(seen) for one in self.transition]
        if self.mode == "D":
            rl, du, turn = moves
            none = torch.zeros_like(turn)
            corners = (turn, none) if self.chirality == "L" else (none, turn)
            return (sources[0], sources[1]), (rl, *corners, du), (marks[0], marks[1])
        # σ(b + ½ wᵀx/dim): the gate's linear map is w/(2 dim).
        angle = torch.sigmoid(self.angle(seen / (2 * self.dim)))[..., None, None]
        right = angle * moves[0]
        down = torch.eye(right.shape[-1], dtype=right.dtype, device=right.device) - right
        to_right = angle[..., None] * sources[0]
        return (to_right, 1 - to_right), (right, right, down, down), (marks[0], marks[0])


def _turned(one: Tensor) -> Tensor:
    """Flip each orientation by its axes and merge orientations with heads."""
    flipped = [one[:, :, :, place].flip(axes) for place, axes in enumerate(FLIPS[: one.shape[3]])]
    return torch.stack(flipped, 3).flatten(3, 4)
