"""Projections on the ball, the box and the simplex, in the Euclidean norm or in that of a positive definite matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_number

_NEWTON_STEPS = 100
_GRADIENT_STEPS = 20_000
_POLISH_EVERY = 20
_ACTIVE_SETS = 20


def project_ball(
    x: Float[Tensor, "*batch d"],
    radius: float = 1.0,
    center: Float[Tensor, " d"] | None = None,
    metric: Float[Tensor, " d"] | Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "*batch d"]:
    """Return the points of the ball ‖z − center‖₂ ≤ radius that are nearest in the norm √(vᵀ H v).

    In a metric, z = center + (H + μI)⁻¹H(x − center) with the μ ≥ 0 that puts it on the sphere, found by Newton's
    method on 1/‖z‖ in the eigenvectors of H.

    Args:
        x: The points.
        radius: The ball's radius.
        center: Its centre; ``None``: the origin.
        metric: H, a diagonal (d,) or a matrix (d, d), symmetric positive definite; ``None``: the identity.

    Shape:
        ``x`` (..., d); the result is of the same shape.

    Returns:
        The projections; points inside come back as they are.

    Raises:
        ValueError: ``radius`` ≤ 0, or ``metric`` is not positive, or of another size.
        TypeError: ``radius`` is no number.

    Cost: O(d) a point; in a full metric one eigendecomposition, O(d³), and O(d²) a point.

    Source: Moré & Sorensen, "Computing a trust region step", 1983, for the secular equation.
    """
    check_number("radius", radius, above=0)
    offset = x if center is None else x - center.to(x)
    norm = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
    if metric is None:
        scaled = offset * (radius / norm.clamp(min=radius))
    else:
        _check_metric(metric, x.shape[-1])
        scaled = _on_sphere(offset, radius, metric.to(x), norm)
    return torch.where(norm <= radius, x, scaled if center is None else center.to(x) + scaled)


def _on_sphere(offset: Tensor, radius: float, metric: Tensor, norm: Tensor) -> Tensor:
    """Project points outside the ball on its sphere in a metric; others come back as anything finite."""
    if metric.dim() == 1:
        values, coordinates = metric, offset
    else:
        values, vectors = torch.linalg.eigh(metric)
        coordinates = offset @ vectors
    _check_positive(values)
    shift = torch.zeros_like(norm)
    for _ in range(_NEWTON_STEPS):
        z = values * coordinates / (values + shift)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        slope = (z * z / (values + shift)).sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        excess = length / radius - 1
        # 1/‖z‖ is concave in μ: from μ = 0 the steps never pass the root, so what is left is rounding.
        if not bool((excess > 4 * torch.finfo(z.dtype).eps).any()):
            break
        shift = shift + (length * length / slope * excess).clamp(min=0)
    z = values * coordinates / (values + shift)
    z = z * (radius / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=radius))
    return z if metric.dim() == 1 else z @ vectors.mT


def project_box(
    x: Float[Tensor, "*batch d"],
    low: float | Float[Tensor, " d"] = 0.0,
    high: float | Float[Tensor, " d"] = 1.0,
    metric: Float[Tensor, " d"] | Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "*batch d"]:
    """Return the points of the box low ≤ z ≤ high that are nearest in the norm √(vᵀ H v).

    Args:
        x: The points; a single one with a full metric.
        low: Least value of each coordinate.
        high: Largest value of each coordinate.
        metric: H, a diagonal (d,) or a matrix (d, d), symmetric positive definite; ``None``: the identity.

    Shape:
        ``x`` (..., d); (d,) with a full metric. The result is of the same shape.

    Returns:
        The projections.

    Raises:
        ValueError: ``low`` > ``high``; ``metric`` is not positive or of another size; several points in a full one.

    Cost: O(d) a point. In a full metric a few linear systems of the coordinates between their bounds, O(d³) each; where
    those sets do not settle, accelerated projected gradient steps, O(d²) each, until they do.

    Source: Hintermüller, Ito & Kunisch, 2002, for the active sets; O'Donoghue & Candès, arXiv 1204.3982, for
    restarted acceleration.
    """
    lows, highs = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
    if not x.is_meta and bool((lows > highs).any()):
        raise ValueError(f"low must be at most high, got {low} and {high}")
    clamped = torch.minimum(torch.maximum(x, lows), highs)
    if metric is None or metric.dim() == 1:
        if metric is not None:
            _check_metric(metric, x.shape[-1])
            _check_positive(metric)
        return clamped
    H = _full_metric(x, metric)
    if torch.equal(clamped, x):
        return x
    slack, rough = _slacks(x, H)
    scale = H.diagonal()

    def on_face(w: Tensor) -> _Face:
        at_low, at_high = w <= lows, w >= highs
        free = ~(at_low | at_high)
        exact = torch.where(at_low, lows, torch.where(at_high, highs, x))
        exact[free] = x[free] - torch.linalg.solve(H[free][:, free], H[free][:, ~free] @ (exact - x)[~free])
        slope = torch.where(free, 0, H @ (exact - x))
        inside = (exact >= lows - slack) & (exact <= highs + slack)
        good = inside & (~at_low | (slope >= -rough)) & (~at_high | (slope <= rough))
        return _Face(torch.minimum(torch.maximum(exact, lows), highs), bool(good.all()), exact - slope / scale)

    return _nearest(x, H, lambda z: torch.minimum(torch.maximum(z, lows), highs), on_face)


def project_simplex(
    x: Float[Tensor, "*batch d"],
    total: float = 1.0,
    metric: Float[Tensor, " d"] | Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "*batch d"]:
    """Return the points with z ≥ 0 and Σ z = total that are nearest in the norm √(vᵀ H v).

    Args:
        x: The points; a single one with a full metric.
        total: The sum of the coordinates.
        metric: H, a diagonal (d,) or a matrix (d, d), symmetric positive definite; ``None``: the identity.

    Shape:
        ``x`` (..., d); (d,) with a full metric. The result is of the same shape.

    Returns:
        The projections.

    Raises:
        ValueError: ``total`` ≤ 0; ``metric`` is not positive or of another size; several points in a full one.
        TypeError: ``total`` is no number.

    Cost: a sort, O(d log d) a point. In a full metric as :func:`project_box`.

    Source: Held, Wolfe & Crowder, 1974, for the threshold; a diagonal metric scales its breakpoints.
    """
    check_number("total", total, above=0)
    if metric is None or metric.dim() == 1:
        weights = torch.ones_like(x[..., :1]).expand_as(x) if metric is None else metric.to(x).expand_as(x)
        if metric is not None:
            _check_metric(metric, x.shape[-1])
            _check_positive(metric)
        return _threshold(x, total, weights)
    H = _full_metric(x, metric)
    slack, rough = _slacks(x, H)
    scale = H.diagonal()

    def on_face(w: Tensor) -> _Face:
        free = _threshold(w, total, scale) > 0
        size = int(free.sum())
        system = H.new_zeros(size + 1, size + 1)
        system[:size, :size] = H[free][:, free]
        system[:size, size] = system[size, :size] = 1
        right = torch.cat([H[free] @ x, H.new_tensor([total])])
        solved = torch.linalg.solve(system, right)
        exact = torch.zeros_like(x)
        exact[free] = solved[:size]
        slope = torch.where(free, 0, H @ (exact - x) + solved[size])
        good = (exact >= -slack) & (slope >= -rough)
        return _Face(exact.clamp(min=0), bool(good.all()), exact - slope / scale)

    return _nearest(x, H, lambda z: _threshold(z, total, torch.ones_like(z)), on_face)


def _threshold(x: Tensor, total: float, weights: Tensor) -> Tensor:
    """Project on the simplex in a diagonal metric: z = max(0, x − τ/h), τ from the sorted breakpoints h·x."""
    order = (weights * x).argsort(dim=-1, descending=True)
    points, inverse = x.gather(-1, order), 1 / weights.gather(-1, order)
    levels = (points.cumsum(-1) - total) / inverse.cumsum(-1)
    kept = (points / inverse > levels).sum(-1, keepdim=True).clamp(min=1)
    return (x - levels.gather(-1, kept - 1) / weights).clamp(min=0)


class _Face(NamedTuple):
    """The nearest point of a face's plane, whether it is the answer, and a point whose projection names a next face."""

    point: Tensor
    good: bool
    ahead: Tensor


