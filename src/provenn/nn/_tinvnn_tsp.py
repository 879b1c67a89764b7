"""An attention model that builds tours of points one by one."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number


class TSPAttention(nn.Module):
    """Build a round tour through all points of an instance: an attention encoder, and a pointer that picks the next.

    Args:
        dim: Width of the embeddings.
        num_heads: Heads of attention; they divide ``dim``.
        num_layers: Layers of the encoder.
        in_features: Numbers a point.
        clip: Logits are clip · tanh(·).

    Shape:
        Points (batch, N, in_features); tours (batch, N) and log-probabilities (batch,).

    Returns:
        Tours, as permutations of the points, and the log-probability that the model gives them. In eval mode each next
        point is the most probable one, in training mode it is drawn.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range; on a call, points of another width, or ``tours`` of another shape.

    Cost: O(N²) an encoder layer, and N steps of O(N).

    Source: Kool, van Hoof & Welling, "Attention, learn to solve routing problems!", ICLR 2019, section 3, with layer
    norm for batch norm.
    """

    def __init__(
        self, dim: int = 64, num_heads: int = 4, num_layers: int = 2, in_features: int = 2, clip: float = 10.0
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads), ("num_layers", num_layers)):
            check_integer(name, value, at_least=1)
        check_integer("in_features", in_features, at_least=1)
        check_number("clip", clip, above=0)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.in_features, self.num_heads, self.clip = in_features, num_heads, clip
        self.embed = nn.Linear(in_features, dim)
        # Dropout is off: the tours drawn in training must be those whose probability is told.
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.summary, self.ends = nn.Linear(dim, dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.start = nn.Parameter(torch.empty(2 * dim).uniform_(-1, 1))
        self.glimpse, self.point = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gather = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch points features"],
        tours: Int[Tensor, "batch points"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Int[Tensor, "batch points"], Float[Tensor, " batch"]]:
        """Return tours and their log-probabilities.

        Args:
            x: Points.
            tours: Tours to tell the log-probability of; without them the model builds some.
            generator: Draws the tours in training mode; without it torch's global one.
        """
        if x.shape[2] != self.in_features:
            raise ValueError(f"x must have {self.in_features} numbers a point, got {x.shape[2]}")
        if tours is not None and tours.shape != x.shape[:2]:
            raise ValueError(f"tours must be {tuple(x.shape[:2])}, got {tuple(tours.shape)}")
        h = self.embed(x)
        for layer in self.encoder:
            h = layer(h)
        fixed = self.summary(h.mean(1))
        keys, values = self.glimpse(h).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        pointers = self.point(h)
        visited = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        context, first = self.start.expand(x.shape[0], -1), h[:, 0]
        picked, total = [], h.new_zeros(x.shape[0])
        for step in range(x.shape[1]):
            logits = self._logits(fixed + self.ends(context), keys, values, pointers, visited)
            chances = logits.log_softmax(1)
            chosen = self._choose(chances, generator) if tours is None else tours[:, step]
            total = total + chances.gather(1, chosen[:, None])[:, 0]
            visited = visited.scatter(1, chosen[:, None], True)
            last = h.gather(1, chosen[:, None, None].expand(-1, -1, h.shape[2]))[:, 0]
            first = last if step == 0 else first
            context = torch.cat((first, last), 1)
            picked.append(chosen)
        return torch.stack(picked, 1), total

    def _logits(self, query: Tensor, keys: Tensor, values: Tensor, pointers: Tensor, visited: Tensor) -> Tensor:
        """Return the logits of the next point: one look at those left, then a pointer."""
        heads = query.unflatten(1, (self.num_heads, 1, -1))
        seen = nn.functional.scaled_dot_product_attention(heads, keys, values, ~visited[:, None, None])
        looked = self.gather(seen.flatten(1))
        scores = (pointers @ looked[..., None])[..., 0] / math.sqrt(looked.shape[1])
        return (self.clip * scores.tanh()).masked_fill(visited, -torch.inf)

    def _choose(self, chances: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training:
            return chances.argmax(1)
        return torch.multinomial(chances.detach().float().exp(), 1, generator=generator)[:, 0]


def tour_length(
    x: Float[Tensor, "batch points features"], tours: Int[Tensor, "batch points"]
) -> Float[Tensor, " batch"]:
    """Return the lengths of round tours.

    Args:
        x: Points.
        tours: Permutations of them.
    """
    ordered = x.gather(1, tours[..., None].expand(-1, -1, x.shape[2]))
    return (ordered - ordered.roll(-1, 1)).norm(dim=2).sum(1)
