"""The sigmoid attention layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.sequences.attention import wide
from provenn.core.sequences.masks import Mask
from provenn.core.sequences.multihead import MultiheadLayer
from provenn.core.sequences.positions import alibi_slopes
from provenn.nn._sigmoid_attention_functional import BACKENDS, Backend, attend

BIASES = ("-log_n", "visible", "learnable")


class SigmoidAttention(MultiheadLayer):
    r"""Multi-head sigmoid attention with the call signature of ``torch.nn.MultiheadAttention``.

    .. math::
        \mathrm{SigmoidAttn}(X) = \sigma(e^t (QK^\top / \sqrt{d} - m|i - j|) + b)\, V

    What the paper found training to need are switches: LayerScale for vision (``layer_scale=1e-4``), QK norm, and for
    language models with long contexts a norm on the output ("hybrid norm", ``out_norm``), which makes a pre-norm
    block x + norm(attn(norm(x))).

    Args:
        embed_dim: Features D of a query, and of the output.
        num_heads: Heads H; each sees d = D/H features.
        bias: b. ``"-log_n"``: −log n, n being ``max_length``. ``"visible"``: −log of the number of keys that each
            query may see, without padding and what the masks hide. ``"learnable"``: one learned number, from −10 on.
            A number: constant; 0 leaves it out.
        qk_norm: Whether to normalise queries and keys (LayerNorm over each head's features).
        causal: Whether no query looks at later keys. The last query stands where the last key does.
        alibi: Whether scores lose a slope m (one a head) times the distance of query and key.
        rope: Whether to rotate queries and keys by their positions.
        layer_scale: Start value of a factor per output feature; ``None`` for no factor.
        out_norm: Whether to normalise the output, before the factor.
        max_length: n of ``"-log_n"``: the maximum, or the training, length. ``None``: the number of keys of each call,
            padding included; then a change of length changes the bias.
        temperature: t; scores are multiplied by exp(t).
        dropout: Share of attention weights dropped in training.
        projection_bias: Whether the projections of queries, keys, values and output have biases.
        kdim: Features of a key; default D.
        vdim: Features of a value; default D.
        batch_first: Whether inputs are (batch, tokens, features), else (tokens, batch, features).
        backend: As in :func:`sigmoid_attention`. Dropout in training and ``need_weights`` use the reference.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        query (batch, L, D), key (batch, S, kdim), value (batch, S, vdim) → output (batch, L, D), and the weights
        (batch, L, S), averaged over heads, or ``None`` if ``need_weights`` is false.

    Returns:
        Calling it returns output and weights, as ``nn.MultiheadAttention`` does; the weights of a row need not sum to
        1. A query that sees no key attends to nothing: its output is what the output projection makes of 0.

    Raises:
        TypeError: A mask is neither boolean nor floating-point.
        ValueError: ``embed_dim`` is not divisible by ``num_heads``, an unknown ``bias`` or ``backend``, a number out of
            bounds, or shapes that do not fit.
        RuntimeError: ``backend="triton"`` without CUDA or without triton.

    Cost: time and memory of four D × D projections and of :func:`sigmoid_attention`; ``need_weights`` (the default, as
    in torch) holds all L × S weights.

    Source: section 2 (the layer and its bias), section 5 and appendix F (LayerScale, QK norm, hybrid norm) of the
    paper; order of terms, norms and positions as in the authors' ``attention_simulator``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: float | str = "-log_n",
        qk_norm: bool = False,
        causal: bool = False,
        alibi: bool = False,
        rope: bool = False,
        layer_scale: float | None = None,
        out_norm: bool = False,
        *,
        max_length: int | None = None,
        temperature: float = 0.0,
        dropout: float = 0.0,
        projection_bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, qk_norm=qk_norm, causal=causal, rope=rope, layer_scale=layer_scale,
            out_norm=out_norm, dropout=dropout, projection_bias=projection_bias, kdim=kdim, vdim=vdim,
            batch_first=batch_first, device=device, dtype=dtype,
        )  # fmt: skip
        if isinstance(bias, str):
            check_choice("bias", bias, BIASES)
        else:
            check_number("bias", bias)
        if max_length is not None:
            check_integer("max_length", max_length, at_least=1)
        check_number("temperature", temperature)
        check_choice("backend", backend, BACKENDS)
        self.bias, self.max_length, self.alibi = bias, max_length, alibi
        self.temperature, self.backend = temperature, backend
        learned = nn.Parameter(torch.full((), -10.0, device=device, dtype=dtype)) if bias == "learnable" else None
        self.register_parameter("learned_bias", learned)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with projected heads; see the base class."""
        return attend(
            q,
            k,
            v,
            mask,
            self._bias_of_call(),
            self.sharpness / math.sqrt(self.head_dim),
            self.backend if self._dropout_p == 0 else "reference",
            causal,
            self.slopes(q),
            self._dropout_p,
            need_weights,
        )

    @property
    def sharpness(self) -> float:
        """exp(t), the factor of the scores."""
        return math.exp(self.temperature)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _bias_of_call(self) -> Tensor | float | str:
        if self.learned_bias is not None:
            return self.learned_bias
        if self.bias == "-log_n" and self.max_length is not None:
            return -math.log(self.max_length)
        return self.bias

    def slopes(self, like: Tensor) -> Tensor | None:
        """Return e^t m of every head, or ``None`` without ALiBi. Not a buffer: ``.to(dtype)`` must not round it."""
        if not self.alibi:
            return None
        return alibi_slopes(self.num_heads, like.device, wide(like.dtype)) * self.sharpness

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, bias={self.bias!r}, causal={self.causal}"
