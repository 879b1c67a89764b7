"""Projected gradient ascent against corners that are known, and against what it must leave alone."""

import pytest
import torch
from torch import nn

from provenn.core.experiment.adversarial import pgd
from provenn.core.experiment.seeding import generator

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 1.0, 2.0]])


def linear():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(WEIGHT)
    return model


def test_linear_model_is_pushed_to_the_corner():
    # Two classes: the loss of class 0 rises along sign(w₁ − w₀), whatever the step.
    x = torch.full((4, 3), 0.5)
    found = pgd(linear(), x, torch.zeros(4, dtype=torch.long), eps=0.1, steps=5, generator=generator(0))
    corner = 0.5 + 0.1 * torch.sign(WEIGHT[1] - WEIGHT[0])
    torch.testing.assert_close(found, corner.expand(4, 3))


def test_box_cuts_the_corner():
    x = torch.tensor([[0.05, 0.95, 0.5]])
    found = pgd(linear(), x, torch.tensor([0]), eps=0.1, steps=5, generator=generator(0))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.6]]))
    free = pgd(linear(), x, torch.tensor([0]), eps=0.1, steps=5, box=None, generator=generator(0))
    torch.testing.assert_close(free, torch.tensor([[-0.05, 1.05, 0.6]]))


def test_one_step_is_the_fast_gradient_sign():
    x = torch.full((1, 3), 0.5)
    found = pgd(linear(), x, torch.tensor([1]), eps=0.1, steps=1, step_size=0.03, random_start=False)
    torch.testing.assert_close(found - x, 0.03 * torch.sign(WEIGHT[0] - WEIGHT[1])[None])


def test_start_is_uniform_in_the_box_and_follows_the_generator():
    x = torch.full((200, 3), 0.5)
    y = torch.zeros(200, dtype=torch.long)
    starts = [pgd(linear(), x, y, eps=0.2, steps=0, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    change = starts[0] - x
    assert change.abs().max() <= 0.2 + 1e-6
    assert change.abs().max() > 0.19
    assert change.mean().abs() < 4 * 0.2 / 3**0.5 / 600**0.5


def test_model_and_inputs_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.full((6, 3), 0.5)
    y = torch.zeros(6, dtype=torch.long)
    kept = x.clone()
    first = pgd(model, x, y, eps=0.1, steps=3, generator=generator(0))
    assert torch.equal(first, pgd(model, x, y, eps=0.1, steps=3, generator=generator(0)))
    assert torch.equal(x, kept)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not first.requires_grad
    with torch.no_grad():
        assert torch.equal(first, pgd(model, x, y, eps=0.1, steps=3, generator=generator(0)))


def test_raises_the_loss_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = torch.rand(64, 8), torch.arange(64) % 3
    found = pgd(model, x, y, eps=0.1, steps=10, generator=generator(0))
    assert (found - x).abs().max() <= 0.1 + 1e-6
    losses = [nn.functional.cross_entropy(model(one), y).item() for one in (x, found)]
    noisy = pgd(model, x, y, eps=0.1, steps=0, generator=generator(0))
    assert losses[1] > losses[0] + 3 * abs(nn.functional.cross_entropy(model(noisy), y).item() - losses[0])


@pytest.mark.parametrize("bad", [{"eps": -0.1}, {"steps": -1}, {"step_size": 0.0}])
def test_bad_input(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        pgd(linear(), torch.zeros(1, 3), torch.tensor([0]), **{"eps": 0.1, "steps": 1, **bad})


def test_empty_batch():
    assert pgd(linear(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), eps=0.1, steps=2).shape == (0, 3)
