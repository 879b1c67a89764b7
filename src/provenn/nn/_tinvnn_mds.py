"""Coordinates of a point cloud that no rotation, reflection, shift or scale changes: scaling of its own distances."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.precision import full_precision

Sign = Literal["moment", "random", "frame"]
Method = Literal["auto", "gram", "covariance"]
MOMENTS = (3, 5, 7)


class Ambiguity(NamedTuple):
    """Where coordinates are not a function of the distances, (batch, dim) each.

    ``sign``: all odd moments of the column vanish, so that its sign is arbitrary. ``rotation``: the column shares its
    eigenvalue with a neighbour, so that both are defined up to a rotation.
    """

    sign: Bool[Tensor, "batch dim"]
    rotation: Bool[Tensor, "batch dim"]


class InvariantMDS(nn.Module):
    """Replace coordinates by a classical multidimensional scaling of their distances.

    Z = U √Λ of the d largest eigenvalues of the centred Gram matrix, whose distances are those of the points. Columns
    are then fixed in sign, and divided by the root-mean-square radius.

    Args:
        dim: d; without it the dimension of the points.
        scale: Whether to divide by √(Σλ/N).
        sign: ``"moment"``: each column's third moment is made positive, or the fifth, or the seventh, where the earlier
            vanish. ``"random"``: signs are drawn while training, and as before in eval mode. ``"frame"``: as
            ``"moment"`` here; :class:`TinvWrapper` then averages over all signs.
        method: ``"gram"``: eigenvectors of the N×N Gram matrix of the distances; ``"covariance"``: scores of the D×D
            covariance, the same up to signs and cheaper for N > D; ``"auto"``: the cheaper one.
        tol: Below this share of its bound a moment counts as 0, and a gap between eigenvalues as none.
        differentiable: Whether gradients pass to the points. They grow without bound as eigenvalues meet.

    Shape:
        Points (batch, N, D), ``mask`` (batch, N), true where there is a point; result (batch, N, d), 0 where there is
        none.

    Returns:
        Z, in the type of the points. What is not determined by the distances is told in ``last_ambiguity``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument out of range; on a call, fewer than two points, points that are all equal or not finite.

    Warns:
        UserWarning: d exceeds the rank that the points can have; the columns beyond are 0.

    Cost: O(N D²) and O(D³) by covariance; O(N² D) and O(N³) by Gram matrix, with N² numbers of memory. Eigenvalues are
    found in single precision at least. A mirror image has the same Z: which hand a cloud is, is lost.

    Source: Zhang, Wang, Zhang & Zhu (2021), section 3; Torgerson, "Multidimensional scaling", Psychometrika 17 (1952).
    """

    def __init__(
        self,
        dim: int | None = None,
        scale: bool = True,
        sign: Sign = "moment",
        method: Method = "auto",
        tol: float = 1e-5,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        if dim is not None:
            check_integer("dim", dim, at_least=1)
        check_choice("sign", sign, ("moment", "random", "frame"))
        check_choice("method", method, ("auto", "gram", "covariance"))
        check_number("tol", tol, at_least=0)
        self.dim, self.scale, self.sign, self.method, self.tol = dim, scale, sign, method, tol
        self.differentiable = differentiable
        self.last_ambiguity: Ambiguity | None = None

    def forward(
        self, X: Float[Tensor, "batch points dim"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> Float[Tensor, "batch points out"]:
        """Return the coordinates.

        Args:
            X: Points.
            mask: Which of them are points; all without it.
        """
        _check(X, mask)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()), full_precision(X.device):
            centred, counts = centre(X, mask)
            dim = self.dim or X.shape[2]
            if self.method == "gram" or (self.method == "auto" and X.shape[1] < X.shape[2]):
                Z, values = _from_gram(_gram(centred, mask), dim)
            else:
                Z, values = _from_covariance(centred, dim)
            if self.dim is not None and dim > min(X.shape[2], X.shape[1] - 1):
                warnings.warn(
                    f"dim {dim} exceeds the rank {min(X.shape[2], X.shape[1] - 1)} of the points: the columns beyond "
                    "are 0",
                    stacklevel=2,
                )
            return self._finish(Z, values, counts).to(X.dtype)

    def from_distances(
        self, squares: Float[Tensor, "batch points points"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> Float[Tensor, "batch points out"]:
        """Return coordinates of points that are known by their squared distances, or other dissimilarities, alone.

        Args:
            squares: Squared distances; where they are not Euclidean, negative eigenvalues count as 0 and the theorem
                of exact distances is lost.
            mask: Which rows are points.

        Raises:
            ValueError: ``dim`` was not given; the matrix is not square, symmetric and finite; all are equal to 0.
        """
        if self.dim is None:
            raise ValueError("dim must be given where there are distances alone")
        finite = bool(squares.isfinite().all())
        if squares.shape[1] != squares.shape[2] or not finite or not torch.allclose(squares, squares.mT, rtol=1e-4):
            raise ValueError(f"squares must be square, symmetric and finite, got shape {tuple(squares.shape)}")
        ones = torch.ones(squares.shape[:2], dtype=torch.bool, device=squares.device) if mask is None else mask
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()), full_precision(squares.device):
            wide = squares.to(torch.promote_types(squares.dtype, torch.float32))
            weights = ones.to(wide)
            counts = weights.sum(1)
            J = torch.diag_embed(weights) - weights[:, :, None] * weights[:, None] / counts[:, None, None]
            Z, values = _from_gram(-0.5 * J @ wide @ J, self.dim)
            if bool((values.sum(1) <= 0).any()):
                raise ValueError("squares must not all be 0")
            return self._finish(Z, values, counts).to(squares.dtype)

    def _finish(self, Z: Tensor, values: Tensor, counts: Tensor) -> Tensor:
        """Fix signs and scale; note what is ambiguous."""
        signs, ambiguous = _moment_signs(Z, self.tol)
        if not torch.compiler.is_compiling():
            self.last_ambiguity = Ambiguity(ambiguous, _repeated(values, Z.shape[2], self.tol))
        if self.sign == "random" and self.training:
            signs = torch.randint(0, 2, signs.shape, device=Z.device).to(Z) * 2 - 1
        Z = Z * signs[:, None]
        if self.scale:
            Z = Z / (values.sum(1) / counts).sqrt()[:, None, None]
        return Z


def _check(X: Tensor, mask: Tensor | None) -> None:
    if X.shape[1] < 2:
        raise ValueError(f"X must have two points or more, got {X.shape[1]}")
    if mask is not None and mask.shape != X.shape[:2]:
        raise ValueError(f"mask must be {tuple(X.shape[:2])}, got {tuple(mask.shape)}")
    if torch.compiler.is_compiling() or X.is_meta:  # values cannot be looked at
        return
    real = X if mask is None else X.masked_fill(~mask[..., None], 0)
    if not bool(real.isfinite().all()):
        raise ValueError("X must be finite, got NaN or infinity")
    if mask is not None and bool((mask.sum(1) < 2).any()):
        raise ValueError(f"mask must leave two points or more, got {int(mask.sum(1).min())}")
    centred, _ = centre(X, mask)
    if bool((centred.abs().amax((1, 2)) <= 1e-12 * real.abs().amax((1, 2)).to(centred)).any()):
        raise ValueError("X must have two different points, got clouds whose points are all equal")


def centre(
    X: Float[Tensor, "batch points dim"], mask: Bool[Tensor, "batch points"] | None
) -> tuple[Float[Tensor, "batch points dim"], Float[Tensor, " batch"]]:
    """Return points about their mean, in single precision at least, 0 where there is none; and how many there are."""
    wide = X.to(torch.promote_types(X.dtype, torch.float32))
    if mask is None:
        return wide - wide.mean(1, keepdim=True), wide.new_full((X.shape[0],), X.shape[1])
    counts = mask.sum(1).to(wide)
    kept = wide.masked_fill(~mask[..., None], 0)
    mean = kept.sum(1, keepdim=True) / counts[:, None, None]
    return (kept - mean).masked_fill(~mask[..., None], 0), counts


def _gram(centred: Tensor, mask: Tensor | None) -> Tensor:
    """Return −½ J S J of the squared distances S."""
    S = (centred[:, :, None] - centred[:, None]).square().sum(-1)
    weights = torch.ones_like(S[:, 0]) if mask is None else mask.to(S)
    J = torch.diag_embed(weights) - weights[:, :, None] * weights[:, None] / weights.sum(1)[:, None, None]
    return -0.5 * J @ S @ J


def _from_gram(G: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(0.5 * (G + G.mT))
    values, vectors = values.flip(1).clamp(min=0), vectors.flip(2)
    kept = min(dim, values.shape[1])
    Z = vectors[..., :kept] * values[:, None, :kept].sqrt()
    return nn.functional.pad(Z, (0, dim - kept)), values


def _from_covariance(centred: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the scores of a principal component analysis, and its eigenvalues times N."""
    values, axes = torch.linalg.eigh(centred.mT @ centred)
    values, axes = values.flip(1).clamp(min=0), axes.flip(2)
    kept = min(dim, values.shape[1])
    return nn.functional.pad(centred @ axes[..., :kept], (0, dim - kept)), values


