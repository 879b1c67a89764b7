"""Optimistic mirror descent against hand-unrolled recursions, closed forms and its own regret bounds."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, Expectation, FunctionCase, OptimizerCase, ProbeCase, SamplerCase
from provenn.optim import (
    FTRL,
    AdaGradNorm,
    AffineBall,
    Ball,
    Box,
    DynamicOptimisticOMD,
    OnlineGradientDescent,
    OptimisticFTRL,
    OptimisticOMD,
    PastGradient,
    SEAReport,
    SEAStream,
    Simplex,
    Trajectory,
    project_ball,
    project_box,
    project_simplex,
    sea_report,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameter(*values):
    return nn.Parameter(torch.tensor(values or (0.1, 0.2, 0.3), dtype=torch.float64))


def play(optimizer, point, gradients):
    """Play against gradients: a sequence, or a function of round and point; return the points, the last included."""
    points = [point.detach().clone()]
    for t in range(len(gradients) if not callable(gradients) else gradients.rounds):
        point.grad = gradients(t, point.detach().clone()) if callable(gradients) else gradients[t].clone()
        optimizer.step()
        points.append(point.detach().clone())
    return torch.stack(points)


class Game:
    """A gradient that depends on the point."""

    def __init__(self, rounds, gradient):
        self.rounds, self.gradient = rounds, gradient

    def __call__(self, t, x):
        return self.gradient(t, x)


ONE_STEP = "the step size is the theory's, one for the whole vector: groups have no option that scales it"
WITHOUT = {
    "parameter_groups": ONE_STEP,
    "schedulers": ONE_STEP,
    "step_size": ONE_STEP,
    "none_gradients": "all parameters are one vector, whose projection moves an entry without gradient like any other",
}
"""Checks of the contract that a method over one vector with its own step size cannot have."""


def online(part, maker, label="", bad_input=(), **options):
    shared = {"quadratic_steps": 300, **{k: options.pop(k) for k in ("rosenbrock", "quadratic", "excluded")}}
    return OptimizerCase(
        part=f"provenn.optim.{part}",
        make=maker,
        label=label,
        bad_input=(
            BadInput("diameter", lambda: maker([parameter()], diameter=0.0)),
            BadInput("diameter", lambda: maker([parameter()], diameter="wide"), TypeError),
            BadInput("lipschitz", lambda: maker([parameter()], lipschitz=-1.0)),
            BadInput("domain", lambda: maker([parameter()], domain=1.0), TypeError),
            BadInput("gradient", lambda: step_on(maker, math.nan)),
            BadInput("lipschitz", lambda: step_on(maker, 1e9, lipschitz=1.0, strict=True)),
            BadInput("domain", lambda: maker([parameter(), parameter()], domain=Simplex()), TypeError),
            BadInput("center", lambda: maker([parameter()], domain=Ball(1.0, torch.zeros(2)))),
            BadInput("low", lambda: maker([parameter()], domain=Box(torch.zeros(4), torch.ones(4)))),
            *bad_input,
        ),
        **shared,
        **options,
    )


def step_on(maker, value, **options):
    point = parameter()
    optimizer = maker([point], **options)
    point.grad = torch.full_like(point, value)
    optimizer.step()


omd = functools.partial(OptimisticOMD, diameter=10.0)
exp_concave = functools.partial(OptimisticOMD, mode="exp-concave", diameter=2.0, lipschitz=1e3, alpha=1.0)
strongly = functools.partial(OptimisticOMD, mode="strongly-convex", strong_convexity=1.0)
dynamic = functools.partial(DynamicOptimisticOMD, diameter=10.0, lipschitz=300.0)

ROSENBROCK = {"diameter": 1.0}
CASES = [
    online(
        "OptimisticOMD",
        omd,
        "convex",
        rosenbrock=ROSENBROCK,
        quadratic={},
        excluded=WITHOUT,
        bad_input=(
            BadInput("diameter", lambda: OptimisticOMD([parameter()])),
            BadInput("mode", lambda: omd([parameter()], mode="concave")),
            BadInput("geometry", lambda: omd([parameter()], geometry="kl")),
            BadInput("geometry", lambda: omd([parameter()], geometry="entropy")),
            BadInput("optimism", lambda: omd([parameter()], optimism="hope")),
            BadInput("smoothness", lambda: omd([parameter()], smoothness=-1.0)),
            BadInput("eta", lambda: omd([parameter()], eta=0.0)),
            BadInput("metric", lambda: omd([parameter()], metric=torch.eye(2))),
            BadInput("guess", lambda: omd([parameter()]).predict([torch.ones(2)])),
        ),
    ),
    online(
        "OptimisticOMD",
        strongly,
        "strongly-convex",
        quadratic={"strong_convexity": 1.0},
        rosenbrock={"strong_convexity": 400.0},
        excluded=WITHOUT,
        bad_input=(
            BadInput("strong_convexity", lambda: strongly([parameter()], strong_convexity=0.0)),
            BadInput("strong_convexity", lambda: strongly([parameter()], strong_convexity=-1.0)),
            BadInput("strong_convexity", lambda: OptimisticOMD([parameter()], mode="strongly-convex")),
        ),
    ),
    online(
        "OptimisticOMD",
        exp_concave,
        "exp-concave",
        # H starts at 1 + G/(16D), which must be above the curvatures: losses of gradients below G on a domain of D.
        quadratic={"lipschitz": 1e3, "diameter": 2.0},
        rosenbrock={"lipschitz": 1e3, "diameter": 0.05},
        excluded=WITHOUT,
        bad_input=(
            BadInput("alpha", lambda: exp_concave([parameter()], alpha=0.0)),
            BadInput("alpha", lambda: OptimisticOMD([parameter()], Ball(), mode="exp-concave", lipschitz=1.0)),
            BadInput("lipschitz", lambda: OptimisticOMD([parameter()], Ball(), mode="exp-concave", alpha=1.0)),
            BadInput("metric", lambda: exp_concave([parameter()], metric=torch.eye(3))),
        ),
    ),
    online(
        "DynamicOptimisticOMD",
        dynamic,
        quadratic={},
        rosenbrock={"diameter": 4.0, "smoothness": 100.0, "horizon": 1000},
        excluded=WITHOUT,
        bad_input=(
            BadInput("lipschitz", lambda: DynamicOptimisticOMD([parameter()], Ball())),
            BadInput("diameter", lambda: DynamicOptimisticOMD([parameter()], lipschitz=1.0)),
            BadInput("horizon", lambda: dynamic([parameter()], horizon=0)),
            BadInput("horizon", lambda: dynamic([parameter()], horizon=3.0), TypeError),
            BadInput("smoothness", lambda: dynamic([parameter()], smoothness=-1.0)),
        ),
    ),
    *(
        online(
            kind.__name__,
            functools.partial(kind, diameter=10.0),
            quadratic={},
            rosenbrock=ROSENBROCK,
            excluded=WITHOUT,
            bad_input=(BadInput("diameter", lambda kind=kind: kind([parameter()])),),
        )
        for kind in (OnlineGradientDescent, AdaGradNorm, PastGradient, FTRL, OptimisticFTRL)
    ),
    FunctionCase(
        part="provenn.optim.Ball",
        call=lambda: Ball(2.0).project(normal(3)),
        bad_input=(
            BadInput("radius", lambda: Ball(0.0)),
            BadInput("radius", lambda: Ball("1"), TypeError),
            BadInput("center", lambda: Ball(1.0, torch.eye(2))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.Box",
        call=lambda: Box(-1.0, 1.0).project(normal(3)),
        bad_input=(BadInput("low", lambda: Box(1.0, 0.0)), BadInput("high", lambda: Box(0.0, math.inf))),
    ),
    FunctionCase(
        part="provenn.optim.Simplex",
        call=lambda: Simplex().project(normal(3)),
        bad_input=(BadInput("total", lambda: Simplex(0.0)), BadInput("total", lambda: Simplex(None), TypeError)),
    ),
    FunctionCase(
        part="provenn.optim.AffineBall",
        call=lambda: AffineBall(normal(1, 3), torch.zeros(1)).project(normal(3)),
        bad_input=(
            BadInput("radius", lambda: AffineBall(torch.ones(1, 4), 2 * torch.ones(1), 0.9)),
            BadInput("A", lambda: AffineBall(torch.ones(3, 3), torch.ones(3))),
            BadInput("A", lambda: AffineBall(torch.ones(2, 3), torch.ones(2), 9.0)),
            BadInput("b", lambda: AffineBall(torch.ones(1, 3), torch.ones(2))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.project_ball",
        call=lambda: project_ball(normal(4, 3), 1.0, metric=torch.tensor([1.0, 2.0, 3.0])),
        bad_input=(
            BadInput("radius", lambda: project_ball(normal(3), 0.0)),
            BadInput("radius", lambda: project_ball(normal(3), None), TypeError),
            BadInput("metric", lambda: project_ball(normal(3), 1.0, metric=torch.eye(2))),
            BadInput("metric", lambda: project_ball(normal(3), 0.1, metric=-torch.ones(3))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.project_simplex",
        call=lambda: project_simplex(normal(4, 3)),
        bad_input=(
            BadInput("total", lambda: project_simplex(normal(3), -1.0)),
            BadInput("total", lambda: project_simplex(normal(3), "1"), TypeError),
            BadInput("metric", lambda: project_simplex(normal(3), metric=-torch.eye(3, dtype=torch.float64))),
            BadInput("x", lambda: project_simplex(normal(2, 3), metric=torch.eye(3, dtype=torch.float64))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.project_box",
        call=lambda: project_box(normal(4, 3)),
        bad_input=(
            BadInput("low", lambda: project_box(normal(3), 1.0, 0.0)),
            BadInput("metric", lambda: project_box(normal(3), metric=torch.ones(2))),
            BadInput("metric", lambda: project_box(normal(3), metric=-torch.ones(3))),
        ),
    ),
    *(
        SamplerCase(
            part="provenn.optim.SEAStream",
            label=kind,
            make=functools.partial(SEAStream, kind, dim=3, rounds=4, sigma=0.7),
            shape=(4, 3, 3) if kind == "self-play" else (4, 3),
            expectations=(
                Expectation("means", lambda z: z.flatten(1), lambda kind=kind: stream(kind).means.flatten()),
                Expectation(
                    "second moments of the noise",
                    lambda z, kind=kind: second_moments(z - stream(kind).means),
                    lambda kind=kind: (
                        torch.eye(3, dtype=torch.float64).expand(4, 3, 3).flatten() * 0.49 / 3 * factor(kind)
                    ),
                ),
            ),
            bad_input=(
                BadInput("kind", lambda: SEAStream("weather")),
                BadInput("loss", lambda: SEAStream(loss="log")),
                BadInput("dim", lambda: SEAStream(dim=0)),
                BadInput("rounds", lambda: SEAStream(rounds=0)),
                BadInput("rounds", lambda: SEAStream(rounds=3.0), TypeError),
                BadInput("sigma", lambda: SEAStream(sigma=-1.0)),
                BadInput("drift", lambda: SEAStream("drifting", drift=1.1)),
                BadInput("rate", lambda: SEAStream("corrupted", rate=1.5)),
                BadInput("count", lambda: SEAStream("adversarial", count=101)),
                BadInput("period", lambda: SEAStream("switch", period=0)),
                BadInput("curvature", lambda: SEAStream(curvature=0.0)),
                BadInput("n", lambda: SEAStream().sample(-1)),
            ),
        )
        for kind in ("iid", "drifting", "self-play")
    ),
    FunctionCase(
        part="provenn.optim.Trajectory",
        call=lambda: Trajectory(normal(3, 2), normal(3, 2)),
        bad_input_reason="a tuple of tensors, which sea_report checks",
    ),
    FunctionCase(
        part="provenn.optim.SEAReport",
        call=lambda: SEAReport(1, True, *[0.0] * 10, (), (), *[0.0] * 4),
        bad_input_reason="a record of what sea_report has measured",
    ),
    ProbeCase(
        part="provenn.optim.sea_report",
        run=lambda model, trajectory: sea_report(stream("drifting", loss="quadratic", location=1.5), trajectory),
        model=lambda: nn.Linear(2, 2),
        data=lambda generator: Trajectory(
            torch.rand(4, 3, generator=generator, dtype=torch.float64) - 0.5,
            stream("drifting", loss="quadratic", location=1.5).sample(1, generator)[0],
        ),
        brute_force=lambda model, trajectory: brute_force(
            stream("drifting", loss="quadratic", location=1.5), trajectory
        ),
        excluded={"model_restored_after_error": "a probe of a stream: there is no model"},
        bad_input=(
            BadInput("trajectory", lambda: sea_report(stream("iid"), Trajectory(normal(4, 2), normal(4, 3)))),
            BadInput("trajectory", lambda: sea_report(stream("iid"), Trajectory(normal(4, 3), normal(3, 3)))),
            BadInput("trajectory", lambda: sea_report(stream("self-play"), Trajectory(normal(4, 3), normal(4, 3, 3)))),
            BadInput("samples", lambda: sea_report(stream("iid"), Trajectory(normal(4, 3), normal(4, 3)), samples=1)),
            BadInput(
                "samples", lambda: sea_report(stream("iid"), Trajectory(normal(4, 3), normal(4, 3)), 2.5), TypeError
            ),
        ),
    ),
]


def stream(kind, **options):
    return SEAStream(kind, **{"dim": 3, "rounds": 4, "sigma": 0.7, **options})


def factor(kind):
    return 3 if kind == "self-play" else 1


def second_moments(noise):
    columns = noise if noise.dim() == 4 else noise.unsqueeze(-1)
    return (columns @ columns.mT).flatten(1)


def brute_force(source, trajectory):
    """Fields of the report by loops over rounds, and SciPy's minimisation over the ball."""
    from scipy.optimize import minimize

    x, z = trajectory.points.numpy(), trajectory.draws.numpy()
    best = minimize(
        lambda u: 0.5 * ((u - z) ** 2).sum(),
        np.zeros(3),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda u: 1 - u @ u},
        options={"ftol": 1e-15},
    )
    gradients = x - z
    variation = sum(((gradients[t] - (gradients[t - 1] if t else 0)) ** 2).sum() for t in range(4))
    return {
        "regret": 0.5 * ((x - z) ** 2).sum() - best.fun,
        "variation": variation,
        "variance": 4 * 0.49,
        "drift": 3 * 0.5**2,
        "largest_drift": 0.25,
        "diameter": 2.0,
        "smoothness": 1.0,
        "lipschitz": 1.0 + 1.5 + 0.7,
        "rounds": 4,
        "checkpoints": (1, 2, 4),
    }


