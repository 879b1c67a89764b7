"""The LSSL claim's verdict on made-up evidence, and what its experiments are made of."""

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import _lssl_runs as runs
from provenn.claims.nn import lssl as claim
from provenn.nn import LSSL

FAILING = {
    "a": {("pixels", "LSTM"): {"test_accuracy": 0.9}},
    "b": {("audio", "LSSL-f"): {"half rate, adapted": 0.5}},
    "c": {("speed", "recurrence"): {"milliseconds at the longest": 20.0}},
}


def evidence(fails="", changes=None):
    """Three seeds of figures with which all three parts hold, but for those that are to fail."""
    figures = {
        ("pixels", "LSSL"): {"test_accuracy": 0.9},
        ("pixels", "LSTM"): {"test_accuracy": 0.8},
        ("pixels", "random A"): {"test_accuracy": 0.7},
        ("audio", "LSSL-f"): {"full rate": 0.8, "half rate, adapted": 0.78, "half rate, not adapted": 0.4},
        ("speed", "convolution"): {"milliseconds at the longest": 10.0},
        ("speed", "recurrence"): {"milliseconds at the longest": 100.0},
    }
    for row in (*(FAILING[name] for name in fails), changes or {}):
        for key, metrics in row.items():
            figures[key] = {**figures[key], **metrics}
    return Evidence.of({key: {name: [value] * 3 for name, value in row.items()} for key, row in figures.items()})


@pytest.mark.parametrize(
    ("fails", "outcome"),
    [
        ("", "reproduced"),
        ("a", "partly"),
        ("b", "partly"),
        ("c", "partly"),
        ("ab", "not reproduced"),
        ("ac", "not reproduced"),
        ("bc", "not reproduced"),
        ("abc", "not reproduced"),
    ],
)
def test_the_verdict_counts_parts(fails, outcome):
    verdict = claim.judge(evidence(fails))
    assert verdict.outcome == outcome
    for name in "abc":
        assert f"({name}) {'fails' if name in fails else 'holds'}" in verdict.reason


@pytest.mark.parametrize(
    ("study", "arm", "metric", "passes", "fails"),
    [
        ("pixels", "LSTM", "test_accuracy", 0.88, 0.8801),
        ("pixels", "random A", "test_accuracy", 0.85, 0.8501),
        ("audio", "LSSL-f", "half rate, adapted", 0.75, 0.7499),
        ("audio", "LSSL-f", "half rate, adapted", 0.85, 0.8501),
        ("audio", "LSSL-f", "half rate, not adapted", 0.65, 0.6501),
        ("speed", "recurrence", "milliseconds at the longest", 50.0, 49.9),
    ],
)
def test_edges_of_the_rule(study, arm, metric, passes, fails):
    """Each threshold is met by its own figure, and missed a hair beyond."""
    assert claim.judge(evidence(changes={(study, arm): {metric: passes}})).outcome == "reproduced"
    assert claim.judge(evidence(changes={(study, arm): {metric: fails}})).outcome == "partly"


def test_the_arms_have_as_many_parameters():
    sizes = {"width": 32, "depth": 2, "order": 32}
    counts = {
        arm: sum(p.numel() for p in runs.classifier(arm, sizes).parameters())
        for arm in claim.CLAIM.studies["pixels"].arms
    }
    assert abs(counts["LSTM"] / counts["LSSL"] - 1) < 0.05
    lstm = runs.LSTMClassifier(10, 5000)
    width = lstm.lstm.hidden_size
    assert sum(p.numel() for p in lstm.parameters()) == runs._lstm_parameters(width, 10)


def test_the_arms_differ_in_a_alone():
    sizes = {"width": 4, "depth": 1, "order": 3}
    layers = {
        arm: next(m for m in runs.classifier(arm, sizes).modules() if isinstance(m, LSSL)) for arm in runs._LAYERS
    }
    learned, frozen, random = (layers[arm].system for arm in ("LSSL", "LSSL-f", "random A"))
    assert isinstance(learned.log_dt, torch.nn.Parameter)
    assert isinstance(random.log_dt, torch.nn.Parameter)
    assert not isinstance(frozen.log_dt, torch.nn.Parameter)
    assert random.transition.A.shape == (3, 3)
    torch.testing.assert_close(learned.transition.dense()[0], frozen.transition.dense()[0])


def test_splits_do_not_overlap():
    learning, held, test = runs.images("digits", 100, 30, 50, 1)
    assert [len(x) for x, _ in (learning, held, test)] == [100, 30, 50]
    assert learning[0].shape[1:] == (64, 1)
    rows = torch.cat([x[..., 0] for x, _ in (learning, held, test)])
    assert len(rows.unique(dim=0)) == 180
    assert abs(float(learning[0].mean())) < 1e-5
    tones = runs.sounds("tones", 60, 20, 20, 100, 1)
    assert [x.shape for x, _ in tones] == [(60, 100, 1), (20, 100, 1), (20, 100, 1)]


def test_both_views_that_are_timed_give_the_same():
    system = LSSL(3, 4).system
    u = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, _ = runs._view("recurrence", system, u)
        torch.testing.assert_close(runs._view("convolution", system, u), y, rtol=0, atol=1e-4)
