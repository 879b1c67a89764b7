"""The travelling salesman's problem: shortest tours, and training of a tour model by policy gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from provenn.nn._tinvnn_tsp import tour_length


def shortest_tours(x: Tensor) -> Tensor:
    """Return the lengths of the shortest round tours by dynamic programming over sets of points.

    Args:
        x: Points (instances, N, 2), N ≤ 12.

    Source: Held & Karp, "A dynamic programming approach to sequencing problems", J. SIAM 10 (1962).
    """
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    rest = x.shape[1] - 1
    # best[:, S, j]: the shortest way from the last point through the set S of others, ending in j ∈ S.
    best = torch.full((len(x), 1 << rest, rest), torch.inf, dtype=torch.float64)
    for j in range(rest):
        best[:, 1 << j, j] = distance[:, rest, j]
    for subset in range(1, 1 << rest):
        for j in range(rest):
            without = subset & ~(1 << j)
            if subset >> j & 1 and without:
                best[:, subset, j] = (best[:, without] + distance[:, :rest, j]).amin(1)
    return (best[:, -1] + distance[:, :rest, rest]).amin(1)


def train(
    model: nn.Module, steps: int, batch: int, points: int, lr: float, draws: torch.Generator, device: str
) -> Iterator[tuple[int, float]]:
    """Train on uniform instances by REINFORCE, with the mean over four tours of an instance as its baseline.

    Yields:
        The step and the mean length of the tours drawn in it.

    Source: Kool, van Hoof & Welling, "Buy 4 REINFORCE samples, get a baseline for free!", ICLR workshop 2019.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(0, 2**31, (), generator=draws)))
        for step in range(steps):
            x = torch.rand(batch, points, 2, generator=draws).to(device)
            tours, chances = model(x.repeat_interleave(4, 0))
            length = tour_length(x.repeat_interleave(4, 0), tours).view(-1, 4)
            advantage = (length - (length.sum(1, keepdim=True) - length) / 3).flatten()
            optimizer.zero_grad()
            (advantage * chances).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield step, length.mean().item()


@torch.no_grad()
def gap(model: nn.Module, x: Tensor, shortest: Tensor, view: Callable[[Tensor], Tensor]) -> float:
    """Return by how much greedy tours, found on instances seen through ``view``, exceed the shortest, on average."""
    model.eval()
    tours, _ = model(view(x))
    return float((tour_length(x.double(), tours) / shortest.to(x.device) - 1).mean())
