"""DiffGrad against scalar arithmetic, torch's Adam, and the peer package."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.optim import diffgrad as claim
from provenn.contracts import BadInput, OptimizerCase
from provenn.optim import DiffGrad


def parameter(value=1.0):
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


CASES = [
    OptimizerCase(
        part="provenn.optim.DiffGrad",
        make=functools.partial(DiffGrad, friction=friction),
        label=friction,
        foreach=True,
        quadratic={"lr": 0.1},
        rosenbrock={"lr": 0.02},
        bad_input=(
            BadInput("lr", lambda: DiffGrad([parameter()], lr=0.0)),
            BadInput("lr", lambda: DiffGrad([parameter()], lr=-1.0)),
            BadInput("lr", lambda: DiffGrad([parameter()], lr=math.nan)),
            BadInput("betas", lambda: DiffGrad([parameter()], betas=(1.0, 0.999))),
            BadInput("betas", lambda: DiffGrad([parameter()], betas=(0.9, -0.1))),
            BadInput("eps", lambda: DiffGrad([parameter()], eps=-1e-8)),
            BadInput("weight_decay", lambda: DiffGrad([parameter()], weight_decay=-0.1)),
            BadInput("friction", lambda: DiffGrad([parameter()], friction="none")),
        ),
    )
    for friction in ("difference", "signed", "wide", "aliased")
]


def run(make, gradients, start=1.0):
    """The trajectory of one float64 parameter that is fed these gradients, as rows."""
    gradients = np.asarray(gradients, dtype=np.float64)
    param = torch.nn.Parameter(torch.full(gradients.shape[1:], start, dtype=torch.float64))
    optimizer = make([param])
    rows = []
    for gradient in gradients:
        param.grad = torch.from_numpy(np.array(gradient))
        optimizer.step()
        rows.append(param.detach().numpy().copy())
    return np.array(rows)


def by_hand(gradients, friction, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, start=1.0):
    """The paper's equations, one number at a time, in Python floats."""
    theta, m, v, last, rows = start, 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        g = g + weight_decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        theta -= lr * friction(last - g) * (m / (1 - betas[0] ** t)) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
        last = g
        rows.append(theta)
    return np.array(rows)


FORMS = {
    "difference": lambda d: 1 / (1 + math.exp(-abs(d))),
    "signed": lambda d: 1 / (1 + math.exp(-d)),
    "wide": lambda d: 9 / (1 + math.exp(-abs(d) / 2)) - 4,
    "aliased": lambda d: 0.5,
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("friction", FORMS)
def test_follows_the_equations(friction, foreach):
    gradients = np.random.default_rng(0).normal(size=40) * 3
    # A large ε, so that ε inside the root, or outside the bias correction, would be seen.
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": 0.3}
    got = run(lambda p: DiffGrad(p, friction=friction, foreach=foreach, **options), gradients)
    np.testing.assert_allclose(got, by_hand(gradients, FORMS[friction], **options), rtol=1e-12)


def test_first_step_is_adams_times_the_friction_of_the_first_gradient():
    gradient = np.array([[0.3, -2.0, 5.0]])
    adam = 1.0 - run(torch.optim.Adam, gradient)
    ours = 1.0 - run(DiffGrad, gradient)
    np.testing.assert_allclose(ours, adam / (1 + np.exp(-np.abs(gradient))), rtol=1e-12)


def test_constant_gradient_is_adam_at_half_the_learning_rate_from_the_second_step():
    gradients = np.full(30, 0.7)
    ours = np.diff(run(DiffGrad, gradients))
    adam = np.diff(run(lambda p: torch.optim.Adam(p, lr=5e-4), gradients))
    np.testing.assert_allclose(ours, adam, rtol=1e-9)


def test_aliased_is_adam_at_half_the_learning_rate():
    gradients = np.random.default_rng(1).normal(size=(30, 4))
    ours = run(lambda p: DiffGrad(p, friction="aliased"), gradients)
    adam = run(lambda p: torch.optim.Adam(p, lr=5e-4), gradients)
    np.testing.assert_allclose(ours, adam, rtol=1e-12)


def test_friction_sees_the_gradient_and_not_the_moments():
    # Alternating ±4 keeps the first moment small and steady, but the gradient changes by 8: ξ ≈ 1, not ≈ ½.
    gradients = np.array([4.0, -4.0] * 20)
    ours = np.diff(run(DiffGrad, gradients))
    adam = np.diff(run(torch.optim.Adam, gradients))
    np.testing.assert_allclose(ours / adam, 1 / (1 + math.exp(-8)), rtol=1e-9)


def test_keeps_a_copy_of_the_gradient():
    # The authors' slip: a reference to the gradient's buffer, which the next backward overwrites in place.
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = DiffGrad([param])
    param.grad = torch.tensor([1.0])
    optimizer.step()
    param.grad.fill_(-3.0)
    assert optimizer.state[param]["previous_grad"].item() == 1.0


def test_leaves_the_gradient_alone():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, 2.0, 3.0])
    for foreach in (False, True):
        DiffGrad([param], weight_decay=0.5, maximize=True, foreach=foreach).step()
    assert param.grad.tolist() == [1.0, 2.0, 3.0]


