"""Sinkhorn against closed forms, linear programming, finite differences and unrolled autograd."""

from __future__ import annotations

import math

import pytest
import scipy
import torch

from provenn.core.numerics.transport import sinkhorn, symmetric_sinkhorn


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(size: int, seed: int) -> torch.Tensor:
    drawn = draw(size, seed=seed) + 0.2
    return drawn / drawn.sum()


def entropy(P: torch.Tensor) -> torch.Tensor:
    return -(P * P.log()).sum()


def test_marginals_value_and_potentials_fit_together() -> None:
    C, a, b = draw(6, 4), weights(6, 1), weights(4, 2)
    one = sinkhorn(C, a, b, epsilon=0.1, tol=1e-12)
    assert one.converged
    torch.testing.assert_close(one.plan.sum(1), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.plan.sum(0), b, rtol=0, atol=1e-12)
    wanted = (one.plan * C).sum() - 0.1 * entropy(one.plan)
    torch.testing.assert_close(one.value, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ one.f, b @ one.g, rtol=0, atol=1e-12)


def test_two_by_two_has_its_closed_form() -> None:
    # P = [[p, ½ − p], [½ − p, p]] with p / (½ − p) = exp(Δ/2ε), Δ = C12 + C21 − C11 − C22.
    C = torch.tensor([[0.3, 1.0], [0.8, 0.1]], dtype=torch.float64)
    odds = math.exp((1.0 + 0.8 - 0.3 - 0.1) / (2 * 0.25))
    p = 0.5 * odds / (1 + odds)
    plan = sinkhorn(C, epsilon=0.25, tol=1e-13).plan
    torch.testing.assert_close(plan, torch.tensor([[p, 0.5 - p], [0.5 - p, p]], dtype=torch.float64))


def test_no_other_plan_does_better() -> None:
    C, a, b = draw(5, 5), weights(5, 1), weights(5, 2)
    best = sinkhorn(C, a, b, epsilon=0.2, tol=1e-12)
    for seed in range(20):
        moves = draw(5, 5, seed=seed) - 0.5
        moves = moves - moves.mean(0) - moves.mean(1, keepdim=True) + moves.mean()  # marginals stay
        other = best.plan + 0.5 * best.plan.min() * moves / moves.abs().max()
        assert (other * C).sum() - 0.2 * entropy(other) > best.value


def test_small_epsilon_reaches_the_assignment_and_large_the_product() -> None:
    C = draw(12, 12, seed=3)
    rows, columns = scipy.optimize.linear_sum_assignment(C.numpy())
    exact = C[rows, columns].mean().item()
    one = sinkhorn(C, epsilon=2e-3, tol=1e-8, max_iter=20_000, scaling=0.9)
    # M₀ − ε log n² ≤ value ≤ M₀ − ε log n, as n ≤ exp H(P) ≤ n².
    assert exact - 2e-3 * 2 * math.log(12) <= one.value.item() <= exact - 2e-3 * math.log(12) + 1e-6
    far = sinkhorn(C, weights(12, 1), weights(12, 2), epsilon=1e4, tol=1e-12)
    torch.testing.assert_close(far.plan, torch.outer(weights(12, 1), weights(12, 2)), rtol=1e-3, atol=0)


def test_scaling_changes_the_way_and_not_the_solution() -> None:
    C = draw(30, 30, seed=4)
    plain = sinkhorn(C, epsilon=0.03, tol=1e-9, max_iter=10_000)
    scaled = sinkhorn(C, epsilon=0.03, tol=1e-9, max_iter=10_000, scaling=0.5)
    assert plain.converged
    assert scaled.converged
    # A marginal error of 1e-9 on a flat valley: the rate is near 1, so the plan is known to about 1e-6.
    torch.testing.assert_close(plain.plan, scaled.plan, rtol=0, atol=2e-6)
    torch.testing.assert_close(plain.value, scaled.value, rtol=0, atol=1e-9)


def test_scaling_saves_iterations_where_clouds_are_far_apart_beside_epsilon() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, 64, 2, dtype=torch.float64, generator=generator)
    C = torch.cdist(x, y + 5).square()
    plain, scaled = (sinkhorn(C, epsilon=2e-3 * C.mean().item(), scaling=scaling) for scaling in (1.0, 0.7))
    assert plain.converged
    assert scaled.converged
    assert scaled.iterations < 0.8 * plain.iterations


