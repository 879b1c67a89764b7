"""Newton's method by gradient-normalized smoothness against closed forms, NumPy, SciPy and finite differences."""

import copy
import functools
import gc
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from provenn.contracts import (
    BadInput,
    FunctionCase,
    KnownProblem,
    OptimizerCase,
    ProbeCase,
    RefusedProblem,
    SolverCase,
)
from provenn.optim import (
    AcceleratedGradient,
    AdaptiveGradient,
    Chebyshev,
    CubicNewton,
    GaussNewton,
    GNSReport,
    GradientNormalizedNewton,
    Iterate,
    LogisticRegression,
    LogSumExp,
    MinimumCertificate,
    Oracle,
    PowerResidual,
    RankOne,
    Rosenbrock,
    SolveResult,
    SuperUniversalNewton,
    estimate_gns,
    minimize_gns,
)
from provenn.optim._gradient_normalized_smoothness_baselines import cubic_step
from provenn.optim._gradient_normalized_smoothness_systems import DampedSystem, Metric


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def positive(size, seed=0, least=0.3):
    draws = normal(size, size, seed=seed)
    return draws @ draws.T / size + least * torch.eye(size, dtype=torch.float64)


def start(size, norm=3.0, seed=7):
    x = normal(size, seed=seed)
    return norm * x / x.norm()


def soft_maximum(rows=40, size=6, mu=0.25):
    return LogSumExp.centred(normal(rows, size), normal(rows, seed=1), mu)


def logistic(ridge=1e-2):
    features = normal(60, 4)
    return LogisticRegression(features, torch.where(features[:, 0] + normal(60, seed=2) > 0, 1, -1), ridge)


def bowl(curvature, at=0.0):
    """½ (x − at)ᵀ M (x − at) for a matrix or a number M."""
    if isinstance(curvature, float):
        return Oracle(lambda x: 0.5 * curvature * (x - at).square().sum())
    return Oracle(lambda x: 0.5 * (x - at) @ curvature @ (x - at))


NOT_FINITE = Oracle(lambda x: x.log().sum())


def quick(oracle, x0, hessian="exact", **options):
    return minimize_gns(oracle, x0, hessian, **{"grad_tol": 1e-7, "max_iter": 500, **options})


def solver_case(part, make, solve, bad_input, refused=(), early=2):
    return SolverCase(
        part=f"provenn.optim.{part}",
        make=make,
        solve=solve,
        known=(
            KnownProblem("a bowl", lambda: (bowl(positive(4), 1.0), start(4)), lambda: np.ones(4), 1e-5),
            KnownProblem("a start at the minimum", lambda: (bowl(2.0), torch.zeros(3).double()), lambda: np.zeros(3)),
        ),
        refused=(
            RefusedProblem("a start outside the domain", lambda: (NOT_FINITE, vector(1.0, -1.0)), "finite"),
            *refused,
        ),
        certificate=lambda problem, result: {
            "f": float(problem[0].value(result.x)),
            "grad_norm": np.linalg.norm(scipy.optimize.approx_fprime(result.x.numpy(), as_numpy(problem[0]), 1e-7)),
            "gap": math.nan,
            "converged": result.grad_norm < 1e-7,
        },
        early_stop={"max_iter": early},
        tolerance=1e-5,
        bad_input=bad_input,
    )


def as_numpy(oracle):
    return lambda x: float(oracle.value(torch.from_numpy(np.asarray(x, dtype=np.float64))))


def method_case(method, bad_input):
    def solve(options, problem):
        return method().minimize(*problem, **{"grad_tol": 1e-7, "max_iter": 3000, **options})

    return solver_case(
        method.__name__,
        lambda **options: options,
        solve,
        (
            *bad_input,
            BadInput("max_trials", lambda: method(max_trials=0)),
            BadInput("metric", lambda: method(metric=-torch.eye(2))),
            BadInput("max_iter", lambda: method().minimize(bowl(1.0), start(2), max_iter=-1)),
            BadInput("x0", lambda: method().minimize(bowl(1.0), vector(math.nan))),
        ),
    )


def newton(params=None, **options):
    return GradientNormalizedNewton([nn.Parameter(start(3))] if params is None else params, **options)


def bad_hessian(matrix):
    parameter = nn.Parameter(start(2))
    return newton([parameter], hessian=lambda x: matrix).step(lambda: parameter.square().sum())


SKEW = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
SEARCH = (
    BadInput("gamma0", lambda: newton(gamma0=0.0)),
    BadInput("gamma0", lambda: newton(gamma0=-1.0)),
    BadInput("gamma0", lambda: newton(gamma0=math.nan)),
    BadInput("gamma_min", lambda: newton(gamma_min=0.0)),
    BadInput("max_trials", lambda: newton(max_trials=0)),
    BadInput("hessian", lambda: newton(hessian="fisher")),
    BadInput("solver", lambda: newton(solver="lu")),
    BadInput("metric", lambda: newton(metric=torch.diag(vector(1.0, 0.0, 1.0)))),
    BadInput("metric", lambda: newton(metric=SKEW)),
    BadInput("metric", lambda: newton(metric=torch.full((2, 2), math.nan))),
    BadInput("metric", lambda: bad_metric_size()),
    BadInput("hessian", lambda: bad_hessian(SKEW)),
    BadInput("hessian", lambda: bad_hessian(torch.full((2, 2), math.inf))),
    BadInput("hessian", lambda: bad_hessian(torch.eye(3))),
    BadInput("params", lambda: newton([nn.Parameter(torch.zeros(2, dtype=torch.complex128))])),
    BadInput("params", lambda: newton([{"params": [nn.Parameter(start(2))]}, {"params": [nn.Parameter(start(3))]}])),
    BadInput("params", lambda: newton([nn.Parameter(torch.ones(2)), nn.Parameter(start(3))])),
    BadInput("closure", lambda: newton().step(lambda: torch.tensor(1.0)), RuntimeError),
    BadInput("randomness", lambda: noisy_step(), RuntimeError),
)


def bad_metric_size():
    parameter = nn.Parameter(start(2))
    return newton([parameter], metric=torch.eye(3)).step(lambda: parameter.square().sum())


def noisy_step():
    parameter, source = nn.Parameter(start(3)), torch.Generator().manual_seed(0)
    return newton([parameter]).step(lambda: (parameter * (1 + 0.01 * torch.randn(3, generator=source))).square().sum())


REQUIRED = "the closure is required, and the method needs the loss beside the gradient"
ONE_GROUP = "one step is found for all parameters together, so that there is one group"
OPTIMIZER = {
    "closure": "required",
    "step_size": "gamma0",
    "rosenbrock_steps": 100,
    "excluded": {
        "parameter_groups": ONE_GROUP,
        "add_param_group": ONE_GROUP,
        "schedulers": "gamma0 is where the search begins; γ then follows the function",
        "none_gradients": REQUIRED,
        "sparse_gradients": REQUIRED,
    },
    "bad_input": SEARCH,
}

