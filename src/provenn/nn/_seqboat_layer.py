"""The SeqBoat layer, and the norms that it chooses among."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._seqboat_gau import AttentionFunction, GatedAttentionUnit, GAUState, PositionKind
from provenn.nn._seqboat_sma import SparseModularActivation
from provenn.nn._seqboat_ssm import S4D, DiagonalSSM, MultiHeadEMA, check_features, truncated_normal_

_SSMS: dict[str, type[DiagonalSSM]] = {"ema": MultiHeadEMA, "s4d": S4D}
NORMS = ("layernorm", "batchnorm", "scalenorm")


class LayerState(NamedTuple):
    """What decoding keeps of a layer: the SSM's state, the last selected elements, and the number of steps taken."""

    ssm: Tensor
    attention: GAUState | None
    time: int


class ScaleNorm(nn.Module):
    """x over its root mean square along the features, times one learned number."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return the scaled features."""
        return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of each feature over batch and time."""

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:  # noqa: A002 - torch's name
        """Return the normalised features."""
        return super().forward(input.flatten(0, -2)).reshape(input.shape)


def make_norm(name: str, dim: int) -> nn.Module:
    """Build a norm along the last dimension."""
    check_choice("norm", name, NORMS)
    if name == "scalenorm":
        return ScaleNorm()
    return nn.LayerNorm(dim) if name == "layernorm" else SequenceBatchNorm(dim)


class SeqBoatLayer(nn.Module):
    r"""A linear state-space model on every element, and gated attention on those that a learned router selects.

    .. math::
        m = \mathrm{SiLU}(\mathrm{SSM}(\mathrm{norm}(x))),\quad (u, h_x) = W m + b,\quad
        y = \mathrm{SiLU}(h_x + \mathrm{SMA}(\mathrm{GAU})(m; u) + x)

    The selected elements are packed, so that a window of w slots may reach far back in time, and only they cost
    attention.

    Args:
        d_model: D.
        zdim: d_z, features of queries and keys.
        hdim: d_h, features of values; default 2D.
        ndim: Components of the SSM a channel.
        window: w, slots of the packed axis that a query sees back, and with ``bidirectional`` on; ``None``: all of the
            selected (SeqBoat-full).
        attn: ``"softmax"`` or ``"relu2"``.
        bidirectional: Whether SSM and attention look at later elements.
        rel_pos_bias: ``"simple"`` (original positions), ``"local"`` (packed positions) or ``"rotary"`` (original).
        max_positions: Longest sequence with ``"simple"``.
        init_temp_scale: s₀ of the router's temperature.
        ssm: ``"ema"`` or ``"s4d"``.
        norm: ``"layernorm"``, ``"batchnorm"`` (over batch and time) or ``"scalenorm"``.
        prenorm: Whether the norm stands before the SSM, else at the end.
        dropout: Share dropped, in training, of m and of what is added to the residual (without causality of the
            attention's part alone).
        attention_dropout: Share of attention weights dropped.
        hidden_dropout: Share of the values' features dropped.
        packing: Whether the selected elements are packed; without it attention is masked, at O(L²) and of static shape.

    Shape:
        x (batch, time, D), ``padding_mask`` (batch, time), True at padding → (batch, time, D).

    Returns:
        Calling it returns y. ``last_activation`` then holds the share of elements, without padding, that attention got.

    Raises:
        TypeError: A size is no integer.
        ValueError: A size < 1, an unknown choice, a sequence longer than ``max_positions`` with ``"simple"``, or x of
            another shape.
        RuntimeError: ``step`` of a bidirectional layer.

    Cost: O(L D (log L + N + D)) for the SSM and the projections, and O(r (D (d_z + d_h) + w (d_z + d_h))) for the
    attention on r ≤ L elements, the most selected in a sequence of the batch. ``step``: O(D (N + D)), and with any
    element of the batch selected O(D (d_z + d_h) + w (d_z + d_h)).

    With packing r depends on the data: it is read back from the device in every call, ``torch.compile`` breaks its
    graph there, and ``fullgraph=True`` and ``torch.export`` refuse. ``packing=False`` compiles and exports whole, and
    loads the same weights.

    Source: section 3.3 of the paper; defaults and order of dropout, norm and activations as in the authors' code.
    """

    def __init__(
        self,
        d_model: int,
        zdim: int = 64,
        hdim: int | None = None,
        *,
        ndim: int = 16,
        window: int | None = 128,
        attn: AttentionFunction = "softmax",
        bidirectional: bool = False,
        rel_pos_bias: PositionKind = "simple",
        max_positions: int = 1024,
        init_temp_scale: float = 1.0,
        ssm: Literal["ema", "s4d"] = "ema",
        norm: str = "layernorm",
        prenorm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        packing: bool = True,
    ) -> None:
        super().__init__()
        check_integer("d_model", d_model, at_least=1)
        check_choice("ssm", ssm, _SSMS)
        check_number("dropout", dropout, at_least=0, below=1)
        self.d_model, self.bidirectional, self.prenorm, self.dropout = d_model, bidirectional, prenorm, dropout
        self.norm = make_norm(norm, d_model)
        self.ssm = _SSMS[ssm](d_model, ndim, bidirectional)
        unit = GatedAttentionUnit(
            d_model, zdim, 2 * d_model if hdim is None else hdim, window, attn, bidirectional=bidirectional,
            rel_pos_bias=rel_pos_bias, max_positions=max_positions, attention_dropout=attention_dropout,
            hidden_dropout=hidden_dropout,
        )  # fmt: skip
        self.proj = nn.Linear(d_model, 2 + d_model)
        truncated_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.sma = SparseModularActivation(
            unit, d_model, init_temp_scale=init_temp_scale, projection=False, contextual=True, packing=packing
        )

    @property
    def gau(self) -> GatedAttentionUnit:
        """The attention unit."""
        unit = self.sma.inner[0]
        assert isinstance(unit, GatedAttentionUnit)
        return unit

    @property
    def last_activation(self) -> Tensor | None:
        """Share of elements, without padding, that attention got in the last call; ``None`` before."""
        return self.sma.last_activation

    def forward(
        self, x: Float[Tensor, "batch time dim"], padding_mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """Return the layer's output.

        Args:
            x: The sequences.
            padding_mask: True at padding.
        """
        check_features("x", x, self.d_model, 3)
        if padding_mask is not None and padding_mask.shape != x.shape[:2]:
            raise ValueError(f"padding_mask must be {tuple(x.shape[:2])}, got shape {tuple(padding_mask.shape)}")
        self.gau.check_length(x.shape[1])
        m, logits, linear = self._route(self.ssm(self._before(x), padding_mask))
        return self._combine(x, linear, self.sma(m, logits, padding_mask))

    def step(
        self, x: Float[Tensor, "batch dim"], state: LayerState | None = None
    ) -> tuple[Float[Tensor, "batch dim"], LayerState]:
        """Take the next element of each sequence, as in decoding: ``step`` over a sequence gives ``forward``.

        Args:
            x: The elements.
            state: What the step before returned; ``None`` at the beginning.

        Shape:
            x (batch, D) → (batch, D).

        Returns:
            Output, and state: the SSM's, and the last w selected keys and values.

        Raises:
            RuntimeError: The layer is bidirectional.
            ValueError: ``"simple"`` has no bias for so many positions.

        Cost: as the class says; with no element selected attention costs nothing.
        """
        check_features("x", x, self.d_model, 2)
        hidden, attention, time = (None, None, 0) if state is None else state
        self.gau.check_length(time + 1)
        y, hidden = self.ssm.step(self._before(x), hidden)
        m, logits, linear = self._route(y)
        active, confidence = (one[..., 0] for one in self.sma.route(logits))
        h = torch.zeros_like(x)
        if active.any():
            positions = torch.full((len(x),), time, device=x.device)
            h, attention = self.gau.step(m, positions, active, attention)
            h = h * (confidence * active).to(h.dtype)[:, None]
        return self._combine(x, linear, h), LayerState(hidden, attention, time + 1)

    def _before(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x) if self.prenorm else x
        return y

    def _route(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return m, the router's logits, and the linear branch."""
        m = F.dropout(F.silu(y), self.dropout, self.training)
        logits, linear = self.proj(m).split([2, self.d_model], -1)
        return m, logits, linear

    def _combine(self, x: Tensor, linear: Tensor, h: Tensor) -> Tensor:
        if self.bidirectional:
            added = linear + F.dropout(h, self.dropout, self.training)
        else:
            added = F.dropout(linear + h, self.dropout, self.training)
        y: Tensor = F.silu(added + x)
        return y if self.prenorm else self.norm(y)
