"""Bilevel problems: a quadratic with closed forms, penalties of logistic regression, and learned denoising."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer
from provenn.optim._maid_bilevel_hypergradient import LipschitzConstants


class BilevelProblem(ABC):
    """A bilevel problem min_θ g(x̂(θ)), x̂(θ) = argmin_x h(x, θ), with a start and constants.

    Attributes:
        theta0: Start of θ.
        x0: Start of x.

    Raises:
        TypeError: A subclass does not say what its levels are.

    Source: arXiv 2308.10098, section 1.
    """

    theta0: Tensor
    x0: Tensor

    @abstractmethod
    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return h(x, θ)."""

    @abstractmethod
    def upper(self, x: Tensor) -> Tensor:
        """Return g(x)."""

    @abstractmethod
    def mu(self, theta: Tensor) -> float:
        """Return the constant of strong convexity of h(·, θ)."""

    def smoothness(self, theta: Tensor) -> float | None:
        """Return a Lipschitz constant of ∇_x h(·, θ), or None where none is known."""
        return None

    def lipschitz(self, theta: Tensor) -> LipschitzConstants:
        """Return the constants of the hypergradient's bound at θ, as far as they are known."""
        return LipschitzConstants()

    def constants(self) -> dict[str, Any]:
        """Return what a solver takes by name: ``x0``, ``lipschitz``, and ``smoothness`` where it is known."""
        known = self.smoothness(self.theta0) is not None
        return {"x0": self.x0, "lipschitz": self.lipschitz, "smoothness": self.smoothness if known else None}


class BilevelQuadratic(BilevelProblem):
    """h = ½‖A₂x + A₃θ − b₂‖², g = ½‖A₁x − b₁‖²: all is known in closed form.

    Args:
        A1: A₁.
        b1: b₁.
        A2: A₂, of full column rank.
        A3: A₃.
        b2: b₂.

    Shape:
        ``A1`` (rows, n), ``b1`` (rows,), ``A2`` (more, n), ``A3`` (more, m), ``b2`` (more,); θ (m,), x (n,).

    Raises:
        ValueError: A₂ has not full column rank, so h is not strongly convex.

    Cost: O((rows + more)(n + m)) a gradient; closed forms O(n³) once.

    Source: arXiv 2308.10098, the section on a quadratic problem.
    """

    def __init__(
        self,
        A1: Float[Tensor, "rows n"],
        b1: Float[Tensor, " rows"],
        A2: Float[Tensor, "more n"],
        A3: Float[Tensor, "more m"],
        b2: Float[Tensor, " more"],
    ) -> None:
        self.A1, self.b1, self.A2, self.A3, self.b2 = A1, b1, A2, A3, b2
        eigenvalues = torch.linalg.eigvalsh(A2.T @ A2)
        self._mu, self._smoothness = eigenvalues[0].item(), eigenvalues[-1].item()
        if not self._mu > len(eigenvalues) * torch.finfo(A2.dtype).eps * self._smoothness:
            raise ValueError(f"A2 must have full column rank, but A2ᵀA2 has the eigenvalue {self._mu:.3g}")
        self._upper_smoothness = torch.linalg.eigvalsh(A1.T @ A1)[-1].clamp(min=0).item()
        self.theta0 = torch.ones_like(A3[0])
        self.x0 = torch.zeros_like(A2[0])

    @classmethod
    def random(
        cls, size: int = 10, rows: int = 1000, noise: float = 0.01, generator: torch.Generator | None = None
    ) -> BilevelQuadratic:
        """Draw the paper's problem: matrices uniform on [0, 1], right-hand sides of a common truth plus noise.

        Args:
            size: n = m.
            rows: Rows of every matrix.
            noise: Standard deviation of the noise.
            generator: Draws it all; ``None``: torch's global generator.

        Raises:
            ValueError: ``size`` < 1 or ``rows`` < ``size``.
        """
        check_integer("size", size, at_least=1)
        check_integer("rows", rows, at_least=size)
        options: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
        A1, A2, A3 = (torch.rand(rows, size, **options) for _ in range(3))
        x1, x2, theta = (torch.rand(size, **options) for _ in range(3))
        first, second = (noise * torch.randn(rows, **options) for _ in range(2))
        return cls(A1, A1 @ x1 + first, A2, A3, A2 @ x2 + A3 @ theta + second)

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return ½‖A₂x + A₃θ − b₂‖²."""
        return 0.5 * (self.A2 @ x + self.A3 @ theta - self.b2).square().sum()

    def upper(self, x: Tensor) -> Tensor:
        """Return ½‖A₁x − b₁‖²."""
        return 0.5 * (self.A1 @ x - self.b1).square().sum()

    def mu(self, theta: Tensor) -> float:
        """Return the smallest eigenvalue of A₂ᵀA₂."""
        return self._mu

    def smoothness(self, theta: Tensor) -> float:
        """Return the largest eigenvalue of A₂ᵀA₂."""
        return self._smoothness

    def lipschitz(self, theta: Tensor) -> LipschitzConstants:
        """Return L_g, and zeros: H and J are constant."""
        return LipschitzConstants(self._upper_smoothness, 0.0, 0.0)

    def solution(self, theta: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """Return x̂(θ)."""
        return torch.linalg.lstsq(self.A2, (self.b2 - self.A3 @ theta).unsqueeze(1)).solution.squeeze(1)

    def value(self, theta: Float[Tensor, " m"]) -> float:
        """Return f(θ)."""
        return self.upper(self.solution(theta)).item()

    def gradient(self, theta: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return ∇f(θ)."""
        return self._sensitivity().T @ (self.A1.T @ (self.A1 @ self.solution(theta) - self.b1))

    def optimum(self) -> Float[Tensor, " m"]:
        """Return the θ of least norm that minimises f."""
        constant = self.A1 @ self.solution(torch.zeros_like(self.theta0)) - self.b1
        return -torch.linalg.pinv(self.A1 @ self._sensitivity()) @ constant

    def _sensitivity(self) -> Tensor:
        """Return dx̂/dθ."""
        return -torch.linalg.lstsq(self.A2, self.A3).solution


