"""The gated attention unit, and its positions."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.sequences.attention import wide
from provenn.nn._seqboat_blocks import Blocks, cut_in_blocks, whole
from provenn.nn._seqboat_ssm import check_features, truncated_normal_

AttentionFunction = Literal["softmax", "relu2"]
PositionKind = Literal["simple", "local", "rotary"]


class GAUState(NamedTuple):
    """The selected elements that later ones may look at, the latest last.

    Shape: ``keys`` (batch, S, z), ``values`` (batch, S, h), ``positions`` and ``mask`` (batch, S): whether there is
    one. S is the window, or without a window the number of steps that selected anything.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mask: Tensor


class GatedAttentionUnit(nn.Module):
    r"""Single-head attention with a gate, within a window.

    .. math::
        (z, r, v) = \mathrm{SiLU}(W x + b),\quad q, k = \gamma z + \beta,\quad h = W_h(\mathrm{attn}(q, k, v) \odot r)

    Weights are softmax(qkᵀ/√d_z + bias), or relu²(qkᵀ/n + bias), n being the window (twice it where keys lie on both
    sides; without a window the number of keys that a query sees).

    Args:
        dim: D.
        zdim: d_z, features of queries and keys.
        hdim: d_h, features of values.
        window: w: a query sees w slots back and itself, and with ``bidirectional`` w slots on. ``None``: all.
        attn: ``"softmax"`` or ``"relu2"``.
        bidirectional: Whether it looks at later elements.
        rel_pos_bias: ``"simple"``: a learned bias by the distance of the original positions. ``"local"``: by the
            distance in slots; needs a window. ``"rotary"``: queries and keys turned by the original positions.
        max_positions: Positions that ``"simple"`` has biases for.
        attention_dropout: Share of weights dropped in training.
        hidden_dropout: Share of the values' features dropped in training.

    Shape:
        x (batch, T, D) → (batch, T, D). Optional, all (batch, T): ``positions``, the elements' original positions
        (default 0, 1, …; given ones are not checked against ``max_positions``); ``mask``, True at elements that count:
        others are no keys, and their outputs mean nothing (they are finite); ``slots``, each element's place by which
        the window is counted instead of its own.

    Returns:
        Calling it returns h.

    Raises:
        TypeError: A size is no integer.
        ValueError: A size < 1, an unknown choice, an odd ``zdim`` with ``"rotary"``, ``"local"`` without a window, or
            a sequence longer than ``max_positions``.
        RuntimeError: ``step`` of a bidirectional one.

    Cost: O(T (D (d_z + 3 d_h) + w (d_z + d_h))) time and O(T (w + d_h)) memory; O(T²) without a window or with
    ``slots``. ``step``: as one element, with w + 1 keys.

    Source: section 3.3 of the paper; Hua et al., "Transformer quality in linear time", ICML 2022; Ma et al., "Mega",
    ICLR 2023.
    """

    def __init__(
        self,
        dim: int,
        zdim: int,
        hdim: int,
        window: int | None,
        attn: AttentionFunction = "softmax",
        *,
        bidirectional: bool = False,
        rel_pos_bias: PositionKind = "simple",
        max_positions: int = 1024,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("zdim", zdim), ("hdim", hdim), ("max_positions", max_positions)):
            check_integer(name, size, at_least=1)
        if window is not None:
            check_integer("window", window, at_least=1)
        check_choice("attn", attn, ("softmax", "relu2"))
        check_choice("rel_pos_bias", rel_pos_bias, ("simple", "local", "rotary"))
        if rel_pos_bias == "local" and window is None:
            raise ValueError('window must be a number with rel_pos_bias="local", got None')
        if rel_pos_bias == "rotary" and zdim % 2:
            raise ValueError(f'zdim must be even with rel_pos_bias="rotary", got {zdim}')
        for name, share in (("attention_dropout", attention_dropout), ("hidden_dropout", hidden_dropout)):
            check_number(name, share, at_least=0, below=1)
        self.dim, self.zdim, self.hdim, self.window, self.attn = dim, zdim, hdim, window, attn
        self.bidirectional, self.rel_pos_bias, self.max_positions = bidirectional, rel_pos_bias, max_positions
        self.attention_dropout, self.hidden_dropout = attention_dropout, hidden_dropout
        self.in_proj = nn.Linear(dim, zdim + 2 * hdim)
        self.out_proj = nn.Linear(hdim, dim)
        self.gamma, self.beta = nn.Parameter(torch.empty(2, zdim)), nn.Parameter(torch.empty(2, zdim))
        reach = {"simple": max_positions - 1, "local": window or 0, "rotary": None}[rel_pos_bias]
        table = None if reach is None else nn.Parameter(torch.empty(2 * reach + 1))
        self.register_parameter("position_bias", table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from normal distributions cut off at two standard deviations of 0.02."""
        for linear in (self.in_proj, self.out_proj):
            truncated_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        truncated_normal_(self.gamma)
        nn.init.zeros_(self.beta)
        if self.position_bias is not None:
            truncated_normal_(self.position_bias)

    def check_length(self, length: int) -> None:
        """Refuse sequences longer than there are positions."""
        if self.rel_pos_bias == "simple" and length > self.max_positions:
            raise ValueError(
                f'max_positions must be at least the length, {length}, with rel_pos_bias="simple", got '
                f"{self.max_positions}"
            )

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        positions: Int[Tensor, "batch time"] | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
        slots: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Attend.

        Args:
            x: The elements.
            positions: Their original positions.
            mask: Which of them count.
            slots: The places by which the window is counted.
        """
        check_features("x", x, self.dim, 3)
        if positions is None:
            self.check_length(x.shape[1])
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if mask is None:
            mask = torch.ones_like(positions, dtype=torch.bool)
        q, k, v, gate = self._operands(x, positions)
        if self.attn == "relu2":
            q = q / self._keys_seen(mask, slots)
        if slots is None and self.window is not None and self.window + 1 < x.shape[1]:
            blocks = cut_in_blocks(q, k, v, positions, mask, self.window, self.bidirectional)
        else:
            blocks = whole(q, k, v, positions, mask, slots)
        attended = self._attend(blocks).flatten(1, 2)[:, : x.shape[1]]
        h: Tensor = self.out_proj(attended * gate)
        return h

    def step(
        self,
        x: Float[Tensor, "batch dim"],
        positions: Int[Tensor, " batch"],
        active: Bool[Tensor, " batch"],
        state: GAUState | None = None,
    ) -> tuple[Float[Tensor, "batch dim"], GAUState]:
        """Take one element of each sequence.

        Args:
            x: The elements.
            positions: Their original positions.
            active: Whether they are selected: only then they enter the state. The others' outputs mean nothing.
            state: What the step before returned; ``None`` at the beginning.

        Returns:
            Outputs and state.

        Raises:
            RuntimeError: It is bidirectional.
        """
        check_features("x", x, self.dim, 2)
        if self.bidirectional:
            raise RuntimeError("step needs a causal unit: bidirectional=True has to see later elements")
        q, k, v, gate = self._operands(x[:, None], positions[:, None])
        state = self._empty(k, v, positions) if state is None else state
        keys, values = torch.cat((state.keys, k), 1), torch.cat((state.values, v), 1)
        places = torch.cat((state.positions, positions[:, None]), 1)
        mask = torch.cat((state.mask, active[:, None]), 1)
        if self.attn == "relu2":
            q = q / (state.mask.sum(1)[:, None, None] + 1 if self.window is None else self.window)
        offset = torch.arange(1 - keys.shape[1], 1, device=x.device)
        blocks = Blocks(*(one[:, None] for one in (q, keys, values, positions[:, None], places, mask)), offset)
        h: Tensor = self.out_proj(self._attend(blocks)[:, 0, 0] * gate[:, 0])
        if self.window is None:
            return h, GAUState(keys, values, places, mask)
        taken = active[:, None]
        kept = (
            torch.where(taken[..., None], keys[:, 1:], state.keys),
            torch.where(taken[..., None], values[:, 1:], state.values),
            torch.where(taken, places[:, 1:], state.positions),
            torch.where(taken, mask[:, 1:], state.mask),
        )
        return h, GAUState(*kept)

    def _empty(self, k: Tensor, v: Tensor, positions: Tensor) -> GAUState:
        size = self.window or 0
        batch = len(k)
        return GAUState(
            k.new_zeros(batch, size, self.zdim),
            v.new_zeros(batch, size, self.hdim),
            positions.new_zeros(batch, size),
            torch.zeros(batch, size, dtype=torch.bool, device=k.device),
        )

    def _operands(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries (scaled for softmax), keys, values and the gate."""
        sizes = [self.zdim, self.hdim, self.hdim]
        z, gate, v = F.silu(self.in_proj(x)).split(sizes, -1)
        q, k = (z[..., None, :] * self.gamma + self.beta).unbind(-2)
        if self.rel_pos_bias == "rotary":
            q, k = rotate_at(q, positions), rotate_at(k, positions)
        if self.attn == "softmax":
            q = q / math.sqrt(self.zdim)
        return q, k, F.dropout(v, self.hidden_dropout, self.training), gate

    def _keys_seen(self, mask: Tensor, slots: Tensor | None) -> Tensor | int:
        """Return n, by which relu² divides the products."""
        if self.window is not None:
            return 2 * self.window if self.bidirectional else self.window
        if self.bidirectional:
            return mask.sum(1)[:, None, None].clamp(min=1)
        own = torch.arange(mask.shape[1], device=mask.device) if slots is None else slots
        return (own + 1).clamp(min=1)[..., None]

    def _attend(self, blocks: Blocks) -> Tensor:
        """Attend within blocks: the only place where scores are made."""
        scores = blocks.q @ blocks.k.mT
        scores = scores.to(wide(scores.dtype))
        if self.rel_pos_bias == "local" and self.window is not None:
            within = blocks.offset.clamp(-self.window, self.window)
            scores = scores + _look_up(self.position_bias, within + self.window)
        elif self.rel_pos_bias == "simple":
            distance = blocks.key_positions[..., None, :] - blocks.query_positions[..., None]
            scores = scores + _look_up(self.position_bias, distance + self.max_positions - 1)
        weights = self._weigh(scores, self._visible(blocks))
        weights = F.dropout(weights, self.attention_dropout, self.training)
        return weights.to(blocks.v.dtype) @ blocks.v

    def _visible(self, blocks: Blocks) -> Tensor:
        """Return which keys each query sees."""
        offset = blocks.offset
        visible = blocks.key_mask[..., None, :].expand(*blocks.q.shape[:-1], -1)
        if self.window is not None:
            visible = visible & (offset >= -self.window) & (offset <= self.window)
        if not self.bidirectional:
            visible = visible & (offset <= 0)
        return visible

    def _weigh(self, scores: Tensor, visible: Tensor) -> Tensor:
        if self.attn == "relu2":
            return F.relu(scores).square() * visible
        # Rows without a key are those of queries that do not count: they get zeros.
        alone = ~visible.any(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(~(visible | alone), -math.inf), -1) * visible

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.dim}, {self.zdim}, {self.hdim}, window={self.window}, attn={self.attn!r}"


def rotate_at(x: Float[Tensor, "batch time head"], positions: Int[Tensor, "batch time"]) -> Tensor:
    """Turn features 2m, 2m + 1 by the angle position · 10000^(−2m/d), each element by its own position."""
    head = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=x.device, dtype=torch.float64) / head)
    angle = positions[..., None] * frequency
    cos, sin = angle.cos().to(wide(x.dtype)), angle.sin().to(wide(x.dtype))
    even, odd = x.to(wide(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, table[:, None])[..., 0]
