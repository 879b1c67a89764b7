"""MAID, HOAG and their problems against closed forms, unrolled differentiation, finite differences and invariances."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from provenn.claims import Evidence
from provenn.claims.optim import _maid_bilevel_tasks as tasks
from provenn.claims.optim import maid_bilevel as claim
from provenn.contracts import BadInput, FunctionCase, KnownProblem, RefusedProblem, SolverCase
from provenn.core.numerics.smooth_convex import Descent
from provenn.optim import (
    HOAG,
    MAID,
    BilevelCertificate,
    BilevelProblem,
    BilevelQuadratic,
    BilevelResult,
    BilevelStep,
    ConvexityError,
    FoEDenoising,
    Hypergradient,
    LipschitzConstants,
    TVDenoising,
    WeightedLogistic,
    hypergradient,
    hypergradient_bound,
)

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def small_quadratic(seed=0, noise=0.0):
    """Three unknowns and two hyperparameters, well conditioned; without noise the optimum has f = 0."""
    A2 = torch.eye(3, dtype=DOUBLE) + 0.2 * normal(3, 3, seed=seed)
    A3 = torch.eye(3, 2, dtype=DOUBLE) + 0.2 * normal(3, 2, seed=seed + 1)
    A1 = torch.eye(3, dtype=DOUBLE) + 0.2 * normal(3, 3, seed=seed + 2)
    b2, truth = normal(3, seed=seed + 3), normal(2, seed=seed + 4)
    x = torch.linalg.solve(A2, b2 - A3 @ truth)
    return BilevelQuadratic(A1, A1 @ x + noise * normal(3, seed=seed + 5), A2, A3, b2)


def flat_upper():
    one = small_quadratic()
    return BilevelQuadratic(torch.zeros(3, 3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), one.A2, one.A3, one.b2)


class Saddle(BilevelProblem):
    """A lower objective that is not convex."""

    theta0, x0 = torch.ones(1, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)

    def lower(self, x, theta):
        return 0.5 * (x[0] - theta[0]) ** 2 - 0.25 * x[1] ** 2

    def upper(self, x):
        return (x - 1.0).square().sum()

    def mu(self, theta):
        return 1.0


class Broken(BilevelProblem):
    """NaN at one of the levels."""

    theta0, x0 = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)

    def __init__(self, level):
        self.level = level

    def lower(self, x, theta):
        return 0.5 * ((x - theta) ** 2).sum() * (math.nan if self.level == "lower" else 1.0)

    def upper(self, x):
        return x.square().sum() * (math.nan if self.level == "upper" else 1.0)

    def mu(self, theta):
        return 1.0


def random_logistic(seed=0, features=4, classes=3, log_penalty=-1.0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(60, features, dtype=DOUBLE, generator=draws)
    y = (x @ torch.randn(features, classes, dtype=DOUBLE, generator=draws)).argmax(1)
    return WeightedLogistic(x[:40], y[:40], x[40:], y[40:], classes, log_penalty)


def images(count=2, side=8, seed=0):
    clean = torch.zeros(count, side, side, dtype=DOUBLE)
    clean[:, : side // 2] = 1.0
    return clean + 0.1 * normal(count, side, side, seed=seed), clean


def closed_form_certificate(problem, result):
    """ε and the interval of f from x and θ alone, by matrices."""
    A2, A3, A1 = problem.A2.numpy(), problem.A3.numpy(), problem.A1.numpy()
    x, theta = result.x.numpy(), result.theta.numpy()
    mu = np.linalg.eigvalsh(A2.T @ A2)[0]
    epsilon = np.linalg.norm(A2.T @ (A2 @ x + A3 @ theta - problem.b2.numpy())) / mu
    misfit = A1 @ x - problem.b1.numpy()
    value, slope = 0.5 * misfit @ misfit, np.linalg.norm(A1.T @ misfit)
    curved = 0.5 * np.linalg.eigvalsh(A1.T @ A1)[-1] * epsilon**2
    return {
        "epsilon": epsilon,
        "gradient_norm": result.hypergradient.norm().item(),
        "lower_bound": value - slope * epsilon,
        "upper_bound": value + slope * epsilon + curved,
    }


class Setup:
    """A solver's options, to be used on any problem."""

    def __init__(self, solver, **options):
        self.solver, self.options = solver, options
        self.limits = {"max_steps": options.pop("max_steps", 400), "tol": options.pop("tol", 1e-8)}

    def solve(self, problem):
        return self.solver.for_problem(problem, **self.options).solve(**self.limits)


def solver_case(solver, bad_input=(), **defaults):
    def on(**options):
        return lambda: solver.for_problem(small_quadratic(), **options)

    return SolverCase(
        part=f"provenn.optim.{solver.__name__}",
        make=lambda **options: Setup(solver, **{**defaults, **options}),
        known=(
            KnownProblem("a quadratic", small_quadratic, lambda: small_quadratic().optimum(), 1e-6),
            KnownProblem("an upper level that ignores x", flat_upper, lambda: flat_upper().theta0),
        ),
        refused=(
            RefusedProblem("a saddle below", Saddle, "strongly convex", ConvexityError),
            RefusedProblem("NaN below", lambda: Broken("lower"), "lower level", RuntimeError),
            RefusedProblem("NaN above", lambda: Broken("upper"), "upper level", RuntimeError),
        ),
        certificate=closed_form_certificate,
        early_stop={"max_steps": 2},
        answer=lambda result: result.theta,
        bad_input=(
            BadInput("theta", lambda: solver(1.0, None, None, 1.0, x0=torch.ones(1)), TypeError),
            BadInput("theta", lambda: solver(torch.tensor([math.nan]), None, None, 1.0, x0=torch.ones(1))),
            BadInput(
                "x0", lambda: solver(torch.ones(1), None, None, 1.0, x0=torch.ones(1, dtype=torch.int64)), TypeError
            ),
            BadInput("mu", lambda: solver(torch.ones(1), Saddle().lower, Saddle().upper, 0.0, x0=torch.ones(1))),
            BadInput("mu", lambda: solver(torch.ones(1), Saddle().lower, Saddle().upper, -1.0, x0=torch.ones(1))),
            BadInput("eps0", on(eps0=0.0)),
            BadInput("step0", on(step0=-1.0)),
            BadInput("solver", on(solver="newton")),
            BadInput("lipschitz", on(lipschitz=3.0), TypeError),
            BadInput("lower_max_iter", on(lower_max_iter=0)),
            BadInput("budget", lambda: on()().solve(budget=0)),
            BadInput("tol", lambda: on()().solve(tol=-1.0)),
            *(BadInput(name, on(**{name: value})) for name, value in bad_input),
        ),
    )