class WeightedLogistic(BilevelProblem):
    """Multinomial logistic regression with one penalty exp(θ_j) for each weight, chosen by a validation set.

    h = mean cross-entropy on the training set + ½ Σ_j exp(θ_j) x_j²; g = mean cross-entropy on the validation set.

    Args:
        x_train: Training inputs.
        y_train: Training labels.
        x_validation: Validation inputs.
        y_validation: Validation labels.
        classes: Number of classes.
        log_penalty: Start of every θ_j.

    Shape:
        ``x_train`` (samples, features), ``y_train`` (samples,), ``x_validation`` (held, features), ``y_validation``
        (held,); θ (features · classes,), x (features, classes).

    Raises:
        ValueError: ``classes`` < 2, or a set is empty.

    Cost: O(samples · features · classes) a gradient of h.

    Source: arXiv 2308.10098, the section on multinomial logistic regression; Pedregosa, ICML 2016.
    """

    def __init__(
        self,
        x_train: Float[Tensor, "samples features"],
        y_train: Int[Tensor, " samples"],
        x_validation: Float[Tensor, "held features"],
        y_validation: Int[Tensor, " held"],
        classes: int,
        log_penalty: float = -3.0,
    ) -> None:
        check_integer("classes", classes, at_least=2)
        for name, some in (("x_train", x_train), ("x_validation", x_validation)):
            if len(some) == 0:
                raise ValueError(f"{name} must hold at least one sample, got none")
        self._train, self._validation = (x_train, y_train), (x_validation, y_validation)
        # The softmax's Hessian is at most ½ I.
        self._data_smoothness, self._upper_smoothness = (
            0.5 * torch.linalg.matrix_norm(some, 2).square().item() / len(some) for some in (x_train, x_validation)
        )
        self.x0 = x_train.new_zeros(x_train.shape[1], classes)
        self.theta0 = torch.full_like(self.x0, log_penalty).flatten()

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return the penalised training loss."""
        inputs, labels = self._train
        return F.cross_entropy(inputs @ x, labels) + 0.5 * theta.exp().dot(x.flatten().square())

    def upper(self, x: Tensor) -> Tensor:
        """Return the validation loss."""
        inputs, labels = self._validation
        return F.cross_entropy(inputs @ x, labels)

    def mu(self, theta: Tensor) -> float:
        """Return the smallest penalty."""
        return theta.min().exp().item()

    def smoothness(self, theta: Tensor) -> float:
        """Return λ_max(AᵀA)/(2 samples) plus the largest penalty."""
        return self._data_smoothness + theta.max().exp().item()

    def lipschitz(self, theta: Tensor) -> LipschitzConstants:
        """Return L_g, and L_J = max exp(θ_j), since J = diag(exp(θ_j) x_j)."""
        return LipschitzConstants(self._upper_smoothness, theta.max().exp().item())


class TVDenoising(BilevelProblem):
    """Denoising by smoothed total variation, θ = (log weight, log smoothing), learned from clean images.

    h = ½‖x − y‖² + ½ e^{θ₁} Σ √(d² + e^{2θ₂}) over the differences d of neighbours; g = ‖x − clean‖²/(2 · images).

    Args:
        noisy: Noisy images y.
        clean: Clean images.
        theta0: Start; ``None``: (−5, −5).

    Shape:
        ``noisy``, ``clean`` and x (images, height, width); θ (2,).

    Raises:
        ValueError: There is no image, or a shape differs.

    Cost: O(pixels) a gradient.

    Source: arXiv 2308.10098, the section on total-variation denoising; the anisotropic form, the factor ½ and the start
    as in the authors' code. Without its division of h by the number of images, μ = 1 as the code has it.
    """

    def __init__(
        self,
        noisy: Float[Tensor, "images height width"],
        clean: Float[Tensor, "images height width"],
        theta0: Float[Tensor, "2"] | None = None,
    ) -> None:
        self.noisy, self.clean = _same_images(noisy, clean)
        self.theta0 = noisy.new_full((2,), -5.0) if theta0 is None else theta0.to(noisy)
        if self.theta0.shape != (2,):
            raise ValueError(f"theta0 must have shape (2,), got {tuple(self.theta0.shape)}")
        self.x0 = noisy

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return ½‖x − y‖² plus the weighted, smoothed total variation."""
        smoothing = (2 * theta[1]).exp()
        variation = sum((x.diff(dim=dim).square() + smoothing).sqrt().sum() for dim in (1, 2))
        return 0.5 * (x - self.noisy).square().sum() + 0.5 * theta[0].exp() * variation

    def upper(self, x: Tensor) -> Tensor:
        """Return the squared error, half a mean over the images."""
        return 0.5 * (x - self.clean).square().sum() / len(self.clean)

    def mu(self, theta: Tensor) -> float:
        """Return 1."""
        return 1.0

    def smoothness(self, theta: Tensor) -> float:
        """Return 1 + 4 e^{θ₁ − θ₂}: differences have a squared norm of 8, and √(d² + ν²) bends by 1/ν at most."""
        return 1 + 4 * _exp(theta[0] - theta[1])

    def lipschitz(self, theta: Tensor) -> LipschitzConstants:
        """Return L_g."""
        return LipschitzConstants(1 / len(self.clean))