POOLED = {
    **OPTIMIZER,
    "excluded": {
        **OPTIMIZER["excluded"],
        "memory": "of the small objects that a step makes, torch and Python pool some, and the pools grow by jumps, "
        "ever more rarely, at more than 16 bytes a step at first; a test of its own finds the number of tensors and "
        "the state's size constant",
    },
}

CASES = [
    OptimizerCase(part="provenn.optim.GradientNormalizedNewton", make=GradientNormalizedNewton, **POOLED),
    OptimizerCase(
        part="provenn.optim.GradientNormalizedNewton",
        make=functools.partial(GradientNormalizedNewton, solver="cg"),
        label="conjugate gradients",
        **POOLED,
    ),
    OptimizerCase(
        part="provenn.optim.GradientNormalizedNewton",
        make=functools.partial(GradientNormalizedNewton, hessian="zero"),
        label="zero",
        **{**POOLED, "rosenbrock_steps": 1000},
    ),
    solver_case(
        "minimize_gns",
        lambda **options: options,
        lambda options, problem: quick(*problem, **options),
        (
            BadInput("gamma0", lambda: quick(bowl(1.0), start(2), gamma0=0.0)),
            BadInput("gamma_min", lambda: quick(bowl(1.0), start(2), gamma_min=-1.0)),
            BadInput("max_trials", lambda: quick(bowl(1.0), start(2), max_trials=0)),
            BadInput("hessian", lambda: quick(bowl(1.0), start(2), "gauss-newton")),
            BadInput("hessian", lambda: quick(bowl(1.0), start(2), "approximate")),
            BadInput("hessian", lambda: quick(bowl(1.0), start(2), lambda x: SKEW)),
            BadInput("hessian", lambda: quick(bowl(1.0), start(2), lambda x: torch.full((2, 2), math.nan))),
            BadInput("solver", lambda: quick(bowl(1.0), start(2), solver="lu")),
            BadInput("solver", lambda: quick(bowl(1.0), start(2), solver="wsm")),
            BadInput("metric", lambda: quick(bowl(1.0), start(2), metric=-torch.eye(2).double())),
            BadInput("metric", lambda: quick(bowl(1.0), start(2), metric=torch.eye(3).double())),
            BadInput("x0", lambda: quick(bowl(1.0), torch.zeros(2, 2))),
            BadInput("x0", lambda: quick(NOT_FINITE, vector(-1.0))),
            BadInput("max_iter", lambda: quick(bowl(1.0), start(2), max_iter=-1)),
            BadInput("max_calls", lambda: quick(bowl(1.0), start(2), max_calls=0)),
            BadInput("grad_tol", lambda: quick(bowl(1.0), start(2), grad_tol=-1.0)),
            BadInput("gap_tol", lambda: quick(bowl(1.0), start(2), gap_tol=0.0)),
        ),
        refused=(RefusedProblem("no approximation", lambda: (bowl(1.0), start(2), "approximate"), "approximation"),),
    ),
    method_case(
        SuperUniversalNewton,
        (
            BadInput("H0", lambda: SuperUniversalNewton(H0=0.0)),
            BadInput("alpha", lambda: SuperUniversalNewton(alpha=-1.0)),
            BadInput("H_min", lambda: SuperUniversalNewton(H_min=0.0)),
        ),
    ),
    method_case(
        CubicNewton,
        (BadInput("H0", lambda: CubicNewton(H0=0.0)), BadInput("H_min", lambda: CubicNewton(H_min=0.0))),
    ),
    method_case(
        AdaptiveGradient,
        (BadInput("L0", lambda: AdaptiveGradient(L0=0.0)), BadInput("L_min", lambda: AdaptiveGradient(L_min=0.0))),
    ),
    method_case(
        AcceleratedGradient,
        (
            BadInput("L0", lambda: AcceleratedGradient(L0=0.0)),
            BadInput("L_min", lambda: AcceleratedGradient(L_min=0.0)),
        ),
    ),
    ProbeCase(
        part="provenn.optim.estimate_gns",
        run=lambda model, data: estimate_gns(bowl(2.0), data, "zero", directions=8),
        model=lambda: nn.Linear(2, 2),
        data=lambda generator: torch.randn(3, 2, generator=generator, dtype=torch.float64),
        # Of ‖x‖² the gradient 2x has the Lipschitz constant 2, and γ is its length over that.
        brute_force=lambda model, data: {
            "gamma": np.linalg.norm(data.numpy(), axis=1),
            "grad_norm": 2 * np.linalg.norm(data.numpy(), axis=1),
            "exponent": 1.0,
            "constant": 0.5,
            "local_exponents": (1.0, 1.0),
        },
        excluded={"model_restored_after_error": "a probe of functions: there is no model to call"},
        bad_input=(
            BadInput("directions", lambda: estimate_gns(bowl(1.0), start(2), directions=0)),
            BadInput("hessian", lambda: estimate_gns(bowl(1.0), start(2), "gauss-newton")),
            BadInput("x", lambda: estimate_gns(bowl(1.0), vector(math.nan, 0.0))),
            BadInput("x", lambda: estimate_gns(bowl(1.0), torch.zeros(0, 2))),
            BadInput("metric", lambda: estimate_gns(bowl(1.0), start(2), metric=-torch.eye(2).double())),
        ),
    ),
    FunctionCase(
        part="provenn.optim.LogSumExp",
        call=lambda: soft_maximum().evaluate(start(6)),
        bad_input=(
            BadInput("mu", lambda: LogSumExp(normal(3, 2), normal(3), 0.0)),
            BadInput("A", lambda: LogSumExp(normal(3, 2), normal(2), 1.0)),
            BadInput("b", lambda: LogSumExp(normal(2, 2), vector(math.nan, 0.0), 1.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.PowerResidual",
        call=lambda: PowerResidual(torch.sin, 3.0).hessian(start(2)),
        bad_input=(
            BadInput("p", lambda: PowerResidual(torch.sin, 1.5)),
            BadInput("A", lambda: PowerResidual.linear(normal(3, 2), normal(2))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.Rosenbrock",
        call=lambda: Rosenbrock().evaluate(start(2)),
        bad_input=(
            BadInput("a", lambda: Rosenbrock(a=math.nan)),
            BadInput("b", lambda: Rosenbrock(b=0.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.Chebyshev",
        call=lambda: Chebyshev(3).evaluate(start(3)),
        bad_input=(BadInput("n", lambda: Chebyshev(1)), BadInput("p", lambda: Chebyshev(3, p=1.0))),
    ),
    FunctionCase(
        part="provenn.optim.LogisticRegression",
        call=lambda: logistic().evaluate(start(4)),
        bad_input=(
            BadInput("ridge", lambda: LogisticRegression(normal(2, 2), torch.ones(2), -1.0)),
            BadInput("y", lambda: LogisticRegression(normal(2, 2), vector(0.0, 1.0))),
            BadInput("A", lambda: LogisticRegression(normal(3, 2), torch.ones(2))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.GaussNewton",
        call=lambda: GaussNewton(nn.Linear(2, 1), squared, [(torch.ones(3, 2), torch.ones(3, 1))])(torch.zeros(3)),
        bad_input=(
            BadInput("batches", lambda: GaussNewton(nn.Linear(2, 1), squared, [])),
            BadInput("model", lambda: GaussNewton(nn.ReLU(), squared, [(torch.ones(1, 1), torch.ones(1, 1))])),
            BadInput("x", lambda: GaussNewton(nn.Linear(2, 1), squared, [(torch.ones(3, 2),) * 2])(torch.zeros(2))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.RankOne",
        call=lambda: RankOne(2.0, start(3))(start(3)),
        bad_input=(
            BadInput("alpha", lambda: RankOne(math.inf, start(2))),
            BadInput("vector", lambda: RankOne(1.0, vector(math.nan))),
        ),
    ),
    *(
        FunctionCase(part=f"provenn.optim.{one.__name__}", call=call, bad_input_reason=reason)
        for one, call, reason in (
            (Oracle, lambda: bowl(1.0).hessian(start(2)), "takes any function"),
            (SolveResult, lambda: quick(bowl(1.0), start(2)).converged, "only made by a solver"),
            (Iterate, lambda: quick(bowl(1.0), start(2)).history[0], "only made by a solver"),
            (MinimumCertificate, lambda: quick(bowl(1.0), start(2)).certificate, "only made by a solver"),
            (GNSReport, lambda: estimate_gns(bowl(1.0), start(2)).plot(), "only made by the probe"),
        )
    ),
]


def squared(outputs, targets):
    return (outputs - targets).square().sum(-1) / 2


# The functions.


def by_differences(function, x, width=1e-5):
    """The derivative of a function of a vector, one column a coordinate."""
    units = torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(function(x + width * u) - function(x - width * u)) / (2 * width) for u in units], -1)


FUNCTIONS = {
    "soft maximum": lambda: (soft_maximum(), start(6, 0.4)),
    "logistic": lambda: (logistic(), start(4, 1.0)),
    "linear, p = 4": lambda: (PowerResidual.linear(normal(7, 3), normal(7, seed=1), 4.0), start(3)),
    "linear, p = 2": lambda: (PowerResidual.linear(normal(7, 3), normal(7, seed=1), 2.0), start(3)),
    "bent, p = 3": lambda: (PowerResidual(lambda x: torch.cat((x.sin(), x.square())), 3.0), start(3)),
    "Rosenbrock": lambda: (Rosenbrock(1.5, 30.0), vector(-1.2, 1.0)),
    "Rosenbrock, p = 5": lambda: (PowerResidual(Rosenbrock().residual, 5.0), vector(-1.2, 1.0)),
    "Chebyshev": lambda: (Chebyshev(5), start(5, 1.0)),
    "autograd": lambda: (Oracle(lambda x: x.exp().sum() + (x[0] * x[1]) ** 2), start(3, 1.0)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_finite_differences(name):
    # Central differences of width 1e-5: truncation 1e-10 of the third derivative, rounding 1e-11 of the value.
    oracle, x = FUNCTIONS[name]()
    f, g = oracle.evaluate(x)
    assert f.item() == oracle.value(x).item()
    scale = max(1.0, abs(f.item()))
    torch.testing.assert_close(g, by_differences(oracle.value, x), rtol=1e-6, atol=1e-7 * scale)
    torch.testing.assert_close(g, oracle.gradient(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle.hessian(x), by_differences(oracle.gradient, x), rtol=1e-6, atol=1e-6 * scale)


def test_values_by_hand():
    assert Rosenbrock().value(vector(-1.2, 1.0)).item() == pytest.approx(2.2**2 + 100 * 0.44**2)
    # u = (½(1 − 2), 3 − (2·4 − 1)) = (−½, −4), so ‖u‖² = 16.25.
    assert Chebyshev(2).value(vector(2.0, 3.0)).item() == pytest.approx(16.25**2 / 4)
    A, b = vector(1.0, 2.0).diag(), vector(0.5, 0.5)
    assert LogSumExp(A, b, 0.5).value(vector(1.0, 1.0)).item() == pytest.approx(
        0.5 * math.log(math.exp(0.5 / 0.5) + math.exp(1.5 / 0.5))
    )
    one = LogisticRegression(vector(2.0).unsqueeze(0), vector(-1.0), 0.5)
    assert one.value(vector(3.0)).item() == pytest.approx(math.log(1 + math.exp(6.0)) + 0.25 * 9)


def test_weighted_gauss_newton_exceeds_the_hessian_by_the_squared_gradient():
    oracle, x = soft_maximum(mu=0.2), start(6, 0.5)
    g = by_differences(oracle.value, x)
    excess = oracle.approximation(x) - by_differences(oracle.gradient, x)
    torch.testing.assert_close(excess, torch.outer(g, g) / 0.2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mu", [0.05, 1.0])
def test_centred_soft_maximum_is_smallest_at_zero(mu):
    oracle = soft_maximum(mu=mu)
    least = oracle.value(torch.zeros(6).double()).item()
    assert oracle.gradient(torch.zeros(6).double()).norm() < 1e-12
    assert all(oracle.value(start(6, 10.0**-k, seed=k)).item() >= least for k in range(4))


@pytest.mark.parametrize("p", [2.0, 3.0, 4.0])
def test_fisher_term_is_the_papers_and_completes_the_gauss_newton_part(p):
    oracle, x = PowerResidual(lambda x: torch.cat((x.sin(), 2 * x)), p), start(3, 1.0)
    u = torch.cat((x.sin(), 2 * x))
    J = torch.cat((x.cos().diag(), 2 * torch.eye(3).double()))
    size, g = u.norm(), by_differences(oracle.value, x)
    fisher = (p - 2) / size**p * torch.outer(g, g)
    torch.testing.assert_close(oracle.fisher_term(x).dense(), fisher, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(oracle.approximation(x), size ** (p - 2) * J.T @ J + fisher, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", [2.0, 2.5, 4.0])
def test_at_a_root_nothing_is_undefined(p):
    oracle, root = PowerResidual.linear(vector(1.0, 2.0).diag(), vector(1.0, 2.0), p), vector(1.0, 1.0)
    assert oracle.gradient(root).tolist() == [0.0, 0.0]
    wanted = [[1.0, 0.0], [0.0, 4.0]] if p == 2 else [[0.0, 0.0], [0.0, 0.0]]
    assert oracle.hessian(root).tolist() == oracle.approximation(root).tolist() == wanted
    assert oracle.fisher_term(root).dense().abs().max() == 0


def test_linear_equations_have_no_other_curvature():
    oracle, x = PowerResidual.linear(normal(7, 3), normal(7, seed=1), 4.0), start(3)
    torch.testing.assert_close(oracle.approximation(x), oracle.hessian(x), rtol=1e-12, atol=1e-12)


def test_empirical_fisher_is_the_mean_of_squared_gradients():
    oracle, x = logistic(ridge=0.1), start(4, 1.0)
    pairs = zip(oracle.A, oracle.y, strict=True)
    gradients = torch.stack([by_differences(lambda z, a=a, y=y: (1 + (-y * (a @ z)).exp()).log(), x) for a, y in pairs])
    wanted = gradients.T @ gradients / len(gradients) + 0.1 * torch.eye(4)
    torch.testing.assert_close(oracle.approximation(x), wanted, rtol=1e-6, atol=1e-8)


# The step.


@pytest.mark.parametrize("metric", [None, positive(5, seed=3)])
def test_solvers_agree(metric):
    g, curvature = normal(5, seed=4), RankOne(2.5, normal(5, seed=5))
    steps = [DampedSystem(curvature, g, Metric(metric), solver).solve(0.07) for solver in ("cholesky", "cg", "wsm")]
    damped = curvature.dense() + 0.07 * (torch.eye(5).double() if metric is None else metric)
    for step in steps:
        torch.testing.assert_close(step, -torch.linalg.solve(damped, g), rtol=1e-9, atol=1e-9)
    for solver in ("cholesky", "cg"):
        step = DampedSystem(curvature.dense(), g, Metric(metric), solver).solve(0.07)
        torch.testing.assert_close(step, steps[2], rtol=1e-9, atol=1e-9)
        step = DampedSystem(lambda v: curvature.dense() @ v, g, Metric(metric), solver).solve(0.07)
        torch.testing.assert_close(step, steps[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["cholesky", "cg", "wsm"])
def test_zero_needs_no_solver_and_indefinite_gives_no_step(solver):
    g, metric = normal(4), positive(4, seed=2)
    step = DampedSystem(None, g, Metric(metric), solver).solve(0.5)
    torch.testing.assert_close(step, -2 * torch.linalg.solve(metric, g), rtol=1e-12, atol=1e-12)
    assert DampedSystem(RankOne(-1.0, g), g, Metric(None), solver).solve(0.5 * g.square().sum().item()) is None
    assert DampedSystem(RankOne(-1.0, g), g, Metric(None), solver).solve(2 * g.square().sum().item()) is not None


@pytest.mark.parametrize("metric", [None, positive(6, seed=9)])
def test_steps_are_no_longer_than_gamma(metric):
    norm = Metric(metric)
    for seed in range(20):
        draws, g = normal(6, seed % 6 + 1, seed=seed), normal(6, seed=100 + seed)
        gamma = 10.0 ** (seed % 7 - 3)
        dual = math.sqrt(g @ (g if metric is None else torch.linalg.solve(metric, g)))
        h = DampedSystem(draws @ draws.T, g, norm, "cholesky").solve(dual / gamma)
        length = math.sqrt(h @ (h if metric is None else metric @ h))
        assert length <= gamma * (1 + 1e-12)
        assert norm.norm(h).item() == pytest.approx(length, rel=1e-10)
        assert norm.dual_norm(g).item() == pytest.approx(dual, rel=1e-10)


@pytest.mark.parametrize("hessian", ["exact", "approximate", "zero"])
@pytest.mark.parametrize("name", ["soft maximum", "logistic"])
def test_below_gamma_of_the_point_the_slope_condition_holds_and_the_first_trial_is_accepted(name, hessian):
    oracle, _ = FUNCTIONS[name]()
    size = 6 if name == "soft maximum" else 4
    for seed in range(5):
        x = start(size, 2.0, seed=seed)
        # The estimate is an upper bound; a sample of directions finds it to well within a factor of two here.
        gamma = estimate_gns(oracle, x, hessian, seed=seed).gamma[0] / 2
        g = oracle.gradient(x)
        H = {"exact": oracle.hessian, "approximate": oracle.approximation, "zero": lambda x: torch.zeros(size, size)}
        damping = (g.norm() / gamma).item()
        h = -torch.linalg.solve(H[hessian](x).double() + damping * torch.eye(size), g)
        new = oracle.gradient(x + h)
        assert -(new @ h) >= new.square().sum() / (2 * damping)
        assert minimize_gns(oracle, x, hessian, gamma0=gamma, max_iter=1).certificate.trials == 1


def test_with_zero_curvature_and_the_right_gamma_the_step_is_gradient_descent():
    L, x = 3.0, start(4)
    gamma = estimate_gns(bowl(L), x, "zero").gamma[0]
    assert gamma == pytest.approx((L * x).norm().item() / L, rel=1e-6)
    seen = []
    oracle = bowl(torch.diag(vector(3.0, 1.0, 2.0, 0.5)))
    g = oracle.gradient(x)
    minimize_gns(oracle, x, "zero", gamma0=g.norm().item() / L, max_iter=1, callback=lambda x, line: seen.append(x))
    torch.testing.assert_close(seen[1], x - g / L, rtol=1e-12, atol=1e-12)


def test_acceptance_at_its_edge():
    # On L x²/2 with H = 0 the step is −t x with t = γ/x, and the rule holds for t² + 2t ≤ 7: t ≤ √8 − 1 = 1.8284.
    # With 4λ or 2λ in place of 8λ the edges are 1.732 and 1.618; by decrease alone, 2.
    for t, trials in ((1.82, 1), (1.84, 2)):
        run = minimize_gns(bowl(5.0), vector(1.0), "zero", gamma0=t, max_iter=1, grad_tol=None)
        assert run.certificate.trials == trials
        assert run.x.item() == pytest.approx(1 - t / trials)
        assert run.certificate.status == "iterations"


def test_exact_quadratic_doubles_gamma_and_converges_superlinearly():
    run = quick(bowl(positive(5), 1.0), start(5), grad_tol=1e-13)
    assert [line.scale for line in run.history] == [2.0**k for k in range(len(run.history))]
    assert run.certificate.trials == run.certificate.iterations
    ratios = [b.grad_norm / a.grad_norm for a, b in itertools.pairwise(run.history)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(ratios[3:-1]))
    assert math.isinf(estimate_gns(bowl(positive(5), 1.0), start(5)).gamma[0])


@pytest.mark.parametrize("hessian", ["exact", "approximate", "zero"])
@pytest.mark.parametrize("name", ["soft maximum", "Rosenbrock", "Chebyshev"])
def test_values_never_rise_and_gamma_counts_acceptances_and_rejections(name, hessian):
    oracle, x = FUNCTIONS[name]()
    run = quick(oracle, x, hessian, gamma0=0.75, max_iter=150)
    values = [line.f for line in run.history]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    for accepted, line in enumerate(run.history):
        assert line.scale == 0.75 * 2.0 ** (accepted - (line.trials - accepted))
        # Where H + λB is not positive definite, nothing is evaluated.
        assert line.calls <= 1 + line.trials
        assert line.calls == 1 + line.trials or hessian == "exact"
    assert run.certificate.iterations == len(run.history) - 1 > 3


def test_least_gamma_holds():
    run = quick(Oracle(lambda x: 1e3 * x.square().sum()), vector(1e-5), "zero", gamma0=1e-3, gamma_min=1e-4, max_iter=5)
    assert all(line.scale >= 1e-4 for line in run.history)


def test_the_metric_is_a_change_of_variables():
    S = torch.linalg.cholesky(positive(6, seed=8)).T
    oracle, y0 = soft_maximum(), start(6)

    class Moved(Oracle):
        def approximation(self, y):
            return S.T @ oracle.approximation(S @ y) @ S

    moved = Moved(lambda y: oracle.value(S @ y))
    for hessian in ("exact", "approximate", "zero"):
        plain, mapped = [], []
        minimize_gns(oracle, S @ y0, hessian, max_iter=12, callback=lambda x, line, kept=plain: kept.append(x))
        options = {"metric": S.T @ S, "max_iter": 12}
        minimize_gns(moved, y0, hessian, **options, callback=lambda y, line, kept=mapped: kept.append(S @ y))
        assert len(plain) > 4
        torch.testing.assert_close(torch.stack(mapped), torch.stack(plain), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("hessian", ["exact", "approximate"])
def test_rosenbrock_is_solved(hessian):
    run = quick(Rosenbrock(), vector(-1.2, 1.0), hessian, f_star=0.0, grad_tol=None, gap_tol=1e-8)
    assert run.certificate.status == "gap"
    assert run.f < 1e-8
    np.testing.assert_allclose(run.x, [1, 1], atol=3e-4)


def algorithm_in_numpy(value, gradient, hessian, x, B, iterations):
    """Algorithm 1 with SciPy, from its description: points and γ."""
    gamma, points, gammas = 1.0, [x], [1.0]
    inverse = np.linalg.inv(B)
    for _ in range(iterations):
        f, g, H = value(x), gradient(x), hessian(x)
        while True:
            damping = math.sqrt(g @ inverse @ g) / gamma
            new = x - scipy.linalg.solve(H + damping * B, g, assume_a="pos")
            slope = gradient(new)
            if f - value(new) >= slope @ inverse @ slope / (8 * damping):
                break
            gamma /= 2
        x, gamma = new, 2 * gamma
        points.append(x)
        gammas.append(gamma)
    return np.array(points), np.array(gammas)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("with_metric", [True, False])
def test_iterates_are_those_of_the_algorithm_written_in_numpy(exact, with_metric):
    oracle, x0 = soft_maximum(mu=0.3), start(6)
    A, b = oracle.A.numpy(), oracle.b.numpy()

    def softmax(x):
        return scipy.special.softmax((A @ x - b) / 0.3)

    def curvature(x):
        pi = softmax(x)
        return (A.T @ np.diag(pi) @ A - exact * np.outer(A.T @ pi, A.T @ pi)) / 0.3

    points, gammas = algorithm_in_numpy(
        lambda x: 0.3 * scipy.special.logsumexp((A @ x - b) / 0.3),
        lambda x: A.T @ softmax(x),
        curvature,
        x0.numpy(),
        A.T @ A if with_metric else np.eye(6),
        6,
    )
    seen = []
    run = minimize_gns(
        oracle,
        x0,
        "exact" if exact else "approximate",
        metric=oracle.A.T @ oracle.A if with_metric else None,
        max_iter=6,
        grad_tol=None,
        callback=lambda x, line: seen.append(x),
    )
    np.testing.assert_allclose(torch.stack(seen), points, rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal([line.scale for line in run.history], gammas)


@pytest.mark.parametrize("name", ["soft maximum", "logistic", "Rosenbrock"])
def test_minimum_is_that_of_scipy(name):
    oracle, x0 = FUNCTIONS[name]()
    found = scipy.optimize.minimize(
        as_numpy(oracle),
        x0.numpy(),
        jac=lambda x: oracle.gradient(torch.from_numpy(x)).numpy(),
        hess=lambda x: oracle.hessian(torch.from_numpy(x)).numpy(),
        method="trust-exact",
        options={"gtol": 1e-9},
    )
    for hessian in ("exact", "approximate"):
        run = minimize_gns(oracle, x0, hessian, grad_tol=1e-6, max_iter=3000)
        assert run.converged
        assert run.f == pytest.approx(found.fun, abs=1e-9)


def test_limits_and_tolerances_end_runs():
    oracle, x0 = soft_maximum(), start(6)
    least = oracle.value(torch.zeros(6).double()).item()
    by_gap = quick(oracle, x0, f_star=least, grad_tol=None, gap_tol=1e-3)
    assert by_gap.certificate.status == "gap"
    assert 0 <= by_gap.certificate.gap < 1e-3
    assert by_gap.certificate.gap == by_gap.f - least
    assert by_gap.history[-2].f - least >= 1e-3
    by_gradient = quick(oracle, x0, grad_tol=1e-3)
    assert by_gradient.certificate.status == "gradient"
    assert by_gradient.grad_norm < 1e-3 <= by_gradient.history[-2].grad_norm
    by_calls = quick(oracle, x0, max_calls=4)
    assert by_calls.certificate.status == "calls"
    assert not by_calls.converged
    assert by_calls.history[-2].calls < 4 <= by_calls.certificate.calls
    assert quick(oracle, x0, max_iter=0).x.tolist() == x0.tolist()


def test_an_indefinite_hessian_is_rejected_counted_and_warned_of():
    x0 = start(3)
    hopeless = lambda x: -1e30 * torch.eye(3).double()  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="max_trials=40"):
        run = quick(bowl(1.0), x0, hopeless)
    assert run.certificate.trials == 40
    assert run.certificate.calls == 1
    assert run.certificate.status == "search"
    assert run.x.tolist() == x0.tolist()
    # Damped by more than the negative curvature, the step is fine.
    assert quick(bowl(1.0), x0, lambda x: -100 * torch.eye(3).double(), max_iter=1).certificate.trials > 5


# What it is compared with.


def test_super_universal_newton_in_numpy():
    oracle, x0 = soft_maximum(mu=0.1), start(6)
    seen = []
    run = SuperUniversalNewton().minimize(
        oracle, x0, max_iter=6, grad_tol=None, callback=lambda x, line: seen.append(x)
    )
    x, H, scales = x0.numpy(), 1.0, [1.0]
    as_array = lambda function, x: function(torch.from_numpy(x)).numpy()  # noqa: E731
    for k in range(6):
        g, A = as_array(oracle.gradient, x), as_array(oracle.hessian, x)
        while True:
            damping = H * np.linalg.norm(g)
            h = -np.linalg.solve(A + damping * np.eye(6), g)
            new = as_array(oracle.gradient, x + h)
            if -new @ h >= new @ new / (4 * damping):
                break
            H *= 4
        x, H = x + h, max(H / 4, 1e-5)
        scales.append(H)
        np.testing.assert_allclose(seen[k + 1], x, rtol=1e-7, atol=1e-9)
    assert [line.scale for line in run.history] == scales


@pytest.mark.parametrize("weight", [1e-3, 0.5, 40.0])
@pytest.mark.parametrize("indefinite", [False, True])
def test_cubic_step_is_the_root_by_eigenvalues(weight, indefinite):
    A = positive(5) - (1.5 * torch.eye(5) if indefinite else 0)
    g = normal(5, seed=3)
    values, vectors = np.linalg.eigh(A.numpy())
    turned = vectors.T @ g.numpy()

    def length(r):
        return np.linalg.norm(turned / (values + weight * r))

    low = max(0.0, -values[0] / weight) + 1e-12
    root = scipy.optimize.brentq(lambda r: r - length(r), low, 1e6, xtol=1e-13)
    h, systems = cubic_step(DampedSystem(A, g, Metric(None), "cholesky"), Metric(None), weight)
    assert h.norm().item() == pytest.approx(root, rel=1e-8)
    np.testing.assert_allclose(h, -vectors @ (turned / (values + weight * root)), rtol=1e-7)
    assert systems < 60


def test_cubic_step_in_a_metric():
    A, B, g = positive(4), positive(4, seed=5), normal(4, seed=6)
    h, _ = cubic_step(DampedSystem(A, g, Metric(B), "cholesky"), Metric(B), 0.7)
    torch.testing.assert_close((A + 0.7 * (h @ B @ h).sqrt() * B) @ h, -g, rtol=1e-8, atol=1e-8)


def test_cubic_newton_halves_its_constant_and_takes_cubic_steps():
    oracle, x0, seen = soft_maximum(), start(6), []
    run = CubicNewton().minimize(oracle, x0, max_iter=5, grad_tol=None, callback=lambda x, line: seen.append(x))
    for (x, new), (before, after) in zip(itertools.pairwise(seen), itertools.pairwise(run.history), strict=True):
        used = 2 * after.scale
        h = new - x
        left = (oracle.hessian(x) + used / 2 * h.norm() * torch.eye(6)) @ h + oracle.gradient(x)
        assert left.norm() < 1e-7
        model = oracle.gradient(x) @ h + h @ oracle.hessian(x) @ h / 2 + used * h.norm() ** 3 / 6
        assert after.f <= before.f + model.item() + 1e-12
        assert math.log2(used / before.scale) % 1 == 0


def test_gradient_methods_search_for_the_constant():
    # On L‖x‖²/2 the bound holds from L on; 8 is the first power of two above 5, and 4 fails.
    first, v = vector(1.0, -2.0), []
    run = AdaptiveGradient().minimize(bowl(5.0), first, max_iter=1, callback=lambda x, line: v.append(x))
    torch.testing.assert_close(v[1], first * (1 - 5 / 8))
    assert run.history[1].scale == 4.0
    v = []
    run = AcceleratedGradient(L0=5.0).minimize(bowl(5.0), first, max_iter=1, callback=lambda x, line: v.append(x))
    torch.testing.assert_close(v[1], torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert run.history[1].scale == 2.5
    run = AcceleratedGradient(L0=5.0, L_min=4.0).minimize(bowl(5.0), first, max_iter=1)
    assert run.history[1].scale == 4.0


def test_accelerated_gradient_keeps_nesterovs_bound():
    # f(x_k) − f* ≤ 2 L ‖x₀ − x*‖²/k² for L at most 1, as the search finds; plain descent misses that by far.
    curvatures = torch.logspace(-4, 0, 30, dtype=torch.float64)
    oracle, x0 = bowl(curvatures.diag()), torch.ones(30).double()
    fast = AcceleratedGradient(L0=1.0).minimize(oracle, x0, max_iter=100, grad_tol=None)
    for k, line in enumerate(fast.history[1:], 1):
        assert line.f <= 2 * 30 / k**2
    slow = AdaptiveGradient(L0=1.0, L_min=1.0).minimize(oracle, x0, max_iter=100, grad_tol=None)
    assert fast.f < 0.2 * slow.f


# The measured quantity.


def test_gamma_of_a_cubic_goes_with_the_root_of_the_gradient():
    # f = L‖x‖³/6 is homogeneous: γ ∝ ‖x‖ and ‖g‖ = L‖x‖²/2. In the plane 64 directions cover the circle.
    L = 2.5
    oracle = Oracle(lambda x: L / 6 * x.square().sum() ** 1.5)
    points = normal(100, 2, seed=3) * torch.logspace(-1, 1, 100, dtype=torch.float64).unsqueeze(1)
    report = estimate_gns(oracle, points, "exact", directions=64)
    ratios = np.array(report.gamma) / np.sqrt(report.grad_norm)
    assert ratios.max() / ratios.min() < 1.001
    assert report.exponent == pytest.approx(0.5, abs=1e-3)
    assert report.r_squared > 0.9999


def test_gamma_of_an_exponential_is_constant():
    # f = eˣ: the remainder eˣ(eʰ − 1 − h) scales with the gradient. γ solves (e^γ − 1 − γ) = 1: γ = 1.1462.
    points = torch.linspace(-3, 2, 6, dtype=torch.float64).unsqueeze(1)
    report = estimate_gns(Oracle(lambda x: x.exp().sum()), points, "exact", directions=2)
    root = scipy.optimize.brentq(lambda r: math.exp(r) - 2 - r, 0.1, 3)
    np.testing.assert_allclose(report.gamma, root, rtol=1e-6)
    assert report.exponent == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hessian", ["exact", "approximate", "zero"])
@pytest.mark.parametrize("with_metric", [False, True])
def test_gamma_is_that_of_a_grid_of_steps(hessian, with_metric):
    oracle = LogSumExp(normal(8, 2), normal(8, seed=1), 0.5)
    x, B = vector(0.7, -0.4), positive(2, seed=5) if with_metric else torch.eye(2).double()
    report = estimate_gns(oracle, x, hessian, directions=128, metric=B if with_metric else None)
    inverse = torch.linalg.inv(B)
    root = torch.linalg.inv(torch.linalg.cholesky(B).T)
    angles = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)[:-1]
    H = {"exact": oracle.hessian(x), "approximate": oracle.approximation(x), "zero": torch.zeros(2, 2).double()}[
        hessian
    ]
    units = torch.stack((angles.cos(), angles.sin()), 1) @ root.T
    g = oracle.gradient(x)
    slope = (g @ inverse @ g).sqrt()
    radii = torch.logspace(-2, 2, 800, dtype=torch.float64)
    steps = radii.view(-1, 1, 1) * units
    pi = ((x + steps) @ oracle.A.T - oracle.b).div(0.5).softmax(-1)
    left = pi @ oracle.A - g - steps @ H
    worst = ((left @ inverse) * left).sum(-1).sqrt().max(1).values / radii
    # γ holds if at no radius up to it the worst remainder, over the radius, exceeds ‖g‖/γ.
    peaks = worst.cummax(0).values
    feasible = radii[peaks <= slope / radii]
    assert report.gamma[0] == pytest.approx(feasible.max().item(), rel=0.02)


def test_gamma_is_seeded_and_shrinks_with_more_directions():
    oracle, x = soft_maximum(), start(6)
    few, many = (estimate_gns(oracle, x, "zero", directions=count).gamma[0] for count in (2, 400))
    assert many <= few
    assert estimate_gns(oracle, x, "zero", seed=1) == estimate_gns(oracle, x, "zero", seed=1)
    assert estimate_gns(oracle, x, "zero", seed=1).gamma != estimate_gns(oracle, x, "zero", seed=2).gamma


def test_gamma_at_a_stationary_point_is_zero_and_its_law_unknown():
    report = estimate_gns(bowl(1.0), torch.zeros(2).double(), "zero")
    assert report.gamma == (0.0,)
    assert math.isnan(report.exponent)
    assert report.local_exponents == ()


# The optimizer.


def model_and_data(outputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).to(dtype)
    return model, normal(20, 4).to(dtype), torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))


def parameters_after(model, optimizer, closure, steps=4):
    for _ in range(steps):
        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logits_closure(model, x, y, backward=False, outputs=False):
    def closure():
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y) + 1e-2 * sum(p.square().sum() for p in model.parameters())
        if backward:
            loss.backward()
        return (loss, logits) if outputs else loss

    return closure


def test_steps_are_those_of_the_solver():
    oracle, x0 = logistic(), start(4)
    for hessian in ("exact", "zero", oracle.approximation):
        parameter = nn.Parameter(x0.clone())
        optimizer = newton([parameter], hessian=hessian)
        run = minimize_gns(oracle, x0, hessian, max_iter=6, grad_tol=None)
        losses = [optimizer.step(lambda p=parameter: oracle.value(p)) for _ in range(6)]
        torch.testing.assert_close(parameter.detach(), run.x, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose([float(one) for one in losses], [line.f for line in run.history[:-1]], rtol=1e-12)
        assert optimizer.gamma == run.history[-1].scale
        assert optimizer.trials == run.certificate.trials


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("hessian", ["exact", "zero"])
def test_closures_may_call_backward_or_not(hessian, solver):
    results = []
    for backward in (False, True):
        model, x, y = model_and_data()
        optimizer = newton(list(model.parameters()), hessian=hessian, solver=solver, gamma0=100.0)
        results.append(parameters_after(model, optimizer, logits_closure(model, x, y, backward)))
        assert optimizer.trials > 4
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_conjugate_gradients_step_as_factors_do_also_after_rejections():
    results = []
    for solver in ("cholesky", "cg"):
        model, x, y = model_and_data()
        optimizer = newton(list(model.parameters()), solver=solver, gamma0=10.0, metric=positive(27))
        results.append(parameters_after(model, optimizer, logits_closure(model, x, y)))
        assert optimizer.trials > 6
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


def test_one_step_is_the_damped_newton_step_of_the_whole_hessian():
    model, x, y = model_and_data()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    function = functools.partial(flat_loss, model, x, y)
    H, g = torch.func.hessian(function)(before), torch.func.grad(function)(before)
    optimizer = newton(list(model.parameters()), gamma0=0.1)
    after = parameters_after(model, optimizer, logits_closure(model, x, y), steps=1)
    gamma = optimizer.gamma / 2
    wanted = before - torch.linalg.solve(H + g.norm() / gamma * torch.eye(len(g)), g)
    # The damped Hessian's condition number, some 1e4, stands between rounding and the step.
    torch.testing.assert_close(after, wanted, rtol=1e-7, atol=1e-8)


def flat_loss(model, x, y, flat):
    pieces, named = list(flat.split([p.numel() for p in model.parameters()])), {}
    for name, p in model.named_parameters():
        named[name] = pieces.pop(0).view(p.shape)
    logits = torch.func.functional_call(model, named, (x,))
    return nn.functional.cross_entropy(logits, y) + 1e-2 * flat.square().sum()


def gauss_newton_by_hand(model, x, y, loss):
    """Σ JᵀKJ/N from per-sample Jacobians, K written down: diag(p) − ppᵀ for cross-entropy, I for squares."""
    named = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(sample, values):
        return torch.func.functional_call(model, values, (sample.unsqueeze(0),)).squeeze(0)

    total = 0
    for sample in x:
        J = torch.func.jacrev(lambda values, sample=sample: outputs(sample, values))(named)
        J = torch.cat([one.flatten(1) for one in J.values()], 1)
        p = outputs(sample, named).softmax(0)
        K = torch.diag(p) - torch.outer(p, p) if loss == "cross-entropy" else torch.eye(len(p), dtype=p.dtype)
        total = total + J.T @ K @ J
    return total / len(x)


@pytest.mark.parametrize("loss", ["cross-entropy", "squares"])
def test_gauss_newton_three_ways(loss):
    each = squared if loss == "squares" else functools.partial(nn.functional.cross_entropy, reduction="none")
    results = []
    for kind in ("string", "string, cg", "GaussNewton", "GaussNewton, cg", "by hand"):
        model, x, y = model_and_data()
        y = normal(20, 3, seed=3) if loss == "squares" else y
        hessian = {"G": GaussNewton(model, each, [(x[:8], y[:8]), (x[8:], y[8:])]), "s": "gauss-newton"}.get(
            kind[0], lambda flat, m=model, y=y, x=x: gauss_newton_by_hand(m, x, y, loss)
        )

        def closure(model=model, x=x, y=y, pair=kind[0] == "s"):
            outputs = model(x)
            value = each(outputs, y).mean()
            return (value, outputs) if pair else value

        optimizer = newton(list(model.parameters()), hessian=hessian, solver="cg" if "cg" in kind else "cholesky")
        results.append(parameters_after(model, optimizer, closure))
        # A rejection among them: after it the products are still those of the point that was left.
        assert optimizer.trials > 4
    for other in results[:-1]:
        torch.testing.assert_close(other, results[-1], rtol=1e-6, atol=1e-8)


def test_gauss_newton_needs_the_outputs():
    model, x, y = model_and_data()
    with pytest.raises(ValueError, match="outputs"):
        newton(list(model.parameters()), hessian="gauss-newton").step(logits_closure(model, x, y))


def test_gauss_newton_with_a_closure_that_calls_backward():
    results = []
    for backward in (False, True):
        model, x, y = model_and_data()

        def closure(model=model, x=x, y=y, backward=backward):
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
            if backward:
                loss.backward()
            return loss, logits

        results.append(parameters_after(model, newton(list(model.parameters()), hessian="gauss-newton"), closure))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_a_linear_loss_has_no_curvature():
    for solver in ("cholesky", "cg"):
        parameter = nn.Parameter(vector(1.0, 2.0))
        newton([parameter], gamma0=0.5, solver=solver).step(lambda p=parameter: 3 * p[0] + 4 * p[1])
        torch.testing.assert_close(parameter.detach(), vector(1.0 - 0.3, 2.0 - 0.4))


def test_steps_end_quietly_at_a_minimum():
    parameter = nn.Parameter(torch.zeros(3).double())
    optimizer = newton([parameter])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: parameter.square().sum())
    assert optimizer.gamma == 1.0
    assert parameter.tolist() == [0, 0, 0]


def test_a_failed_search_warns_keeps_the_point_and_the_least_gamma():
    parameter = nn.Parameter(start(3))
    before = parameter.detach().clone()
    optimizer = newton([parameter], hessian=lambda x: -1e30 * torch.eye(3), max_trials=40)
    with pytest.warns(ConvergenceWarning, match="40"):
        optimizer.step(lambda: parameter.square().sum())
    assert parameter.tolist() == before.tolist()
    assert optimizer.trials == 40
    assert optimizer.gamma == 1e-9
    # Where the values are rejected, not H: a loss whose gradient has the wrong sign.
    wrong = nn.Parameter(start(3))
    before = wrong.detach().clone()

    def closure():
        wrong.grad = -2 * wrong.detach()
        return wrong.detach().square().sum()

    with pytest.warns(ConvergenceWarning):
        newton([wrong], hessian="zero", max_trials=5).step(closure)
    assert wrong.tolist() == before.tolist()


def test_randomness_that_begins_later_is_named_too():
    parameter, calls = nn.Parameter(start(3)), []
    optimizer = newton([parameter], hessian="zero")

    def closure():
        calls.append(len(calls))
        return parameter.square().sum() + (0.0 if len(calls) < 8 else float(len(calls)))

    def run():
        for _ in range(20):
            optimizer.step(closure)

    with pytest.raises(RuntimeError, match="randomness"):
        run()


def test_new_batches_at_every_step_are_no_randomness():
    parameter = nn.Parameter(start(3))
    optimizer = newton([parameter])
    for k in range(3):

        def loss(k=k):
            return (parameter - k).square().sum()

        before = loss().item()
        optimizer.step(loss)
        assert loss().item() < before


def test_dropout_is_named():
    model, x, y = model_and_data()
    noisy = nn.Sequential(model, nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="randomness"):
        newton(list(noisy.parameters())).step(lambda: nn.functional.cross_entropy(noisy(x), y))


def test_parameters_without_part_in_the_loss_stay():
    used, idle = nn.Parameter(start(2)), nn.Parameter(start(3))
    before = idle.detach().clone()
    for backward in (False, True):

        def closure(backward=backward):
            loss = (used - 1).square().sum()
            if backward:
                loss.backward()
            return loss

        for solver in ("cholesky", "cg"):
            newton([used, idle], solver=solver).step(closure)
        assert idle.tolist() == before.tolist()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)

    def closure():
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="sparse"):
        newton(list(table.parameters()), hessian="zero").step(closure)


def test_a_closure_whose_graph_is_gone_is_told_so():
    parameter = nn.Parameter(start(2))

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    with pytest.raises(RuntimeError, match="closure must return the loss"):
        newton([parameter]).step(closure)
    newton([parameter], hessian="zero").step(closure)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    parameter = nn.Parameter(start(2))
    with pytest.raises(ValueError, match="finite"):
        newton([parameter]).step(lambda: parameter.sum() * value)


def test_trials_with_undefined_values_are_rejected():
    # −log x + x: the first steps leave the domain.
    parameter = nn.Parameter(vector(3.0))
    optimizer = newton([parameter], gamma0=100.0, hessian="zero")
    for _ in range(30):
        optimizer.step(lambda: (parameter - parameter.log()).sum())
    assert parameter.item() == pytest.approx(1.0, abs=1e-3)


def test_gamma_is_not_lost_with_the_state_or_a_copy():
    model, x, y = model_and_data()
    optimizer = newton(list(model.parameters()), hessian="zero", metric=positive(27))
    for _ in range(3):
        optimizer.step(logits_closure(model, x, y))
    other_model, other = copy.deepcopy((model, optimizer))
    assert (other.gamma, other.trials) == (optimizer.gamma, optimizer.trials)
    again = parameters_after(other_model, other, logits_closure(other_model, x, y))
    assert torch.equal(again, parameters_after(model, optimizer, logits_closure(model, x, y)))


def test_softmax_regression_beats_lbfgs_evaluation_for_evaluation():
    # A use as any optimizer with a closure: L-BFGS gets the same closure, and more of its calls.
    torch.manual_seed(0)
    x, y = normal(90, 5), torch.randint(3, (90,), generator=torch.Generator().manual_seed(1))
    losses = []
    for make in (
        newton,
        functools.partial(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    ):
        model, calls = nn.Linear(5, 3).double(), []
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        optimizer = make(list(model.parameters()))

        def closure(model=model, optimizer=optimizer, calls=calls):
            optimizer.zero_grad()
            calls.append(1)
            loss = nn.functional.cross_entropy(model(x), y) + 1e-3 * model.weight.square().sum()
            loss.backward()
            return loss

        while len(calls) < 24:
            optimizer.step(closure)
        losses.append(closure().item())
    assert losses[0] <= losses[1] + 1e-12


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_steps_leave_nothing_behind(solver, backward):
    # Every step is a whole one: from the same point, so that none begins at the minimum.
    parameter = nn.Parameter(start(3))
    optimizer = newton([parameter], solver=solver)

    def closure():
        loss = parameter.cosh().sum()
        if backward:
            loss.backward()
        return loss

    def left_after(steps):
        for _ in range(steps):
            parameter.data.copy_(start(3))
            optimizer.step(closure)
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects()), len(pickle.dumps(optimizer.state_dict()))

    left_after(5)
    assert left_after(20) == left_after(20)


@pytest.mark.parametrize(("backward", "more"), [(False, 1), (True, 2)])
def test_a_closure_is_called_once_a_step_and_once_a_trial(backward, more):
    # And once more in the first step, to see whether it repeats; a backward() of its own is noticed by another call.
    oracle, parameter, calls = logistic(), nn.Parameter(start(4)), []
    optimizer = newton([parameter])

    def closure():
        calls.append(1)
        loss = oracle.value(parameter)
        if backward:
            loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert len(calls) == 5 + optimizer.trials + more


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    model, x, y = model_and_data()
    on_cpu = parameters_after(model, newton(list(model.parameters())), logits_closure(model, x, y))
    model, x, y = model_and_data()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    on_gpu = parameters_after(model, newton(list(model.parameters())), logits_closure(model, x, y))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-6, atol=1e-8)