# The recursions.


def test_one_dimension_equals_the_hand_unrolled_recursion():
    D, G, L, x, hat, last, V = 3.0, 5.0, 0.2, 0.7, 0.7, 0.0, 0.0
    point = parameter(x)
    optimizer = OptimisticOMD([point], diameter=D, lipschitz=G, smoothness=L)
    for t in range(30):
        g = math.sin(3 * t) + x
        eta = D / math.sqrt(10 * D**2 * L**2 + 4 * G**2 + V)
        hat -= eta * g
        V += (g - last) ** 2
        x, last = hat - D / math.sqrt(10 * D**2 * L**2 + 4 * G**2 + V) * g, g
        point.grad = torch.full_like(point, math.sin(3 * t) + point.item())
        optimizer.step()
        assert point.item() == pytest.approx(x, abs=1e-13)
    assert optimizer.held["carried"].item() == pytest.approx(hat, abs=1e-13)


def test_an_unknown_bound_is_the_largest_gradient_so_far():
    point = parameter(0.0)
    optimizer = OptimisticOMD([point], diameter=2.0)
    points = play(optimizer, point, torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    first = 2 / math.sqrt(4)
    assert points[1].item() == pytest.approx(-first - 2 / math.sqrt(4 + 1))
    assert points[2].item() == pytest.approx(-first - 3 * 2 / math.sqrt(36 + 1) - 3 * 2 / math.sqrt(36 + 1 + 4))


def test_strongly_convex_steps():
    point = parameter(0.0)
    optimizer = OptimisticOMD([point], mode="strongly-convex", strong_convexity=0.5)
    gradients = [1.0, -2.0, 0.5]
    points = play(optimizer, point, torch.tensor(gradients, dtype=torch.float64).unsqueeze(1))
    hat = 0.0
    for t, g in enumerate(gradients, start=1):
        hat -= 4 / t * g
        assert points[t].item() == pytest.approx(hat - 4 / (t + 1) * g)


def test_gradients_are_met_inside_and_the_carried_state_is_projected_first():
    # Beside the boundary two sequences and one differ: the guess is taken from a point that was projected.
    point = parameter(0.9)
    optimizer = OptimisticOMD([point], Ball(1.0), eta=0.5)
    point.grad = torch.tensor([-1.0], dtype=torch.float64)
    optimizer.step()
    assert point.item() == optimizer.held["carried"].item() == 1.0
    point.grad = torch.tensor([0.4], dtype=torch.float64)
    optimizer.step()
    assert point.item() == pytest.approx(1 - 0.2 - 0.2)
    single = parameter(0.9)
    past = PastGradient([single], Ball(1.0), lipschitz=1.0)
    single.grad = torch.tensor([-1.0], dtype=torch.float64)
    past.step()
    assert single.item() == 1.0
    single.grad = torch.tensor([0.4], dtype=torch.float64)
    past.step()
    assert single.item() == pytest.approx(1 - 2 / math.sqrt(4 + 1 + 1.4**2) * (0.8 + 1))


@pytest.mark.parametrize("domain", [None, Ball(0.8), Box(-0.3, 0.4)])
def test_without_a_guess_it_is_gradient_descent_bit_by_bit(domain):
    point = parameter(0.1, 0.2, 0.3)
    optimizer = OptimisticOMD([point], domain, eta=0.3, optimism="none")
    points = play(optimizer, point, normal(20, 3))
    other = nn.Parameter(points[0].clone())
    descent = torch.optim.SGD([other], lr=0.3)
    for g, found in zip(normal(20, 3), points[1:], strict=True):
        other.grad = g.clone()
        descent.step()
        if domain is not None:
            other.data = domain.project(other.data)
        torch.testing.assert_close(found, other.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.05, 1.0])
