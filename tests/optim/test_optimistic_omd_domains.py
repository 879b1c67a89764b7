"""Projections against SciPy's SLSQP, optimality conditions and the algebra of projections."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from provenn.optim import AffineBall, Ball, Box, Simplex, project_ball, project_box, project_simplex

D = 4
EQUATIONS = torch.tensor([[1.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
RIGHT = torch.tensor([0.3], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_metric(seed, condition=30.0):
    basis = torch.linalg.qr(normal(D, D, seed=seed)).Q
    return basis @ torch.diag(torch.logspace(0, math.log10(condition), D, dtype=torch.float64)) @ basis.mT


METRICS = {
    "identity": lambda seed: None,
    "diagonal": lambda seed: normal(D, seed=seed).abs() + 0.1,
    "full": full_metric,
}
BALL, CENTER = 0.8, torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=torch.float64)
DOMAINS = {
    "ball": Ball(BALL, CENTER),
    "box": Box(torch.tensor([-0.5, 0.0, -1.0, 0.2], dtype=torch.float64), 0.6),
    "simplex": Simplex(1.5),
    "affine": AffineBall(EQUATIONS, RIGHT, BALL, CENTER),
}


def constraints(name):
    ball = {"type": "ineq", "fun": lambda u: BALL**2 - ((u - CENTER.numpy()) ** 2).sum()}
    ball["jac"] = lambda u: -2 * (u - CENTER.numpy())
    if name == "ball":
        return {"constraints": [ball]}
    if name == "affine":
        line = {
            "type": "eq",
            "fun": lambda u: EQUATIONS.numpy() @ u - RIGHT.numpy(),
            "jac": lambda u: EQUATIONS.numpy(),
        }
        return {"constraints": [ball, line]}
    if name == "box":
        return {"bounds": [(-0.5, 0.6), (0.0, 0.6), (-1.0, 0.6), (0.2, 0.6)]}
    total = {"type": "eq", "fun": lambda u: u.sum() - 1.5, "jac": lambda u: np.ones(D)}
    return {"bounds": [(0, None)] * D, "constraints": [total]}


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("name", DOMAINS)
def test_projections_equal_scipys(name, kind):
    # 17 points for each of 12 pairs of set and metric: 204.
    domain = DOMAINS[name]
    for seed, point in enumerate(1.5 * normal(17, D, seed=3)):
        metric = METRICS[kind](seed)
        H = np.eye(D) if metric is None else np.diag(metric) if metric.dim() == 1 else metric.numpy()
        y = point.numpy()
        found = domain.project(point, metric)
        wanted = minimize(
            lambda u, H=H, y=y: 0.5 * (u - y) @ H @ (u - y),
            found.numpy() + 0.01,
            jac=lambda u, H=H, y=y: H @ (u - y),
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
            **constraints(name),
        )
        np.testing.assert_allclose(found, wanted.x, atol=1e-6)
        # As near as SciPy's, which may be outside by its own tolerance.
        assert 0.5 * (found - point).numpy() @ H @ (found - point).numpy() <= wanted.fun + 1e-6 * (1 + wanted.fun)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("name", DOMAINS)
def test_projections_are_idempotent_and_do_not_expand(name, kind):
    domain, metric = DOMAINS[name], METRICS[kind](5)
    points = 2 * normal(12, D, seed=8)
    found = torch.stack([domain.project(point, metric) for point in points])
    again = torch.stack([domain.project(point, metric) for point in found])
    torch.testing.assert_close(found, again, atol=1e-12, rtol=0)
    H = torch.eye(D, dtype=torch.float64) if metric is None else metric
    H = torch.diag(H) if H.dim() == 1 else H

    def lengths(rows):
        gaps = rows.unsqueeze(0) - rows.unsqueeze(1)
        return torch.einsum("abi,ij,abj->ab", gaps, H, gaps)

    assert (lengths(found) <= lengths(points) + 1e-10).all()


@pytest.mark.parametrize("name", DOMAINS)
def test_rows_are_projected_as_single_points(name):
    points = 2 * normal(2, 7, D, seed=1)
    found = DOMAINS[name].project(points)
    for row, expected in zip(points.flatten(0, 1), found.flatten(0, 1), strict=True):
        torch.testing.assert_close(DOMAINS[name].project(row), expected)
    diagonal = METRICS["diagonal"](2)
    found = DOMAINS[name].project(points, diagonal)
    torch.testing.assert_close(DOMAINS[name].project(points[1, 3], diagonal), found[1, 3])


def test_the_ball_in_a_metric_meets_its_conditions_where_it_is_badly_conditioned():
    H = full_metric(4, condition=1e10)
    for point in normal(10, D, seed=6) * 100:
        z = project_ball(point, 1.0, metric=H)
        assert z.norm().item() == pytest.approx(1.0, abs=1e-12)
        force = H @ (point - z)
        # An outward normal: parallel to z.
        assert (force @ z).item() > 0
        assert (force - z * (force @ z)).norm().item() <= 1e-5 * force.norm().item()


def test_points_inside_come_back_bit_by_bit():
    point = torch.tensor([0.1, 0.2, -0.3, 0.25], dtype=torch.float64)
    for metric in (None, METRICS["diagonal"](0), full_metric(0)):
        assert torch.equal(project_ball(point, 1.0, metric=metric), point)
        assert torch.equal(project_box(point, -1.0, 1.0, metric), point)
        corner = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(project_simplex(corner, 1.0, metric), corner)


@pytest.mark.parametrize("condition", [1e2, 1e5])
@pytest.mark.parametrize("project", [project_box, project_simplex])
def test_full_metrics_meet_the_optimality_conditions_to_ten_digits(project, condition):
    H = full_metric(11, condition)
    for point in 3 * normal(10, D, seed=12):
        z = project(point, metric=H)
        slope = H @ (z - point)
        if project is project_box:
            violation = torch.where(z <= 0, -slope, torch.where(z >= 1, slope, slope.abs()))
            assert ((z >= 0) & (z <= 1)).all()
        else:
            level = slope[z > 0].mean()
            violation = torch.where(z > 0, (slope - level).abs(), level - slope)
            assert z.sum().item() == pytest.approx(1.0, abs=1e-12)
            assert (z >= 0).all()
        assert violation.max().item() <= 1e-10 * condition


def test_diameters():
    assert Ball(1.5).diameter(7) == 3.0
    assert Box(-1.0, torch.tensor([0.0, 1.0])).diameter(2) == pytest.approx(math.sqrt(5))
    assert Simplex(2.0).diameter(3) == pytest.approx(2 * math.sqrt(2))
    cut = AffineBall(torch.tensor([[0.0, 1.0]]), torch.tensor([0.6]), 1.0)
    assert cut.diameter(2) == pytest.approx(1.6)
    torch.testing.assert_close(cut.project(torch.tensor([9.0, 9.0])), torch.tensor([0.8, 0.6]))


def test_domains_are_shown_with_what_they_were_made_of():
    assert repr(Ball(2.0)) == "Ball(radius=2.0, center=None)"
    assert repr(Simplex()) == "Simplex(total=1.0)"