def test_tiny_epsilon_and_huge_costs_stay_finite() -> None:
    for C in (draw(8, 8) * 1e6, draw(8, 8).float() * 1e4):
        with pytest.warns(RuntimeWarning, match="marginals are off by"):
            one = sinkhorn(C, epsilon=1e-2, tol=1e-9, max_iter=10)
        assert one.f.isfinite().all()
        assert one.value.isfinite()
        assert not one.converged
        assert one.iterations == 10


def test_the_values_gradient_is_the_envelope_and_finite_differences() -> None:
    C, a, b = draw(4, 3), weights(4, 1), weights(3, 2)

    def value(C):
        return sinkhorn(C, a, b, epsilon=0.1, tol=1e-13).value

    assert torch.autograd.gradcheck(value, C.clone().requires_grad_(), eps=1e-6, atol=1e-7)
    leaf = C.clone().requires_grad_()
    one = sinkhorn(leaf, a, b, epsilon=0.1, tol=1e-13)
    (by_C,) = torch.autograd.grad(one.value, leaf)
    torch.testing.assert_close(by_C, one.plan.detach())


def test_the_values_gradient_by_weights_along_directions_that_keep_the_sum() -> None:
    C, a, b = draw(4, 3), weights(4, 1).requires_grad_(), weights(3, 2).requires_grad_()
    by_a, by_b = torch.autograd.grad(sinkhorn(C, a, b, epsilon=0.1, tol=1e-13).value, (a, b))
    da, db = (torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (4, 3))
    da, db, h = da - da.mean(), db - db.mean(), 1e-5
    up = sinkhorn(C, (a + h * da).detach(), (b + h * db).detach(), epsilon=0.1, tol=1e-13).value
    down = sinkhorn(C, (a - h * da).detach(), (b - h * db).detach(), epsilon=0.1, tol=1e-13).value
    assert (by_a @ da + by_b @ db).item() == pytest.approx((up - down).item() / (2 * h), rel=1e-6)


def unrolled(C, a, b, epsilon, steps):
    """The iteration in autograd's view, written from the scaling form rather than the potentials."""
    K = torch.exp(-C / epsilon)
    v = torch.ones_like(b)
    for _ in range(steps):
        u = a / (K @ v)
        v = b / (K.T @ u)
    f, g = epsilon * u.log(), epsilon * v.log()
    shift = (a @ f - b @ g) / 2
    return f - shift, g + shift, u[:, None] * K * v


@pytest.mark.parametrize("what", ["potentials", "plan"])
def test_implicit_gradients_are_those_of_the_unrolled_iteration(what: str) -> None:
    C = draw(5, 4, seed=6).requires_grad_()
    raw_a, raw_b = draw(5, seed=7).requires_grad_(), draw(4, seed=8).requires_grad_()
    a, b = raw_a.softmax(0), raw_b.softmax(0)
    w, z, M = draw(5, seed=9), draw(4, seed=10), draw(5, 4, seed=11)
    one = sinkhorn(C, a, b, epsilon=0.3, tol=1e-14, max_iter=1000)
    f, g, P = unrolled(C, a, b, 0.3, 500)
    torch.testing.assert_close(one.plan, P)
    ours = w @ one.f + z @ one.g if what == "potentials" else (M * one.plan).sum()
    theirs = w @ f + z @ g if what == "potentials" else (M * P).sum()
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad(ours, (C, raw_a, raw_b), retain_graph=True)
    wanted = torch.autograd.grad(theirs, (C, raw_a, raw_b))
    for one_got, one_wanted in zip(got, wanted, strict=True):
        torch.testing.assert_close(one_got, one_wanted, rtol=1e-7, atol=1e-10)


def test_bad_input_is_named() -> None:
    C = draw(3, 2)
    cases = [
        ((C / 0,), {}, "C must be finite"),
        ((C[0],), {}, r"C must be a matrix with rows and columns, got shape \(2,\)"),
        ((C, weights(2, 0)), {}, r"a must have shape \(3,\), got \(2,\)"),
        ((C, torch.tensor([0.0, 0.5, 0.5])), {}, r"a must be above 0 \(leave out points of weight 0\), got 0\.0"),
        ((C, None, torch.tensor([0.6, 0.6])), {}, r"b must add up to 1, got a sum of 1\.2"),
        ((C,), {"epsilon": 0.0}, "epsilon must be a finite number > 0, got 0"),
        ((C,), {"tol": 0.0}, "tol must be"),
        ((C,), {"max_iter": 0}, "max_iter must be"),
        ((C,), {"scaling": 1.5}, "scaling must be"),
        ((C,), {"relaxation": 2.0}, "relaxation must be"),
        ((C,), {"relaxation": 0.0}, "relaxation must be"),
    ]
    for arguments, options, words in cases:
        with pytest.raises(ValueError, match=words):
            sinkhorn(*arguments, **{"epsilon": 0.1, **options})


