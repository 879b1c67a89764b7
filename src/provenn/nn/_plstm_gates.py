"""What pLSTM's layers share: gates from features, transitions that carry far, projections, norm and passthrough."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer

SHUT = -5.0
"""Where sources, marks and direct gates start, before the sigmoid."""
STEEPNESS = 5.0
"""τ = tanh(5 λ), with λ from 1 on."""
EPS = 1e-5


class Gate(nn.Module):
    """Gates before their activation: a linear map of the features that starts as a constant, or a learned constant.

    Args:
        dim: Features.
        shape: The shape of the gates of one place.
        start: Their first value, a number or a tensor of that shape.
        constant: Whether they do not depend on the features.
    """

    def __init__(self, dim: int, shape: tuple[int, ...], start: float | Tensor, constant: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(shape))
        self.register_parameter("weight", None if constant else nn.Parameter(torch.zeros(*shape, dim)))
        with torch.no_grad():
            self.bias.copy_(torch.as_tensor(start).expand(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, *shape) for features (…, dim)."""
        if self.weight is None:
            return self.bias.to(x.dtype).expand(*x.shape[:-1], *self.bias.shape)
        return F.linear(x, self.weight.flatten(0, -2), self.bias.flatten()).unflatten(-1, self.bias.shape)


class Transition(nn.Module):
    """Transitions τ = U diag(tanh 5λ) V of J × J, with orthogonal U and V; for J = 1 the number tanh 5λ.

    Orthogonal matrices are exponentials of skew ones, which start at small random values, so that the slices of the
    state differ.

    Args:
        dim: Features.
        shape: How many there are a place.
        states: J.
        constant: Whether they do not depend on the features.
    """

    def __init__(self, dim: int, shape: tuple[int, ...], states: int, constant: bool) -> None:
        super().__init__()
        self.states = states
        self.eigenvalues = Gate(dim, (*shape, states), 1.0, constant)
        for name in ("into", "out_of") if states > 1 else ():
            start = 0.1 * torch.randn(*shape, states, states)
            setattr(self, name, Gate(dim, (*shape, states, states), start, constant))

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, *shape, J, J)."""
        values = torch.tanh(STEEPNESS * self.eigenvalues(x))
        if self.states == 1:
            return values[..., None]
        return (_orthogonal(self.out_of(x)) * values[..., None, :]) @ _orthogonal(self.into(x))


def _orthogonal(matrix: Tensor) -> Tensor:
    wide = torch.promote_types(matrix.dtype, torch.float32)
    skew = (matrix - matrix.mT).to(wide)
    return torch.linalg.matrix_exp(skew).to(matrix.dtype)


class Projections(nn.Module):
    """Queries, keys and values of all heads, and what follows the scan: norm of each head, projection, passthrough.

    Args:
        dim: Features in and out.
        heads: Heads.
        states: J_V = J_O: each head's values are d_v × J, with d_v = dim/(heads·J).
    """

    def __init__(self, dim: int, heads: int, states: int) -> None:
        super().__init__()
        check_integer("heads", heads, at_least=1)
        check_integer("states", states, at_least=1)
        check_integer("dim", dim, at_least=1)
        if dim % (heads * states):
            raise ValueError(f"dim must be divisible by heads × states = {heads * states}, got {dim}")
        self.heads, self.states = heads, states
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_weight = nn.Parameter(torch.ones(heads, dim // heads))
        self.out = nn.Linear(dim, dim, bias=False)
        self.passthrough = nn.Parameter(torch.ones(dim))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (5 * dim)))
        for layer in (self.query, self.key, self.value):
            nn.init.zeros_(layer.bias)

    def forward(self, convolved: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k (…, heads, d_k, 1), q scaled by 1/√d_k, from convolved features, and v (…, heads, d_v, J)."""
        q, k = (layer(convolved).unflatten(-1, (self.heads, -1))[..., None] for layer in (self.query, self.key))
        v = self.value(x).unflatten(-1, (self.heads, -1, self.states))
        return q / math.sqrt(q.shape[-2]), k, v

    def finish(self, heard: Tensor, x: Tensor) -> Tensor:
        """Turn the scan's output (…, heads, d_v, J) into (…, dim)."""
        flat = heard.flatten(-2)
        normed = F.rms_norm(flat, flat.shape[-1:], eps=EPS) * self.norm_weight
        projected: Tensor = self.out(normed.flatten(-2))
        return projected + self.passthrough * x


def check_mode(mode: str, chirality: str) -> None:
    """Check how activation moves.

    Raises:
        ValueError: Unknown.
    """
    check_choice("mode", mode, ("P", "D"))
    check_choice("chirality", chirality, ("L", "R"))
