"""The layer of tensor attention, and the weights with which it solves Match3."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.sequences.masks import Mask
from provenn.core.sequences.streaming import BLOCK
from provenn.nn._kronecker_attention_exact import tensor_attention
from provenn.nn._kronecker_attention_fast import attend_by_plan, check_bound
from provenn.nn._kronecker_attention_polynomial import MAX_RANK, Plan, polynomial_plan

METHODS = ("exact", "poly")
NORMALIZATIONS = ("tanh", "clip", None)


class KroneckerAttention(nn.Module):
    r"""Multi-head self-attention in which a query attends to tuples of tokens (pairs, for order 3).

    .. math::
        \mathrm{head}(X) = D^{-1} \exp(Q (K_1 \oslash K_2)^\top / d_h) (V_1 \oslash V_2)

    with one projection of X each for Q, and for K and V of each of the order − 1 factors. ⊘ multiplies rows feature
    by feature. Order 2 is ordinary attention with scale 1/d_h.

    Args:
        d_model: Features of a token, in and out.
        num_heads: Heads.
        order: k; a query sees tuples of k − 1 tokens.
        method: ``"exact"``, or ``"poly"``: exp by a polynomial, almost linear time; wants ``bound``.
        head_dim: d_h, the features of a head; default d_model / num_heads.
        bias: Whether projections have biases.
        dropout: Share of output features dropped in training.
        causal: Whether no query sees a tuple with a later token.
        normalize_qk: How to keep queries and keys within ``bound`` B: ``"tanh"`` (B tanh(x/B)), ``"clip"``, or
            ``None``; then the polynomial method refuses an entry beyond the bound.
        bound: B.
        degree: Of the polynomial; default the smallest that keeps ``tol``. Its certified error must be below 1, which
            keeps denominators positive.
        tol: Largest relative error of an entry exp(score).
        basis: ``"taylor"`` or ``"chebyshev"``.
        max_rank: Largest number of monomials.
        block: Scores alive at once in the exact method.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, n, d_model) → (batch, n, d_model); mask broadcastable to (batch, heads, n, n, …, n), one n for the
        queries and one for each factor.

    Returns:
        Calling it returns the output.

    Raises:
        TypeError: A number is of the wrong type, or ``mask`` is neither boolean nor floating-point.
        ValueError: ``num_heads`` does not divide ``d_model`` and ``head_dim`` is not given; a number or choice is out
            of bounds; ``bound`` is missing where it is needed, or exceeded; ``mask`` with the polynomial method; the
            rank needed is above ``max_rank``; or x has not d_model features.

    Cost: exact, O(n^order · d_h) time a head and O(block) memory beside operands; polynomial, O(n r d_h) and O(n r),
    r = C(d_h + g, g), so that it pays for heads of few features.

    Source: the paper's definition of tensor attention (exact) and its upper bound (polynomial).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        order: int = 3,
        method: Literal["exact", "poly"] = "exact",
        *,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        normalize_qk: Literal["tanh", "clip"] | None = None,
        bound: float | None = None,
        degree: int | None = None,
        tol: float = 1e-3,
        basis: Literal["taylor", "chebyshev"] = "taylor",
        max_rank: int = MAX_RANK,
        block: int = BLOCK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("d_model", d_model, at_least=1)
        check_integer("num_heads", num_heads, at_least=1)
        check_integer("order", order, at_least=2)
        check_choice("method", method, METHODS)
        check_choice("normalize_qk", normalize_qk, NORMALIZATIONS)
        check_number("dropout", dropout, at_least=0, below=1)
        check_integer("block", block, at_least=1)
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model must be divisible by num_heads, got {d_model} and {num_heads}")
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        check_integer("head_dim", self.head_dim, at_least=1)
        if bound is not None:
            check_number("bound", bound, above=0)
        elif method == "poly" or normalize_qk is not None:
            raise ValueError(f"bound must be given with method={method!r} and normalize_qk={normalize_qk!r}, got None")
        self.d_model, self.num_heads, self.order, self.method = d_model, num_heads, order, method
        self.causal, self.normalize_qk, self.bound, self.block = causal, normalize_qk, bound, block
        self.plan: Plan | None = None
        if method == "poly" and bound is not None:
            self.plan = polynomial_plan(self.head_dim, order, bound, degree, tol, basis, max_rank)
            if self.plan.report.entry_error >= 1:
                raise ValueError(
                    f"degree = {degree} is too low for bound = {bound}: its relative error "
                    f"{self.plan.report.entry_error:.3g} must be below 1"
                )
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=bias, device=device, dtype=dtype)
        self.k_projs, self.v_projs = (
            nn.ModuleList(nn.Linear(d_model, inner, bias=bias, device=device, dtype=dtype) for _ in range(order - 1))
            for _ in range(2)
        )
        self.out_proj = nn.Linear(inner, d_model, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch tokens d_model"], mask: Mask | None = None
    ) -> Float[Tensor, "batch tokens d_model"]:
        """Attend; see the class.

        Args:
            x: Tokens.
            mask: Broadcastable to (batch, heads, n, n, …, n): True where a query may look, or added to the scores.

        Shape:
            (batch, n, d_model) → (batch, n, d_model).
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (batch, tokens, {self.d_model}), got {tuple(x.shape)}")
        q, ks = self._bounded(self._heads(self.q_proj, x)), [self._bounded(self._heads(p, x)) for p in self.k_projs]
        vs = [self._heads(projection, x) for projection in self.v_projs]
        if self.plan is None:
            attended = tensor_attention(q, ks, vs, mask, block=self.block, causal=self.causal)
        elif mask is not None:
            raise ValueError("mask must be None with method='poly', whose sums factorise over the tokens, got a mask")
        else:
            if self.normalize_qk is None:
                check_bound(q, ks, self.plan.report.bound)
            attended = attend_by_plan(q, ks, vs, self.plan, self.causal)
        output: Tensor = self.dropout(self.out_proj(attended.transpose(1, 2).flatten(2)))
        return output

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        split: Tensor = projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return split

    def _bounded(self, x: Tensor) -> Tensor:
        if self.normalize_qk is None or self.bound is None:
            return x
        if self.normalize_qk == "clip":
            return x.clamp(-self.bound, self.bound)
        return self.bound * torch.tanh(x / self.bound)

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.d_model}, num_heads={self.num_heads}, order={self.order}, method={self.method!r}"


class Match3(nn.Module):
    """Match3 by one head of third-order attention with given weights; :func:`match3_layer` makes it.

    Args:
        M: Modulus.
        scale: s.
    """

    def __init__(self, M: int, scale: float) -> None:
        super().__init__()
        self.M = M
        angle = 2 * math.pi * torch.arange(M) / M
        real, none = torch.ones(M), torch.zeros(M)
        table = torch.stack([angle.cos(), angle.sin(), real, none], dim=1)
        blank = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        self.embedding = nn.Embedding.from_pretrained(torch.cat([table, blank]))
        self.attention = KroneckerAttention(4, 1, head_dim=5, bias=False)
        half_gap = (1 - math.cos(2 * math.pi / M)) / 2
        cos, sin, token, void = torch.eye(4)
        # cos(a + b + c) = ca cb cc − ca sb sc − sa cb sc − sa sb cc; the fifth column scores the pair (blank, blank).
        q = torch.stack([cos, -cos, -sin, -sin, (1 - half_gap) * token])
        read = torch.zeros(5, 4)
        read[0] = token
        weights = {
            self.attention.q_proj: 5 * scale * q,  # the layer divides scores by its five features
            self.attention.k_projs[0]: torch.stack([cos, sin, cos, sin, void]),
            self.attention.k_projs[1]: torch.stack([cos, sin, sin, cos, void]),
            self.attention.v_projs[0]: read,
            self.attention.v_projs[1]: read,
            self.attention.out_proj: read.T,
        }
        with torch.no_grad():
            for projection, weight in weights.items():
                projection.weight.copy_(weight)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Return each token's output, in [0, 1].

        Args:
            tokens: Numbers from 0 to M − 1.

        Shape:
            (batch, n) → (batch, n).

        Raises:
            ValueError: A token is out of range (not checked under ``torch.compile``).
        """
        if (
            not torch.compiler.is_compiling()
            and tokens.numel()
            and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.M
        ):
            raise ValueError(f"tokens must be in 0…{self.M - 1}, got {int(tokens.min())}…{int(tokens.max())}")
        blank = tokens.new_full((len(tokens), 1), self.M)
        output: Tensor = self.attention(self.embedding(torch.cat([tokens, blank], dim=1)))
        return output[:, :-1, 2]


