"""The APGW regression: derivatives, special cases against lifelines, invariances, intervals, tests, concordance."""

import math
import warnings

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from lifelines import LogLogisticAFTFitter, WeibullAFTFitter
from lifelines.datasets import load_gbsg2, load_rossi
from lifelines.utils import concordance_index
from sklearn.base import clone
from stats.test_flexible_survival import direct_likelihood, survival_data

from provenn.stats import APGW, APGWRegression
from provenn.stats._flexible_survival_concordance import concordance
from provenn.stats._flexible_survival_fit import Survival, climb
from provenn.stats._flexible_survival_likelihood import Likelihood, Rows

X, T, EVENT = survival_data(300, seed=3)


def random_rows(count=40):
    draws = np.random.default_rng(0)
    design = np.column_stack([np.ones(count), draws.normal(size=(count, 2))])
    event, sign = (draws.random(count) < 0.7).astype(float), np.ones(count)
    event[-8:], sign[-8:] = 0, -1
    return Rows(*(torch.from_numpy(one) for one in (design, draws.normal(size=count), event, sign)))


@pytest.mark.parametrize("nu", [-1.5, -0.6, 0.0, 1e-6, 0.4, 2.0])
def test_gradient_and_hessian_against_finite_differences(nu):
    likelihood = Likelihood(random_rows(), dict.fromkeys(("phi", "lam", "gamma", "kappa"), 3), l2=0.3)
    theta = 0.2 * torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta[9] = nu
    value, gradient, hessian = likelihood.derivatives(theta)
    assert value.item() == pytest.approx(likelihood.value(theta).item(), rel=1e-12)
    step = 1e-5
    for place, one in enumerate(step * torch.eye(12, dtype=torch.float64)):
        slope = (likelihood.value(theta + one) - likelihood.value(theta - one)) / (2 * step)
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-6)
        curve = (likelihood.derivatives(theta + one)[1] - likelihood.derivatives(theta - one)[1]) / (2 * step)
        torch.testing.assert_close(hessian[place], curve, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hessian, torch.func.hessian(likelihood.value)(theta), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("widths", [(3, 0, 1, 1), (0, 3, 3, 0), (1, 3, 3, 1)])
def test_derivatives_where_parameters_are_fixed(widths):
    names = dict(zip(("phi", "lam", "gamma", "kappa"), widths, strict=True))
    likelihood = Likelihood(random_rows(), names, {"kappa": 0.4, "phi": -0.2})
    theta = 0.3 * torch.randn(sum(widths), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, gradient, hessian = likelihood.derivatives(theta)
    torch.testing.assert_close(gradient, torch.func.grad(likelihood.value)(theta))
    torch.testing.assert_close(hessian, torch.func.hessian(likelihood.value)(theta))
    torch.testing.assert_close(likelihood.derivatives(theta, hessian=False)[0], value)


def test_exponential_without_covariates():
    """λ̂ = Σδ/Σt, and Σδ/Σ(t − entry) where subjects enter late."""
    draws = np.random.default_rng(2)
    entry = np.where(draws.random(300) < 0.5, 0.3 * T, 0.0)
    for late in (np.zeros(300), entry):
        data = Survival.of(X, T, EVENT, late)
        alone = Likelihood(data.rows, {"phi": 0, "lam": 1, "gamma": 0, "kappa": 0}, {"kappa": math.log(2)})
        found = climb(alone, torch.zeros(1, dtype=torch.float64))
        assert found.converged
        assert math.exp(found.theta.item()) / data.unit == pytest.approx(EVENT.sum() / (T - late).sum(), rel=1e-9)


def rossi():
    table = load_rossi()
    return table, table.drop(columns=["week", "arrest"]), table["week"], table["arrest"]


def gbsg2():
    table = load_gbsg2()
    numeric = table[["age", "tsize", "pnodes", "time", "cens"]].astype(float)
    return numeric, numeric[["age", "tsize", "pnodes"]], numeric["time"], numeric["cens"]


@pytest.mark.parametrize("load", [rossi, gbsg2])
@pytest.mark.parametrize(("kappa", "fitter"), [(1.0, WeibullAFTFitter), (0.0, LogLogisticAFTFitter)])
def test_special_cases_against_lifelines(load, kappa, fitter):
    """Log-likelihoods and coefficients to 1e-4; lifelines' scale is exp(−xᵀτ)."""
    table, X, T, event = load()
    ours = APGWRegression("phi", (), kappa=kappa).fit(X, T, event)
    # lifelines stops at a change of 1e-6 in the likelihood, which leaves coefficients 1e-3 off.
    theirs = fitter().fit(table, T.name, event.name, fit_options={"ftol": 1e-14})
    assert ours.log_likelihood_ == pytest.approx(theirs.log_likelihood_, abs=1e-4)
    assert ours.aic_ == pytest.approx(theirs.AIC_, abs=2e-4)
    scale, shape = ("lambda_", "rho_") if kappa == 1 else ("alpha_", "beta_")
    wanted = -theirs.params_[scale][["Intercept", *X.columns]].to_numpy()
    errors = theirs.standard_errors_[scale][["Intercept", *X.columns]].to_numpy()
    np.testing.assert_allclose(ours.coef_["phi"], wanted, atol=1e-4)
    assert ours.coef_["gamma"][0] == pytest.approx(theirs.params_[shape]["Intercept"], abs=1e-4)
    ours_errors = [row.standard_error for row in ours.summary()][: len(errors)]
    np.testing.assert_allclose(ours_errors, errors, rtol=1e-2)


@pytest.mark.parametrize("model", [("phi",), ("lam",), ("phi", "gamma"), ("lam", "gamma"), ("phi", "lam")])
def test_no_step_goes_up_from_the_fit(model):
    """The likelihood in NumPy agrees, and no random step raises it."""
    fitted = APGWRegression(
        tuple(one for one in model if one != "gamma"), tuple(one for one in model if one == "gamma")
    ).fit(X, T, EVENT)
    theta = np.concatenate([fitted.coef_[name] for name in fitted.coef_])
    top = direct_likelihood(theta, model, X, T, EVENT)
    assert fitted.log_likelihood_ == pytest.approx(top, abs=1e-8)
    draws = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(50):
            assert direct_likelihood(theta + size * draws.normal(size=len(theta)), model, X, T, EVENT) < top + 1e-9


def test_accelerated_failure_time():
    """M(φ): S(t | x) = S₀(t·exp(xᵀτ))."""
    fitted = APGWRegression("phi", ()).fit(X, T, EVENT)
    t = np.array([0.3, 1.0, 2.5])
    for row in X[:5]:
        factor = math.exp(row @ fitted.coef_["phi"][1:])
        baseline = fitted.predict_survival(np.zeros((1, 2)), t * factor)
        np.testing.assert_allclose(fitted.predict_survival(row[None], t), baseline, rtol=1e-12)


def test_proportional_hazards():
    """M(λ): one hazard ratio for all times, exp of the coefficients; M(λγ): not."""
    t = np.array([0.1, 1.0, 4.0])
    fitted = APGWRegression("lam", ()).fit(X, T, EVENT)
    wanted = math.exp((X[1] - X[0]) @ fitted.coef_["lam"][1:])
    np.testing.assert_allclose(fitted.hazard_ratio(X[0], X[1], t), wanted, rtol=1e-10)
    ratios = APGWRegression("lam").fit(X, T, EVENT).hazard_ratio(X[0], X[1], t)
    assert np.ptp(np.log(ratios)) > 0.01


@pytest.mark.parametrize("scale", ["phi", "lam", ("phi", "lam")])
def test_unit_of_time(scale):
    """Times in other units change the intercept of log φ alone, and the log-likelihood by the events' log unit."""
    unit = 365.25
    kappa = 0.0 if isinstance(scale, tuple) else "free"
    here, there = (APGWRegression(scale, kappa=kappa).fit(X, c * T, EVENT) for c in (1.0, unit))
    for name, coefficients in here.coef_.items():
        wanted = coefficients - np.log(unit) * np.array([name == "phi", 0, 0])[: len(coefficients)]
        np.testing.assert_allclose(there.coef_[name], wanted, atol=1e-6)
    assert there.log_likelihood_ == pytest.approx(here.log_likelihood_ - EVENT.sum() * math.log(unit), abs=1e-8)
    np.testing.assert_allclose(there.predict(X), unit * here.predict(X), rtol=1e-6)
    np.testing.assert_allclose(there.predict_hazard(X[:2], [unit]), here.predict_hazard(X[:2], [1.0]) / unit, rtol=1e-6)


def test_scales_of_covariates_do_not_matter():
    here, there = APGWRegression().fit(X, T, EVENT), APGWRegression().fit(X * [100, 0.01] + [50, -3], T, EVENT)
    assert there.log_likelihood_ == pytest.approx(here.log_likelihood_, abs=1e-8)
    np.testing.assert_allclose(there.coef_["phi"][1:] * [100, 0.01], here.coef_["phi"][1:], rtol=1e-5)
    ours, theirs = (np.array([row.standard_error for row in one.summary()])[[1, 2]] for one in (here, there))
    np.testing.assert_allclose(theirs * [100, 0.01], ours, rtol=1e-5)


def test_weibull_has_one_scale():
    """At κ = 1 M(φ) and M(λ) are the same model: β = γτ."""
    phi, lam = (APGWRegression(scale, (), kappa=1.0).fit(X, T, EVENT) for scale in ("phi", "lam"))
    assert phi.log_likelihood_ == pytest.approx(lam.log_likelihood_, abs=1e-8)
    gamma = math.exp(phi.coef_["gamma"][0])
    np.testing.assert_allclose(lam.coef_["lam"][1:], gamma * phi.coef_["phi"][1:], rtol=1e-5)


def test_left_truncation_restores_what_late_entry_hides():
    """Those who had the event before entry are never seen; without `entry` times look longer than they are."""
    draws = np.random.default_rng(5)
    z = draws.normal(size=(4000, 1))
    time = APGW(torch.from_numpy(np.exp(0.5 * z[:, 0])), 1.0, 1.4, 0.5).sample(1, torch.Generator().manual_seed(1))[0]
    entry = draws.uniform(0, 1.5, 4000)
    seen = time.numpy() > entry
    event = np.ones(seen.sum())
    corrected = APGWRegression("phi", ()).fit(z[seen], time.numpy()[seen], event, entry[seen])
    naive = APGWRegression("phi", ()).fit(z[seen], time.numpy()[seen], event)
    row = {one[:2]: one for one in corrected.summary()}["phi", "x0"]
    assert abs(row.estimate - 0.5) < 4 * row.standard_error
    assert row.standard_error < 0.05
    median = np.median(time.numpy()[np.abs(z[:, 0]) < 0.1])
    at_zero = [fitted.predict([[0.0]])[0] for fitted in (corrected, naive)]
    assert at_zero[0] == pytest.approx(median, rel=0.1)
    assert at_zero[1] > 1.2 * median


def test_left_truncation_in_the_likelihood():
    """The log-likelihood is Σ δ log h(T) − H(T) + H(entry)."""
    entry = np.where(X[:, 0] > 0, 0.4 * T, 0.0)
    fitted = APGWRegression("lam").fit(X, T, EVENT, entry)
    law = fitted.distribution(X)
    hazard, total, before = (
        one[:, 0].numpy()
        for one in (
            law.log_hazard(torch.from_numpy(T[:, None])),
            law.cumhaz(torch.from_numpy(T[:, None])),
            law.cumhaz(torch.from_numpy(entry[:, None])),
        )
    )
    assert fitted.log_likelihood_ == pytest.approx((EVENT * hazard - total + before).sum(), abs=1e-8)


def test_intervals_by_simulation():
    """Delta-method standard errors against the spread over draws of the coefficients from their normal law."""
    fitted = APGWRegression("phi").fit(X, T, EVENT)
    theta, draws = fitted._theta.clone(), np.random.default_rng(0)
    some, t = X[:2], np.array([0.5, 1.5])
    spread = 0.05  # small, so that every function is close to linear
    quantities = {
        "survival": (lambda one: one.predict_survival(some, t), lambda v: np.log(-np.log(v))),
        "hazard": (lambda one: one.predict_hazard(some, t), np.log),
        "ratio": (lambda one: one.hazard_ratio(some[0], some[1], t), np.log),
        "quantile": (lambda one: one.predict_quantile(some, 0.3), np.log),
    }
    widths = {
        "survival": fitted.predict_survival(some, t, confidence=0.9),
        "hazard": fitted.predict_hazard(some, t, confidence=0.9),
        "ratio": fitted.hazard_ratio(some[0], some[1], t, confidence=0.9),
        "quantile": fitted.predict_quantile(some, 0.3, confidence=0.9),
    }
    seen = {name: [] for name in quantities}
    for step in draws.multivariate_normal(np.zeros(len(theta)), fitted.covariance_, size=400):
        fitted._theta = theta + spread * torch.from_numpy(step)
        for name, (of, scale) in quantities.items():
            seen[name].append(scale(of(fitted)))
    fitted._theta = theta
    for name, (of, scale) in quantities.items():
        estimate, low, high = widths[name]
        np.testing.assert_allclose(estimate, of(fitted))
        assert (low < high).all()
        error = np.std(seen[name], axis=0) / spread
        # 400 draws give a standard deviation to 3.5 %; the seed is fixed.
        np.testing.assert_allclose(np.abs(scale(high) - scale(low)) / 2 / 1.6449, error, rtol=0.1)
        np.testing.assert_allclose((scale(high) + scale(low)) / 2, scale(estimate), rtol=1e-9, atol=1e-9)


def test_cure_fraction():
    """With half of the subjects cured the fit finds κ < 0 and their share; the median of the cured is infinite."""
    draws = torch.Generator().manual_seed(0)
    time = APGW(torch.ones(1500, dtype=torch.float64), 0.5, 1.5, -0.4).sample(1, draws)[0].numpy()
    observed, event = np.minimum(time, 40.0), (time <= 40).astype(float)
    z = np.random.default_rng(0).normal(size=(1500, 1))
    fitted = APGWRegression("lam", ()).fit(z, observed, event)
    estimate, low, high = fitted.cure_fraction(z[:3], confidence=0.95)
    np.testing.assert_allclose(fitted.cure_fraction(z[:3]), estimate)
    assert (low < math.exp(-0.75)).all()
    assert (high > math.exp(-0.75)).all()
    assert (high - low < 0.15).all()
    np.testing.assert_allclose(fitted.predict_survival(z[:3], [1e30])[:, 0], estimate, atol=1e-6)
    assert np.isinf(fitted.predict_quantile(z[:3], 0.9)).all()
    never = APGWRegression("phi", (), kappa=1.0).fit(X, T, EVENT)
    assert never.cure_fraction(X[:2]).tolist() == [0, 0]
    assert never.cure_fraction(X[:2], confidence=0.9).estimate.tolist() == [0, 0]
    assert np.isnan(never.cure_fraction(X[:2], confidence=0.9).low).all()


def test_predictions_fit_together():
    fitted = APGWRegression("lam").fit(X, T, EVENT)
    median = fitted.predict(X[:4])
    np.testing.assert_allclose(np.diag(fitted.predict_survival(X[:4], median)), 0.5, rtol=1e-9)
    for row in X[:2]:
        total, _ = scipy.integrate.quad(lambda t, row=row: fitted.predict_hazard(row[None], t)[0, 0], 1e-12, 1.7)
        assert math.exp(-total) == pytest.approx(fitted.predict_survival(row[None], 1.7)[0, 0], rel=1e-5)


def test_summary():
    fitted = APGWRegression("phi", ("gamma",)).fit(X, T, EVENT)
    rows = fitted.summary(confidence=0.9)
    assert [row[:2] for row in rows] == [
        *(("phi", name) for name in ("intercept", "x0", "x1")),
        *(("gamma", name) for name in ("intercept", "x0", "x1")),
        ("kappa", "intercept"),
    ]
    for row, variance in zip(rows, np.diag(fitted.covariance_), strict=True):
        assert row.standard_error == pytest.approx(math.sqrt(variance))
        assert row.p_value == pytest.approx(2 * scipy.stats.norm.cdf(-abs(row.estimate / row.standard_error)))
        assert row.high - row.estimate == pytest.approx(1.6448536 * row.standard_error)
        assert row.estimate - row.low == pytest.approx(1.6448536 * row.standard_error)
    assert len(rows) == 7
    assert fitted.aic_ == pytest.approx(14 - 2 * fitted.log_likelihood_)
    assert fitted.bic_ == pytest.approx(7 * math.log(300) - 2 * fitted.log_likelihood_)


def test_covariance_against_finite_differences():
    """The inverse of minus the second differences of the NumPy likelihood, in the original units."""
    units = [10.0, 0.3]
    fitted = APGWRegression("lam").fit(X * units, T, EVENT)
    theta = np.concatenate([fitted.coef_[name] for name in fitted.coef_])
    steps = 1e-3 * np.sqrt(np.diag(fitted.covariance_)) * np.eye(len(theta))

    def at(theta):
        return direct_likelihood(theta, ("lam", "gamma"), X * units, T, EVENT)

    size = len(theta)
    second = np.array(
        [
            [
                at(theta + steps[i] + steps[j])
                - at(theta + steps[i] - steps[j])
                - at(theta - steps[i] + steps[j])
                + at(theta - steps[i] - steps[j])
                for j in range(size)
            ]
            for i in range(size)
        ]
    )
    lengths = np.diag(steps)
    information = -second / (4 * np.outer(lengths, lengths))
    np.testing.assert_allclose(
        np.sqrt(np.diag(np.linalg.inv(information))), np.sqrt(np.diag(fitted.covariance_)), rtol=2e-2
    )


def test_likelihood_ratio():
    large = APGWRegression("phi", ("gamma",)).fit(X, T, EVENT)
    for small, degrees in (
        (APGWRegression("phi", ()), 2),
        (APGWRegression("phi", (), kappa=1.0), 3),
        (APGWRegression("phi", ("gamma",), kappa=0.0), 1),
    ):
        test = large.likelihood_ratio(small.fit(X, T, EVENT))
        assert test.degrees == degrees
        assert test.statistic == pytest.approx(2 * (large.log_likelihood_ - small.log_likelihood_))
        assert test.p_value == pytest.approx(1 - scipy.stats.chi2.cdf(test.statistic, degrees))
    fewer = APGWRegression("phi", ("gamma",)).fit(X[:, :1], T, EVENT)
    assert large.likelihood_ratio(fewer).degrees == 2
    for wrong in (
        APGWRegression("lam", ()).fit(X, T, EVENT),
        APGWRegression("phi", ()).fit(X[1:], T[1:], EVENT[1:]),
        APGWRegression("phi", (), l2=1.0).fit(X, T, EVENT),
        large,
    ):
        with pytest.raises(ValueError, match="smaller"):
            large.likelihood_ratio(wrong)
    fixed = APGWRegression("phi", ("gamma",), kappa=0.5).fit(X, T, EVENT)
    with pytest.raises(ValueError, match="nested"):
        fixed.likelihood_ratio(APGWRegression("phi", (), kappa=1.0).fit(X, T, EVENT))


def test_free_scales():
    """A free second scale cannot lower the maximum; the warning says that it may not be identified."""
    with pytest.warns(UserWarning, match="not identified"):
        free = APGWRegression("lam", (), free_scales=True).fit(X, T, EVENT)
    fixed = APGWRegression("lam", ()).fit(X, T, EVENT)
    assert list(free.coef_) == ["phi", "lam", "gamma", "kappa"]
    assert len(free.coef_["phi"]) == 1
    assert free.log_likelihood_ >= fixed.log_likelihood_ - 1e-6


def test_shape_kappa_takes_covariates():
    fitted = APGWRegression("phi", ("gamma", "kappa")).fit(X, T, EVENT)
    assert fitted.coef_["kappa"].shape == (3,)
    assert fitted.log_likelihood_ >= APGWRegression("phi", ("gamma",)).fit(X, T, EVENT).log_likelihood_ - 1e-6


def test_penalty():
    """It shrinks coefficients, is not counted in the log-likelihood, and leaves intercepts free."""
    free, bound, strong = (APGWRegression("phi", (), l2=l2).fit(X, T, EVENT) for l2 in (0.0, 30.0, 1e7))
    assert np.linalg.norm(bound.coef_["phi"][1:]) < 0.95 * np.linalg.norm(free.coef_["phi"][1:])
    np.testing.assert_allclose(strong.coef_["phi"][1:], 0, atol=1e-4)
    theta = np.concatenate([bound.coef_[name] for name in bound.coef_])
    assert bound.log_likelihood_ == pytest.approx(direct_likelihood(theta, ("phi",), X, T, EVENT), abs=1e-8)
    deviation = X.std(axis=0)
    step = 1e-5
    for place in range(2):
        moved = [theta.copy(), theta.copy()]
        for one, sign in zip(moved, (1, -1), strict=True):
            one[1 + place] += sign * step
        slope = np.subtract(*(direct_likelihood(one, ("phi",), X, T, EVENT) for one in moved)) / (2 * step)
        assert slope == pytest.approx(30 * deviation[place] ** 2 * theta[1 + place], rel=1e-4)


def test_singular_information_is_flagged():
    """Two equal columns leave no maximum alone; their sum of effects is what one column has."""
    twice = APGWRegression("phi", (), kappa=1.0).fit(np.column_stack([X, X[:, 0]]), T, EVENT)
    once = APGWRegression("phi", (), kappa=1.0).fit(X, T, EVENT)
    assert twice.information_singular_
    assert not once.information_singular_
    assert twice.coef_["phi"][1] + twice.coef_["phi"][3] == pytest.approx(once.coef_["phi"][1], abs=1e-5)


def test_constant_column_is_named():
    table = load_rossi().assign(ward=3.0)
    with pytest.raises(ValueError, match="'ward'"):
        APGWRegression().fit(table[["age", "ward"]], table["week"], table["arrest"])


def test_concordance_against_a_double_loop():
    draws = np.random.default_rng(0)
    for _ in range(5):
        time, predicted = draws.integers(1, 12, 60).astype(float), draws.integers(0, 9, 60).astype(float)
        predicted[predicted == 8] = np.inf
        event = (draws.random(60) < 0.6).astype(float)
        pairs = agreeing = 0.0
        for i in range(60):
            for j in range(60):
                if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                    pairs += 1
                    agreeing += 1.0 if predicted[i] < predicted[j] else 0.5 if predicted[i] == predicted[j] else 0.0
        assert concordance(predicted, time, event) == pytest.approx(agreeing / pairs)
    assert math.isnan(concordance(np.ones(3), np.ones(3), np.zeros(3)))


def test_score_against_lifelines():
    fitted = APGWRegression("phi", ()).fit(X, T, EVENT)
    assert fitted.score(X, T, EVENT) == pytest.approx(concordance_index(T, fitted.predict(X), EVENT))
    assert fitted.score(X, T, EVENT) > 0.6


def test_estimator_is_cloned_and_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = clone(APGWRegression("lam", kappa=0.5)).fit(X, T, EVENT)
    assert fitted.converged_
    assert fitted.time_unit_ == np.median(T)
