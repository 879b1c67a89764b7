"""What surrounds attention: the call of ``nn.MultiheadAttention``, projections, norms, rotary positions."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.sequences.masks import Mask, combine_masks
from provenn.core.sequences.positions import rotate

Heads = Float[Tensor, "batch heads tokens head"]


class MultiheadLayer(nn.Module):
    """Multi-head attention with the call signature of ``torch.nn.MultiheadAttention``; what attends is a subclass's.

    Args:
        embed_dim: Features D of a query, and of the output.
        num_heads: Heads H; each sees D/H features.
        qk_norm: Whether to normalise queries and keys per head (one LayerNorm over the head's features for each of
            the two, shared by the heads).
        causal: Whether no query looks at later keys. The last query stands where the last key does.
        rope: Whether to rotate queries and keys by their positions.
        layer_scale: Start value of a factor per output feature; ``None`` for no factor.
        out_norm: Whether to normalise the output (LayerNorm), before the factor.
        dropout: Share of attention weights dropped in training.
        projection_bias: Whether the projections of queries, keys, values and output have biases.
        kdim: Features of a key; default D.
        vdim: Features of a value; default D.
        batch_first: Whether inputs are (batch, tokens, features), else (tokens, batch, features).
        device: Where to put the parameters.
        dtype: Their type.

    Raises:
        ValueError: ``embed_dim`` is not divisible by ``num_heads``, a number is out of bounds, or ``rope`` with an
            odd head size.
    """

    # What torch.nn.TransformerEncoderLayer asks to decide whether it may skip this module's forward and run its own
    # fused softmax attention on its weights. It must not.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        causal: bool = False,
        rope: bool = False,
        layer_scale: float | None = None,
        out_norm: bool = False,
        dropout: float = 0.0,
        projection_bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("embed_dim", embed_dim, at_least=1)
        check_integer("num_heads", num_heads, at_least=1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        if rope and self.head_dim % 2:
            raise ValueError(f"rope needs an even head size, got embed_dim / num_heads = {self.head_dim}")
        check_number("dropout", dropout, at_least=0, below=1)
        if layer_scale is not None:
            check_number("layer_scale", layer_scale)
        self.causal, self.rope, self.dropout, self.batch_first = causal, rope, dropout, batch_first
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=projection_bias, **place)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=projection_bias, **place)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=projection_bias, **place)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=projection_bias, **place)
        self.q_norm = nn.LayerNorm(self.head_dim, **place) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, **place) if qk_norm else nn.Identity()
        self.out_norm = nn.LayerNorm(embed_dim, **place) if out_norm else nn.Identity()
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((embed_dim,), layer_scale, **place))
        self._reset_projections()

    def _reset_projections(self) -> None:
        """Start as ``nn.MultiheadAttention`` does: Xavier over the three projections as one matrix, biases zero."""
        packed = self.kdim == self.vdim == self.embed_dim
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5 if packed else 1.0)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    @abstractmethod
    def attend(
        self, q: Heads, k: Heads, v: Heads, mask: Mask | None, causal: bool, need_weights: bool
    ) -> tuple[Heads, Float[Tensor, "batch heads queries keys"] | None]:
        """Attend with projected, normalised and rotated heads.

        Args:
            q: Queries, (batch, heads, L, head_dim).
            k: Keys, (batch, heads, S, head_dim).
            v: Values, (batch, heads, S, head_dim).
            mask: Broadcastable to (batch, heads, L, S): True where a query may look, or added to the scores.
            causal: Whether no query looks ahead.
            need_weights: Whether to return the weights.
        """

    def forward(
        self,
        query: Float[Tensor, "... embed_dim"],
        key: Float[Tensor, "... kdim"],
        value: Float[Tensor, "... vdim"],
        key_padding_mask: Mask | None = None,
        need_weights: bool = True,
        attn_mask: Mask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "... embed_dim"], Float[Tensor, "..."] | None]:
        """Attend; arguments and results are those of ``nn.MultiheadAttention``.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            key_padding_mask: (batch, S): True where a key is padding, or added to its scores.
            need_weights: Whether to return the weights, at the cost of an L × S matrix a head.
            attn_mask: (L, S) or (batch · heads, L, S): True where a query may **not** look (as in
                ``nn.MultiheadAttention``, the opposite of ``scaled_dot_product_attention``), or added to the scores.
            average_attn_weights: Whether the returned weights are averaged over heads.
            is_causal: Applies a causal mask; beside an ``attn_mask`` a hint that it is the causal one.

        Shape:
            query (batch, L, D), key (batch, S, kdim), value (batch, S, vdim) → output (batch, L, D), weights
            (batch, L, S) or (batch, heads, L, S). Without ``batch_first`` the first two dimensions are swapped;
            without a batch they lack the first.

        Returns:
            The output, and the weights or ``None``. A query that sees no key gets the output of zero weights, i.e.
            what the output projection makes of zero.

        Raises:
            TypeError: A mask is neither boolean nor floating-point.
            ValueError: Shapes do not fit.
        """
        batched = query.ndim == 3
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            raise ValueError(f"query must have 2 or 3 dimensions, and key and value as many, got {tuple(query.shape)}")
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        (batch, queries, _), keys = query.shape, key.shape[1]
        if key.shape[0] != batch or value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"key must have the batch of query and the length of value, got {tuple(key.shape)} beside "
                f"{tuple(query.shape)} and {tuple(value.shape)}"
            )
        causal = self.causal
        if is_causal and (attn_mask is None or queries == keys):
            causal, attn_mask = True, None
        mask = combine_masks(
            _visible_padding(key_padding_mask, batch, keys), _visible(attn_mask, batch, self.num_heads, queries, keys)
        )
        q, k, v = self._project(query, key, value)
        output, weights = self.attend(q, k, v, mask, causal, need_weights)
        output = self.out_norm(self.out_proj(output.transpose(1, 2).flatten(2)))
        if self.gamma is not None:
            output = output * self.gamma
        if not need_weights:
            weights = None
        elif weights is not None:
            weights = (weights.mean(dim=1) if average_attn_weights else weights).to(output.dtype)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = (self.num_heads, self.head_dim)
        q = self.q_norm(self.q_proj(query).unflatten(-1, split)).transpose(1, 2)
        k = self.k_norm(self.k_proj(key).unflatten(-1, split)).transpose(1, 2)
        v = self.v_proj(value).unflatten(-1, split).transpose(1, 2)
        if self.rope:
            q, k = rotate(q, offset=k.shape[-2] - q.shape[-2]), rotate(k)
        return q, k, v


def is_softmax_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return whether a module is torch's attention, also by a subclass, unless that computes something else."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def _check_mask_type(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating-point, got {mask.dtype}")


def _visible_padding(mask: Mask | None, batch: int, keys: int) -> Mask | None:
    """Turn a key padding mask into one of visibility that broadcasts to (batch, heads, L, S)."""
    if mask is None:
        return None
    _check_mask_type("key_padding_mask", mask)
    if mask.shape not in ((batch, keys), (keys,)) or (mask.ndim == 1 and batch != 1):
        raise ValueError(f"key_padding_mask must be {(batch, keys)}, got {tuple(mask.shape)}")
    mask = mask.reshape(batch, 1, 1, keys)
    return ~mask if mask.dtype == torch.bool else mask


def _visible(mask: Mask | None, batch: int, heads: int, queries: int, keys: int) -> Mask | None:
    if mask is None:
        return None
    _check_mask_type("attn_mask", mask)
    if mask.shape not in ((queries, keys), (batch * heads, queries, keys)):
        raise ValueError(
            f"attn_mask must be {(queries, keys)} or {(batch * heads, queries, keys)}, got {tuple(mask.shape)}"
        )
    if mask.ndim == 3:
        mask = mask.unflatten(0, (batch, heads))
    return ~mask if mask.dtype == torch.bool else mask