def match3_layer(M: int, scale: float) -> Match3:
    """Build the exact construction by which one third-order head solves Match3.

    Token i of x ∈ {0, …, M − 1}ⁿ asks whether there are j and l with x_i + x_j + x_l ≡ 0 (mod M); j and l may be
    equal, and i itself. Four features make the score s · cos(2π(x_i + x_j + x_l)/M), which is s for a match and at most
    s cos(2π/M) else. A fifth gives a pair of added blank tokens the score s(1 − δ), half-way between, δ = ½(1 −
    cos(2π/M)). Real pairs have the value 1, pairs with a blank 0.

    Args:
        M: Modulus, at least 2.
        scale: s. Outputs are right for s ≥ 2(ln n² + 3) / (1 − cos(2π/M)).

    Shape:
        The module maps tokens (batch, n) to outputs (batch, n) in [0, 1].

    Returns:
        A module whose output is above ½ where there is a match and below ½ where there is none.

    Raises:
        TypeError: ``M`` is not an integer.
        ValueError: ``M`` < 2 or ``scale`` ≤ 0.

    Cost: O(n³) time a sequence.

    Source: Match3 after Sanford, Hsu and Telgarsky (2023), which the paper takes up in its introduction; the weights
    are worked out here.
    """
    check_integer("M", M, at_least=2)
    check_number("scale", scale, above=0)
    return Match3(M, scale)