def _moment_signs(Z: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Return ±1 by the first odd moment of each column that does not vanish, and where all vanish."""
    # Large powers of unscaled coordinates would overflow.
    Y = Z / Z.abs().amax(1, keepdim=True).clamp(min=torch.finfo(Z.dtype).tiny)
    signs, open_ = torch.ones_like(Z[:, 0]), torch.ones_like(Z[:, 0], dtype=torch.bool)
    for power in MOMENTS:
        moment, bound = (Y**power).sum(1), (Y.abs() ** power).sum(1)
        decided = open_ & (moment.abs() >= tol * bound) & (bound > 0)
        signs = torch.where(decided & (moment < 0), -signs, signs)
        open_ = open_ & ~decided
    return signs.detach(), open_


def _repeated(values: Tensor, dim: int, tol: float) -> Tensor:
    """Return which of the first columns share their eigenvalue with the one before or after."""
    padded = nn.functional.pad(values, (0, max(0, dim + 1 - values.shape[1])))
    equal = (padded[:, :-1] - padded[:, 1:]) < tol * padded[:, :1]
    # Columns of eigenvalue 0 are 0, whatever the axes.
    equal = equal & (padded[:, :-1] > tol * padded[:, :1])
    before = nn.functional.pad(equal, (1, 0))[:, :-1]
    return (equal | before)[:, :dim]
