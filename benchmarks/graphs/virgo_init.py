"""Virgo's variances beside the published way, signals sent through torch_geometric's GCN; growth with the graph."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from benchmarks.timing import alternate
from provenn.core.experiment.seeding import generator
from provenn.graphs import virgo_

DEPTH, WIDTH, CLASSES, FEATURES = 8, 16, 5, 32


def measure() -> dict[str, Any]:
    """Compare the lists of variances, then the times of reading the graph; drawing the weights is in neither."""
    x, edges = _graph(5000)
    layers = _layers()
    ours, theirs = virgo_(nn.Identity(), edges, x, CLASSES, layers=layers), _published(x, edges)
    difference = max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))
    times = alternate(
        {
            "ours": lambda: virgo_(nn.Identity(), edges, x, CLASSES, layers=layers),
            "published": lambda: _published(x, edges),
        },
        rounds=9,
    )
    graphs = {str(nodes): _graph(nodes) for nodes in (5000, 40_000)}
    growth = alternate(
        {
            name: lambda one=one: virgo_(nn.Identity(), one[1], one[0], CLASSES, layers=layers)
            for name, one in graphs.items()
        },
        rounds=7,
    )
    return {
        "peer": "the lists of github.com/LspongebobJH/virgo_icml2023 by torch_geometric's GCNConv, written anew",
        "agrees": difference <= 1e-5,
        "largest_difference": difference,
        "speed_ratio": times["published"] / times["ours"],
        "growth": {"nodes and edges ×8, time ×": growth["40000"] / growth["5000"]},
    }


def _graph(nodes: int) -> tuple[Tensor, Tensor]:
    draws = generator("graph", nodes)
    pairs = torch.randint(nodes, (2, 4 * nodes), generator=draws)
    pairs = pairs[:, pairs[0] != pairs[1]]
    return torch.rand(nodes, FEATURES, generator=draws), torch.cat([pairs, pairs.flip(0)], dim=1).unique(dim=1)


def _layers() -> list[nn.Module]:
    dims = [FEATURES, *[WIDTH] * (DEPTH - 1), CLASSES]
    return [GCNConv(wide, narrow) for wide, narrow in pairwise(dims)]


@torch.no_grad()
def _published(x: Tensor, edges: Tensor) -> list[float]:
    through = GCNConv(1, 1, bias=False)
    through.lin.weight.fill_(1.0)

    def sizes(signal: Tensor) -> list[float]:
        found = []
        for _ in range(DEPTH):
            signal = through(signal, edges)
            found.append(signal.square().sum().item())
        return found

    c, b = sizes(x.mean(dim=1, keepdim=True)), sizes(torch.ones(len(x), 1))
    forward = [2 / FEATURES] + [2 / WIDTH * c[place - 1] / c[place] for place in range(1, DEPTH)]
    backward = [len(x) / ((CLASSES - 1) * b[0])] + [2 / WIDTH * b[place - 1] / b[place] for place in range(1, DEPTH)]
    return [2 / (1 / one + 1 / other) for one, other in zip(forward, backward[::-1], strict=True)]
