"""The rules of batch size, curvature, learning rate, momentum and damping, as formulas of numbers.

P is the number of parameters, N that of samples, B the batch, 𝔟 = B/(1 − B/N). A batch's curvature matrix is the one
of all data plus a symmetric random matrix whose entries have variance σ²/𝔟.

Source: Granziol, Zohren and Roberts, arXiv 2006.09092.
"""

from __future__ import annotations

import math
from typing import Literal

from provenn.core.experiment.checks import check_choice, check_integer, check_number

Kind = Literal["sgd", "adaptive"]


def effective_batch_size(batch: float, n: int | None = None) -> float:
    """Return 𝔟 = B/(1 − B/N), the batch that would have the same noise if drawn with replacement.

    Args:
        batch: B, samples a batch, drawn without replacement; a critical batch need not be whole.
        n: N, samples of the data; ``None``: infinitely many, 𝔟 = B.

    Returns:
        𝔟; infinity at B = N.

    Raises:
        ValueError: ``batch`` is not in [1, N], or ``n`` < 1.

    Source: arXiv 2006.09092, the noise model (finite population correction).
    """
    check_number("batch", batch, at_least=1)
    if n is None:
        return float(batch)
    check_integer("n", n, at_least=1)
    if batch > n:
        raise ValueError(f"batch must be at most the {n} samples of the data, got {batch}")
    return math.inf if batch == n else batch * n / (n - batch)


def _ratio(dim: int, batch: float, n: int | None) -> float:
    """Return P/𝔟."""
    check_integer("dim", dim, at_least=1)
    return dim / effective_batch_size(batch, n)


