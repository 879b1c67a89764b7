"""Comparing losses: same networks and batches, weights of a loss trained too, and parts that do not fit named."""

from __future__ import annotations

import pytest
import torch
from compare import planted_losses
from compare.planted_losses import SEEN, TASK, Choosy, Learned, Pull, Unasked
from torch import nn

from provenn.claims.workers import Inline
from provenn.compare.kinds.losses import build, unfit
from provenn.compare.lookup import find_kind, find_task, fitting_parts
from provenn.compare.running import Comparison, PartResult, run_comparison
from provenn.compare.tasks import small_face_verification
from provenn.compare.tasks.imbalanced_tabular import BalancedCrossEntropy, SquaredError, learnings


@pytest.fixture(autouse=True)
def clean():
    SEEN.clear()


def compared(*parts: str, trials: int = 0, seeds: int = 1) -> list[PartResult]:
    names = tuple(f"compare.planted_losses.{part}" for part in parts)
    return run_comparison(Comparison("losses", "compare.planted_losses.TASK", names, trials, seeds), Inline())


def test_every_network_trains_for_the_epochs_and_the_score_is_their_mean() -> None:
    (result,) = compared("Pull", trials=2, seeds=1)
    assert SEEN[:6] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert result.runs[0].steps == 6
    # Adam's first steps are of the size of the rate: three of them from 1 towards 7; the mean of the places is ½.
    lr = result.settings["lr"]
    assert result.runs[0].score == pytest.approx(1 + 3 * lr + 0.5, rel=0.02)
    assert all(score > 100 for _, score in result.tried)  # tuning is scored apart


def test_weights_of_a_loss_are_trained_with_the_network() -> None:
    learning = TASK.setup(3, "cpu", tuning=False).learnings[0]
    criterion = build(Learned, learning, {"lr": 0.1})
    assert criterion.centre.shape == (2,)
    (result,) = compared("Learned")
    assert result.failure is None
    assert result.runs[0].score == pytest.approx(1 + 0.5)  # the network itself gets no gradient


def test_a_loss_gets_what_it_asks_for() -> None:
    learning = TASK.setup(1, "cpu", tuning=False).learnings[0]
    assert build(Pull, learning, {"lr": 0.1, "centre": 2.0}).centre.tolist() == [2, 2]


def test_what_does_not_fit_says_why() -> None:
    assert unfit(TASK, Pull) is None
    assert unfit(TASK, Unasked) == "takes no width"
    assert unfit(TASK, Choosy) == "cannot take the task's batches: targets must be planted"
    assert not any(epoch > 0 for epoch, _ in planted_losses.SEEN)


def test_the_losses_that_ship_with_the_tables_equal_their_formulas() -> None:
    logits, y = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    each = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
    torch.testing.assert_close(BalancedCrossEntropy()(logits, y), (each[:1].mean() + each[1:].mean()) / 2)
    torch.testing.assert_close(SquaredError()(logits, y), ((1 / (1 + torch.exp(-logits)) - y) ** 2).mean())


def test_the_tables_are_split_by_the_seed_and_hold_few_positives() -> None:
    task = find_task("imbalanced-tabular")
    one, same, other = (learnings(seed, "cpu", False) for seed in (1, 1, 2))
    assert len(one) == 6
    for a, b, c in zip(one, same, other, strict=True):
        (x, y), (again, _), (apart, _) = (next(iter(learning.batches(0))) for learning in (a, b, c))
        assert torch.equal(x, again)
        assert not torch.equal(x, apart)
        assert 0 < y.mean() < 0.15
        assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
        assert a.score(nn.Sequential(Constant(-1.0))) == 0.0
        assert 0.05 < a.score(nn.Sequential(Constant(1.0))) < 0.3  # F1 of "all positive" is 2p / (1 + p)
    names, reasons = fitting_parts(find_kind("losses"), task)
    assert {"AnyLoss", "ScoreOrientedLoss", "bce"} <= set(names)
    assert not set(names) & set(reasons)


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), self.value)


def test_faces_to_verify_are_of_people_that_were_not_trained_on() -> None:
    task = find_task("small-face-verification")
    tuned, judged, other = (
        small_face_verification.learnings(seed, "cpu", tuning, data="simulated")[0]
        for seed, tuning in ((1, True), (1, False), (2, False))
    )
    assert tuned.offers == {"in_features": 64, "num_classes": 22}
    assert judged.offers == {"in_features": 64, "num_classes": 28}
    x, y = next(iter(judged.batches(0)))
    assert x.shape == (28, 1, 28, 23)
    assert not torch.equal(x, next(iter(judged.batches(1)))[0])
    assert sorted(set(torch.cat([y for _, y in judged.batches(0)]).tolist())) == list(range(28))
    assert not torch.equal(x, next(iter(other.batches(0)))[0])
    assert 0 <= judged.score(judged.model) <= 1
    assert judged.score(judged.model) != tuned.score(judged.model)  # other people
    assert unfit(task, nn.CrossEntropyLoss) == "takes no in_features, num_classes"
    softmax = build(task.references["softmax"], judged, {"lr": 0.1})
    weight, bias = softmax.classifier.weight, softmax.classifier.bias
    e = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scores = e @ weight.T + bias
    expected = (scores.logsumexp(1) - scores[torch.arange(5), y[:5]]).mean()
    torch.testing.assert_close(softmax(e, y[:5]), expected)
