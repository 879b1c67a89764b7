"""The claim's verdicts on made-up evidence, its tasks, and its arms."""

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import _quadratic_networks_tasks as tasks
from provenn.claims.nn import quadratic_networks as claim
from provenn.core.experiment.accounting import model_size


def evidence(relinear=0.45, conventional=0.44, random=0.30, diverged=0, spirals=(0.1, 0.2), quartic=(0.1, 0.2)):
    made = {
        ("images", tasks.RELINEAR): {"test_accuracy": [relinear] * 3},
        ("images", tasks.CONVENTIONAL): {"test_accuracy": [conventional] * 3},
        ("images", tasks.RANDOM): {
            "test_accuracy": [random] * 3,
            "diverged": [1.0] * diverged + [0.0] * (3 - diverged),
        },
    }
    for task, (ours, theirs) in (("spirals", spirals), ("quartic", quartic)):
        made[task, tasks.QUADRATIC] = {"test_error": [ours] * 5}
        made[task, tasks.EQUAL_PARAMETERS] = {"test_error": [theirs] * 5}
    return Evidence.of(made)


WORSE = (0.2, 0.1)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "reproduced"),
        ({"conventional": 0.445}, "reproduced"),  # + 0.5 points
        ({"conventional": 0.4451}, "partly"),
        ({"random": 0.42}, "reproduced"),  # 3 points below
        ({"random": 0.421}, "partly"),  # the plane alone
        ({"random": 0.44, "diverged": 1}, "reproduced"),
        ({"spirals": WORSE}, "partly"),
        ({"quartic": WORSE}, "partly"),
        ({"quartic": (0.1, 0.1)}, "partly"),
        ({"quartic": WORSE, "conventional": 0.453}, "partly"),  # − 0.3 points
        ({"quartic": WORSE, "conventional": 0.4531}, "not reproduced"),
        ({"quartic": WORSE, "random": 0.421}, "not reproduced"),
        ({"conventional": 0.5, "random": 0.5}, "partly"),  # the plane alone
        ({"conventional": 0.5, "spirals": WORSE, "quartic": WORSE}, "not reproduced"),
    ],
)
def test_verdicts(changes, outcome):
    verdict = claim.judge(evidence(**changes))
    assert verdict.outcome == outcome
    assert len(verdict.margins) == 5


def test_the_reason_tells_the_figures():
    reason = claim.judge(evidence(diverged=2)).reason
    assert "+1.00 points" in reason
    assert "2 runs of random start diverged" in reason
    assert "-10.00 points on spirals" in reason


def test_the_arms_start_equal_but_for_the_random_one():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, plain, random = (tasks.network(arm, 1, 3) for arm in (tasks.RELINEAR, tasks.CONVENTIONAL, tasks.RANDOM))
    assert torch.equal(ours(x), plain(x))
    assert not torch.allclose(random(x), plain(x), atol=0.1)
    assert torch.equal(random[1].branch[0].r.weight, plain[1].branch[0].weight)
    conv = random[3].branch[3]
    assert conv.g.weight.std().item() == pytest.approx((2 / 288) ** 0.5, rel=0.05)
    assert conv.b.weight.std().item() == pytest.approx((2 / 288) ** 0.5, rel=0.05)
    assert (conv.g.bias + 1).abs().max() <= 288**-0.5


def test_the_perceptrons_have_the_sizes_that_the_claim_states():
    sizes = {arm: model_size(tasks.perceptron(arm, 0)).parameters for arm in tasks.WIDTHS}
    assert sizes == {tasks.QUADRATIC: 315, tasks.EQUAL_PARAMETERS: 318, tasks.EQUAL_WIDTH: 105}


@pytest.mark.parametrize("task", ["spirals", "quartic"])
def test_the_plane_is_balanced_within_bounds_and_new_for_each_seed(task):
    one, again, other = (tasks.plane(task, seed, 400, 100, 2000) for seed in (0, 0, 1))
    assert torch.equal(one.train[0], again.train[0])
    assert not torch.equal(one.train[0], other.train[0])
    assert [len(part[0]) for part in (one.train, one.validation, one.test)] == [400, 100, 2000]
    assert one.test[1].mean().item() == pytest.approx(0.5, abs=0.05)
    assert one.test[0].abs().max() < 1.2


def test_spirals_are_a_turn_and_a_half_from_the_centre():
    x, y = tasks.plane("spirals", 3, 4000, 1, 1).train
    angle = torch.atan2(x[:, 1], x[:, 0]) - torch.pi * y
    radius = x.norm(dim=1)
    expected = 3 * torch.pi * radius
    off = torch.remainder(angle - expected + torch.pi, 2 * torch.pi) - torch.pi
    assert (off.abs()[radius > 0.3] < 0.9).double().mean() > 0.97  # noise of 0.03 is at most a third of a radian or so


def test_a_quartics_signs_are_fitted_by_its_fifteen_monomials():
    x, y = tasks.plane("quartic", 2, 2000, 1, 1).train
    powers = torch.stack([x[:, 0] ** i * x[:, 1] ** j for i in range(5) for j in range(5 - i)], dim=1).double()
    weights = torch.zeros(15, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(powers @ weights, y.double())
        loss.backward()
        return loss

    optimizer.step(closure)
    wrong = ((powers @ weights > 0) != (y > 0)).double().mean()
    assert wrong < 0.02