def test_a_guess_that_is_right_gives_the_be_the_leader_bound(eta):
    gradients = normal(200, 4)
    point = parameter(0.0, 0.0, 0.0, 0.0)
    optimizer = OptimisticOMD([point], Ball(1.0), eta=eta)
    total = 0.0
    for g in gradients:
        optimizer.predict([g])
        total += (g @ point.detach()).item()
        point.grad = g.clone()
        optimizer.step()
    regret = total + gradients.sum(0).norm().item()
    assert regret <= 1 / (2 * eta) + 1e-9
    assert optimizer.held["variation"] == 0


def test_constant_gradients_stop_the_variation():
    point = parameter(0.0, 0.0)
    optimizer = OptimisticOMD([point], diameter=1.0, lipschitz=10.0)
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    points = play(optimizer, point, [g] * 6)
    assert optimizer.held["variation"] == 25.0
    steps = points.diff(dim=0)[2:]
    torch.testing.assert_close(steps, (-g / math.sqrt(425)).expand(4, 2))


def test_exp_concave_steps_in_a_metric_that_lags_by_a_round():
    D, G, alpha = 2.0, 3.0, 0.5
    beta = min(1 / (4 * G * D), alpha) / 2
    gradients = normal(40, 3, seed=1)
    gradients = gradients / gradients.norm(dim=-1, keepdim=True).clamp(min=1)
    point = parameter()
    optimizer = OptimisticOMD([point], mode="exp-concave", diameter=D, lipschitz=G, alpha=alpha)
    points = play(optimizer, point, gradients).numpy()
    H, hat = (1 + beta * G**2 / 2) * np.eye(3), points[0]
    for t, g in enumerate(gradients.numpy(), start=1):
        hat = hat - np.linalg.solve(H, g)
        H = H + beta / 2 * np.outer(g, g)
        np.testing.assert_allclose(points[t], hat - np.linalg.solve(H, g), atol=1e-12)
    np.testing.assert_allclose(optimizer.held["H"], H, rtol=1e-13)


