"""The survey's verdict on made-up evidence, and what its experiments draw."""

import math

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import rnn_review as claim
from provenn.claims.nn._rnn_review_runs import RADII, _mixed_copies, set_radius

FAILING = {
    1: {("error flow", "LSTM, f ≡ 1"): {"slope, unit inputs": 0.03}},
    2: {("temporal order", "Elman"): {"test_accuracy": 0.8}},
    3: {("truncation", "k₂ = 40"): {"test_accuracy": 0.9}},
    4: {("clipping", "unclipped"): {"failed": 0.4}},
    5: {("tagging", "Elman"): {"test_accuracy": 0.85}},
    6: {("copy", "NTM"): {"wrong at longer": 0.3}},
}


def evidence(*fails, **changes):
    """Three seeds of figures with which all statements hold, but for those that are to fail."""
    figures = {
        ("error flow", "Elman"): {f"slope, ρ = {r}": math.log(r) for r in RADII},
        ("error flow", "LSTM, f ≡ 1"): {"slope, unit inputs": 0.001},
        ("temporal order", "LSTM"): {"test_accuracy": 0.99},
        ("temporal order", "Elman"): {"test_accuracy": 0.4},
        ("truncation", "k₂ = 40"): {"test_accuracy": 1.0},
        ("truncation", "k₂ = 10"): {"test_accuracy": 0.5},
        ("clipping", "clipped"): {"failed": 0.0},
        ("clipping", "unclipped"): {"failed": 1.0},
        ("tagging", "BRNN"): {"test_accuracy": 1.0},
        ("tagging", "Elman"): {"test_accuracy": 0.25},
        ("copy", "NTM"): {"wrong at longer": 0.1},
        ("copy", "LSTM"): {"wrong at longer": 0.4},
    }
    for place in fails:
        figures |= FAILING[place]
    for key, metrics in changes.get("figures", {}).items():
        figures[key] = {**figures[key], **metrics}
    return Evidence.of({key: {name: [value] * 3 for name, value in row.items()} for key, row in figures.items()})


@pytest.mark.parametrize(
    ("fails", "outcome"),
    [
        ((), "reproduced"),
        ((4,), "reproduced"),
        ((6,), "reproduced"),
        ((1,), "partly"),  # five hold, the first is not among them
        ((2,), "partly"),
        ((3,), "partly"),
        ((4, 5), "partly"),
        ((2, 3, 6), "partly"),
        ((2, 3, 5, 6), "not reproduced"),
        ((1, 2, 3, 4, 5, 6), "not reproduced"),
    ],
)
def test_the_verdict_counts_statements(fails, outcome):
    verdict = claim.judge(evidence(*fails))
    assert verdict.outcome == outcome
    assert verdict.margins["statements that hold"] == 6 - len(fails)
    for place in range(1, 7):
        assert f"({place}) {'fails' if place in fails else 'holds'}" in verdict.reason


@pytest.mark.parametrize(
    ("study", "arm", "metric", "passes", "fails"),
    [
        ("error flow", "Elman", "slope, ρ = 0.5", math.log(0.5) + 0.049, math.log(0.5) + 0.051),
        ("error flow", "Elman", "slope, ρ = 1.1", math.log(1.1) - 0.049, math.log(1.1) - 0.051),
        ("error flow", "LSTM, f ≡ 1", "slope, unit inputs", -0.0199, -0.0201),
        ("temporal order", "LSTM", "test_accuracy", 0.9501, 0.9499),
        ("temporal order", "Elman", "test_accuracy", 0.6999, 0.7001),
        ("truncation", "k₂ = 40", "test_accuracy", 0.9501, 0.9499),
        ("truncation", "k₂ = 10", "test_accuracy", 0.5999, 0.6001),
        ("clipping", "clipped", "failed", 1 / 12, 2 / 12),
        ("clipping", "unclipped", "failed", 7 / 12, 5 / 12),
        ("tagging", "Elman", "test_accuracy", 0.799, 0.801),
        ("copy", "NTM", "wrong at longer", 0.1999, 0.2001),
    ],
)
def test_the_edges_of_every_threshold(study, arm, metric, passes, fails):
    for value, count in ((passes, 6), (fails, 5)):
        verdict = claim.judge(evidence(figures={(study, arm): {metric: value}}))
        assert verdict.margins["statements that hold"] == count


def test_the_radius_is_set():
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    set_radius(matrix, 1.1)
    assert torch.linalg.eigvals(matrix).abs().max().item() == pytest.approx(1.1)


def test_mixed_copies_hold_every_length_and_ask_for_its_items():
    task = _mixed_copies(60, 3, 2, torch.Generator().manual_seed(0))
    assert task.inputs.shape == (60, 7, 3)
    assert set(task.target_mask.sum(1).tolist()) == {1, 2, 3}
    for x, y, asked in zip(task.inputs, task.targets, task.target_mask, strict=True):
        length = int(asked.sum())
        assert x[length, 2] == 1
        torch.testing.assert_close(y[length + 1 : 2 * length + 1], x[:length, :2])
