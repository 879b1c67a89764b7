"""SFace's values, gradients and time per step against the authors' formulas, and its time against NormFace's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import alternate
from provenn.losses import ArcFaceLoss, CosFaceLoss, NormFaceLoss, SFaceLoss, verification_report
from provenn.losses._sface_heads import SphereHead

FORMULA_ANGLES = {"a": 0.80, "b": 1.23}
"""The defaults of the authors' code."""
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def sface_formula(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the authors' loss as they compute it: masks, exponentials, and no clamp before arccos."""
    scaled = 64.0 * F.normalize(x) @ F.normalize(weight).T
    own = F.one_hot(labels, len(weight)).to(scaled.dtype)
    pulled, pushed = (own * scaled).sum(1), (1 - own) * scaled
    with torch.no_grad():
        pull = 1 / (1 + torch.exp(-80.0 * (torch.acos(pulled / 64.0) - FORMULA_ANGLES["a"])))
        push = 1 / (1 + torch.exp(80.0 * (torch.acos(pushed / 64.0) - FORMULA_ANGLES["b"])))
    return (push * pushed).sum(1).mean() - (pull * pulled).mean()


def _softmax_formula(margin: Callable[[Tensor], Tensor]) -> Formula:
    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        theta = torch.acos(F.normalize(x) @ F.normalize(weight).T)
        own = F.one_hot(labels, len(weight)).bool()
        return F.cross_entropy(64.0 * torch.where(own, margin(theta), theta.cos()), labels)

    return loss


def _arc(theta: Tensor) -> Tensor:
    return torch.where(theta < math.pi - 0.5, (theta + 0.5).cos(), theta.cos() - 0.5 * math.sin(0.5))


PAIRS: dict[str, tuple[Callable[[int, int], SphereHead], Formula]] = {
    "SFace": (lambda d, classes: SFaceLoss(d, classes, **FORMULA_ANGLES), sface_formula),
    "ArcFace": (ArcFaceLoss, _softmax_formula(_arc)),
    "CosFace": (CosFaceLoss, _softmax_formula(lambda theta: theta.cos() - 0.35)),
    "NormFace": (NormFaceLoss, _softmax_formula(torch.cos)),
}


def measure() -> dict[str, Any]:
    """Compare values and gradients on batches far from and near to their centres, then times of a step."""
    differences = {name: _largest_differences(*pair) for name, pair in PAIRS.items()}
    small, large = _times(64, 500, 128, rounds=60), _times(256, 10_000, 512, rounds=9)
    growth = alternate(
        {str(classes): _step(SFaceLoss(64, classes), *_batch(64, 64, classes)) for classes in (500, 4000, 32_000)},
        rounds=15,
    )
    return {
        "peer": (
            "the authors' formulas, written anew (github.com/zhongyy/SFace, SFace_torch/head/metrics.py); "
            "pytorch-metric-learning is not installed, so that ArcFace and CosFace are compared with their formulas in "
            "angles"
        ),
        "agrees": max(one for pair in differences.values() for one in pair) <= 1e-5,
        "largest_difference": differences["SFace"][0],
        "largest_difference_of_gradients": differences["SFace"][1],
        "largest_difference_of_softmax_heads": max(max(differences[name]) for name in PAIRS if name != "SFace"),
        "difference_of_rates_from_scikit_learn": _rates_apart(),
        "formula_is_finite_on_its_centres_in_float32": _finite_when_aligned(sface_formula),
        "speed_ratio": small["formula"] / small["SFace"],
        "speed_ratio_at_10000_classes": large["formula"] / large["SFace"],
        "time_over_normface": small["SFace"] / small["NormFace"],
        "time_over_normface_at_10000_classes": large["SFace"] / large["NormFace"],
        "growth": {
            "classes ×8 (500 to 4000), time ×": growth["4000"] / growth["500"],
            "classes ×8 (4000 to 32000), time ×": growth["32000"] / growth["4000"],
        },
    }


def _batch(samples: int, features: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=draws, dtype=dtype)
    return x.requires_grad_(), torch.randint(classes, (samples,), generator=draws)


def _largest_differences(make: Callable[[int, int], SphereHead], formula: Formula) -> tuple[float, float]:
    """Return the largest difference of value and gradients in float64; embeddings go from noise to their centres."""
    values, slopes = [0.0], [0.0]
    head = make(16, 12).double()
    for nearness in (0.0, 0.3, 1.0, 3.0, 10.0):
        x, labels = _batch(64, 16, 12, torch.float64)
        x = (x + nearness * F.normalize(head.weight)[labels]).detach().requires_grad_()
        pair = head(x, labels), formula(x, head.weight, labels)
        ours, theirs = (torch.autograd.grad(one, (x, head.weight)) for one in pair)
        values.append(abs(pair[0].item() - pair[1].item()))
        slopes += [(one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True)]
    return max(values), max(slopes)


def _rates_apart() -> float:
    """Return how far AUC and true accept rates are from scikit-learn's."""
    draws = torch.Generator().manual_seed(1)
    labels = torch.arange(120) % 12
    embeddings = torch.randn(12, 8, generator=draws)[labels] + torch.randn(120, 8, generator=draws)
    report = verification_report(embeddings, labels, fars=(0.1, 0.01))
    unit = F.normalize(embeddings.double())
    first, second = np.triu_indices(120, 1)
    scores, same = (unit @ unit.T).numpy()[first, second], (labels[first] == labels[second]).numpy()
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    apart = [abs(report.tar(far) - tpr[fpr <= far].max()) for far in (0.1, 0.01)]
    return float(max(*apart, abs(report.auc - roc_auc_score(same, scores))))


def _finite_when_aligned(formula: Formula) -> bool:
    """Return whether a formula is finite for embeddings equal to their centres, of which cosines round above 1."""
    weight = torch.randn(200, 7, generator=torch.Generator().manual_seed(3))
    return bool(formula(weight.clone(), weight, torch.arange(200)).isfinite())


def _step(head: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(head(x, labels), (x, head.weight))


def _times(samples: int, classes: int, features: int, rounds: int) -> dict[str, float]:
    x, labels = _batch(samples, features, classes)
    weight = nn.Parameter(torch.randn(classes, features, generator=torch.Generator().manual_seed(2)))
    return alternate(
        {
            "SFace": _step(SFaceLoss(features, classes), x, labels),
            "formula": lambda: torch.autograd.grad(sface_formula(x, weight, labels), (x, weight)),
            "NormFace": _step(NormFaceLoss(features, classes), x, labels),
        },
        rounds=rounds,
    )