def test_the_inverse_is_kept_to_nine_digits():
    point = parameter(*[0.0] * 6)
    optimizer = OptimisticOMD([point], Ball(5.0), mode="exp-concave", lipschitz=20.0, alpha=100.0)
    for t in range(400):
        point.grad = normal(6, seed=t) * 3
        optimizer.step()
    held = optimizer.held
    dense = torch.linalg.inv(held["H"])
    assert ((held["inverse"] - dense).norm() / dense.norm()).item() < 1e-9
    total = sum(torch.outer(normal(6, seed=t) * 3, normal(6, seed=t) * 3) for t in range(400))
    beta = 1 / (4 * 20 * 10) / 2
    torch.testing.assert_close(held["H"], (1 + beta * 200) * torch.eye(6, dtype=torch.float64) + beta / 2 * total)


def test_exp_concave_projects_in_its_metric():
    point = parameter(0.0, 0.0)
    optimizer = OptimisticOMD([point], Ball(1.0), mode="exp-concave", lipschitz=10.0, alpha=100.0)
    for g in normal(30, 2, seed=3) * torch.tensor([3.0, 0.1], dtype=torch.float64):
        H, hat = optimizer.held["H"].clone(), optimizer.held["carried"].clone()
        point.grad = g.clone()
        optimizer.step()
        # First-order optimality of the correction, and of the play in the next round's metric.
        assert_projected(H, hat, g, optimizer.held["carried"])
        assert_projected(optimizer.held["H"], optimizer.held["carried"], g, point.detach())


