"""SPDNet: layers that map symmetric positive definite matrices to such, and a classifier of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.precision import full_precision
from provenn.core.numerics.spd import clamp_eigenvalues, spd_log
from provenn.nn._gbw_batchnorm_checks import check_channels, check_spd, check_symmetric

Batch = Float[Tensor, "batch channels n n"]


class BiMap(nn.Module):
    """Bilinear maps W X Wᵀ of symmetric matrices by matrices W of orthonormal rows.

    Output channel o is Σ_i W_oi X_i W_oiᵀ.

    Args:
        in_size: Size n of the input matrices.
        out_size: Size m ≤ n of the output matrices.
        in_channels: Input channels.
        out_channels: Output channels.
        device: Where the weights are.
        dtype: Their type.

    Shape:
        (N, in_channels, n, n) to (N, out_channels, m, m); ``weight`` (out_channels, in_channels, m, n), on the Stiefel
        manifold: :class:`RiemannianSGD` keeps its rows orthonormal.

    Raises:
        TypeError: A size is no integer, or the input is not of the weight's dtype.
        ValueError: A size is below 1, ``out_size`` exceeds ``in_size``, or the input has another shape or is not
            symmetric.

    Warns:
        UserWarning: The input is float32.

    Cost: O(N · in_channels · out_channels · m n²).

    Source: Huang & Van Gool, "A Riemannian Network for SPD Matrix Learning" (AAAI 2017), equation 2.
    """

    manifolds: ClassVar[dict[str, str]] = {"weight": "stiefel"}

    def __init__(
        self,
        in_size: int,
        out_size: int,
        in_channels: int = 1,
        out_channels: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_integer("in_size", in_size, at_least=1)
        check_integer("out_size", out_size, at_least=1, at_most=in_size)
        check_integer("in_channels", in_channels, at_least=1)
        check_integer("out_channels", out_channels, at_least=1)
        super().__init__()
        self.in_size, self.out_size = in_size, out_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, out_size, in_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights uniformly among matrices of orthonormal rows."""
        for matrix in self.weight.flatten(0, 1):
            nn.init.orthogonal_(matrix)

    def forward(self, X: Batch) -> Float[Tensor, "batch out_channels m m"]:
        """Map a batch.

        Args:
            X: Symmetric matrices.

        Returns:
            Symmetric matrices; positive definite ones of such.
        """
        check_channels("X", X, self.in_channels, self.in_size, self.weight.dtype)
        check_symmetric("X", X)
        with full_precision(X.device):
            return (self.weight @ X[:, None] @ self.weight.mT).sum(2)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_size}, {self.out_size}, in_channels={self.in_channels}, out_channels={self.out_channels}"


class ReEig(nn.Module):
    """Raise the eigenvalues of symmetric matrices to at least a minimum: SPDNet's nonlinearity.

    Args:
        minimum: ε > 0. The paper that brought the layer has 1e-4; the code of GBW batch normalisation 1e-5.

    Shape:
        (…, n, n) to the same.

    Raises:
        TypeError: ``minimum`` is no number, or the input is neither float64 nor float32.
        ValueError: ``minimum`` ≤ 0, or the input is not symmetric.

    Warns:
        UserWarning: The input is float32.

    Cost: one eigendecomposition a matrix, O(n³). The gradient is finite at equal eigenvalues.

    Source: Huang & Van Gool (AAAI 2017), equation 3.
    """

    def __init__(self, minimum: float = 1e-4) -> None:
        check_number("minimum", minimum, above=0)
        super().__init__()
        self.minimum = minimum

    def forward(self, X: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
        """Rectify.

        Args:
            X: Symmetric matrices.

        Returns:
            Matrices whose eigenvalues are at least ε.
        """
        check_symmetric("X", X)
        with full_precision(X.device):
            return clamp_eigenvalues(X, self.minimum)

    def extra_repr(self) -> str:
        """Show ε."""
        return f"minimum={self.minimum}"


class LogEig(nn.Module):
    """Take the logarithm of symmetric positive definite matrices, where distances become Euclidean.

    Shape:
        (…, n, n) to the same, symmetric.

    Raises:
        TypeError: The input is neither float64 nor float32.
        ValueError: The input is not symmetric positive definite; the message has the smallest eigenvalue.

    Warns:
        UserWarning: The input is float32.

    Cost: one eigendecomposition a matrix, O(n³). The gradient is finite at equal eigenvalues.

    Source: Huang & Van Gool (AAAI 2017), equation 4.
    """

    def forward(self, X: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
        """Take the logarithm.

        Args:
            X: Symmetric positive definite matrices.

        Returns:
            Symmetric matrices.
        """
        check_spd("X", X)
        with full_precision(X.device):
            return spd_log(X)


class SPDNet(nn.Module):
    """Classify symmetric positive definite matrices: (BiMap, norm, ReEig) a stage, then LogEig and a linear layer.

    Args:
        dims: Sizes of the matrices, that of the input first: (12, 8, 4) has two stages.
        classes: Number of classes.
        norm: Builds the normalisation after every BiMap from the matrices' size, such as :class:`GBWBatchNorm`.
            ``None`` leaves it out.
        minimum: ε of ReEig.
        device: Where the weights are.
        dtype: Their type, which ``norm`` must also have.

    Shape:
        (N, 1, n, n) to (N, classes).

    Raises:
        TypeError: A size is no integer, ``norm`` cannot be called, or the input is not of the weights' dtype.
        ValueError: ``dims`` has fewer than two sizes or rises, another number is out of bounds, or the input has
            another shape or is not symmetric positive definite.

    Warns:
        UserWarning: The input is float32.

    Cost: two eigendecompositions a matrix and stage beside those of the norm.

    Source: Huang & Van Gool (AAAI 2017); the order of norm and ReEig is that of the paper's code.
    """

    def __init__(
        self,
        dims: Sequence[int],
        classes: int,
        norm: Callable[[int], nn.Module] | None = None,
        minimum: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        sizes = tuple(dims)
        if len(sizes) < 2:
            raise ValueError(f"dims must have the size of the input and of at least one stage, got {dims!r}")
        for place, size in enumerate(sizes):
            check_integer(f"dims[{place}]", size, at_least=1, at_most=sizes[place - 1] if place else None)
        check_integer("classes", classes, at_least=1)
        if norm is not None and not callable(norm):
            raise TypeError(f"norm must be None or build a module from a size, got {norm!r}")
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            stages.append(BiMap(before, after, device=device, dtype=dtype))
            stages += [] if norm is None else [norm(after)]
            stages.append(ReEig(minimum))
        self.size = sizes[0]
        self.features = nn.Sequential(*stages, LogEig())
        self.head = nn.Linear(sizes[-1] ** 2, classes, device=device, dtype=dtype)

    def forward(self, X: Float[Tensor, "batch 1 n n"]) -> Float[Tensor, "batch classes"]:
        """Classify a batch.

        Args:
            X: Symmetric positive definite matrices.

        Returns:
            The logits.
        """
        check_channels("X", X, 1, self.size, self.head.weight.dtype)
        check_spd("X", X)
        logits: Tensor = self.head(self.features(X).flatten(1))
        return logits