def wigner_bulk_radius(sigma2: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return 2√(P/𝔟)σ, the radius of the semicircle that the noise's eigenvalues fill.

    Args:
        sigma2: σ², variance of an entry of one sample's deviation.
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        The radius; 0 at B = N.

    Raises:
        ValueError: ``sigma2`` < 0, ``dim`` < 1, or as :func:`effective_batch_size`.

    Source: Wigner's semicircle law; arXiv 2006.09092.
    """
    check_number("sigma2", sigma2, at_least=0)
    return 2 * math.sqrt(_ratio(dim, batch, n) * sigma2)


def spiked_wigner_edge(lam: float, sigma2: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the extreme eigenvalue of a batch's Hessian, given that of the full data's.

    λ + Pσ²/(𝔟λ) if |λ| > √(P/𝔟)σ: the spike stands out of the noise, pushed outwards; else ±2√(P/𝔟)σ, the edge of
    the noise alone.

    Args:
        lam: λ₁ of the full data's Hessian (positive or 0), or λ_P (negative): the mirror image.
        sigma2: σ², as :func:`wigner_bulk_radius`.
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        The eigenvalue; ``lam`` itself at B = N.

    Raises:
        ValueError: ``lam`` is not finite, or as :func:`wigner_bulk_radius`.

    Source: Benaych-Georges and Nadakuditi, Adv. Math. 227 (2011); arXiv 2006.09092, theorem of the batch Hessian.
    """
    check_number("lam", lam)
    radius = wigner_bulk_radius(sigma2, dim, batch, n)
    if 2 * abs(lam) > radius:
        return lam + radius**2 / (4 * lam)
    return math.copysign(radius, lam)


def wigner_spike(edge: float, sigma2: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the full data's λ from a batch's extreme eigenvalue: :func:`spiked_wigner_edge` solved for λ.

    Args:
        edge: Eigenvalue of the batch's Hessian, of either sign.
        sigma2: σ².
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        λ; where ``edge`` is within the noise's bulk, which hides λ, the largest that it can hide: √(P/𝔟)σ.

    Raises:
        ValueError: ``edge`` is not finite, or as :func:`wigner_bulk_radius`.

    Source: the larger root of λ² − edge·λ + Pσ²/𝔟 = 0, from arXiv 2006.09092's theorem of the batch Hessian.
    """
    check_number("edge", edge)
    radius = wigner_bulk_radius(sigma2, dim, batch, n)
    size = abs(edge)
    lam = radius / 2 if size <= radius else (size + math.sqrt((size - radius) * (size + radius))) / 2
    return math.copysign(lam, edge)


def spiked_wigner_overlap(lam: float, sigma2: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the squared cosine between the extreme eigenvectors of a batch's Hessian and of the full data's.

    1 − Pσ²/(𝔟λ²) if |λ| > √(P/𝔟)σ, else 0.

    Args:
        lam: λ₁ or λ_P of the full data's Hessian.
        sigma2: σ².
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: ``lam`` is not finite, or as :func:`wigner_bulk_radius`.

    Source: Benaych-Georges and Nadakuditi, Adv. Math. 227 (2011); arXiv 2006.09092, theorem of the batch Hessian.
    """
    check_number("lam", lam)
    radius = wigner_bulk_radius(sigma2, dim, batch, n)
    return 1 - (radius / (2 * lam)) ** 2 if 2 * abs(lam) > radius else 0.0


def spiked_wishart_edge(lam: float, scale: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the largest eigenvalue of a batch's Gauss–Newton matrix, given that of the full data's.

    With q = P/𝔟: λ₁(1 + q s²/(λ₁ − s²)) if λ₁ > s²(1 + √q); else the edge of the Marčenko–Pastur law, s²(1 + √q)².

    Args:
        lam: λ₁ of the full data's matrix.
        scale: s², the common size of its other eigenvalues.
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        The eigenvalue; the larger of ``lam`` and ``scale`` at B = N.

    Raises:
        ValueError: ``lam`` or ``scale`` is negative or not finite, ``dim`` < 1, or as :func:`effective_batch_size`.

    Source: Baik and Silverstein, J. Multivariate Anal. 97 (2006); arXiv 2006.09092, theorem of the Gauss–Newton matrix.
    """
    check_number("lam", lam, at_least=0)
    check_number("scale", scale, at_least=0)
    q = _ratio(dim, batch, n)
    if lam > scale * (1 + math.sqrt(q)):
        return lam * (1 + q * scale / (lam - scale))
    return scale * (1 + math.sqrt(q)) ** 2


def wishart_spike(edge: float, scale: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the full data's λ₁ from a batch's largest eigenvalue: :func:`spiked_wishart_edge` solved for λ₁.

    Args:
        edge: Largest eigenvalue of the batch's Gauss–Newton matrix.
        scale: s², as :func:`spiked_wishart_edge`.
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        λ₁; where ``edge`` is within the noise's bulk, which hides λ₁, the largest that it can hide: s²(1 + √q).

    Raises:
        ValueError: ``edge`` or ``scale`` is negative or not finite, or as :func:`spiked_wishart_edge`.

    Source: the larger root of λ² − (edge + s² − q s²)λ + edge·s² = 0, from Baik and Silverstein's formula.
    """
    check_number("edge", edge, at_least=0)
    check_number("scale", scale, at_least=0)
    q = _ratio(dim, batch, n)
    if edge <= scale * (1 + math.sqrt(q)) ** 2:
        return scale * (1 + math.sqrt(q))
    half = (edge + scale - q * scale) / 2
    return half + math.sqrt(max(0.0, half**2 - edge * scale))


def spiked_wishart_overlap(lam: float, scale: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the squared cosine between the top eigenvectors of a batch's Gauss–Newton matrix and of the full data's.

    (1 − q/(ℓ − 1)²)/(1 + q/(ℓ − 1)) with ℓ = λ₁/s² and q = P/𝔟, if ℓ > 1 + √q, else 0.

    Args:
        lam: λ₁.
        scale: s², as :func:`spiked_wishart_edge`.
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: As :func:`spiked_wishart_edge`.

    Source: Paul, Statistica Sinica 17 (2007), theorem 4.
    """
    check_number("lam", lam, at_least=0)
    check_number("scale", scale, at_least=0)
    q = _ratio(dim, batch, n)
    if not lam > scale * (1 + math.sqrt(q)):
        return 0.0
    x = scale / (lam - scale)  # 1/(ℓ − 1), which stays finite at s² = 0
    return (1 - q * x**2) / (1 + q * x)


def critical_batch_size(lam: float, sigma2: float, dim: int, n: int | None = None) -> float:
    """Return B*, the batch from which on the largest stable rate is about flat: 𝔟 = Pσ²/λ₁².

    At B* the spike meets the noise's bulk, and a batch's largest eigenvalue is twice the full data's. For a network,
    whose noise is not spread evenly, give σ² measured along the top eigenvector: :func:`noise_variance` with
    ``direction``.

    Args:
        lam: λ₁ of the full data's matrix.
        sigma2: σ².
        dim: P.
        n: N; ``None``: infinitely many.

    Returns:
        B*, below N, a real number that can be below 1.

    Raises:
        ValueError: ``lam`` ≤ 0, ``sigma2`` < 0, ``dim`` < 1 or ``n`` < 1.

    Source: arXiv 2006.09092, scaling rules.
    """
    check_number("lam", lam, above=0)
    check_number("sigma2", sigma2, at_least=0)
    check_integer("dim", dim, at_least=1)
    effective = dim * sigma2 / lam**2
    if n is None:
        return effective
    check_integer("n", n, at_least=1)
    return effective / (1 + effective / n)


def max_learning_rate(lam: float, momentum: float = 0.0) -> float:
    """Return 2(1 + μ)/λ₁, the largest rate at which gradient descent with heavy-ball momentum is stable.

    For batches of B, give the batch's eigenvalue: ``max_learning_rate(spiked_wigner_edge(lam, sigma2, dim, B, n))``.
    Where momentum averages gradients (Adam, or SGD with dampening d = μ), divide by 1 − μ (by 1 − d).

    Args:
        lam: Largest eigenvalue of the matrix that the steps see.
        momentum: μ in [0, 1).

    Returns:
        The rate; steps at a rate below it contract along every eigenvector with a positive eigenvalue.

    Raises:
        ValueError: ``lam`` ≤ 0, or ``momentum`` is not in [0, 1).

    Source: Polyak, USSR Comput. Math. Math. Phys. 4 (1964); arXiv 2006.09092, scaling rules (μ = 0).
    """
    check_number("lam", lam, above=0)
    check_number("momentum", momentum, at_least=0, below=1)
    return 2 * (1 + momentum) / lam


def polyak_parameters(largest: float, smallest: float) -> tuple[float, float]:
    """Return heavy ball's optimal rate and momentum on a quadratic: (2/(√L + √ℓ))² and ((√L − √ℓ)/(√L + √ℓ))².

    The error shrinks by (√κ − 1)/(√κ + 1) a step asymptotically, κ = L/ℓ.

    Args:
        largest: L, largest eigenvalue.
        smallest: ℓ, smallest one.

    Returns:
        Learning rate and momentum.

    Raises:
        ValueError: Not 0 < ``smallest`` ≤ ``largest``.

    Source: Polyak, USSR Comput. Math. Math. Phys. 4 (1964); arXiv 2006.09092, on-the-fly learner.
    """
    check_number("largest", largest, above=0)
    check_number("smallest", smallest, above=0, at_most=largest)
    high, low = math.sqrt(largest), math.sqrt(smallest)
    return (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2


def suggest_lr(
    from_batch: float,
    to_batch: float,
    kind: Kind = "sgd",
    *,
    lr: float = 1.0,
    critical_batch: float | None = None,
    n: int | None = None,
) -> float:
    """Carry a learning rate that is right at one batch size over to another.

    ``sgd``: lr ∝ 𝔟; ``adaptive`` (Adam and its like): lr ∝ √𝔟; both flat above the critical batch.

    Args:
        from_batch: Batch at which ``lr`` is right.
        to_batch: Batch to carry it to.
        kind: Which optimizer.
        lr: The rate at ``from_batch``; 1 gives the factor.
        critical_batch: B* of :func:`critical_batch_size`, at least 1; ``None``: the rule never saturates.
        n: N; ``None``: infinitely many, 𝔟 = B.

    Returns:
        The rate at ``to_batch``.

    Raises:
        ValueError: A batch is below 1 or above N, ``kind`` is unknown, ``lr`` ≤ 0, ``critical_batch`` < 1, or a batch
            of all N samples is not above the critical batch, so that 𝔟 is infinite.

    Source: arXiv 2006.09092, scaling rules; the linear rule is Goyal et al., arXiv 1706.02677's.
    """
    check_choice("kind", kind, ("sgd", "adaptive"))
    check_number("lr", lr, above=0)
    if critical_batch is not None:
        check_number("critical_batch", critical_batch, at_least=1)
    sizes = []
    for name, batch in (("from_batch", from_batch), ("to_batch", to_batch)):
        check_number(name, batch, at_least=1)
        if n is not None and batch > n:
            raise ValueError(f"{name} must be at most the {n} samples of the data, got {batch}")
        size = effective_batch_size(batch if critical_batch is None else min(batch, critical_batch), n)
        if math.isinf(size):
            raise ValueError(f"{name} is all {n} samples, where nothing bounds the rate but a smaller critical_batch")
        sizes.append(size)
    growth = sizes[1] / sizes[0]
    return lr * (growth if kind == "sgd" else math.sqrt(growth))


def suggest_damping(
    from_batch: float, to_batch: float, *, damping: float = 1.0, from_lr: float = 1.0, to_lr: float = 1.0
) -> float:
    """Carry a damping (Adam's ε, or a second-order method's δ) to another batch and rate: δ ∝ lr/B.

    Args:
        from_batch: Batch at which ``damping`` is right.
        to_batch: Batch to carry it to.
        damping: δ at ``from_batch`` and ``from_lr``.
        from_lr: Learning rate there.
        to_lr: Learning rate at ``to_batch``.

    Returns:
        δ at ``to_batch`` and ``to_lr``.

    Raises:
        ValueError: A batch is below 1, or ``damping`` or a rate is not above 0.

    Source: arXiv 2006.09092, abstract and scaling rules.
    """
    for name, batch in (("from_batch", from_batch), ("to_batch", to_batch)):
        check_number(name, batch, at_least=1)
    for name, value in (("damping", damping), ("from_lr", from_lr), ("to_lr", to_lr)):
        check_number(name, value, above=0)
    return damping * (to_lr / from_lr) * (from_batch / to_batch)


def minimal_damping(lr: float, lam: float, sigma2: float, dim: int, batch: float, n: int | None = None) -> float:
    """Return the least damping δ at which a batch's noise does not make preconditioned steps unstable.

    A step lr/(λ̂ + δ) along a direction that the preconditioner takes for flat (λ̂ = 0) is stable while lr·Δ/δ < 2, Δ the
    curvature that the batch adds. With Δ = Pσ²/(𝔟λ₁): δ = lr·Pσ²/(2𝔟λ₁) ∝ lr/B.

    Args:
        lr: Learning rate.
        lam: λ₁ of the full data's matrix.
        sigma2: σ².
        dim: P.
        batch: B.
        n: N; ``None``: infinitely many.

    Returns:
        δ; 0 at B = N.

    Raises:
        ValueError: ``lr`` or ``lam`` is not above 0, or as :func:`wigner_bulk_radius`.

    Source: the proportionality is arXiv 2006.09092's; the constant is from the stability bound above.
    """
    check_number("lr", lr, above=0)
    check_number("lam", lam, above=0)
    return lr * wigner_bulk_radius(sigma2, dim, batch, n) ** 2 / (8 * lam)
