"""Generalised scattering beside kymatio: the same filters, coefficients and time; and growth with the image."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D
from torch import Tensor

from benchmarks.timing import alternate
from provenn.nn import FilterBank, GeneralizedScattering, ScatteringLayer

SCALES, ORIENTATIONS, SIDE = 2, 4, 40
"""kymatio pads 32 × 32 to 40 × 40 points, and leaves the outermost coefficients out."""


def measure() -> dict[str, Any]:
    """Compare first-order coefficients with kymatio's, then times, the cost of depth, and growth with the side."""
    warnings.filterwarnings("ignore")
    x = torch.randn(8, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = _ours(x), _peer(SIDE)(x.float())
    off = (ours - theirs.double()).abs().amax((0, 2, 3)) / theirs.abs().max().item()
    # kymatio samples the moduli of coarser wavelets at every second point before it smooths them.
    difference, coarser = off[: 1 + ORIENTATIONS].max().item(), off[1 + ORIENTATIONS :].max().item()
    single = x.float()
    net, peer = _network(SIDE), _peer(SIDE)
    times = alternate({"provenn": lambda: _sampled(net, single), "kymatio": lambda: peer(single)}, rounds=20)
    images = {str(side): torch.randn(8, 1, side, side) for side in (32, 64, 128)}
    growth = alternate({side: partial(_network(int(side)), image) for side, image in images.items()}, rounds=9)
    depths = {str(depth): _deep(depth) for depth in (1, 2, 3)}
    deep = alternate({depth: partial(network, images["32"]) for depth, network in depths.items()}, rounds=9)
    return {
        "peer": "kymatio's ScatteringTorch2D of the first order, with its Morlet filters",
        "agrees": difference < 1e-4,
        "largest_difference": difference,
        "largest_difference_where_the_peer_samples_before_smoothing": coarser,
        "speed_ratio": times["kymatio"] / times["provenn"],
        "growth": {
            **{f"side {a} to {b}, time ×": growth[b] / growth[a] for a, b in pairwise(images)},
            **{f"layers {a} to {b}, six filters each, time ×": deep[b] / deep[a] for a, b in pairwise(depths)},
        },
    }


def _network(side: int) -> GeneralizedScattering:
    bank = FilterBank.morlet((side, side), SCALES, ORIENTATIONS)
    return GeneralizedScattering([ScatteringLayer(bank)], output=bank.transfer()[0].clone())


def _deep(depth: int) -> GeneralizedScattering:
    grids = [(32 // 2**level,) * 2 for level in range(depth)]
    return GeneralizedScattering([ScatteringLayer(FilterBank.morlet(g, 2, 3), "modulus", "average", 2) for g in grids])


def _sampled(net: GeneralizedScattering, x: Tensor) -> Tensor:
    step = 2**SCALES
    return torch.cat([one[..., step:-step:step, step:-step:step] for one in net(x[:, None])], 1)


def _ours(x: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _sampled(_network(SIDE), x)
    finally:
        torch.set_default_dtype(before)


def _peer(side: int) -> ScatteringTorch2D:
    return ScatteringTorch2D(SCALES, (side - 8, side - 8), L=ORIENTATIONS, max_order=1, pre_pad=True)
