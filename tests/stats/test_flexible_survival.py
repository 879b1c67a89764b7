"""The APGW distribution against closed forms, quadrature and finite differences; the cases of all its parts."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from torch import nn

from provenn.contracts import BadInput, EstimatorCase, FunctionCase, ProbeCase
from provenn.stats import APGW, APGWRegression, select_apgw
from provenn.stats._flexible_survival_distribution import exponential_quotients


def survival_data(samples=60, seed=0):
    """Return covariates, times and events with an effect on the scale; a third is censored."""
    draws = np.random.default_rng(seed)
    X = draws.normal(size=(samples, 2))
    T = draws.weibull(1.5, samples) * np.exp(0.5 * X[:, 0] - 0.3 * X[:, 1])
    C = draws.exponential(2.5, samples)
    return X, np.minimum(T, C), (T <= C).astype(float)


X, T, EVENT = survival_data()


def direct_likelihood(theta, model, X, T, event):
    """The log-likelihood from the formulas of H and h as they stand, in NumPy."""
    theta, logs = np.asarray(theta), {"phi": -math.log(np.median(T)), "lam": 0.0}
    columns = np.column_stack([np.ones(len(T)), X])
    for name in ("phi", "lam", "gamma"):
        width = columns.shape[1] if name in model else int(name == "gamma")
        if width:
            logs[name] = columns[:, :width] @ theta[:width]
        theta = theta[width:]
    kappa = math.expm1(theta[0])
    phi, lam, gamma = (np.exp(logs[name]) for name in ("phi", "lam", "gamma"))
    z = (phi * T) ** gamma
    base = 1 + z / (kappa + 1)
    total = lam * (kappa + 1) / kappa * (base**kappa - 1)
    hazard = lam * phi * gamma * (phi * T) ** (gamma - 1) * base ** (kappa - 1)
    return event @ np.log(hazard) - total.sum()


def nelder_mead(model, start):
    """Return the largest log-likelihood of a model that the simplex method finds, restarted from its own ends."""

    def descent(theta):
        with np.errstate(all="ignore"):
            value = direct_likelihood(theta, model, X, T, EVENT)
        return -value if np.isfinite(value) else 1e10

    found = []
    for kappa in (-0.5, 0.2, 1.5):
        at = np.array([*start, math.log1p(kappa)])
        for _ in range(5):
            ended = scipy.optimize.minimize(descent, at, method="Nelder-Mead", options={"maxiter": 1500})
            at = ended.x
        found.append(-ended.fun)
    return max(found)


@functools.cache
def selected():
    return select_apgw(X, T, EVENT)


def run_selection(_, data):
    return select_apgw(*data)


CASES = [
    FunctionCase(
        part="provenn.stats.APGW",
        call=lambda: APGW(1.0, 2.0, 0.5, -0.5).sample(5, torch.Generator().manual_seed(0)),
        bad_input=(
            BadInput("phi", lambda: APGW(0.0, 1.0, 1.0, 1.0)),
            BadInput("lam", lambda: APGW(1.0, -1.0, 1.0, 1.0)),
            BadInput("gamma", lambda: APGW(1.0, 1.0, math.nan, 1.0)),
            BadInput("kappa", lambda: APGW(1.0, 1.0, 1.0, -1.0)),
            BadInput("t", lambda: APGW(1.0, 1.0, 1.0, 1.0).sf(-1.0)),
            BadInput("u", lambda: APGW(1.0, 1.0, 1.0, 1.0).icdf(1.1)),
            BadInput("n", lambda: APGW(1.0, 1.0, 1.0, 1.0).sample(-1)),
            BadInput("n", lambda: APGW(1.0, 1.0, 1.0, 1.0).sample(1.5), TypeError),
        ),
    ),
    EstimatorCase(
        part="provenn.stats.APGWRegression",
        make=lambda **overrides: APGWRegression(**{"shape": (), "kappa": 1.0} | overrides),
        bad_input=(
            BadInput("T", lambda: APGWRegression().fit(X, T - T.min())),
            BadInput("event", lambda: APGWRegression().fit(X, T, EVENT + 1)),
            BadInput("event", lambda: APGWRegression().fit(X, T, 0 * EVENT)),
            BadInput("event", lambda: APGWRegression().fit(X, T, EVENT[1:])),
            BadInput("entry", lambda: APGWRegression().fit(X, T, EVENT, T)),
            BadInput("entry", lambda: APGWRegression().fit(X, T, EVENT, -T)),
            BadInput("x1", lambda: APGWRegression().fit(X * [1, 0], T, EVENT)),
            BadInput("scale", lambda: APGWRegression("gamma").fit(X, T, EVENT)),
            BadInput("scale", lambda: APGWRegression(()).fit(X, T, EVENT)),
            BadInput("scale", lambda: APGWRegression(("phi", "phi")).fit(X, T, EVENT)),
            BadInput("identified", lambda: APGWRegression(("phi", "lam"), kappa=1.0).fit(X, T, EVENT)),
            BadInput("identified", lambda: APGWRegression(kappa=1, free_scales=True).fit(X, T, EVENT)),
            BadInput("shape", lambda: APGWRegression(shape="lam").fit(X, T, EVENT)),
            BadInput("kappa", lambda: APGWRegression(kappa=-1.0).fit(X, T, EVENT)),
            BadInput("kappa", lambda: APGWRegression(kappa="fixed").fit(X, T, EVENT)),
            BadInput("kappa", lambda: APGWRegression(shape=("kappa",), kappa=2.0).fit(X, T, EVENT)),
            BadInput("kappa", lambda: APGWRegression(kappa=None).fit(X, T, EVENT), TypeError),
            BadInput("l2", lambda: APGWRegression(l2=-1.0).fit(X, T, EVENT)),
            BadInput("free_scales", lambda: APGWRegression(free_scales="yes").fit(X, T, EVENT), TypeError),
        ),
        excluded={
            "check_fit_score_takes_y": "the target is called T, as in survival analysis, not y",
            "check_n_features_in_after_fitting": "it passes score's target as y, which is called T",
        },
    ),
    ProbeCase(
        part="provenn.stats.select_apgw",
        run=run_selection,
        model=lambda: nn.Linear(1, 1),
        data=lambda generator: survival_data(),
        brute_force=lambda model, data: {
            "parameters": (5, 5, 7, 7, 8, 10),
        },
        bad_input=(
            BadInput("T", lambda: select_apgw(X, -T, EVENT)),
            BadInput("event", lambda: select_apgw(X, T, EVENT + 0.5)),
            BadInput("x0", lambda: select_apgw(X * [0, 1], T, EVENT)),
            BadInput("entry", lambda: select_apgw(X, T, EVENT, T + 1)),
        ),
        excluded={"model_restored_after_error": "it looks at data alone"},
    ),
]


def double(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def unit(kappa):
    """The distribution of which H is H₀(t; κ)."""
    return APGW(*double(1.0, 1.0, 1.0), torch.tensor(kappa, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kappa", "closed"), [(1.0, lambda z: z), (0.0, np.log1p), (1e-7, np.log1p), (-1e-7, np.log1p), (1e7, np.expm1)]
)
def test_special_cases_of_the_cumulative_hazard(kappa, closed):
    z = np.linspace(0, 5, 60)
    np.testing.assert_allclose(unit(kappa).cumhaz(torch.from_numpy(z)).numpy(), closed(z), rtol=2e-6, atol=1e-12)


def test_kappa_two_is_linear_plus_quadratic():
    z = torch.linspace(0, 8, 40, dtype=torch.float64)
    torch.testing.assert_close(unit(2.0).cumhaz(z), z + z**2 / 6)


@pytest.mark.parametrize("z", [0.01, 1.0, 30.0])
def test_value_and_slope_are_continuous_in_kappa_at_zero(z):
    """The slope at 0 by hand: ((κ+1)/κ)(e^{κs} − 1) with s = log(1 + z/(κ+1))."""

    def of(kappa):
        return APGW(*double(1.0, 1.0, 1.0), kappa).cumhaz(z)

    log = math.log1p(z)
    slope = log + log**2 / 2 - z / (1 + z)
    for kappa in (-1e-3, -1e-4, -1e-9, 0.0, 1e-9, 1e-4, 1e-3):
        at = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
        value = of(at)
        (found,) = torch.autograd.grad(value, at)
        assert value.item() == pytest.approx(log + kappa * slope, abs=40 * kappa**2 + 1e-14)
        assert found.item() == pytest.approx(slope, abs=60 * abs(kappa) + 1e-12)


def test_quotients_of_the_exponential_against_long_sums():
    """Σ xᵏ/(k+1)! and its derivatives, in exact arithmetic, on both sides of where the formula changes."""
    from fractions import Fraction

    for x in (-3.0, -0.5000001, -0.4999999, -1e-9, 0.0, 1e-3, 0.4999999, 0.5, 2.5):
        exact, power = [Fraction(0)] * 3, Fraction(1)
        for k in range(60):
            exact[0] += power / math.factorial(k + 1)
            exact[1] += power * (k + 1) / math.factorial(k + 2)
            exact[2] += power * (k + 1) * (k + 2) / math.factorial(k + 3)
            power *= Fraction(x)
        found = exponential_quotients(torch.tensor(x, dtype=torch.float64))
        for one, wanted in zip(found[:3], exact, strict=True):
            assert one.item() == pytest.approx(float(wanted), rel=2e-14)


PARAMETERS = [
    (0.7, 1.3, 1.5, -0.6),
    (2.0, 0.4, 0.8, -0.2),
    (0.5, 2.0, 1.2, 0.0),
    (1.0, 1.0, 2.0, 0.5),
    (1.5, 0.5, 0.7, 4.0),
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_hazard_is_the_slope_of_the_cumulative_hazard(parameters):
    t = torch.linspace(0.05, 6, 50, dtype=torch.float64, requires_grad=True)
    law = APGW(*double(*parameters))
    (slope,) = torch.autograd.grad(law.cumhaz(t).sum(), t)
    torch.testing.assert_close(law.hazard(t), slope)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_density_and_cure_fraction_make_one(parameters):
    law = APGW(*double(*parameters))

    def in_logs(x):
        return law.pdf(math.exp(x)).item() * math.exp(x)

    total, _ = scipy.integrate.quad(in_logs, -60, 120, points=[-5, 0, 2, 5, 20], limit=400)
    assert total + law.cure_fraction.item() == pytest.approx(1, abs=1e-6)
    assert law.sf(1e60).item() == pytest.approx(law.cure_fraction.item(), abs=1e-6)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_quantiles_invert_probabilities(parameters):
    law = APGW(*double(*parameters))
    u = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    found = law.icdf(u)
    reached = u < 1 - law.cure_fraction
    torch.testing.assert_close(law.cdf(found[reached]), u[reached], rtol=1e-9, atol=1e-12)
    assert found[~reached].isinf().all()
    assert reached.any()
    assert law.icdf(1.0).isinf()


def test_tails_do_not_overflow_early():
    law = APGW(*double(1.0, 1.0, 40.0, 0.5))
    assert law.cumhaz(1e8).isfinite()  # (φt)^γ is 1e320
    assert law.log_hazard(1e8).item() == pytest.approx(
        math.log(40) - 8 * math.log(10) + 0.5 * 320 * math.log(10) + 0.5 * math.log(1.5)
    )
    assert law.cumhaz(0.0).item() == 0
    assert APGW(*double(2.0, 3.0, 1.0, 0.5)).hazard(0.0).item() == pytest.approx(6)


def test_cure_fraction_of_many_draws():
    law = APGW(*double(0.7, 1.2, 1.3, -0.4))
    draws = law.sample(200_000, torch.Generator().manual_seed(0))
    assert law.cure_fraction.item() == pytest.approx(math.exp(-1.8), rel=1e-12)
    assert draws.isinf().double().mean().item() == pytest.approx(math.exp(-1.8), abs=0.0034)  # 4 standard errors
    assert APGW(*double(0.7, 1.2, 1.3, 0.4)).cure_fraction.item() == 0
    for t in (0.5, 1.0, 3.0):
        assert (draws > t).double().mean().item() == pytest.approx(law.sf(t).item(), abs=0.0045)


def test_draws_have_the_shape_and_dtype_of_the_batch():
    law = APGW(torch.ones(3), 2.0, torch.ones(2, 1), 0.5)
    assert law.sample(4).shape == (4, 2, 3)
    assert law.sample(4).dtype == torch.float32
    assert repr(law).startswith("APGW(phi=")


def test_five_shapes_of_the_hazard():
    """Signs of h′ on a grid of log t, by differences of log h, for random (γ, κ)."""
    draws = np.random.default_rng(1)
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    seen = set()
    for gamma, kappa in zip(np.exp(draws.uniform(-1.2, 1.2, 200)), draws.uniform(-0.9, 3.5, 200), strict=True):
        slope = APGW(*double(1.0, 1.0, float(gamma), float(kappa))).log_hazard(x.exp()).diff()
        signs = slope[slope.abs() > 1e-9].sign()
        found = [int(sign) for sign, _ in itertools.groupby(signs.tolist())]
        start, end = int(np.sign(gamma - 1)), int(np.sign(gamma * kappa - 1))
        assert found == ([start] if start == end else [start, end])
        seen.add(tuple(found))
    assert seen == {(1,), (-1,), (1, -1), (-1, 1)}
    constant = APGW(*double(1.0, 1.0, 1.0, 1.0)).hazard(x.exp())
    torch.testing.assert_close(constant, torch.ones_like(constant))


@pytest.mark.parametrize(("name", "model"), [("M(φ)", ("phi",)), ("M(λ)", ("lam",)), ("M(φγ)", ("phi", "gamma"))])
def test_selection_against_nelder_mead(name, model):
    report = selected()
    place = report.models.index(name)
    found = nelder_mead(model, [0.0] * (report.parameters[place] - 1))
    assert report.log_likelihoods[place] == pytest.approx(found, abs=1e-4)


def test_selection_is_consistent():
    report = selected()
    for i, (value, size) in enumerate(zip(report.log_likelihoods, report.parameters, strict=True)):
        assert report.aic[i] == pytest.approx(2 * size - 2 * value)
        assert report.bic[i] == pytest.approx(math.log(60) * size - 2 * value)
        assert report.delta_aic[i] == pytest.approx(report.aic[i] - min(report.aic))
    assert report.delta_aic[report.models.index(report.best)] == 0
    value = dict(zip(report.models, report.log_likelihoods, strict=True))
    for small, large in (
        ("φ", "φγ"),
        ("λ", "λγ"),
        ("φ", "φλ"),
        ("λ", "φλ"),
        ("φλ", "φλγ"),
        ("λγ", "φλγ"),
        ("φγ", "φλγ"),
    ):
        assert value[f"M({small})"] <= value[f"M({large})"] + 1e-6


def test_profile_of_kappa():
    """At κ = 1 the profile of M(φ) is a Weibull fit; nowhere is it above the free maximum; ∞ goes on where 1e2 ends."""
    report = selected()
    assert report.best in ("M(φ)", "M(λ)")
    scale = "phi" if report.best == "M(φ)" else "lam"
    profile = dict(zip(report.kappas, report.profile, strict=True))
    top = report.log_likelihoods[report.models.index(report.best)]
    for kappa in (-0.5, 0.0, 1.0, 3.0):
        alone = APGWRegression(scale, (), kappa=kappa).fit(X, T, EVENT)
        assert profile[kappa] == pytest.approx(alone.log_likelihood_, abs=1e-7)
    assert max(report.profile) <= top + 1e-7
    assert profile[math.inf] == pytest.approx(profile[100.0], abs=0.2)
    assert report.supported == tuple(max(top, *report.profile) - value <= 1.9207 for value in report.profile)
    assert {0.0, 1.0, math.inf} <= set(report.kappas)


def test_plot_marks_the_named_values():
    figure = selected().plot()
    words = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert any("Weibull" in word for word in words)
    assert any("Gompertz" in word for word in words)
    assert any("log-logistic" in word for word in words)
