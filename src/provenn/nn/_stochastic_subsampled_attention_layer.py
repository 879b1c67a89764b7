"""The attention layer that sees a random part of the sources in training, and all of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.sequences.attention import wide
from provenn.core.sequences.masks import Mask
from provenn.core.sequences.multihead import MultiheadLayer
from provenn.nn._stochastic_subsampled_attention_subsets import Subset, draw_subset, windows_of

Pairwise = Callable[[Tensor, Tensor], Tensor]
"""A function of the original indices i of queries and j of sources, which broadcast against each other."""

IMPLEMENTATIONS = ("auto", "gather", "mask", "fused")


class SubsampledAttention(MultiheadLayer):
    r"""Multi-head attention of which each query sees N/s random sources in training; a drop-in ``MultiheadAttention``.

    Every call in training mode draws an order π of the sources, shared by heads and batch, and no other layer's.
    Queries are cut in s windows, the ordered sources too, and window b attends to window b:

    .. math::
        \mathrm{out}_i = \sum_{j \in \pi(b_i)} \mathrm{softmax}_j(q_i \cdot k_j / \sqrt{d} + r_{ij})\, v_j

    so that every source is used once, and its part of the softmax is normalised by itself. In evaluation mode every
    query sees every source.

    Args:
        embed_dim: Features D of a query, and of the output.
        num_heads: Heads H; each sees D/H features.
        sparsity: s ≥ 1; 1 is dense attention. An attribute that may be changed between calls.
        bias: ``"none"``: the order of sources is uniform; ``"local"``: sources are sorted by
            i + σ · (N/s) · N(0, 1), so that a window holds mainly sources from near.
        sigma: σ ≥ 0, in windows; 0 is plain windowed attention.
        implementation: ``"gather"`` attends block by block; ``"mask"`` computes all scores and hides the rest, the
            same mathematics at the cost of dense attention; ``"fused"`` hands the blocks to
            ``scaled_dot_product_attention``, without masks, biases, weights and ``include_self``; ``"auto"``:
            ``"gather"``. Calls that need weights use the mask.
        include_self: Whether a query sees its own source beside its subset, so that no causal query is left without.
        causal: Whether no query looks at later sources.
        attn_mask: ``attn_mask(i, j)`` of original indices: True where query i may **not** look at source j, or
            what is added to the score.
        rel_bias: ``rel_bias(i, j)``, added to the score: shaped as i and j broadcast, or (heads, ...). A module is
            trained with the layer.
        moving_windows: Whether the windows' borders move by a random offset in every call.
        grid: Height and width of a grid of tokens: windows are then two-dimensional, and so is ``"local"``.
        strict: Whether a length that s does not divide is refused; else sources and queries are padded.
        eval_samples: What evaluation does: 0 attends densely; m averages the outputs of m draws in this layer. An
            attribute that may be changed between calls.
        dropout: Share of attention weights dropped in training, where attention is dense: sampling replaces it.
        projection_bias: Whether the projections of queries, keys, values and output have biases.
        batch_first: Whether inputs are (batch, tokens, features), else (tokens, batch, features).
        device: Where to put the parameters.
        dtype: Their type.

    Attributes:
        pathway_seed: ``None``: draws come from torch's global generator (which ``torch.utils.checkpoint`` keeps for
            the second pass). A number: every call draws the subset of that seed.

    Shape:
        query (batch, N, D), key (batch, N, D), value (batch, N, D) → output (batch, N, D), and the weights
        (batch, N, N), averaged over heads, or ``None``. Dense calls take any number of sources.

    Returns:
        Calling it returns output and weights, as ``nn.MultiheadAttention`` does. A query that sees no source gets
        what the output projection makes of 0.

    Raises:
        TypeError: A mask is neither boolean nor floating-point, or an argument of another type.
        ValueError: ``sparsity`` < 1, ``sigma`` < 0, an unknown ``bias`` or ``implementation``, ``"fused"`` with a
            custom bias or mask or ``include_self``, ``embed_dim`` not divisible by ``num_heads``, a ``grid`` that does
            not fit, a length not divisible by s if ``strict``, or sampling where key and query differ in length.

    Cost: 2 N²D/s multiply–accumulates for scores and weighted values, 2 ND for the own source, and memory of
    H N (N/s + 1) scores a sample; the four projections are dense attention's.

    Source: section 3 of the paper; the fallback to the own source is this implementation's.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        sparsity: int = 4,
        bias: Literal["none", "local"] = "none",
        sigma: float = 1.0,
        implementation: Literal["auto", "gather", "mask", "fused"] = "auto",
        include_self: bool = True,
        *,
        causal: bool = False,
        attn_mask: Pairwise | None = None,
        rel_bias: Pairwise | None = None,
        moving_windows: bool = False,
        grid: tuple[int, int] | None = None,
        strict: bool = False,
        eval_samples: int = 0,
        dropout: float = 0.0,
        projection_bias: bool = True,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim, num_heads, causal=causal, dropout=dropout, projection_bias=projection_bias,
            batch_first=batch_first, **place,
        )  # fmt: skip
        check_integer("sparsity", sparsity, at_least=1)
        check_choice("bias", bias, ("none", "local"))
        check_number("sigma", sigma, at_least=0)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        check_integer("eval_samples", eval_samples, at_least=0)
        if implementation == "fused" and (include_self or causal or attn_mask or rel_bias):
            raise ValueError(
                "implementation must not be 'fused' with include_self, causal, attn_mask or rel_bias: "
                "its kernel knows no custom bias"
            )
        if grid is not None:
            check_integer("grid", grid[0], at_least=1)
            check_integer("grid", grid[1], at_least=1)
            windows_of(grid[0] * grid[1], sparsity, grid, strict)
        self.sparsity, self.bias, self.sigma, self.implementation = sparsity, bias, sigma, implementation
        self.include_self, self.moving_windows, self.grid, self.strict = include_self, moving_windows, grid, strict
        self.eval_samples = eval_samples
        self.pairwise_mask, self.rel_bias = attn_mask, rel_bias
        self.pathway_seed: int | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with projected heads; see the base class."""
        if self.implementation == "fused" and (need_weights or mask is not None or causal):
            raise ValueError("implementation must not be 'fused' for a call with need_weights or a mask")
        draws = 1 if self.training else self.eval_samples
        if draws == 0 or self.sparsity == 1:
            return self._dense(q, k, v, mask, causal)
        generator = None if self.pathway_seed is None else torch.Generator().manual_seed(self.pathway_seed)
        results = [self._sampled(q, k, v, mask, causal, need_weights, generator) for _ in range(draws)]
        if draws == 1:
            return results[0]
        outputs, weights = zip(*results, strict=True)
        return torch.stack(outputs).mean(dim=0), torch.stack(weights).mean(dim=0) if need_weights else None

    def draw(self, tokens: int, generator: torch.Generator | None = None, device: Any = None) -> Subset:
        """Draw what a call on so many tokens sees.

        Args:
            tokens: N.
            generator: Draws, on the CPU; ``None``: torch's global one.
            device: Where the indices go.

        Returns:
            Original indices of queries and sources, window by window; those from N on are padding.
        """
        windows = windows_of(tokens, self.sparsity, self.grid, self.strict)
        return draw_subset(windows, self.bias, self.sigma, self.moving_windows, generator, device)

    def _sampled(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None,
        causal: bool,
        need_weights: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(f"key must have the query's length to be sampled, got {k.shape[-2]} and {q.shape[-2]}")
        subset = self.draw(k.shape[-2], generator, q.device)
        if self.implementation == "mask" or need_weights:
            return self._dense(q, k, v, mask, causal, self._visible(subset, k.shape[-2]))
        return self._gathered(q, k, v, mask, causal, subset), None

    def _visible(self, subset: Subset, tokens: int) -> Tensor:
        """Return which sources the queries see, (N, N)."""
        blocks = torch.arange(len(subset.queries), device=subset.queries.device)
        blocks = blocks.repeat_interleave(subset.queries.shape[1])
        of_query, of_source = (blocks[one.flatten().argsort()][:tokens] for one in subset)
        visible = of_query[:, None] == of_source
        return visible | torch.eye(tokens, dtype=torch.bool, device=visible.device) if self.include_self else visible

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.implementation == "fused":
            return nn.functional.scaled_dot_product_attention(q, k, v), None
        queries, keys = q.shape[-2], k.shape[-2]
        i = torch.arange(keys - queries, keys, device=q.device)[:, None]
        j = torch.arange(keys, device=q.device)
        scores = self._masked(self._products(q, k), i, j, mask, causal, keys)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = _softmax(scores)
        if self.training and self.dropout > 0 and visible is None:
            weights = torch.dropout(weights, self.dropout, train=True)
        return torch.matmul(weights, v.to(weights.dtype)).to(v.dtype), weights

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, subset: Subset) -> Tensor:
        queries, sources = subset
        keys, padding = k.shape[-2], sources.numel() - k.shape[-2]
        if padding:
            q, k, v = (nn.functional.pad(one, (0, 0, 0, padding)) for one in (q, k, v))
        i, j = queries[:, :, None], sources[:, None, :]
        blocks = q[:, :, queries]
        if self.implementation == "fused" and not padding:
            out = nn.functional.scaled_dot_product_attention(blocks, k[:, :, sources], v[:, :, sources])
        else:
            scores = self._products(blocks, k[:, :, sources])
            scores = self._masked(scores, i, j, _picked(mask, i, j, keys), causal, keys)
            values = v[:, :, sources].to(scores.dtype)
            own = own_values = None
            if self.include_self:
                own = self._own_scores(blocks, k, i, mask, causal, keys)
                own = own.masked_fill((i == j).any(dim=-1, keepdim=True), float("-inf"))
                own_values = v[:, :, queries].to(scores.dtype)
            out = _weighted(scores, values, own, own_values)
        return out.flatten(2, 3)[:, :, queries.flatten().argsort()[:keys]].to(v.dtype)

    def _own_scores(self, blocks: Tensor, k: Tensor, i: Tensor, mask: Mask | None, causal: bool, keys: int) -> Tensor:
        dtype = wide(blocks.dtype)
        own = (blocks.to(dtype) * k[:, :, i.squeeze(-1)].to(dtype)).sum(dim=-1, keepdim=True)
        return self._masked(own / math.sqrt(self.head_dim), i, i, _picked(mask, i, i, keys), causal, keys)

    def _products(self, q: Tensor, k: Tensor) -> Tensor:
        dtype = wide(q.dtype)
        return torch.matmul(q.to(dtype), k.to(dtype).mT) / math.sqrt(self.head_dim)

    def _masked(self, scores: Tensor, i: Tensor, j: Tensor, mask: Tensor | None, causal: bool, keys: int) -> Tensor:
        """Add what depends on original indices: bias, masks, and −∞ for padding and, if causal, the future."""
        query, source = i.clamp(max=keys - 1), j.clamp(max=keys - 1)  # no function is asked about padding
        if self.rel_bias is not None:
            scores = scores + self.rel_bias(query, source)
        if self.pairwise_mask is not None:
            given = self.pairwise_mask(query, source)
            bars = given.dtype == torch.bool
            scores = scores.masked_fill(given, float("-inf")) if bars else scores + given
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        hidden = (j >= keys) | (j > i) if causal else j >= keys
        return scores.masked_fill(hidden, float("-inf"))

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, sparsity={self.sparsity}, bias={self.bias!r}"


def _softmax(scores: Tensor) -> Tensor:
    """Softmax with weights 0, and gradients 0, in rows that are hidden whole."""
    hidden = scores == float("-inf")
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(hidden, 0.0)


def _weighted(scores: Tensor, values: Tensor, own: Tensor | None, own_values: Tensor | None) -> Tensor:
    """Average values by softmax weights, the own source's beside a block's; 0 in rows that are hidden whole.

    Divided after the product, so that scores and own scores need not be copied into one tensor.
    """
    top = scores.amax(dim=-1, keepdim=True)
    top = top if own is None else torch.maximum(top, own)
    top = top.detach().clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    out, total = torch.matmul(weights, values), weights.sum(dim=-1, keepdim=True)
    if own is not None and own_values is not None:
        weight = (own - top).exp()
        out, total = out + weight * own_values, total + weight
    return out / total.clamp(min=0.5)  # at least 1 wherever a source is seen


def _picked(mask: Mask | None, i: Tensor, j: Tensor, keys: int) -> Tensor | None:
    """Take the entries at original indices out of a mask (..., L or 1, S); padding gets any."""
    if mask is None:
        return None
    query, source = i.clamp(max=keys - 1), j.clamp(max=keys - 1)
    return mask[..., query, source] if mask.shape[-2] > 1 else mask[..., 0, :][..., source]
