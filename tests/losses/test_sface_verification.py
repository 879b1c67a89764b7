"""Verification and identification against scikit-learn's curves, loops, and what must come out of plain cases."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold
from torch.nn import functional as F

from provenn.losses import identification_rate, pair_report, verification_report

FARS = (0.5, 0.1, 0.01)


def drawn(seed, pairs=400, ties=False):
    draws = np.random.default_rng(seed)
    same = draws.random(pairs) < 0.3
    scores = draws.normal(size=pairs) + 1.2 * same
    return np.round(scores, 1) if ties else scores, same


def report_of(scores, same, **options):
    return pair_report(torch.from_numpy(scores), torch.from_numpy(same), **options)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rates_are_those_of_scikit_learn(seed, ties):
    scores, same = drawn(seed, ties=ties)
    report = report_of(scores, same, fars=FARS)
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    assert report.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert report.tars == pytest.approx(tuple(tpr[fpr <= far].max() for far in FARS), abs=1e-12)
    assert report.tar(0.1) == report.tars[1]
    for far, tar in zip(report.curve_far, report.curve_tar, strict=True):
        assert tpr[fpr <= far - 1e-9].max() - 1e-12 <= tar <= tpr[fpr <= far + 1e-9].max() + 1e-12
    assert report.curve_far[0] == 1.0
    assert report.curve_far[-1] == pytest.approx(1 / (~same).sum())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("pairs", "folds"), [(400, 10), (403, 10), (57, 4)])
def test_accuracy_by_folds_is_that_of_scikit_learn(pairs, folds, ties):
    scores, same = drawn(3, pairs, ties)
    report = report_of(scores, same, folds=folds)
    found = []
    for train, test in KFold(folds).split(scores):
        fpr, tpr, levels = roc_curve(same[train], scores[train], drop_intermediate=False)
        matching = same[train].sum()
        best = int(np.argmax(np.round(tpr * matching + (1 - fpr) * (len(train) - matching))))
        below = levels[best + 1] if best + 1 < len(levels) else levels[best] - 2
        threshold = (levels[best] + below) / 2 if best else levels[1] + 1
        found.append(((scores[test] >= threshold) == same[test]).mean())
    assert report.fold_accuracies == pytest.approx(found, abs=1e-12)
    assert report.accuracy == pytest.approx(np.mean(found), abs=1e-12)
    assert report.accuracy_std == pytest.approx(np.std(found), abs=1e-12)


def test_all_pairs_are_those_of_their_cosines():
    draws = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(30, 4, generator=draws), torch.randint(6, (30,), generator=draws)
    first, second = np.triu_indices(30, 1)
    scores = F.cosine_similarity(embeddings[first].double(), embeddings[second].double()).numpy()
    same = (labels[first] == labels[second]).numpy()
    report = verification_report(embeddings, labels, fars=FARS)
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    assert (report.pairs, report.matching) == (435, same.sum())
    assert report.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert report.tars == pytest.approx(tuple(tpr[fpr <= far].max() for far in FARS), abs=1e-12)
    lengths = torch.logspace(-30, 30, 30)[:, None]
    assert verification_report(embeddings * lengths, labels, fars=FARS).auc == pytest.approx(report.auc, abs=1e-3)
    assert not embeddings.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_embeddings(dtype):
    labels = torch.arange(60) % 6
    report = verification_report(torch.eye(6, dtype=dtype)[labels] * 3.7, labels)
    assert (report.auc, report.accuracy, report.accuracy_std) == (1.0, 1.0, 0.0)
    assert report.tars == (1.0,) * 5
    assert report.fars == (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    assert identification_rate(torch.eye(6, dtype=dtype)[labels], labels) == 1.0


def test_random_embeddings():
    draws = torch.Generator().manual_seed(1)
    labels = torch.arange(200) % 10
    report = verification_report(torch.randn(200, 32, generator=draws), labels)
    assert report.auc == pytest.approx(0.5, abs=0.03)  # 1900 matching pairs: ±0.007 were they independent
    assert report.tar(1e-2) < 0.03
    assert report.accuracy == pytest.approx(0.9, abs=0.01)  # all pairs called different, as nine in ten are


def test_worst_scores():
    same = torch.tensor([True, False] * 20)
    report = pair_report(-same.double(), same)
    assert report.auc == 0.0
    assert report.tars == (0.0,) * 5
    tied = pair_report(torch.zeros(40), same)
    assert tied.auc == 0.5


def test_a_rate_of_whole_pairs_is_not_lost_to_rounding():
    """0.07 of 100 pairs is 7.000000000000001: the seventh false accept is allowed, the eighth is not."""
    same = torch.zeros(101, dtype=torch.bool)
    for place, expected in ((7, 1.0), (8, 0.0)):
        scores = torch.arange(101.0, 0, -1)
        same[:] = False
        same[place] = True
        assert pair_report(scores, same, fars=(0.07,)).tars == (expected,)
    same[:] = False
    same[29] = True
    assert pair_report(torch.arange(101.0, 0, -1), same, fars=(0.29,)).tars == (1.0,)  # 28.999999999999996


def test_report_words():
    scores, same = drawn(4)
    report = report_of(scores, same)
    assert type(report).from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="far"):
        report.tar(0.3)
    assert "AUC" in report.plot().axes[0].get_title()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("given", [False, True])
def test_identification_by_loops(given, rank):
    draws = torch.Generator().manual_seed(2)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    centres = torch.randn(4, 3, generator=draws)
    embeddings = centres[labels] + 0.9 * torch.randn(8, 3, generator=draws)
    distractors = torch.randn(9, 3, generator=draws) if given else None
    found = []
    for probe in range(8):
        for mate in range(8):
            if probe == mate or labels[probe] != labels[mate]:
                continue
            others = distractors if given else embeddings[labels != labels[probe]]
            mine = F.cosine_similarity(embeddings[probe], embeddings[mate], dim=0)
            nearer = sum(float(F.cosine_similarity(embeddings[probe], one, dim=0) >= mine) for one in others)
            found.append(nearer < rank)
    rate = identification_rate(embeddings, labels, distractors, rank)
    assert 0 < rate < 1
    assert rate == pytest.approx(np.mean(found))


def test_identification_needs_no_more_than_there_is():
    embeddings, labels = torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 1])
    assert identification_rate(embeddings, labels, rank=2) == 1.0
    assert identification_rate(embeddings, labels, torch.eye(3)[:1]) == 0.0  # a distractor as near counts against it
