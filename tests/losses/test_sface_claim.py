"""SFace's claim: the rule on made-up figures, the cut of the people, and what the arms share."""

import numpy as np
import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.losses import _sface_faces as faces
from provenn.claims.losses import sface as claim
from provenn.data import DataUnavailableError

CLEAN, SOME, MANY = claim.NOISE
ARMS = ("SFace", "ArcFace", "CosFace", "NormFace")


def judged(tar, auc=None):
    """Judge figures {study: four arms' TAR}; the AUC of SFace is a little above ArcFace's unless given."""
    auc = auc or {SOME: (0.91, 0.9), MANY: (0.81, 0.8)}
    figures = {}
    for study, values in tar.items():
        for place, (arm, value) in enumerate(zip(ARMS, values, strict=True)):
            area = auc.get(study, (0.9, 0.9))[min(place, 1)]
            figures[study, arm] = {
                claim.TAR: [value - 0.01, value, value + 0.01],
                "AUC": [area, area - 0.02, area + 0.02],
            }
    return claim.judge(Evidence.of(figures))


GOOD = {CLEAN: (0.5, 0.51, 0.49, 0.48), SOME: (0.4, 0.38, 0.39, 0.4), MANY: (0.3, 0.295, 0.2, 0.1)}


def test_reproduced():
    verdict = judged(GOOD)
    assert verdict.outcome == "reproduced"
    assert "ArcFace 38.0 %" in verdict.reason
    assert verdict.margins[f"{claim.TAR} above ArcFace's, {SOME}"].estimate == pytest.approx(0.02)


@pytest.mark.parametrize(
    "change",
    [
        {SOME: (0.4, 0.38, 0.401, 0.4)},  # CosFace ahead at 30 %
        {MANY: (0.3, 0.295, 0.2, 0.301)},  # NormFace ahead at 50 %
        {SOME: (0.4, 0.381, 0.39, 0.4)},  # ArcFace less than 2 points behind at both
        {CLEAN: (0.5, 0.5, 0.5, 0.521)},  # more than 2 points behind the best without noise
    ],
)
def test_one_condition_short_is_partly(change):
    assert judged(GOOD | change).outcome == "partly"


def test_edges():
    edge = {CLEAN: (0.5, 0.52, 0.5, 0.5), SOME: (0.4, 0.4, 0.4, 0.4), MANY: (0.3, 0.28, 0.3, 0.3)}
    assert judged(edge).outcome == "reproduced"


def test_not_reproduced():
    worse = GOOD | {SOME: (0.4, 0.5, 0.39, 0.4)}
    assert judged(worse, {SOME: (0.9, 0.9), MANY: (0.9, 0.8)}).outcome == "not reproduced"  # equal at 30 %
    assert judged(worse, {SOME: (0.91, 0.9), MANY: (0.79, 0.8)}).outcome == "not reproduced"


def test_reproduced_does_not_ask_for_auc():
    assert judged(GOOD, {SOME: (0.8, 0.9), MANY: (0.8, 0.9)}).outcome == "reproduced"


def trial(arm="SFace", study=SOME, seed=0):
    return Trial(study, arm, seed, "smoke", claim.CLAIM.studies[study].tiers["smoke"].budget)


def test_no_person_is_on_both_sides(monkeypatch):
    seen = []
    original = faces.Faces.of
    monkeypatch.setattr(faces.Faces, "of", lambda self, chosen: seen.append(chosen.tolist()) or original(self, chosen))
    metrics = {event.name: event.value for event in claim.run(trial()) if isinstance(event, Metric)}
    kept, held_back, training, unseen = map(set, seen)
    assert kept | held_back == training
    assert not kept & held_back
    assert not training & unseen
    assert len(training | unseen) == 12
    assert {claim.TAR, "AUC", "wrong labels learned"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())


def test_arms_share_weights_and_labels():
    data = faces.load_faces("simulated", 6, "cpu")
    first, (labels, wrong) = claim._trainer(trial("SFace"), (0.01, 0), data, "all")
    other, (again, _) = claim._trainer(trial("NormFace"), (0.05, 1), data, "all")
    assert torch.equal(labels, again)
    assert int(wrong.sum()) == 18
    assert torch.equal(labels != data.people, wrong)
    mine, theirs = first.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert first.seed == other.seed


def test_every_arm_tries_as_much():
    assert {len(variants) for variants in claim.HEADS.values()} == {2}
    assert claim.SETTINGS[0] == (0.01, 0)
    assert len(set(claim.SETTINGS)) == 4
    assert claim.HEADS["SFace"][0](4, 2).curves.a == 0.87


def test_people_are_renamed_in_order():
    data = faces.load_faces("simulated", 4, "cpu")
    part = data.of(torch.tensor([2, 0]))
    assert part.people.tolist() == [1] * 10 + [0] * 10
    assert torch.equal(part.images[:10], data.images[:10])
    assert torch.equal(part.images[10:], data.images[20:30])


def test_shifts_keep_the_middle():
    images = torch.arange(2 * 28 * 23.0).reshape(2, 1, 28, 23)
    moved = faces.shifted(images, torch.Generator().manual_seed(0))
    for before, after in zip(images, moved, strict=True):
        offset = after[0, 10, 10] - before[0, 10, 10]
        assert torch.equal(after[0, 4:-4, 4:-4] - offset, before[0, 4:-4, 4:-4])
        down = round(offset.item() / 23)
        assert abs(down) <= 2
        assert abs(offset.item() - 23 * down) <= 2


def test_simulated_faces_are_the_same_each_time_and_tell_people_apart():
    data = faces.load_faces("simulated", 6, "cpu")
    assert torch.equal(data.images, faces.load_faces("simulated", 6, "cpu").images)
    flat = data.images.flatten(1)
    means = torch.stack([flat[data.people == one].mean(0) for one in range(6)])
    assert torch.equal(torch.cdist(flat, means).argmin(1), data.people)


def test_missing_photographs_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    with pytest.raises(DataUnavailableError, match=r"orl_faces\.npz"):
        faces.load_faces("orl_faces", 40, "cpu")


def test_photographs_of_another_size_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    np.savez(tmp_path / "orl_faces.npz", x=np.zeros((4, 5, 5), np.uint8), y=np.zeros(4))
    with pytest.raises(ValueError, match="orl_faces"):
        faces.load_faces("orl_faces", 40, "cpu")