def test_relaxation_changes_the_way_and_not_the_solution_and_saves_iterations() -> None:
    C, a, b = draw(30, 20, seed=4), weights(30, 1), weights(20, 2)
    plain = sinkhorn(C, a, b, epsilon=0.02, tol=1e-9, max_iter=10_000)
    relaxed = sinkhorn(C, a, b, epsilon=0.02, tol=1e-9, max_iter=10_000, relaxation=1.6)
    assert relaxed.converged
    assert relaxed.iterations < 0.6 * plain.iterations
    torch.testing.assert_close(plain.value, relaxed.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(plain.plan, relaxed.plan, rtol=0, atol=2e-6)  # the error 1e-9, over a rate near 1
    early = sinkhorn(C, a, b, epsilon=0.02, tol=0.05, relaxation=1.6)
    torch.testing.assert_close(early.plan.sum(0), b)  # the columns are met at any end


def test_the_symmetric_iteration_solves_the_same_problem_in_fewer_steps() -> None:
    points = draw(40, 3, seed=5)
    C, a = torch.cdist(points, points).square(), weights(40, 6)
    plain = sinkhorn(C, a, a, epsilon=0.02, tol=1e-11, max_iter=20_000)
    one = symmetric_sinkhorn(C, a, epsilon=0.02, tol=1e-11)
    assert one.converged
    assert one.iterations < 0.5 * plain.iterations
    torch.testing.assert_close(one.plan.sum(1), a, rtol=0, atol=1e-11)
    torch.testing.assert_close(one.plan, one.plan.T)
    torch.testing.assert_close(one.value, plain.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.f, plain.f, rtol=0, atol=1e-6)
    assert symmetric_sinkhorn(C, a, epsilon=0.02, tol=0.1).iterations < one.iterations


def test_the_symmetric_iterations_gradients() -> None:
    points, w = draw(5, 2, seed=7).requires_grad_(), draw(5, 5, seed=8)

    def both(solve):
        C = (points[:, None] - points).square().sum(2)
        one = solve(C)
        return torch.autograd.grad(one.value + (w * one.plan).sum(), points)[0]

    wanted = both(lambda C: sinkhorn(C, epsilon=0.2, tol=1e-13))
    torch.testing.assert_close(both(lambda C: symmetric_sinkhorn(C, epsilon=0.2, tol=1e-13)), wanted)


def test_bad_input_of_the_symmetric_iteration() -> None:
    for C, options, words in (
        (draw(3, 2), {}, "C must be symmetric"),
        (draw(3, 3), {}, "C must be symmetric"),
        (torch.full((2, 2), math.nan), {}, "C must be finite"),
        (torch.zeros(2, 2), {"epsilon": -1.0}, "epsilon must be"),
        (torch.zeros(2, 2), {"tol": 0.0}, "tol must be"),
        (torch.zeros(2, 2), {"max_iter": 0}, "max_iter must be"),
    ):
        with pytest.raises(ValueError, match=words):
            symmetric_sinkhorn(C, **{"epsilon": 0.1, **options})
    with pytest.warns(RuntimeWarning, match="marginals are off by"):
        symmetric_sinkhorn(draw(4, 4, seed=1) + draw(4, 4, seed=1).T, epsilon=0.01, tol=1e-9, max_iter=2)


def test_the_values_error_falls_with_the_square_of_the_marginals() -> None:
    C = draw(30, 30, seed=4)
    exact = sinkhorn(C, epsilon=0.03, tol=1e-12, max_iter=20_000).value
    for tol in (1e-1, 1e-2, 1e-3):
        one = sinkhorn(C, epsilon=0.03, tol=tol)
        off = (exact - one.value).item()
        assert 0 <= off <= 0.5 * one.error**2  # a dual value lies below the optimum