def test_complex_parameter_equals_its_real_and_imaginary_parts():
    gradients = torch.randn(20, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128))
    parts = torch.nn.Parameter(torch.view_as_real(whole.detach().clone()))
    optimizers = DiffGrad([whole], weight_decay=0.1), DiffGrad([parts], weight_decay=0.1)
    for gradient in gradients:
        whole.grad, parts.grad = gradient.clone(), torch.view_as_real(gradient.clone())
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_that_skip_steps_count_their_own(foreach):
    often, seldom = parameter(), parameter()
    optimizer = DiffGrad([often, seldom], foreach=foreach)
    for turn in range(6):
        often.grad = torch.tensor(float(turn + 1), dtype=torch.float64)
        seldom.grad = torch.tensor(float(turn + 1), dtype=torch.float64) if turn % 3 == 0 else None
        optimizer.step()
    friction = FORMS["difference"]
    assert often.item() == pytest.approx(by_hand([1, 2, 3, 4, 5, 6], friction)[-1], rel=1e-12)
    assert seldom.item() == pytest.approx(by_hand([1, 4], friction)[-1], rel=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_peer_package_takes_the_same_trajectory(weight_decay):
    peer = pytest.importorskip("pytorch_optimizer")
    gradients = np.random.default_rng(2).normal(size=(50, 7))
    ours = run(lambda p: DiffGrad(p, weight_decay=weight_decay), gradients)
    theirs = run(
        lambda p: peer.DiffGrad(p, weight_decay=weight_decay, weight_decouple=False, fixed_decay=False), gradients
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_sparse_gradient_is_refused():
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        DiffGrad(table.parameters()).step()


# The claim.


def test_functions_are_the_papers():
    # Minima found by a scan: the global one lies where the claim says, and no other local minimum is as low.
    for name, function in claim.FUNCTIONS.items():
        x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
        y = function(x)
        inner = (y[1:-1] < y[:-2]) & (y[1:-1] <= y[2:])
        lows = torch.sort(y[1:-1][inner]).values
        assert x[y.argmin()].item() == pytest.approx(claim.MINIMA[name].place, abs=1e-3)
        assert lows[0].item() == pytest.approx(claim.MINIMA[name].value, abs=1e-4)
        assert lows[1].item() == pytest.approx(claim.MINIMA[name].next_value, abs=1e-4)


def evidence(ours, adam, reached, missed):
    functions = {"DiffGrad": reached, "Adam": missed}
    figures = {
        ("functions", arm): {f"{name}: reached": [float(hit)] for name, hit in zip(claim.FUNCTIONS, hits, strict=True)}
        for arm, hits in functions.items()
    }
    figures["digits", "DiffGrad"] = {"test_accuracy": ours}
    figures["digits", "Adam"] = {"test_accuracy": adam}
    return Evidence.of(figures)


BETTER, WORSE = [0.95, 0.96, 0.97, 0.96, 0.95], [0.93, 0.94, 0.94, 0.95, 0.93]


@pytest.mark.parametrize(
    ("ours", "adam", "reached", "missed", "outcome"),
    [
        (BETTER, WORSE, (1, 1, 1), (1, 0, 1), "reproduced"),
        (BETTER, WORSE, (1, 1, 1), (1, 1, 1), "partly"),
        (BETTER, WORSE, (1, 0, 1), (0, 0, 0), "partly"),
        (WORSE, BETTER, (1, 1, 1), (0, 1, 1), "partly"),
        (WORSE, BETTER, (1, 1, 1), (1, 1, 1), "not reproduced"),
        # A mean above Adam's does not count when the interval reaches below zero.
        ([0.99, 0.90, 0.99, 0.90, 0.95], [0.94] * 5, (1, 1, 0), (0, 0, 0), "not reproduced"),
    ],
)
def test_judge(ours, adam, reached, missed, outcome):
    assert claim.judge(evidence(ours, adam, reached, missed)).outcome == outcome


def test_every_arm_tunes_over_the_same_rates():
    tuning = claim.CLAIM.studies["digits"].tuning
    rates = {arm: [one["lr"] for one in tuning.of(arm)] for arm in claim.CLAIM.studies["digits"].arms}
    for first, second in itertools.pairwise(rates.values()):
        assert first == second == [5e-4, 1e-3, 2e-3, 4e-3]
