"""SeqBoat against mega-pytorch's average and a layer written out densely; and time against the share that is active."""

from __future__ import annotations

import importlib.metadata
import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from mega_pytorch.mega_pytorch import MultiHeadedEMA
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import alternate
from provenn.nn import MultiHeadEMA, SeqBoatLayer

SHARES = (100, 50, 25, 12)
LENGTH, DIM, WINDOW = 2048, 64, 128


def measure() -> dict[str, Any]:
    """Compare outputs and gradients in float64; times at (4, 512, 64); then time against activation at length 2048."""
    average = _difference_of_averages()
    dense = max(_difference_of_layers(attn) for attn in ("softmax", "relu2"))
    peer, ours = _averages(DIM, 16)
    x = _sequences(4, 512)
    forward = alternate({"peer": partial(_run, peer, x), "ours": partial(_run, ours, x)}, rounds=25)
    both = alternate({"peer": partial(_train, peer, x), "ours": partial(_train, ours, x)}, rounds=5)
    layer, x = _layer(), _sequences(1, LENGTH)
    runs = {str(share): partial(_at, layer, x, share, False) for share in SHARES}
    trains = {str(share): partial(_at, layer, x, share, True) for share in SHARES}
    masked = _layer(packing=False)
    masked.load_state_dict(layer.state_dict())
    runs["masked"], trains["masked"] = partial(_at, masked, x, 25, False), partial(_at, masked, x, 25, True)
    by_share, by_share_both = alternate(runs, rounds=5), alternate(trains, rounds=5)
    lengths = alternate({str(n): partial(_at, layer, x[:, :n], 25, True) for n in (512, 2048)}, rounds=5)
    return {
        "peer": f"mega-pytorch {importlib.metadata.version('mega-pytorch')} (the average); a dense layer written out",
        "agrees": max(average, dense) <= 1e-9,
        "largest_difference": average,
        "largest_difference_of_dense_layer": dense,
        "speed_ratio": both["peer"] / both["ours"],
        "speed_ratio_forward": forward["peer"] / forward["ours"],
        "time_over_that_of_all_active": _relative(by_share),
        "time_over_that_of_all_active_forward_backward": _relative(by_share_both),
        "falls_with_activation": _falls(by_share) and _falls(by_share_both),
        "masked_over_packed_at_25_percent": by_share["masked"] / by_share["25"],
        "masked_over_packed_at_25_percent_forward_backward": by_share_both["masked"] / by_share_both["25"],
        "growth": {"length ×4 at 25 % active, time ×": lengths["2048"] / lengths["512"]},
    }


def _relative(times: dict[str, float]) -> dict[str, float]:
    return {f"{share} % active": times[str(share)] / times["100"] for share in SHARES}


def _falls(times: dict[str, float]) -> bool:
    taken = [times[str(share)] for share in SHARES]
    return all(later < earlier for earlier, later in pairwise(taken))


def _sequences(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(0))


def _averages(dim: int, heads: int) -> tuple[MultiHeadedEMA, MultiHeadEMA]:
    """Build the peer's average and ours with its weights: its decay (1 − a) d is any number, with p = 1 ours too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer, ours = MultiHeadedEMA(dim=dim, heads=heads), MultiHeadEMA(dim, heads)
    with torch.no_grad():
        rise, damping = peer.alphas.sigmoid(), peer.dampen_factors.sigmoid()
        ours.delta.fill_(30.0)
        ours.alpha.copy_(torch.logit(1 - (1 - rise) * damping).expand(dim, heads))
        ours.beta.copy_((rise[:, None] * peer.expansion).T)
        ours.gamma.copy_(math.sqrt(heads) * peer.reduction.T)
        ours.omega.zero_()
    return peer, ours


def _difference_of_averages() -> float:
    peer, ours = (one.double() for one in _averages(DIM, 16))
    with torch.no_grad():  # the decay anew, so that it is not off by float32's rounding
        keep = (1 - peer.alphas.sigmoid()) * peer.dampen_factors.sigmoid()
        ours.alpha.copy_(torch.logit(1 - keep).expand_as(ours.alpha))
        ours.beta.copy_((peer.alphas.sigmoid()[:, None] * peer.expansion).T)
        ours.gamma.copy_(4 * peer.reduction.T)
    x = _sequences(2, 300).double().requires_grad_()
    results = [[y, *torch.autograd.grad(y.square().sum(), x)] for y in (peer(x), ours(x))]
    return max(((one - other).abs().max() / one.abs().max()).item() for one, other in zip(*results, strict=True))


def _layer(**options: Any) -> SeqBoatLayer:
    """Build a layer whose window counts packed elements."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SeqBoatLayer(DIM, 64, window=WINDOW, rel_pos_bias="local", **options)


def _difference_of_layers(attn: str) -> float:
    """Of a layer with all elements on and a window beyond the length, against the formula with all L² scores."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = SeqBoatLayer(DIM, 64, window=100, attn=attn, max_positions=100).double()
    with torch.no_grad():
        layer.proj.weight[:2] = 0
        layer.proj.bias[:2] = torch.tensor([-1.0, 1.0])
        layer.gau.gamma.mul_(50)
    x = _sequences(2, 90).double()
    unit, m = layer.gau, F.silu(layer.ssm(layer.norm(x)))
    z, gate, v = F.silu(unit.in_proj(m)).split([64, 2 * DIM, 2 * DIM], -1)
    q, k = (z * unit.gamma[row] + unit.beta[row] for row in (0, 1))
    place = torch.arange(90)
    bias = unit.position_bias[place - place[:, None] + 99]
    hidden = torch.ones(90, 90).triu(1).bool()
    if attn == "softmax":
        weights = (q @ k.mT / 8 + bias).masked_fill(hidden, -math.inf).softmax(-1)
    else:
        weights = F.relu(q @ k.mT / 100 + bias).square().masked_fill(hidden, 0)
    confidence = 1 / (1 + math.exp(-2 / math.sqrt(DIM)))
    linear = F.linear(m, layer.proj.weight[2:], layer.proj.bias[2:])
    expected = F.silu(linear + confidence * unit.out_proj(weights @ v * gate) + x)
    return (layer(x) - expected).abs().max().item()


def _at(layer: SeqBoatLayer, x: Tensor, share: int, train: bool) -> None:
    """Run the layer with a share of its elements active, evenly spread: its router's logits are replaced."""
    order = torch.arange(x.shape[1]) * share // 100
    active = order != torch.arange(-1, x.shape[1] - 1) * share // 100
    logits = torch.stack((~active, active), -1).to(x.dtype).expand(len(x), -1, -1)
    with torch.set_grad_enabled(train):
        m, _, linear = layer._route(layer.ssm(layer.norm(x)))
        y = F.silu(linear + layer.sma(m, logits) + x)
    if train:
        torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)


def _run(module: torch.nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def _train(module: torch.nn.Module, x: Tensor) -> None:
    torch.autograd.grad(module(x).square().sum(), list(module.parameters()), allow_unused=True)
