"""Level set traversal against the published steps (two passes forward and one back each), and growth with the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.seeding import generator, seeded
from provenn.robust import level_set_traversal

SETTING = {"step_size": 0.1, "num_steps": 30, "parallel_eps": 2e-3, "delta": 0.001}


def measure() -> dict[str, Any]:
    """Compare ends after ten steps, then times by turns."""
    model, x, y, target = _problem(64)
    short = SETTING | {"num_steps": 10}
    ours = level_set_traversal(model, x, y, target, **short, noise=0)
    theirs = _published(model, x, y, target, **short)
    difference = (ours.adversarial - theirs).abs().max().item()
    times = alternate(
        {
            "ours": lambda: level_set_traversal(model, x, y, target, **SETTING, noise=0),
            "published": lambda: _published(model, x, y, target, **SETTING),
        },
        rounds=7,
    )
    growth = alternate({str(size): _walk_of(size) for size in (16, 128)}, rounds=5)
    return {
        "peer": "the steps of github.com/SriramB-98/blindspots-neurips-sub, written out anew",
        "agrees": difference <= 1e-5,
        "largest_difference": difference,
        "share_of_steps_refused": 1 - ours.accepted.double().mean().item() / 10,
        "speed_ratio": times["published"] / times["ours"],
        "growth": {"images ×8, time ×": growth["128"] / growth["16"]},
    }


def _problem(count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    with seeded("model"):
        model = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        ).eval()
    with torch.no_grad():
        model[-1].weight.mul_(150)
        x, target = torch.rand(2, count, 1, 28, 28, generator=generator("images"))
        return model, x, model(x).argmax(dim=1), target


def _walk_of(count: int) -> Any:
    problem = _problem(count)
    return lambda: level_set_traversal(*problem, **SETTING)


def _published(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    step_size: float,
    num_steps: int,
    parallel_eps: float,
    delta: float,
) -> Tensor:
    rows = torch.arange(len(x))
    with torch.no_grad():
        before = model(x).softmax(dim=1)[rows, y]
    at, carried = x, torch.zeros_like(x)
    for _ in range(num_steps):
        at = at.detach().requires_grad_()
        nn.functional.cross_entropy(model(at), y, reduction="sum").backward()
        slope, at = at.grad, at.detach()
        away = target - at
        share = (away * slope).sum(dim=(1, 2, 3)) / slope.square().sum(dim=(1, 2, 3))
        carried = (carried + slope * parallel_eps / 2).clamp(-parallel_eps, parallel_eps)
        tried = (at + step_size * (away - share.view(-1, 1, 1, 1) * slope) - carried).clamp(0, 1)
        with torch.no_grad():
            kept = before - model(tried).softmax(dim=1)[rows, y] < delta
        at = torch.where(kept.view(-1, 1, 1, 1), tried, at)
    return at