def assert_projected(H, start, g, x):
    """H(x − start) + g is a multiple of −x on the unit sphere, else zero."""
    slope = H @ (x - start) + g
    if x.norm() < 1 - 1e-9:
        torch.testing.assert_close(slope, torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
    else:
        assert (slope - x * (slope @ x)).norm().item() < 1e-9
        assert (slope @ x).item() <= 1e-12


def test_entropy_steps_are_softmax_updates_on_the_simplex():
    start = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    point = nn.Parameter(start.clone())
    optimizer = OptimisticOMD([point], Simplex(), geometry="entropy", lipschitz=2.0, smoothness=0.1)
    gradients = normal(25, 3).clamp(-2, 2)
    points = play(optimizer, point, gradients)
    torch.testing.assert_close(points.sum(-1), torch.ones(26, dtype=torch.float64))
    assert (points > 0).all()
    D2, V, last, score = 2 * math.log(3), 0.0, torch.zeros(3, dtype=torch.float64), start.log()
    for t, g in enumerate(gradients, start=1):
        score = score - math.sqrt(D2 / (10 * D2 * 0.01 + 16 + V)) * g
        V += (g - last).abs().max().item() ** 2
        last = g
        torch.testing.assert_close(points[t], torch.softmax(score - math.sqrt(D2 / (10 * D2 * 0.01 + 16 + V)) * g, 0))


def test_entropy_survives_entries_that_underflow_and_scales_with_the_total():
    point = nn.Parameter(torch.full((2,), 1.0, dtype=torch.float64))
    optimizer = OptimisticOMD([point], Simplex(2.0), geometry="entropy", eta=100.0)
    up, down = torch.tensor([50.0, 0.0], dtype=torch.float64), torch.tensor([-50.0, 0.0], dtype=torch.float64)
    play(optimizer, point, [up, up, down, down, down])
    assert point.detach()[0].item() == 2.0
    assert point.detach().sum().item() == 2.0


@pytest.mark.parametrize("full", [False, True])
def test_a_metric_is_a_change_of_coordinates(full):
    root = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    if full:
        root = root + 0.3 * (normal(3, 3) + normal(3, 3).mT)
        root = root @ root.mT + 0.2 * torch.eye(3, dtype=torch.float64)
    H = root @ root
    gradients = normal(20, 3, seed=5)
    point = parameter()
    metric = H if full else H.diagonal()
    points = play(OptimisticOMD([point], diameter=2.0, metric=metric), point, gradients)
    other = nn.Parameter(root @ points[0])
    mapped = play(OptimisticOMD([other], diameter=2.0), other, torch.linalg.solve(root, gradients.mT).mT)
    torch.testing.assert_close(points @ root, mapped)


def test_the_diameter_is_measured_in_the_metric():
    metric = torch.tensor([1.0, 9.0], dtype=torch.float64)
    assert OptimisticOMD([parameter(0.0, 0.0)], Ball(1.0), metric=metric).diameter == 6.0
    assert OptimisticOMD([parameter(0.0, 0.0)], Box(0.0, 3.0)).diameter == pytest.approx(3 * math.sqrt(2))
    assert OptimisticOMD([parameter(0.5, 0.5)], Simplex()).diameter == pytest.approx(math.sqrt(2))


# The dynamic version.


def test_the_grid_covers_its_range_with_ratio_two():
    for T, L in ((1000, 0.05), (37, 0.3), (16_000, 2.0)):
        optimizer = DynamicOptimisticOMD([parameter()], Ball(1.0), T, lipschitz=3.0, smoothness=L)
        rates = optimizer.rates
        least, largest = math.sqrt(4 / (8 * 9 * T)), 1 / (8 * L)
        assert len(rates) == max(1, math.ceil(0.5 * math.log2(9 * T / (8 * L * L * 4)) - 1e-9) + 1)
        assert rates[0].item() == pytest.approx(min(least, largest))
        assert rates[-1].item() == pytest.approx(largest)
        torch.testing.assert_close(rates[1:-1] / rates[:-2], torch.full_like(rates[1:-1], 2.0))
        assert len(rates) == 1 or (rates[-1] / rates[-2]).item() <= 2 + 1e-9


def test_one_learner_is_the_static_method_with_a_constant_step():
    gradients = normal(50, 3, seed=8)
    one, other = parameter(), parameter()
    mixture = DynamicOptimisticOMD([one], Ball(1.0), 50, lipschitz=10.0, smoothness=50.0)
    assert len(mixture.rates) == 1
    static = OptimisticOMD([other], Ball(1.0), eta=1 / 400)
    torch.testing.assert_close(play(mixture, one, gradients), play(static, other, gradients))


def test_the_mixture_equals_the_hand_unrolled_one():
    T, D, G, L = 40, 2.0, 4.0, 0.4
    gradients = normal(T, 2, seed=4).numpy()
    point = parameter(0.3, -0.2)
    optimizer = DynamicOptimisticOMD([point], Ball(1.0), T, lipschitz=G, smoothness=L)
    points = play(optimizer, point, torch.from_numpy(gradients)).numpy()
    etas = optimizer.rates.tolist()
    n = len(etas)
    assert n >= 3

    def project(u):
        return u / max(1.0, np.linalg.norm(u))

    hats, bases = [points[0]] * n, [points[0]] * n
    moved, losses, V, last = [0.0] * n, [0.0] * n, 0.0, np.zeros(2)
    for t, g in enumerate(gradients, start=1):
        V += ((g - last) ** 2).sum()
        last = g
        scores, new = [], []
        for i in range(n):
            losses[i] += g @ bases[i] + 2 * L * moved[i]
            hats[i] = project(hats[i] - etas[i] * g)
            new.append(project(hats[i] - etas[i] * g))
            moved[i] = ((new[i] - bases[i]) ** 2).sum()
            scores.append(losses[i] + g @ new[i] + 2 * L * moved[i])
        bases = new
        epsilon = min(1 / (8 * D**2 * L), math.sqrt(math.log(n) / (D**2 * (4 * G**2 + V))))
        weights = np.exp(-epsilon * (np.array(scores) - min(scores)))
        weights /= weights.sum()
        np.testing.assert_allclose(points[t], sum(p * x for p, x in zip(weights, bases, strict=True)), atol=1e-12)
    np.testing.assert_allclose(optimizer.weights, weights, atol=1e-12)
    assert optimizer.weights.sum().item() == pytest.approx(1.0, abs=1e-14)


def test_without_a_horizon_the_epochs_double_and_go_on_from_the_mixture():
    point = parameter(0.0, 0.0)
    optimizer = DynamicOptimisticOMD([point], Ball(1.0), lipschitz=10.0)
    gradients = normal(200, 2, seed=2)
    lengths = []
    for g in gradients:
        point.grad = g.clone()
        optimizer.step()
        lengths.append(optimizer.held["length"])
        if optimizer.held["left"] == optimizer.held["length"]:
            assert optimizer.held["variation"] == 0
            torch.testing.assert_close(optimizer.held["carried"], point.detach().expand_as(optimizer.held["carried"]))
    assert [lengths[i] for i in (62, 63, 190, 191)] == [64, 128, 128, 256]


def test_the_mixture_follows_a_jumping_comparator():
    T, source = 2000, torch.Generator().manual_seed(0)
    regrets = {}
    target = torch.ones(2, dtype=torch.float64) / math.sqrt(2)
    noise = 0.5 * torch.randn(T, 2, generator=source, dtype=torch.float64)
    signs = [1 if (t // 50) % 2 else -1 for t in range(T)]
    for name, make in {
        "dynamic": lambda p: DynamicOptimisticOMD(p, Ball(1.0), T, lipschitz=4.0),
        "static": lambda p: OptimisticOMD(p, Ball(1.0), lipschitz=4.0),
    }.items():
        point = parameter(0.0, 0.0)
        points = play(make([point]), point, [s * target + n for s, n in zip(signs, noise, strict=True)])
        regrets[name] = sum(s * (target @ x).item() + 1 for s, x in zip(signs, points, strict=False))
    assert regrets["dynamic"] < 0.8 * regrets["static"]


# The comparison methods.


def test_comparison_methods_equal_their_formulas():
    gradients = [1.0, -2.0, 0.5]
    D, G = 3.0, 2.0

    def found(kind, **options):
        point = parameter(0.2)
        optimizer = kind([point], **{"diameter": D, "lipschitz": G, **options})
        return play(optimizer, point, torch.tensor(gradients, dtype=torch.float64).unsqueeze(1)).squeeze(1)[1:].tolist()

    def walk(steps):
        return pytest.approx(list(np.cumsum([0.2, *steps]))[1:])

    a, b, c = gradients
    assert found(OnlineGradientDescent) == walk([-D / (G * math.sqrt(t)) * g for t, g in enumerate(gradients, 1)])
    assert found(OnlineGradientDescent, strong_convexity=0.5) == walk([-2 * a, -b, -2 / 3 * c])
    assert found(AdaGradNorm) == walk([-D / math.sqrt(2 * s) * g for s, g in zip((1, 5, 5.25), gradients, strict=True)])
    V = (1, 10, 16.25)
    delta = 10 * D * D * 0.01
    assert found(PastGradient, smoothness=0.1) == walk(
        [-D / math.sqrt(delta + 16 + v) * (2 * g - h) for v, g, h in zip(V, gradients, (0, a, b), strict=True)]
    )
    totals = (1, -1, -0.5)
    assert found(FTRL) == pytest.approx(
        [0.2 - D / math.sqrt(16 + s) * S for s, S in zip((1, 5, 5.25), totals, strict=True)]
    )
    assert found(OptimisticFTRL, smoothness=0.1) == pytest.approx(
        [0.2 - D / math.sqrt(delta + 16 + v) * (S + g) for v, S, g in zip(V, totals, gradients, strict=True)]
    )
    points = [0.2]
    for t, (S, g) in enumerate(zip(totals, gradients, strict=True), start=1):
        points.append(np.mean(points[:t]) - (S + g) / (0.5 * t))
    assert found(OptimisticFTRL, strong_convexity=0.5) == pytest.approx(points[1:])


@pytest.mark.parametrize("kind", [OnlineGradientDescent, AdaGradNorm, PastGradient, FTRL, OptimisticFTRL])
def test_comparison_methods_stay_in_the_domain_and_learn(kind):
    point = nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.float64))
    g = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    points = play(kind([point], Simplex(), lipschitz=3.0), point, [g] * 200)
    torch.testing.assert_close(points.sum(-1), torch.ones(201, dtype=torch.float64))
    torch.testing.assert_close(points[-1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


# One vector, domains and errors.


def test_several_tensors_are_one_vector():
    whole, pieces = parameter(0.1, 0.2, 0.3), [parameter(0.1), nn.Parameter(torch.tensor(0.2).double()), parameter(0.3)]
    gradients = normal(15, 3)
    one = OptimisticOMD([whole], Ball(0.5))
    many = OptimisticOMD(pieces, Ball(0.5))
    points = play(one, whole, gradients)
    for g, expected in zip(gradients, points[1:], strict=True):
        for place, piece in enumerate(pieces):
            piece.grad = g[place].clone().view_as(piece)
        many.step()
        torch.testing.assert_close(torch.stack([piece.detach().view(()) for piece in pieces]), expected)


def test_a_missing_gradient_counts_with_zeros_and_none_at_all_with_nothing():
    pieces = [parameter(0.1), parameter(0.2)]
    optimizer = OptimisticOMD(pieces, diameter=1.0)
    optimizer.step()
    assert optimizer.held["steps"] == 0
    pieces[0].grad = torch.ones_like(pieces[0])
    optimizer.step()
    assert pieces[1].item() == 0.2
    assert pieces[0].item() < 0.1
    assert pieces[1].grad is None


def test_a_start_outside_is_projected_with_a_warning():
    point = parameter(3.0, 4.0)
    with pytest.warns(UserWarning, match="starting point"):
        optimizer = OptimisticOMD([point], Ball(1.0))
    torch.testing.assert_close(point.detach(), torch.tensor([0.6, 0.8], dtype=torch.float64))
    torch.testing.assert_close(optimizer.held["carried"], point.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OptimisticOMD([parameter(0.6, 0.8)], Ball(1.0))


def test_a_gradient_beyond_the_bound_warns_once_and_counts():
    point = parameter(0.0)
    optimizer = OptimisticOMD([point], diameter=1.0, lipschitz=1.0)
    point.grad = torch.tensor([3.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="lipschitz"):
        optimizer.step()
    assert optimizer.held["carried"].item() == pytest.approx(-3 / 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("kind", [OptimisticOMD, DynamicOptimisticOMD, OnlineGradientDescent])
@pytest.mark.parametrize("value", [math.nan, math.inf, 50.0])
def test_refused_gradients_change_nothing(kind, value):
    point = parameter()
    optimizer = kind([point], diameter=1.0, lipschitz=2.0, strict=True)
    play(optimizer, point, normal(2, 3) * 0.1)
    before = point.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.held.items()}
    point.grad = torch.full_like(point, value)
    with pytest.raises(ValueError, match="gradient"):
        optimizer.step()
    torch.testing.assert_close(point.detach(), before[0], rtol=0, atol=0)
    for name, value_before in before[1].items():
        torch.testing.assert_close(torch.as_tensor(optimizer.held[name]), value_before, rtol=0, atol=0)


def test_the_last_gradient_is_kept_apart_from_its_tensor():
    one, other = parameter(), parameter()
    optimizers = [OptimisticOMD([p], diameter=1.0) for p in (one, other)]
    for g in normal(5, 3):
        one.grad, other.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
        one.grad.zero_()
    torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [omd, exp_concave, dynamic], ids=["convex", "exp-concave", "dynamic"])
def test_added_parameters_join_the_vector(make):
    first, second = parameter(0.5, -0.5), parameter(0.25)
    optimizer = make([first])
    play(optimizer, first, normal(4, 2))
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = normal(2), normal(1)
    optimizer.step()
    assert second.item() != 0.25
    with pytest.raises(TypeError, match="params"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 2


def test_another_optimizers_state_is_refused():
    state = OptimisticOMD([parameter()], Ball()).state_dict()
    with pytest.raises(ValueError, match="state_dict"):
        OptimisticOMD([parameter(0.0, 0.0)], Ball()).load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict"):
        OnlineGradientDescent([parameter()], Ball()).load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict"):
        OptimisticOMD([parameter()], Ball()).load_state_dict(torch.optim.SGD([parameter()], lr=0.1).state_dict())


def test_a_metric_keeps_its_size():
    optimizer = OptimisticOMD([parameter()], diameter=1.0, metric=torch.ones(3))
    with pytest.raises(ValueError, match="metric"):
        optimizer.add_param_group({"params": [parameter(1.0)]})
    assert len(optimizer.param_groups) == 1