def _nearest(x: Tensor, H: Tensor, project: Callable[[Tensor], Tensor], on_face: Callable[[Tensor], _Face]) -> Tensor:
    """Minimise (z − x)ᵀ H (z − x) over a set: by active sets, and where those go in circles by projected gradients."""
    face = on_face(x)
    for _ in range(_ACTIVE_SETS):
        if face.good:
            return face.point
        face = on_face(face.ahead)
    rate = 1 / float(torch.linalg.eigvalsh(H)[-1])
    z = ahead = project(x)
    weight = 1.0
    for step in range(1, _GRADIENT_STEPS + 1):
        new = project(ahead - rate * (H @ (ahead - x)))
        if float((ahead - new) @ (new - z)) > 0:
            weight = 1.0
        after = (1 + (1 + 4 * weight * weight) ** 0.5) / 2
        ahead = new + (weight - 1) / after * (new - z)
        z, weight = new, after
        if step % _POLISH_EVERY == 0 and (face := on_face(z - rate * (H @ (z - x)))).good:
            return face.point
    return z


def _slacks(x: Tensor, H: Tensor) -> tuple[float, float]:
    """Return what rounding leaves of a coordinate and of a slope: at a point of the set itself all slopes are zero."""
    slack = 100 * torch.finfo(x.dtype).eps * (1 + float(x.abs().max()))
    return slack, slack * float(torch.linalg.matrix_norm(H))


def _full_metric(x: Tensor, metric: Tensor) -> Tensor:
    _check_metric(metric, x.shape[-1])
    if x.dim() != 1:
        raise ValueError(f"x must be a single point in a full metric, got the shape {tuple(x.shape)}")
    _, failed = torch.linalg.cholesky_ex(metric)
    if bool(failed):
        raise ValueError("metric must be positive definite, got one that is not")
    return metric.to(x)


def _check_metric(metric: Tensor, size: int) -> None:
    if metric.shape not in ((size,), (size, size)):
        raise ValueError(f"metric must have the shape ({size},) or ({size}, {size}), got {tuple(metric.shape)}")


def _check_positive(values: Tensor) -> None:
    if not bool((values > 0).all()):
        raise ValueError(f"metric must be positive definite, got {float(values.min()):.3g} on its diagonal or spectrum")
