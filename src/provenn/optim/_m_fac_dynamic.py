"""The dynamic algorithm of M-FAC: the inverse of a damped empirical Fisher matrix over a sliding window."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number


class DynamicInverseFisher:
    r"""The inverse of :math:`F = \lambda I + \frac1m G^\top G`, where G holds the last m gradients.

    G is a ring buffer; rows that are not filled yet are zero gradients, and m is the divisor from the start. All that
    is solved is of size m, by the factors of :math:`S = \lambda^{-1} G G^\top + m I = L \,\mathrm{diag}(d)\, L^\top`
    without pivoting, where the pivots d are those of the static recursion:

    .. math::
        F^{-1} x = \frac{x}{\lambda} - \frac{1}{\lambda^2} G^\top S^{-1} G x, \qquad
        F^{-1} G^\top = \frac{m}{\lambda} G^\top S^{-1}

    By the second form, a product with a gradient of the window is a combination of the window's gradients, and the
    large terms of the first never cancel in d dimensions. S is kept and factored in float64, whatever the gradients'
    type; its entries are products in that type, so float32 tells parallel gradients apart up to ‖g‖²/λ ≈ 1e7 m.

    Args:
        num_grads: m, the length of the window.
        dim: d, the length of a gradient.
        damping: λ. It stands outside the mean over gradients.
        dtype: Type of the stored gradients; float32 or float64.
        device: Where they are. ``None``: torch's default.

    Raises:
        ValueError: ``num_grads`` < 1, ``dim`` < 1 or ``damping`` ≤ 0.
        TypeError: An option is no number, or ``dtype`` is neither float32 nor float64.

    Cost: m·d numbers of ``dtype``, and 2 m² in float64: GGᵀ and its factor.

    Source: section on the dynamic algorithm of the paper. It forms F⁻¹ from ``coefficients`` by forward substitution;
    two triangular solves are the same in exact arithmetic, O(m²) a product instead of O(m³) once an update.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        damping: float = 1e-5,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_integer("num_grads", num_grads, at_least=1)
        check_integer("dim", dim, at_least=1)
        check_number("damping", damping, above=0)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.damping = float(damping)
        self.grads = torch.zeros(num_grads, dim, dtype=dtype, device=device)
        self.gram = torch.zeros(num_grads, num_grads, dtype=torch.float64, device=device)
        self._next = torch.zeros((), dtype=torch.int64)
        self._cached_factor: Tensor | None = None

    @property
    def num_grads(self) -> int:
        """m, the length of the window."""
        return self.grads.shape[0]

    @property
    def dim(self) -> int:
        """d, the length of a gradient."""
        return self.grads.shape[1]

    @torch.no_grad()
    def update(self, grad: Float[Tensor, " d"]) -> None:
        """Put a gradient in the place of the oldest.

        Args:
            grad: The gradient, copied.

        Shape:
            ``grad`` (d,).

        Raises:
            ValueError: ``grad`` has another shape, or it or its squared norm is not finite; the window stays as it was.

        Cost: O(m d).
        """
        self._replace_oldest(grad)

    @torch.no_grad()
    def mul(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return F⁻¹x.

        Args:
            x: Any vector.

        Shape:
            ``x`` (d,); returns (d,).

        Raises:
            ValueError: ``x`` has another shape.

        Cost: O(m d), and O(m³) for the first product after an update.
        """
        x = self._checked("x", x)
        weights = torch.cholesky_solve((self.grads @ x).double()[:, None], self._factor())[:, 0] / self.damping**2
        return torch.addmv(x / self.damping, self.grads.T, weights.to(x.dtype), alpha=-1)

    @torch.no_grad()
    def update_mul(self, grad: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Put a gradient in the place of the oldest, and return its product with the F⁻¹ of the new window.

        Args:
            grad: The gradient, copied.

        Shape:
            ``grad`` (d,); returns (d,).

        Raises:
            ValueError: As in :meth:`update`.

        Cost: O(m d + m³): two passes over the window, one less than :meth:`update` and :meth:`mul`.
        """
        row = self._replace_oldest(grad)
        unit = torch.zeros(self.num_grads, 1, dtype=torch.float64, device=self.gram.device)
        unit[row] = self.num_grads / self.damping
        weights = torch.cholesky_solve(unit, self._factor())[:, 0]
        return self.grads.T @ weights.to(self.grads.dtype)

    def pivots(self) -> Float[Tensor, " m"]:
        """Return d, the pivots of S: dᵢ = m + gᵢᵀ F_{i−1}⁻¹ gᵢ over the window's rows in storage order.

        Shape:
            Returns (m,), in float64.

        Cost: O(m³) for the first call after an update.
        """
        return self._factor().diagonal().square()

    def coefficients(self) -> Float[Tensor, "m m"]:
        """Return B = λ⁻¹L⁻¹, by which the vectors of the static recursion are B G.

        Shape:
            Returns (m, m), lower triangular, in float64.

        Cost: O(m³).
        """
        factor = self._factor()
        unit_lower = factor / factor.diagonal()
        identity = torch.eye(self.num_grads, dtype=torch.float64, device=factor.device)
        return torch.linalg.solve_triangular(unit_lower, identity / self.damping, upper=False, unitriangular=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the window, GGᵀ, the place of the oldest gradient and λ; the tensors are the live ones, not copies."""
        return {"grads": self.grads, "gram": self.gram, "next": self._next, "damping": self.damping}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the window of another inverse, its λ included.

        Args:
            state_dict: What :meth:`state_dict` returned; copied.

        Raises:
            ValueError: It is of another number of gradients or another length.
        """
        shape = tuple(state_dict["grads"].shape)
        if shape != tuple(self.grads.shape):
            raise ValueError(
                f"state_dict must hold {self.num_grads} gradients of length {self.dim}, got a window of shape {shape}"
            )
        with torch.no_grad():
            self.grads.copy_(state_dict["grads"])
            self.gram.copy_(state_dict["gram"])
            self._next.copy_(state_dict["next"])
        self.damping = float(state_dict["damping"])
        self._cached_factor = None

    def adopt(self, state_dict: dict[str, Any]) -> None:
        """Use the tensors of a state as they are, whatever their size: the window of an optimizer that is restored.

        Args:
            state_dict: What :meth:`state_dict` returned; not copied.
        """
        self.grads, self.gram, self._next = state_dict["grads"], state_dict["gram"], state_dict["next"]
        self.damping = float(state_dict["damping"])
        self._cached_factor = None

    @torch.no_grad()
    def widen(self, columns: int) -> None:
        """Append entries to every gradient, 0 in those that are stored; GGᵀ stays as it is.

        Args:
            columns: How many.

        Raises:
            ValueError: ``columns`` < 0.

        Cost: one copy of the window.
        """
        check_integer("columns", columns, at_least=0)
        self.grads = torch.cat([self.grads, self.grads.new_zeros(self.num_grads, columns)], dim=1)

    def _checked(self, name: str, vector: Tensor) -> Tensor:
        if vector.shape != (self.dim,):
            raise ValueError(f"{name} must have shape ({self.dim},), got {tuple(vector.shape)}")
        return vector.to(self.grads.device, self.grads.dtype)

    def _replace_oldest(self, grad: Tensor) -> int:
        grad = self._checked("grad", grad)
        # One number tells of every entry, and bounds all products with rows that passed before.
        if not torch.dot(grad, grad).isfinite():
            raise ValueError("grad must be finite, and its squared norm too, got NaN or infinity")
        row = int(self._next)
        self.grads[row] = grad
        products = (self.grads @ grad).double()
        self.gram[row] = products
        self.gram[:, row] = products
        self._next.fill_((row + 1) % self.num_grads)
        self._cached_factor = None
        return row

    def _factor(self) -> Tensor:
        """Return the Cholesky factor of S: L with column i scaled by the root of pivot i."""
        if self._cached_factor is None:
            factor, failed = torch.linalg.cholesky_ex(self._shifted(self.gram))
            if failed:
                # Products in float32 leave GGᵀ indefinite where gradients are large and almost parallel.
                values, vectors = torch.linalg.eigh(self.gram)
                factor = torch.linalg.cholesky(self._shifted((vectors * values.clamp(min=0)) @ vectors.T))
            self._cached_factor = factor
        return self._cached_factor

    def _shifted(self, gram: Tensor) -> Tensor:
        shifted = gram / self.damping
        shifted.diagonal().add_(self.num_grads)
        return shifted