class FoEDenoising(BilevelProblem):
    """Denoising by a field of experts: θ holds filters c_k, their weights and smoothings; h is convex.

    h = ½‖x − y‖² + ½ e^{θ₀} Σ_k e^{w_k} Σ √((c_k ∗ x)² + e^{2ν_k}), g as in :class:`TVDenoising`; the filters see the
    image mirrored at its border. θ = (θ₀, w, ν, c), laid end to end.

    Args:
        noisy: Noisy images y.
        clean: Clean images.
        num_filters: Number of filters.
        kernel_size: Side of a filter, odd.
        generator: Draws the filters of the start, normal with deviation 1/side and mean removed; ``None``: torch's
            global generator.

    Shape:
        ``noisy``, ``clean`` and x (images, height, width); θ (1 + num_filters · (2 + kernel_size²),).

    Raises:
        ValueError: There is no image, a shape differs, ``num_filters`` < 1, or ``kernel_size`` is even, below 1, or
            does not fit the images.

    Cost: O(pixels · num_filters · kernel_size²) a gradient.

    Source: arXiv 2308.10098, the section on fields of experts; Roth & Black, IJCV 82 (2009).
    """

    def __init__(
        self,
        noisy: Float[Tensor, "images height width"],
        clean: Float[Tensor, "images height width"],
        num_filters: int = 48,
        kernel_size: int = 7,
        generator: torch.Generator | None = None,
    ) -> None:
        self.noisy, self.clean = _same_images(noisy, clean)
        check_integer("num_filters", num_filters, at_least=1)
        check_integer("kernel_size", kernel_size, at_least=1)
        if kernel_size % 2 == 0 or kernel_size // 2 >= min(noisy.shape[1:]):
            raise ValueError(f"kernel_size must be odd and fit images of {tuple(noisy.shape[1:])}, got {kernel_size}")
        self._num_filters, self._kernel_size = num_filters, kernel_size
        shape = (num_filters, kernel_size * kernel_size)
        device = noisy.device if generator is None else generator.device
        filters = torch.randn(shape, dtype=noisy.dtype, device=device, generator=generator).to(noisy.device)
        filters = (filters - filters.mean(dim=1, keepdim=True)) / kernel_size
        logs = [noisy.new_full((count,), log) for count, log in ((1 + num_filters, -3.0), (num_filters, -3.5))]
        self.theta0 = torch.cat([*logs, filters.flatten()])
        self.x0 = noisy

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return ½‖x − y‖² plus the weighted, smoothed responses of the filters."""
        count, side = self._num_filters, self._kernel_size
        scale, weights, smoothings, filters = theta.split([1, count, count, count * side * side])
        padded = F.pad(x.unsqueeze(1), (side // 2,) * 4, mode="reflect")
        responses = F.conv2d(padded, filters.view(count, 1, side, side))
        smooth = (responses.square() + (2 * smoothings).exp().view(1, count, 1, 1)).sqrt()
        penalty = weights.exp().dot(smooth.sum(dim=(0, 2, 3)))
        return 0.5 * (x - self.noisy).square().sum() + 0.5 * scale.exp().squeeze() * penalty

    def upper(self, x: Tensor) -> Tensor:
        """Return the squared error, half a mean over the images."""
        return 0.5 * (x - self.clean).square().sum() / len(self.clean)

    def mu(self, theta: Tensor) -> float:
        """Return 1."""
        return 1.0

    def lipschitz(self, theta: Tensor) -> LipschitzConstants:
        """Return L_g."""
        return LipschitzConstants(1 / len(self.clean))


def _same_images(noisy: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    if noisy.ndim != 3 or noisy.numel() == 0:
        raise ValueError(f"noisy must hold images (images, height, width), got shape {tuple(noisy.shape)}")
    if clean.shape != noisy.shape:
        raise ValueError(f"clean must have noisy's shape {tuple(noisy.shape)}, got {tuple(clean.shape)}")
    return noisy, clean


def _exp(value: Tensor) -> float:
    """Return exp as a number, infinite where it overflows."""
    return math.inf if value.item() > 700 else math.exp(value.item())
