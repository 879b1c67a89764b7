"""SeqBoat's claim: its rule on made-up evidence, and its tasks."""

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import _seqboat_tasks as tasks
from provenn.claims.nn import seqboat as claim
from provenn.core.experiment.seeding import generator


def evidence(copying=(0.9, 0.5, 0.3), least=0.2, digits=(0.8, 0.8), count=0.5):
    figures = {}
    for arm, value in zip(claim.ARMS, copying, strict=True):
        figures[claim.COPYING, arm] = {"test_accuracy": [value] * 3, "least_activation": [least] * 3}
    for arm, value, share in zip(claim.ARMS, (*digits, 0.1), (count, 1.0, 0.0), strict=True):
        figures[claim.SPOKEN, arm] = {"test_accuracy": [value] * 3, "attended_times_window": [8192 * share] * 3}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("made_up", "outcome"),
    [
        ({}, "reproduced"),
        ({"copying": (0.551, 0.5, 0.3)}, "reproduced"),
        ({"copying": (0.549, 0.5, 0.3)}, "partly"),
        ({"copying": (0.9, 0.5, 0.851)}, "partly"),
        ({"least": 0.5}, "reproduced"),
        ({"least": 0.51}, "partly"),
        ({"digits": (0.791, 0.8)}, "reproduced"),
        ({"digits": (0.789, 0.8)}, "partly"),
        ({"digits": (0.95, 0.8)}, "reproduced"),
        ({"count": 0.7}, "reproduced"),
        ({"count": 0.71}, "partly"),
        ({"least": 0.51, "count": 0.71}, "not reproduced"),
        ({"copying": (0.5, 0.5, 0.5), "digits": (0.7, 0.8)}, "not reproduced"),
    ],
)
def test_the_rule_on_made_up_evidence(made_up, outcome):
    assert claim.judge(evidence(**made_up)).outcome == outcome


def test_copying_asks_for_the_symbols_in_their_order():
    x, y = tasks.copying(20, 40, generator(0))
    tokens = x.argmax(-1)
    assert x.sum(-1).eq(1).all()
    assert tokens[:, -8:].eq(tasks.CUE).all()
    for row, wanted in zip(tokens, y, strict=True):
        assert row[row < tasks.VOCABULARY].tolist() == wanted.tolist()
    assert len({tuple(row.tolist()) for row in tokens.ne(tasks.BLANK)}) > 1


def test_copying_without_blanks_is_the_symbols_and_then_the_cues():
    x, y = tasks.copying(20, 16, generator(0))
    assert torch.equal(x.argmax(-1)[:, :8], y)
    assert x.argmax(-1)[:, 8:].eq(tasks.CUE).all()


def test_sequences_grow_to_the_whole_length_in_half_of_the_epochs():
    budget = claim.CLAIM.studies[claim.COPYING].tiers["small"].budget
    lengths = [tasks.length_at(epoch, budget["length"], budget["window"]) for epoch in range(budget["epochs"])]
    assert lengths == [16, 32, 48, 64, 80, 96, 112] + [128] * 9
    assert budget["steps"] % budget["epochs"] == 0


def test_every_arm_copies_with_the_same_optimizer_and_embedding():
    for arm in tasks.ARMS:
        torch.manual_seed(0)
        model = tasks.build(arm, False, 32, 4, 2, 4)
        assert model.encoder.weight.std().item() == pytest.approx(32**-0.5, rel=0.15)
        optimizer = tasks.optimizer_of(model, False, 0.5)
        assert optimizer.defaults["betas"] == (0.9, 0.98)
        assert optimizer.defaults["lr"] == 0.5
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        optimizer.step()
        norm = sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt()
        assert norm.item() == pytest.approx(1, rel=1e-4)


def test_splits_share_no_take_and_are_standardised_by_the_training_clips():
    splits = tasks.spoken_digits(16, False)
    assert {name: len(split.y) for name, split in splits.items()} == {"test": 100, "validation": 100, "train": 400}
    assert torch.allclose(splits["train"].x.mean((0, 1)), torch.zeros(33), atol=1e-4)
    assert splits["test"].x.shape[1:] == (16, 33)


def test_arms_differ_in_attention_alone():
    models = {}
    for arm in tasks.ARMS:
        torch.manual_seed(0)
        models[arm] = tasks.build(arm, True, 8, 4, 2, 4)
    names = {arm: {n for n, _ in model.named_parameters()} for arm, model in models.items()}
    assert {n.rsplit(".", 1)[0] for n in names[tasks.CHUNKED] - names[tasks.EMA]} == {
        f"layers.{i}.gau{rest}" for i in (0, 1) for rest in ("", ".in_proj", ".out_proj")
    }
    assert all(model(torch.randn(2, 16, 33)).shape == (2, 10) for model in models.values())


def test_chunked_attention_stays_in_its_chunk():
    torch.manual_seed(0)
    layer = tasks.build(tasks.CHUNKED, True, 8, 4, 2, 4).layers[0].double().eval()
    layer.norm, layer.ssm = torch.nn.Identity(), torch.nn.Identity()
    layer.gau.position_bias.data.fill_(1.0)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5] += 1
    moved = (layer(x) - layer(changed)).abs().amax((0, 2)) > 0
    assert not moved[:4].any()
    assert moved[4:8].all()
    assert not moved[8:].any()