def record():
    return BilevelStep(0, 0, 0, 1.0, 0.1, 0.1, 0.0, math.nan, math.nan, False)


def certificate():
    return BilevelCertificate(0.1, 0.1, 1.0, 0.5, 0.0, 1.0, 3, 2)


QUADRATIC = small_quadratic()
NOISY, CLEAN = images()

CASES = [
    solver_case(
        MAID,
        (
            ("delta0", 0.0),
            ("eta", 0.0),
            ("eta", 1.0),
            ("rho", 1.0),
            ("rho", 0.0),
            ("tau", 1.0),
            ("tau", -0.5),
            ("nu", 0.99),
            ("max_backtracks", 0),
        ),
    ),
    solver_case(HOAG, (("sequence", "linear"), ("step", "long")), step="fixed", step0=0.3, max_steps=800),
    FunctionCase(
        part="provenn.optim.BilevelProblem",
        call=Saddle,
        bad_input=(BadInput("BilevelProblem", BilevelProblem, TypeError),),
    ),
    FunctionCase(
        part="provenn.optim.BilevelQuadratic",
        call=lambda: BilevelQuadratic.random(3, 5, generator=torch.Generator().manual_seed(0)),
        bad_input=(
            BadInput(
                "A2",
                lambda: BilevelQuadratic(
                    QUADRATIC.A1, QUADRATIC.b1, torch.ones(3, 3, dtype=DOUBLE), QUADRATIC.A3, QUADRATIC.b2
                ),
            ),
            BadInput("size", lambda: BilevelQuadratic.random(0)),
            BadInput("rows", lambda: BilevelQuadratic.random(5, 4)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.WeightedLogistic",
        call=random_logistic,
        bad_input=(
            BadInput("classes", lambda: random_logistic(classes=1)),
            BadInput(
                "x_validation",
                lambda: WeightedLogistic(
                    torch.ones(2, 2), torch.tensor([0, 1]), torch.ones(0, 2), torch.zeros(0, dtype=torch.int64), 2
                ),
            ),
        ),
    ),
    FunctionCase(
        part="provenn.optim.TVDenoising",
        call=lambda: TVDenoising(NOISY, CLEAN),
        bad_input=(
            BadInput("noisy", lambda: TVDenoising(NOISY[0], CLEAN[0])),
            BadInput("noisy", lambda: TVDenoising(NOISY[:0], CLEAN[:0])),
            BadInput("clean", lambda: TVDenoising(NOISY, CLEAN[:1])),
            BadInput("theta0", lambda: TVDenoising(NOISY, CLEAN, torch.zeros(3))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.FoEDenoising",
        call=lambda: FoEDenoising(NOISY, CLEAN, 2, 3, torch.Generator().manual_seed(0)),
        bad_input=(
            BadInput("kernel_size", lambda: FoEDenoising(NOISY, CLEAN, 2, 4)),
            BadInput("kernel_size", lambda: FoEDenoising(NOISY, CLEAN, 2, 17)),
            BadInput("num_filters", lambda: FoEDenoising(NOISY, CLEAN, 0, 3)),
            BadInput("clean", lambda: FoEDenoising(NOISY, CLEAN[:1], 2, 3)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.LipschitzConstants",
        call=lambda: LipschitzConstants(1.0, 0.0),
        bad_input=(
            BadInput("upper", lambda: LipschitzConstants(-1.0)),
            BadInput("jacobian", lambda: LipschitzConstants(1.0, math.nan)),
            BadInput("inverse_hessian", lambda: LipschitzConstants(inverse_hessian="a"), TypeError),
        ),
    ),
    FunctionCase(
        part="provenn.optim.BilevelResult",
        call=lambda: BilevelResult(torch.ones(1), torch.ones(1), torch.ones(1), certificate(), (record(),), "steps"),
        bad_input_reason="a record that the solvers fill",
    ),
    FunctionCase(
        part="provenn.optim.BilevelCertificate",
        call=certificate,
        bad_input_reason="a record that the solvers fill",
    ),
    FunctionCase(part="provenn.optim.BilevelStep", call=record, bad_input_reason="a record that the solvers fill"),
    FunctionCase(
        part="provenn.optim.Hypergradient",
        call=lambda: Hypergradient(torch.ones(1), torch.ones(1), 0.0, 1),
        bad_input_reason="a record that hypergradient fills",
    ),
    FunctionCase(
        part="provenn.optim.ConvexityError",
        call=lambda: ConvexityError("lower must be strongly convex", -1.0),
        bad_input_reason="an error with its curvature",
    ),
    FunctionCase(
        part="provenn.optim.hypergradient",
        call=lambda: hypergradient(QUADRATIC.lower, QUADRATIC.upper, QUADRATIC.x0, QUADRATIC.theta0, 1e-3),
        bad_input=(
            BadInput(
                "delta", lambda: hypergradient(QUADRATIC.lower, QUADRATIC.upper, QUADRATIC.x0, QUADRATIC.theta0, 0.0)
            ),
            BadInput(
                "max_iter",
                lambda: hypergradient(
                    QUADRATIC.lower, QUADRATIC.upper, QUADRATIC.x0, QUADRATIC.theta0, 1e-3, max_iter=-1
                ),
            ),
            BadInput(
                "start",
                lambda: hypergradient(
                    QUADRATIC.lower, QUADRATIC.upper, QUADRATIC.x0, QUADRATIC.theta0, 1e-3, torch.zeros(2)
                ),
            ),
            BadInput(
                "lower",
                lambda: hypergradient(Saddle().lower, Saddle().upper, Saddle.x0, Saddle.theta0, 1e-3),
                ConvexityError,
            ),
        ),
    ),
    FunctionCase(
        part="provenn.optim.hypergradient_bound",
        call=lambda: hypergradient_bound(0.1, 0.1, 1.0, 1.0, 1.0, LipschitzConstants(1.0, 1.0, 1.0)),
        bad_input=(
            BadInput("mu", lambda: hypergradient_bound(0.1, 0.1, 0.0, 1.0, 1.0, LipschitzConstants(1.0, 1.0, 1.0))),
            BadInput(
                "epsilon", lambda: hypergradient_bound(-0.1, 0.1, 1.0, 1.0, 1.0, LipschitzConstants(1.0, 1.0, 1.0))
            ),
            BadInput("constants", lambda: hypergradient_bound(0.1, 0.1, 1.0, 1.0, 1.0, LipschitzConstants(1.0))),
        ),
    ),
]


# the problems


@pytest.mark.parametrize(
    "problem",
    [
        small_quadratic(),
        random_logistic(),
        TVDenoising(*images(), theta0=torch.tensor([-1.0, -2.0])),
        FoEDenoising(*images(side=6), 2, 3, torch.Generator().manual_seed(1)),
    ],
    ids=["quadratic", "logistic", "tv", "foe"],
)
def test_constants_hold_on_the_dense_hessian(problem):
    x = problem.x0 + 0.3 * normal(*problem.x0.shape, seed=5)
    H = torch.autograd.functional.hessian(lambda at: problem.lower(at, problem.theta0), x)
    eigenvalues = torch.linalg.eigvalsh(H.reshape(x.numel(), x.numel()))
    assert eigenvalues[0] >= problem.mu(problem.theta0) * (1 - 1e-9)
    smoothness = problem.smoothness(problem.theta0)
    assert smoothness is None or eigenvalues[-1] <= smoothness * (1 + 1e-9)
    upper = torch.autograd.functional.hessian(problem.upper, x).reshape(x.numel(), x.numel())
    assert torch.linalg.eigvalsh(upper)[-1] <= problem.lipschitz(problem.theta0).upper * (1 + 1e-9)


def test_penalties_have_the_lipschitz_constant_of_their_jacobian():
    problem = random_logistic()
    theta = normal(12, seed=2)

    def jacobian(x):
        return torch.autograd.functional.jacobian(
            lambda t: torch.autograd.grad(problem.lower(x, t), x, create_graph=True)[0].flatten(), theta
        )

    one, other = (normal(4, 3, seed=seed).requires_grad_() for seed in (3, 4))
    change = torch.linalg.matrix_norm(jacobian(one) - jacobian(other), 2)
    assert change <= problem.lipschitz(theta).jacobian * (one - other).norm()
    # exp(θ_j) is reached where only the weight with the largest penalty moves.
    largest = torch.zeros(12, dtype=DOUBLE)
    largest[theta.argmax()] = 1.0
    moved = (one.detach() + largest.view(4, 3)).requires_grad_()
    assert torch.linalg.matrix_norm(jacobian(moved) - jacobian(one), 2).item() == pytest.approx(
        problem.lipschitz(theta).jacobian, rel=1e-9
    )


def test_objectives_by_hand():
    logistic = random_logistic()
    x, theta = normal(4, 3, seed=1), normal(12, seed=2)
    inputs, labels = (one.numpy() for one in logistic._train)
    scores = inputs @ x.numpy()
    losses = [math.log(sum(math.exp(s) for s in row)) - row[y] for row, y in zip(scores, labels, strict=True)]
    penalty = 0.5 * sum(math.exp(t) * w * w for t, w in zip(theta.tolist(), x.flatten().tolist(), strict=True))
    assert logistic.lower(x, theta).item() == pytest.approx(sum(losses) / 40 + penalty, rel=1e-12)

    noisy, clean = images(2, 4)
    x = normal(2, 4, 4, seed=3)
    tv = TVDenoising(noisy, clean)
    theta = torch.tensor([-0.5, -1.5], dtype=DOUBLE)
    total = 0.0
    for n, i, j in itertools.product(range(2), range(4), range(4)):
        total += 0.5 * (x[n, i, j] - noisy[n, i, j]).item() ** 2
        for a, b in ((i + 1, j), (i, j + 1)):
            if a < 4 and b < 4:
                total += 0.5 * math.exp(-0.5) * math.hypot((x[n, a, b] - x[n, i, j]).item(), math.exp(-1.5))
    assert tv.lower(x, theta).item() == pytest.approx(total, rel=1e-12)
    assert tv.upper(x).item() == pytest.approx(0.25 * (x - clean).square().sum().item(), rel=1e-12)

    foe = FoEDenoising(noisy, clean, 2, 3, torch.Generator().manual_seed(0))
    theta = 0.3 * normal(1 + 2 * 11, seed=4)
    filters = theta[5:].view(2, 3, 3).numpy()
    total = 0.5 * (x - noisy).square().sum().item()
    for n in range(2):
        padded = np.pad(x[n].numpy(), 1, mode="reflect")
        for k, i, j in itertools.product(range(2), range(4), range(4)):
            response = float((padded[i : i + 3, j : j + 3] * filters[k]).sum())
            weight = 0.5 * math.exp(theta[0]) * math.exp(theta[1 + k])
            total += weight * math.hypot(response, math.exp(theta[3 + k]))
    assert foe.lower(x, theta).item() == pytest.approx(total, rel=1e-12)
    # Filters of the start have mean zero, so a constant image costs only the smoothing.
    assert foe.theta0[5:].view(2, 9).mean(1).abs().max() < 1e-15


def test_closed_forms_of_the_quadratic():
    problem = BilevelQuadratic.random(4, 9, generator=torch.Generator().manual_seed(3))
    theta = normal(4)
    x = problem.solution(theta).requires_grad_()
    assert torch.autograd.grad(problem.lower(x, theta), x)[0].norm() < 1e-10
    step = 0.1  # f is quadratic: differences are exact at any step, and a wide one keeps rounding small
    slopes = [
        (problem.value(theta + step * e) - problem.value(theta - step * e)) / (2 * step)
        for e in torch.eye(4, dtype=DOUBLE)
    ]
    np.testing.assert_allclose(problem.gradient(theta), slopes, rtol=1e-9)
    assert problem.gradient(problem.optimum()).norm() < 1e-9


# the hypergradient and its bound


def test_hypergradient_at_the_exact_solution_is_the_closed_form():
    problem = BilevelQuadratic.random(5, 12, generator=torch.Generator().manual_seed(0))
    theta = normal(5)
    found = hypergradient(problem.lower, problem.upper, problem.solution(theta), theta, 1e-12)
    torch.testing.assert_close(found.gradient, problem.gradient(theta), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("delta", [1.0, 1e-2, 1e-6])
def test_residual_is_what_it_says_and_below_delta(delta):
    problem = random_logistic()
    x = normal(4, 3, seed=1)
    found = hypergradient(problem.lower, problem.upper, x, problem.theta0, delta)
    H = torch.autograd.functional.hessian(lambda at: problem.lower(at, problem.theta0), x).view(12, 12)
    b = torch.autograd.functional.jacobian(problem.upper, x).flatten()
    residual = (H @ found.adjoint.flatten() - b).norm().item()
    assert residual <= delta
    assert residual == pytest.approx(found.residual_norm, abs=1e-12)


def test_a_right_hand_side_below_delta_gives_zero_and_a_warm_start_stays():
    problem = random_logistic()
    x = normal(4, 3, seed=1)
    found = hypergradient(problem.lower, problem.upper, x, problem.theta0, 1e3)
    assert (found.adjoint == 0).all()
    assert found.iterations == 0
    exact = hypergradient(problem.lower, problem.upper, x, problem.theta0, 1e-12)
    warm = hypergradient(problem.lower, problem.upper, x, problem.theta0, 1e-6, start=exact.adjoint)
    torch.testing.assert_close(warm.adjoint, exact.adjoint, rtol=0, atol=0)
    near = hypergradient(
        problem.lower, problem.upper, x, problem.theta0, 1e-10, start=exact.adjoint + 1e-7 * normal(4, 3, seed=9)
    )
    torch.testing.assert_close(near.gradient, exact.gradient, rtol=0, atol=1e-8)
    assert near.iterations > 0


@pytest.mark.parametrize(
    "problem",
    [random_logistic(), TVDenoising(*images(), theta0=torch.tensor([-1.0, -2.0]))],
    ids=["logistic", "tv"],
)
def test_hypergradient_against_finite_differences(problem):
    def value(theta):
        return problem.upper(solved(problem, theta)).item()

    theta = problem.theta0
    found = hypergradient(problem.lower, problem.upper, solved(problem, theta), theta, 1e-11)
    step = 1e-4
    for j in range(2):
        e = torch.zeros_like(theta)
        e[j] = step
        assert found.gradient[j].item() == pytest.approx(
            (value(theta + e) - value(theta - e)) / (2 * step), rel=1e-5, abs=1e-8
        )


def solved(problem, theta):
    """The lower minimiser by Newton's method."""
    x = problem.x0.clone()
    for _ in range(30):
        H = torch.autograd.functional.hessian(lambda at: problem.lower(at, theta), x).reshape(x.numel(), x.numel())
        g = torch.autograd.functional.jacobian(lambda at: problem.lower(at, theta), x)
        step, before = torch.linalg.solve(H, g.flatten()).view_as(x), problem.lower(x, theta)
        length = 1.0
        while problem.lower(x - length * step, theta) > before and length > 1e-9:
            length /= 2
        x = x - length * step
        if step.norm() < 1e-13:
            break
    return x


def test_hypergradient_against_ten_thousand_unrolled_steps():
    problem = random_logistic(features=2)
    theta = problem.theta0.clone().requires_grad_()
    rate = 1 / problem.smoothness(theta.detach())
    inputs, labels = problem._train
    hot = torch.nn.functional.one_hot(labels, 3).double()
    x = problem.x0
    for _ in range(10_000):  # the gradient by hand: half the graph
        slope = inputs.T @ (torch.softmax(inputs @ x, 1) - hot) / 40 + theta.exp().view_as(x) * x
        x = x - rate * slope
    (unrolled,) = torch.autograd.grad(problem.upper(x), theta)
    found = hypergradient(problem.lower, problem.upper, x.detach(), theta.detach(), 1e-10)
    torch.testing.assert_close(found.gradient, unrolled, rtol=1e-6, atol=1e-6)


def test_bound_holds_at_500_random_accuracies_on_the_quadratic():
    """Exact constants: J = A₂ᵀA₃, H = A₂ᵀA₂ constant."""
    draws = torch.Generator().manual_seed(7)
    loosest = 0.0
    for trial in range(500):
        problem = small_quadratic(seed=10 * (trial % 20), noise=1.0)
        theta = 3 * torch.randn(2, dtype=DOUBLE, generator=draws)
        epsilon, delta = (10 ** (4 * torch.rand((), generator=draws).item() - 3) for _ in range(2))
        away = torch.randn(3, dtype=DOUBLE, generator=draws)
        x = problem.solution(theta) + epsilon * away / away.norm()
        found = hypergradient(problem.lower, problem.upper, x, theta, delta, max_iter=trial % 4)
        norm = torch.linalg.matrix_norm(problem.A2.T @ problem.A3, 2).item()
        slope = (problem.A1.T @ (problem.A1 @ x - problem.b1)).norm().item()
        constants = problem.lipschitz(theta)
        omega = hypergradient_bound(epsilon, found.residual_norm, problem.mu(theta), norm, slope, constants)
        error = (found.gradient - problem.gradient(theta)).norm().item()
        assert error <= omega
        loosest = max(loosest, error / omega)
    assert loosest > 0.5  # tight enough that a factor 2 lost somewhere would show


class Curved(BilevelProblem):
    """h = ½ x² + ½ c x²·(x²/(1+x²)) style curvature, one unknown, so that all constants come from a fine grid.

    h(x, θ) = ½ x² + log cosh(x) + θ sin(x)/2 has h_xx = 1 + sech²x − ½ θ sin x and h_xθ = cos(x)/2.
    """

    theta0, x0 = torch.tensor([0.5], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)

    def lower(self, x, theta):
        return (0.5 * x.square() + x.cosh().log() + 0.5 * theta * x.sin()).sum()

    def upper(self, x):
        return 0.5 * (x - 2.0).square().sum()

    def mu(self, theta):
        return 1 - 0.5 * theta.abs().item()


def test_bound_holds_with_curvature_and_needs_each_of_its_terms():
    """One unknown: L_J = ½, L_{H⁻¹} = max |h_xxx|/h_xx² from a grid; the true error against ω at random points."""
    problem = Curved()
    grid = torch.linspace(-6, 6, 4_001, dtype=DOUBLE)
    draws = torch.Generator().manual_seed(1)
    for _ in range(100):
        theta = 1.6 * torch.rand(1, dtype=DOUBLE, generator=draws) - 0.8
        second = 1 + grid.cosh().pow(-2) - 0.5 * theta * grid.sin()
        third = -2 * grid.tanh() * grid.cosh().pow(-2) - 0.5 * theta * grid.cos()
        constants = LipschitzConstants(1.0, 0.5, (third / second.square()).abs().max().item() * 1.001)
        exact = solved(problem, theta)
        epsilon = 10 ** (3 * torch.rand((), generator=draws).item() - 2.5)
        x = exact + epsilon * (1 if torch.rand((), generator=draws) < 0.5 else -1)
        found = hypergradient(problem.lower, problem.upper, x, theta, 1e-12)
        truth = hypergradient(problem.lower, problem.upper, exact, theta, 1e-12)
        omega = hypergradient_bound(
            epsilon, 1e-12, problem.mu(theta), (x.cos() / 2).abs().item(), (x - 2).abs().item(), constants
        )
        assert (found.gradient - truth.gradient).abs().item() <= omega


def test_bound_by_hand():
    constants = LipschitzConstants(2.0, 3.0, 5.0)
    # c = 2·7/4 + 5·11·7 + 3·11/4 = 396.75; ω = c·0.1 + 7/4·0.01 + 3·2/4·0.01
    assert hypergradient_bound(0.1, 0.01, 4.0, 7.0, 11.0, constants) == pytest.approx(39.675 + 0.0175 + 0.015)


def test_estimated_constants_of_a_quadratic():
    """H and J are constant, so their constants are 0; ‖J‖ and L_g are found by power iteration."""
    problem = small_quadratic(noise=1.0)
    method = MAID.for_problem(problem, lipschitz=None)
    x = problem.solution(problem.theta0)
    direction = method.problem.direction(problem.theta0, x, 1e-10)
    for _ in range(12):
        omega, constants = method.problem.bound(direction, 1e-2, 1e-3)
    assert constants.jacobian == pytest.approx(0, abs=1e-7)
    assert constants.inverse_hessian == pytest.approx(0, abs=1e-7)
    exact = torch.linalg.eigvalsh(problem.A1.T @ problem.A1)[-1].item()
    assert constants.upper == pytest.approx(exact, rel=1e-3)
    norm = torch.linalg.matrix_norm(problem.A2.T @ problem.A3, 2).item()
    wanted = hypergradient_bound(1e-2, 1e-3, problem.mu(x), norm, direction.upper.norm(), constants)
    assert omega == pytest.approx(wanted, rel=1e-6)


def test_estimated_constants_are_difference_quotients_and_running_maxima():
    problem = Curved()
    method = MAID.for_problem(problem)
    theta = problem.theta0
    seen = []
    for at in (0.3, 1.2, 0.3):
        x = torch.tensor([at], dtype=DOUBLE)
        direction = method.problem.direction(theta, x, 1e-12)
        _, constants = method.problem.bound(direction, 1e-4, 1e-12)
        seen.append((constants.jacobian, constants.inverse_hessian))

    # Near x: |d/dx cos(x)/2| = |sin x|/2, and |h_xxx|/h_xx².
    def inverse(x):
        second = 1 + math.cosh(x) ** -2 - 0.25 * math.sin(x)
        return abs(-2 * math.tanh(x) * math.cosh(x) ** -2 - 0.25 * math.cos(x)) / second**2

    assert seen[0] == pytest.approx((math.sin(0.3) / 2, inverse(0.3)), rel=1e-3)
    assert seen[1][0] == pytest.approx(math.sin(1.2) / 2, rel=1e-3)
    assert seen[1][1] == pytest.approx(max(inverse(0.3), inverse(1.2)), rel=1e-3)
    assert seen[2] == seen[1]


def test_distance_bound_holds_where_the_solution_is_known():
    problem = BilevelQuadratic.random(6, 20, generator=torch.Generator().manual_seed(2))
    method = MAID.for_problem(problem)
    for seed in range(50):
        theta = normal(6, seed=seed)
        epsilon = 10.0 ** -(seed % 6)
        x, reached = method.problem.solve_lower(theta, normal(6, seed=seed + 100), epsilon)
        assert reached == epsilon
        gradient = problem.A2.T @ (problem.A2 @ x + problem.A3 @ theta - problem.b2)
        distance = (x - problem.solution(theta)).norm()
        assert distance <= gradient.norm() / problem.mu(theta) * (1 + 1e-9)
        assert gradient.norm() / problem.mu(theta) <= epsilon * (1 + 1e-9)


# MAID


def watched_steps(method, problem, count):
    """Run steps; return the θ, ε, δ and β before and after each, and the record."""
    found = []
    for _ in range(count):
        before = (method.theta.clone(), method.epsilon, method.delta, method.step_size)
        record = method.step()
        found.append((before, (method.theta.clone(), method.epsilon, method.delta, method.step_size), record))
    return found


def power_of(ratio, base):
    """The integer k with ratio = base^k."""
    k = round(math.log(ratio) / math.log(base))
    assert ratio == pytest.approx(base**k, rel=1e-12)
    return k


def test_accepted_steps_lower_the_exact_value_and_descend():
    problem = BilevelQuadratic.random(4, 30, generator=torch.Generator().manual_seed(1))
    method = MAID.for_problem(problem, eps0=1.0, delta0=1.0, rho=0.5)
    taken = 0
    for (before, *_), (after, *_), record in watched_steps(method, problem, 40):
        if not record.accepted:
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            continue
        taken += 1
        assert problem.value(after) < problem.value(before)
        z = (before - after) / record.step_size
        assert record.gradient_norm == pytest.approx(z.norm().item(), rel=1e-9)
        exact = problem.gradient(before)
        assert (z - exact).norm() <= record.error_bound
        assert record.error_bound <= (1 - 1e-4) * record.gradient_norm
        assert z.dot(exact) >= 1e-4 * z.dot(z)
    assert taken > 10


def test_accuracies_and_steps_follow_their_factors_exactly():
    problem = BilevelQuadratic.random(4, 30, generator=torch.Generator().manual_seed(1))
    method = MAID.for_problem(problem, eps0=0.3, delta0=0.7, step0=2.0, rho=0.6, tau=0.25, nu=1.2)
    shrinks, backtracks = 0, 0
    for (_, eps, delta, beta), (_, eps_after, delta_after, beta_after), record in watched_steps(method, problem, 25):
        assert delta_after / eps_after == pytest.approx(0.7 / 0.3, rel=1e-12)  # they move together
        grown = 1.2 if record.accepted else 1.0
        shrinks += power_of(eps_after / eps / grown, 0.25)
        assert delta_after / delta == pytest.approx(eps_after / eps, rel=1e-12)
        if record.accepted:
            backtracks += power_of(record.step_size / beta, 0.6)
            assert beta_after == pytest.approx(record.step_size * 10 / 9, rel=1e-12)
        else:
            assert beta_after == beta
        assert (record.epsilon, record.delta) == (eps_after, delta_after)
    assert shrinks > 3
    assert backtracks > 3


def test_a_failed_search_shrinks_accuracy_and_may_go_on_longer():
    """An upper level that no step can lower: 3 rounds of 2, 3 and 4 trials, then of 5, 6 and 7."""
    problem = small_quadratic(noise=1.0)
    thetas = []

    class Watched(BilevelQuadratic):
        def mu(self, theta):
            thetas.append(theta.clone())
            return super().mu(theta)

    watched = Watched(problem.A1, problem.b1, problem.A2, problem.A3, problem.b2)
    method = MAID.for_problem(watched, step0=1e9, max_backtracks=2, rho=0.9, tau=0.5)
    for trials in ([2, 3, 4], [5, 6, 7]):
        thetas.clear()
        epsilon = method.epsilon
        record = method.step()
        assert not record.accepted
        assert method.step_size == 1e9
        assert power_of(method.epsilon / epsilon, 0.5) >= 3
        tried = {tuple(one.tolist()) for one in thetas if not torch.equal(one, method.theta)}
        assert len(tried) == sum(trials)
    # After a success the count starts anew.
    method.step_size = 1e-3
    assert method.step().accepted
    method.step_size = 1e9
    thetas.clear()
    method.step()
    assert len({tuple(one.tolist()) for one in thetas if not torch.equal(one, method.theta)}) == 9


def test_the_line_search_takes_the_first_step_that_passes_its_test():
    """With all solves exact up to 1e-9 the step taken lowers f, and the one before it would not have."""
    problem = small_quadratic(noise=0.5)
    method = MAID.for_problem(problem, eps0=1e-9, delta0=1e-9, step0=5.0, rho=0.7)
    theta, value = method.theta.clone(), problem.value(method.theta)
    record = method.step()
    z = problem.gradient(theta)
    assert record.accepted
    step = record.step_size
    assert problem.value(theta - step * z) - value <= 0
    assert problem.value(theta - step / 0.7 * z) - value > 0
    assert step < 5.0


@pytest.mark.parametrize(("convex", "wanted"), [(True, 1.0), (False, 2.0)])
def test_bounds_of_inexact_values_in_the_line_search(convex, wanted):
    """g = ½‖x‖² and x̃ at distance exactly ε: the slack between bounds is ‖∇g⁺‖ε + ‖∇g‖ε + L_gε²/2 (twice if g may bend
    down)."""
    identity = torch.eye(2, dtype=DOUBLE)
    problem = BilevelQuadratic(
        identity, torch.zeros(2, dtype=DOUBLE), identity, -identity, torch.zeros(2, dtype=DOUBLE)
    )
    epsilon = 0.05

    def erring(objective, x, *, tol, mu, smoothness, max_iter):
        """Stand at x̂ + ε e₁, whose gradient has the norm εμ."""
        _, gradient = objective(torch.zeros(2, dtype=DOUBLE))
        return Descent(-gradient + torch.tensor([epsilon, 0.0], dtype=DOUBLE), epsilon, 1)

    def accepted(threshold):
        """θ = (2, 0); the step takes θ to (2 − β·2.05, 0). η² only scales a term that is known."""
        method = MAID(
            torch.tensor([2.0, 0.0], dtype=DOUBLE),
            problem.lower,
            problem.upper,
            1.0,
            solver=erring,
            eps0=epsilon,
            delta0=1e-9,
            step0=threshold,
            eta=1e-2,
            max_backtracks=1,
            adaptive=False,
            lipschitz=LipschitzConstants(1.0, 0.0, 0.0),
            x0=torch.zeros(2, dtype=DOUBLE),
            smoothness=1.0,
            convex_upper=convex,
        )
        method._line_search(*method._descent_direction()[:2])
        return not torch.equal(method.theta, torch.tensor([2.0, 0.0], dtype=DOUBLE))

    def slack(beta):
        old, new = 2.0 + epsilon, 2.0 - beta * (2.0 + epsilon) + epsilon
        left = 0.5 * new**2 + abs(new) * epsilon + wanted * 0.5 * epsilon**2 - 0.5 * old**2 + old * epsilon
        return left + 1e-4 * beta * old**2

    low, high = 1e-3, 0.5
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slack(middle) > 0 else (low, middle)
    assert accepted(high * 1.0001)
    assert not accepted(high * 0.9999)


def test_larger_constants_only_make_the_test_stricter():
    problem = small_quadratic(noise=1.0)
    accuracies = []
    for factor in (1, 2, 4, 8):
        given = LipschitzConstants(factor * problem._upper_smoothness, factor * 0.1, 0.0)
        method = MAID.for_problem(problem, lipschitz=given, eps0=0.5, delta0=0.5)
        method._descent_direction()
        accuracies.append(method.epsilon)
    assert sorted(accuracies, reverse=True) == accuracies
    assert accuracies[-1] < accuracies[0]


def test_permuting_separable_penalties_permutes_the_trajectory():
    x = normal(60, 5, seed=1)
    y = (x @ normal(5, 3, seed=2)).argmax(1)
    order = torch.tensor([3, 0, 4, 1, 2])

    def thetas(columns):
        problem = WeightedLogistic(x[:40, columns], y[:40], x[40:, columns], y[40:], 3, -1.0)
        given = LipschitzConstants(1.0, 1.0, 0.5)
        method = MAID.for_problem(problem, lipschitz=given, step0=5.0)
        found = []
        for _ in range(6):
            method.step()
            found.append(method.theta.view(5, 3).clone())
        return found

    for plain, permuted in zip(thetas(torch.arange(5)), thetas(order), strict=True):
        torch.testing.assert_close(permuted, plain[order], rtol=1e-8, atol=1e-10)
    assert (plain - plain.mean()).abs().max() > 1e-2


@pytest.mark.parametrize("solver", ["fista", "gd", "lbfgs"])
def test_every_lower_solver_reaches_the_optimum(solver):
    problem = small_quadratic()
    result = MAID.for_problem(problem, solver=solver, step0=0.5).solve(max_steps=200, tol=1e-4)
    assert result.converged
    torch.testing.assert_close(result.theta, problem.optimum(), rtol=0, atol=1e-3)


def test_a_users_solver_is_used_and_counted():
    problem = small_quadratic()

    def exact(objective, x, *, tol, mu, smoothness, max_iter):
        """Newton's method from the gradient at 0."""
        _, constant = objective(torch.zeros_like(x))
        columns = [objective(e)[1] - constant for e in torch.eye(3, dtype=DOUBLE)]
        return Descent(torch.linalg.solve(torch.stack(columns, 1), -constant), 0.0, 7)

    method = MAID.for_problem(problem, solver=exact)
    method.step()
    assert method.problem.lower_iterations % 7 == 0
    assert method.problem.lower_iterations > 0
    assert method.solve(tol=1e-8).converged


def test_accuracy_rises_no_further_than_the_test_asks():
    """With η = ½ the bound ends below ‖z‖/2, and one factor τ earlier it was above."""
    problem = small_quadratic(noise=1.0)
    method = MAID.for_problem(problem, eps0=10.0, delta0=10.0, eta=0.5, tau=0.8)
    direction, _, omega = method._descent_direction()
    assert omega <= 0.5 * direction.norm
    looser = MAID.for_problem(problem, eps0=method.epsilon / 0.8, delta0=method.delta / 0.8, adaptive=False)
    direction, _, omega = looser._descent_direction()
    assert omega > 0.5 * direction.norm


def test_fixed_accuracy_keeps_it_and_skips_the_test():
    problem = small_quadratic(noise=1.0)
    method = MAID.for_problem(problem, eps0=0.5, delta0=0.5, adaptive=False)
    records = [method.step() for _ in range(20)]
    assert {record.epsilon for record in records} == {0.5}
    assert any(record.error_bound > record.gradient_norm for record in records)


def test_the_budget_is_kept_and_leaves_the_last_accepted_point():
    problem = BilevelQuadratic.random(5, 40, generator=torch.Generator().manual_seed(1))
    whole = MAID.for_problem(problem)
    thetas = [whole.theta.clone()]
    for _ in range(12):
        whole.step()
        thetas.append(whole.theta.clone())
    for budget in (1, 20, 57, 90):
        method = MAID.for_problem(problem)
        result = method.solve(budget=budget)
        assert result.status == "budget"
        last = result.history[-1]
        assert last.lower_iterations + last.cg_iterations <= budget
        torch.testing.assert_close(result.theta, thetas[last.step], rtol=0, atol=0)


def test_a_solve_goes_on_where_the_last_ended():
    problem = small_quadratic()
    whole = MAID.for_problem(problem).solve(max_steps=10, tol=0.0)
    method = MAID.for_problem(problem)
    method.solve(max_steps=4, tol=0.0)
    pieces = method.solve(max_steps=6, tol=0.0)
    torch.testing.assert_close(pieces.theta, whole.theta, rtol=1e-6, atol=1e-8)
    assert len(pieces.history) == len(whole.history) == 11


@pytest.mark.parametrize("warm", [False, True])
def test_certificate_holds_the_exact_value_and_gradient(warm):
    problem = small_quadratic(noise=1.0)
    result = MAID.for_problem(problem, warm_start=warm).solve(max_steps=5)
    low, high = result.value_bounds
    assert low <= problem.value(result.theta) <= high
    assert (result.hypergradient - problem.gradient(result.theta)).norm() <= result.error_bound
    assert (result.x - problem.solution(result.theta)).norm() <= result.certificate.epsilon
    assert not result.converged


def test_a_smooth_upper_term_joins_value_gradient_and_optimum():
    problem = small_quadratic(noise=1.0)

    def ridge(theta):
        return 0.5 * 3.0 * theta.square().sum()

    result = MAID.for_problem(problem, regularizer=ridge).solve(tol=1e-6)
    sensitivity = -torch.linalg.solve(problem.A2, problem.A3)
    M = problem.A1 @ sensitivity
    constant = problem.A1 @ torch.linalg.solve(problem.A2, problem.b2) - problem.b1
    wanted = torch.linalg.solve(M.T @ M + 3.0 * torch.eye(2, dtype=DOUBLE), -M.T @ constant)
    torch.testing.assert_close(result.theta, wanted, rtol=0, atol=1e-4)
    low, high = result.value_bounds
    assert low <= problem.value(wanted) + ridge(wanted).item() + 1e-6
    assert high >= problem.value(wanted) + ridge(wanted).item() - 1e-6


def test_missed_accuracy_warns_and_the_reached_one_is_used():
    problem = BilevelQuadratic.random(5, 40, generator=torch.Generator().manual_seed(1))
    method = MAID.for_problem(problem, eps0=1e-6, lower_max_iter=5)
    with pytest.warns(ConvergenceWarning, match="1e-06"):
        x, reached = method.problem.solve_lower(problem.theta0, problem.x0, 1e-6)
    gradient = problem.A2.T @ (problem.A2 @ x + problem.A3 @ problem.theta0 - problem.b2)
    assert reached == pytest.approx(gradient.norm().item() / problem.mu(x), rel=1e-9)
    assert reached > 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.problem.solve_lower(problem.theta0, problem.x0, 1e-6, trial=True)


def test_convexity_error_tells_the_curvature():
    with pytest.raises(ConvexityError, match=r"curvature -0\.\d") as caught:
        MAID.for_problem(Saddle()).step()
    assert -0.5 <= caught.value.curvature < 0
    assert isinstance(caught.value, ValueError)


def test_steps_that_leave_the_numbers_are_only_rejected():
    problem = TVDenoising(*images(), theta0=torch.tensor([-1.0, -2.0]))
    method = MAID.for_problem(problem, step0=1e6, rho=0.1)
    record = method.step()
    assert record.accepted
    assert method.theta.isfinite().all()


def test_an_accuracy_out_of_reach_ends_it():
    problem = small_quadratic()
    method = MAID(
        problem.theta0.float(),
        lambda x, theta: problem_float(problem).lower(x, theta),
        lambda x: problem_float(problem).upper(x),
        problem.mu(problem.theta0),
        x0=problem.x0.float(),
        lower_max_iter=200,
        cg_max_iter=50,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = method.solve(tol=1e-12, max_steps=300)
    assert result.status in ("stalled", "steps")
    assert result.theta.dtype == torch.float32
    torch.testing.assert_close(result.theta.double(), problem.optimum(), rtol=0, atol=1e-2)


def problem_float(problem):
    return BilevelQuadratic(*(one.float() for one in (problem.A1, problem.b1, problem.A2, problem.A3, problem.b2)))


def test_learned_denoising_lowers_the_error():
    noisy, clean = images(2, 12)
    tv, foe = TVDenoising(noisy, clean), FoEDenoising(noisy, clean, 2, 3, torch.Generator().manual_seed(0))
    for problem, share, step in ((tv, 0.8, 1.0), (foe, 0.98, 30.0)):  # two filters do less
        before = problem.upper(solved_by(problem, problem.theta0)).item()
        result = MAID.for_problem(problem, rho=0.5, step0=step).solve(budget=300)
        assert problem.upper(solved_by(problem, result.theta)).item() < share * before


def solved_by(problem, theta):
    x, _ = MAID.for_problem(problem, lower_max_iter=5000).problem.solve_lower(theta, problem.x0, 1e-6)
    return x


def test_runs_without_gradients_enabled_and_leaves_inputs_alone():
    problem = small_quadratic()
    theta = problem.theta0.clone().requires_grad_()
    with torch.no_grad():
        method = MAID(theta, problem.lower, problem.upper, problem.mu, **problem.constants())
        method.step()
    assert theta.grad is None
    assert (theta == 1).all()
    assert not method.theta.requires_grad


# HOAG


@pytest.mark.parametrize(
    ("sequence", "wanted"),
    [("geometric", [1, 0.9, 0.81, 0.729]), ("quadratic", [1, 1 / 4, 1 / 9, 1 / 16]), ("cubic", [1, 1 / 8, 1 / 27])],
)
def test_hoag_follows_its_sequence(sequence, wanted):
    method = HOAG.for_problem(small_quadratic(), sequence=sequence, eps0=0.2, step="fixed", step0=0.1)
    for factor in wanted:
        assert method.epsilon == pytest.approx(0.2 * factor, rel=1e-12)
        method.step()
    method._count = 10**7
    assert method.epsilon == 1e-12


def test_hoag_with_a_fixed_step_is_gradient_descent():
    problem = small_quadratic(noise=1.0)
    method = HOAG.for_problem(problem, step="fixed", step0=0.2, eps0=1e-10)
    theta = problem.theta0
    for _ in range(6):
        method.step()
        theta = theta - 0.2 * problem.gradient(theta)
        torch.testing.assert_close(method.theta, theta, rtol=0, atol=1e-7)


def test_hoag_adapts_its_step_by_hand():
    """Every branch of the rule, replayed with closed forms at an accuracy that hides nothing."""
    problem = small_quadratic(noise=1.0)
    method = HOAG.for_problem(problem, step0=3.0, eps0=1e-9)
    L, theta, last, branches = 1 / 3, problem.theta0, None, []
    for _ in range(14):
        method.step()
        value = problem.value(theta)
        if last is not None and value >= 1.2 * last[1]:
            branches.append("back")
            L *= 2
            theta = last[0] - problem.gradient(last[0]) / L
        else:
            z = problem.gradient(theta)
            if last is None or value <= last[1] - L * (z.norm().item() / L) ** 2 + 1e-9:
                branches.append("longer")
                L *= 0.95
            else:
                branches.append("on")
            last = (theta, value)
            theta = theta - z / L
        torch.testing.assert_close(method.theta, theta, rtol=1e-6, atol=1e-6)
        assert method.history[-1].step_size == pytest.approx(1 / L, rel=1e-12)
    assert set(branches) == {"back", "longer", "on"}


def test_hoag_halves_all_later_accuracies_when_it_goes_back():
    problem = small_quadratic(noise=1.0)
    method = HOAG.for_problem(problem, step0=50.0, eps0=0.1)
    method.step()
    before = method.epsilon
    assert not method.step().accepted
    assert method.epsilon == pytest.approx(0.5 * before)


def test_hoag_starts_with_the_published_step():
    problem = small_quadratic(noise=1.0)
    method = HOAG.for_problem(problem, eps0=1e-9)
    method.step()
    size = problem.gradient(problem.theta0).norm().item()
    assert method.history[-1].step_size == pytest.approx(math.sqrt(2) / size / 0.95, rel=1e-6)


# the claim


def made_up(maid, hoag, per_study=None):
    """Evidence with worst, median and best of MAID, and worst and best of each HOAG sequence, alike on all problems."""
    per_study = per_study or {}
    figures = {}
    for study in claim.STUDIES:
        worst, median, best = per_study.get(study, (maid, hoag))[0]
        rivals = per_study.get(study, (maid, hoag))[1]
        figures[study, "MAID"] = {
            "worst final loss": [worst] * 3,
            "median final loss": [median] * 3,
            "best final loss": [best] * 3,
        }
        for arm, (high, low) in zip(claim.ARMS[1:], rivals, strict=True):
            figures[study, arm] = {"worst final loss": [high] * 3, "best final loss": [low] * 3}
    return Evidence.of(figures)


STEADY = ((1.2, 1.0), (1.2, 1.0), (1.2, 1.0))
WILD = ((1.5001, 1.0), (9.0, 1.0), (9.0, 1.0))


@pytest.mark.parametrize(
    ("maid", "hoag", "outcome"),
    [
        ((1.0, 0.95, 0.95), WILD, "reproduced"),
        ((1.0999, 1.0, 1.0), WILD, "reproduced"),
        ((1.1001, 1.0, 1.0), WILD, "not reproduced"),
        ((1.0, 0.95, 0.95), ((1.4999, 1.0), *WILD[1:]), "partly"),
        ((1.0, 0.95, 0.95), STEADY, "partly"),
        ((1.05, 1.0001, 1.0), WILD, "partly"),
        ((1.05, 1.01, 1.0), (*WILD[:2], (9.0, 1.02)), "partly"),  # the best HOAG run is another sequence's
        ((3.0, 1.0, 1.0), STEADY, "not reproduced"),
    ],
)
def test_judge(maid, hoag, outcome):
    assert claim.judge(made_up(maid, hoag)).outcome == outcome


def test_judge_counts_problems():
    good, slow, shaky = (1.0, 0.95, 0.95), (1.1, 1.05, 1.05), (1.2, 1.0, 1.0)
    one_wild = {"tv": (good, WILD)}
    assert claim.judge(made_up(good, STEADY, one_wild)).outcome == "reproduced"
    assert claim.judge(made_up(good, WILD, {"tv": (slow, WILD)})).outcome == "reproduced"
    two_slow = {"tv": (slow, WILD), "digits": (slow, WILD)}
    assert claim.judge(made_up(good, WILD, two_slow)).outcome == "partly"
    assert claim.judge(made_up(good, WILD, {"digits": (shaky, WILD)})).outcome == "not reproduced"


def test_judge_takes_geometric_means_over_seeds():
    figures = {
        (study, arm): {
            "worst final loss": [2.0, 8.0],
            "median final loss": [1.0, 4.0],
            "best final loss": [1.0, 1.0] if arm == "MAID" else [2.0, 2.0],
        }
        for study in claim.STUDIES
        for arm in claim.ARMS
    }
    margins = claim.judge(Evidence.of(figures)).margins
    assert margins["MAID: worst / best, tv"].estimate == pytest.approx(4.0)
    assert margins["HOAG's steadiest sequence: worst / best, tv"].estimate == pytest.approx(2.0)
    assert margins["MAID's median / HOAG's best, tv"].estimate == pytest.approx(1.0)


def test_the_claims_problems():
    problem, x_test, y_test = tasks.digits(0)
    assert problem.theta0.numel() == 640
    assert len(problem._train[0]) == 600
    assert len(problem._validation[0]) == 400
    assert len(x_test) == len(y_test) == 797
    tv = tasks.denoising(0)
    assert tv.clean.shape == (6, 64, 64)
    assert (tv.noisy - tv.clean).std().item() == pytest.approx(0.1, rel=0.02)
    edges = (tv.clean.diff(dim=2) != 0).double().mean().item()
    assert 0 < edges < 0.1  # piecewise constant
    assert not torch.equal(tv.clean, tasks.denoising(1).clean)
    assert not torch.equal(tasks.quadratic(0).A1, tasks.quadratic(1).A1)


def test_exact_value_by_newtons_method():
    problem = random_logistic()
    exact = problem.upper(solved(problem, problem.theta0)).item()
    assert tasks.exact_value(problem, problem.theta0, problem.x0) == pytest.approx(exact, abs=1e-5)
    quadratic = small_quadratic(noise=1.0)
    expected = quadratic.value(quadratic.theta0)
    assert tasks.exact_value(quadratic, quadratic.theta0, quadratic.x0) == pytest.approx(expected, rel=1e-12)
