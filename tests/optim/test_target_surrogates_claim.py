"""The verdict's rule on made-up evidence, its edges, and the problems and costs that the claim is tested on."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.optim import _target_surrogates_problems as problems
from provenn.claims.optim import target_surrogates as claim

GOOD = {"SSO, m = 20": 0.1, "SSO, m = 10": 0.2, "SSO, m = 1": 0.9, "SSO-SLS": 0.3, "SGD": 1.0, "Adam": 0.5, "SLS": 0.6}
LATE = "excess, oracle 100×"


def verdict(changes=()):
    """The verdict where all goes well, but for changes [(study, arm, metric, value)]."""
    figures = {
        (study, arm): {"excess": [value] * 2, LATE: [value] * 2}
        for study, (arm, value) in itertools.product(claim.STUDIES, GOOD.items())
    }
    for study, arm, metric, value in changes:
        figures[study, arm][metric] = [value] * 2
    return claim.judge(Evidence.of(figures))


def spoiled(*studies):
    return verdict([(study, "SSO, m = 20", "excess", 2.0) for study in studies]).outcome


def test_all_well_is_reproduced():
    assert verdict().outcome == "reproduced"
    assert verdict().margins["excess over SGD's, digits"] == pytest.approx(0.1)
    assert verdict().margins["excess over the best baseline's, digits"] == pytest.approx(0.2)


def test_two_problems_are_enough_and_one_is_part():
    assert spoiled("cart-pole") == "reproduced"
    assert spoiled("digits", "breast cancer") == "reproduced"
    assert spoiled("rank 1", "rank 4", "rank 10") == "reproduced"
    assert spoiled("digits", "cart-pole") == "partly"
    assert spoiled("digits", "rank 4") == "partly"
    assert spoiled("digits", "rank 1", "cart-pole") == "not reproduced"


@pytest.mark.parametrize(
    ("arm", "metric", "edge", "beyond"),
    [
        ("SGD", "excess", 0.2, 0.199),  # half of it, at most
        ("Adam", "excess", 0.1, 0.099),  # not above the best baseline
        ("SLS", "excess", 0.1, 0.099),
        ("SSO, m = 1", "excess", 0.101, 0.1),  # below it
        ("SGD", LATE, 0.101, 0.1),
        ("Adam", LATE, 0.101, 0.1),
        ("SLS", LATE, 0.101, 0.1),
        ("SSO, m = 1", LATE, 0.101, 0.1),
    ],
)
def test_edges_of_every_condition(arm, metric, edge, beyond):
    others = [(study, "SSO, m = 20", "excess", 2.0) for study in ("cart-pole", "digits")]
    assert verdict([*others, ("rank 4", arm, metric, edge)]).outcome == "partly"
    assert verdict([*others, ("rank 4", arm, metric, beyond)]).outcome == "not reproduced"


def test_arms_that_are_shown_do_not_count():
    shown = [(study, arm, "excess", 1e-9) for study in claim.STUDIES for arm in ("SSO, m = 10", "SSO-SLS")]
    assert verdict(shown).outcome == "reproduced"


def test_all_arms_get_the_same_seven_step_sizes():
    tuning = claim.CLAIM.studies["digits"].tuning
    sizes = {arm: sorted(one["size"] for one in tuning.of(arm)) for arm in claim.ARMS}
    assert all(found == pytest.approx([10.0**k for k in range(-3, 4)]) for found in sizes.values())


def test_the_least_loss_of_a_rank_is_that_of_the_truncated_matrix():
    problem = problems.build("rank 4", {"batch": 10}, 0)
    x, y = problem._x.numpy(), problem._y.numpy()
    U, S, V = np.linalg.svd(y, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ V[:4]
    assert problem.least == pytest.approx(((best - y) ** 2).sum() / 2000, rel=1e-9)
    assert problem.least > 1e-6
    # And a network of that rank gets there.
    W = np.linalg.lstsq(x, best, rcond=None)[0]
    left, sizes, right = np.linalg.svd(W.T, full_matrices=False)
    first, second = problem.model
    first.weight.data = torch.from_numpy(np.diag(sizes[:4]) @ right[:4])
    second.weight.data = torch.from_numpy(left[:, :4].copy())
    assert problem.whole() == pytest.approx(problem.least, rel=1e-9)
    assert problems.build("rank 10", {"batch": 10}, 0).least == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("study", ["breast cancer", "digits"])
def test_a_hyperplane_separates_the_tables(study):
    x, y = (one.numpy() for one in problems.table(study))
    assert LogisticRegression(C=1e9, max_iter=20000, tol=1e-6).fit(x, y).score(x, y) == 1


def test_losses_of_the_tables_are_the_usual_ones():
    for study, classes in (("breast cancer", 2), ("digits", 10)):
        assert problems.build(study, {"batch": 8}, 0).whole() == pytest.approx(math.log(classes))
    problem = problems.build("breast cancer", {"batch": 8}, 0)
    z = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    expected = -torch.tensor([0.3, 2.0]).double().sigmoid().log().mean()
    assert problems._logistic(z, torch.tensor([1.0, -1.0]).double()).item() == pytest.approx(expected.item())
    assert problem.batches == 72


def test_batches_are_the_same_for_every_arm():
    one, other = (problems.build("digits", {"batch": 5}, 3) for _ in range(2))
    for index in range(3):
        assert torch.equal(one.batch(index)[0], other.batch(index)[0])
    assert not torch.equal(one.batch(9)[0], problems.build("digits", {"batch": 5}, 4).batch(9)[0])


def test_costs_of_steps():
    for arm, oracle, passes in (("SGD", 4, 4.0), ("Adam", 4, 4.0)):
        stepper = claim.Stepper(arm, problems.build("digits", {"batch": 5}, 0), 0.1)
        for index in range(4):
            stepper.step(index)
        assert (stepper.oracle, stepper.passes) == (oracle, pytest.approx(passes))
    stepper = claim.Stepper("SLS", problems.build("digits", {"batch": 5}, 0), 1e-6)
    stepper.step(0)  # so small a step holds at once: one gradient and one value
    assert (stepper.oracle, stepper.passes) == (1, pytest.approx(4 / 3))
    problem, counted = problems.build("digits", {"batch": 5}, 0), []
    problem.model.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    stepper = claim.Stepper("SSO, m = 20", problem, 1.0)
    stepper.step(0)
    # The repeat of the first step is not counted; a pass with gradients enabled is one that is gone back through.
    assert stepper.oracle == 1
    assert sum(counted) == 20
    assert stepper.passes == pytest.approx((len(counted) - 1) / 3 + sum(counted) * 2 / 3)


def test_modelled_time():
    excesses, calls, passes = [1.0, 0.5, 0.25, 0.125], [0, 1, 2, 3], [0, 10, 20, 30]
    reached = functools.partial(claim.after, excesses, calls, passes)
    assert reached(100, 3) == 0.25  # 330 is more than 303, 220 is not
    assert reached(1, 3) == 1.0  # 11 is more than 6
    assert reached(10, 2) == 0.5  # 20 ≤ 22 < 40
    assert claim.after([1.0, 0.5, 1e30], [0, 1, 2], [0, 1, 2], 1, 2) == 1e30
    assert claim.after([1.0, 0.5, 0.2], [0, 1, 2], [0, 1, 2], 1, 2) == 0.2


@pytest.mark.parametrize("arm", claim.ARMS)
def test_every_arm_lowers_the_loss(arm):
    budget = {"batch": 64, "calls": 20, "every": 10}
    found = list(claim.run(Trial("digits", arm, 0, "small", budget, {"size": 0.1 if arm in ("SGD", "Adam") else 1.0})))
    figures = {event.name: event.value for event in found if isinstance(event, Metric)}
    assert figures["excess"] < 0.6 * math.log(10)
    assert figures["excess, oracle 100×"] >= figures["excess"]


def test_divergence_counts_as_a_huge_excess():
    budget = {"batch": 100, "calls": 40, "every": 10}
    found = list(claim.run(Trial("rank 4", "SGD", 0, "small", budget, {"size": 1000.0})))
    figures = {event.name: event.value for event in found if isinstance(event, Metric)}
    assert figures["excess"] == figures["excess, oracle 1×"] == 1e30
    assert all(math.isfinite(value) for value in figures.values())


def test_imitation_is_measured_in_the_policys_own_states():
    problem = problems.build("cart-pole", {"episodes": 2, "horizon": 3}, 0)
    x, loss = problem.batch(0)
    assert x.shape == (6, 4)
    expert = problem._expert(x)
    assert loss(expert).item() == 0
    assert loss(expert + 1).item() == pytest.approx(0.5)
    before = problem.whole()
    assert before == problem.whole() > 0.01
