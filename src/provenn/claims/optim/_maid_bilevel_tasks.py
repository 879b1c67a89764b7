"""The bilevel problems of MAID's claim: random quadratics, penalties on digits, and simulated images to denoise."""

from __future__ import annotations

import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch import Tensor

from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.seeding import generator
from provenn.core.numerics.smooth_convex import fista
from provenn.optim import BilevelProblem, BilevelQuadratic, TVDenoising, WeightedLogistic

TRAINING, VALIDATION = 600, 400


def quadratic(seed: int, size: int = 10, rows: int = 1000) -> BilevelQuadratic:
    """Draw the paper's quadratic.

    Args:
        seed: The draw.
        size: Unknowns of each level.
        rows: Rows of the matrices.
    """
    return BilevelQuadratic.random(size, rows, generator=generator(seed, "quadratic"))


def digits(seed: int, training: int = TRAINING) -> tuple[WeightedLogistic, Tensor, Tensor]:
    """Split the digits 600/400/797, pixels in [0, 1]; return the problem, and inputs and labels of the test set.

    Args:
        seed: Of the split.
        training: How many of the 600 to train on.
    """
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(seed, "digits"))
    images, labels = torch.from_numpy(x / 16.0)[order], torch.from_numpy(y).long()[order]
    held = slice(TRAINING, TRAINING + VALIDATION)
    problem = WeightedLogistic(images[:training], labels[:training], images[held], labels[held], classes=10)
    return problem, images[TRAINING + VALIDATION :], labels[TRAINING + VALIDATION :]


def piecewise_constant_images(
    count: int, side: int, draws: torch.Generator, rectangles: int = 8
) -> Float[Tensor, "count side side"]:
    """Simulate images of overlapping rectangles of constant grey, each from an eighth to half a side long.

    Args:
        count: Images.
        side: Pixels a side, at least 8.
        draws: Draws places, sizes and greys in [0, 1].
        rectangles: Rectangles in an image.

    Raises:
        ValueError: ``side`` < 8.
    """
    check_integer("side", side, at_least=8)
    images = torch.zeros(count, side, side, dtype=torch.float64)
    for image in images:
        for _ in range(rectangles):
            height, width = torch.randint(side // 8, side // 2 + 1, (2,), generator=draws).tolist()
            top, left = (int(torch.randint(side - length + 1, (), generator=draws)) for length in (height, width))
            image[top : top + height, left : left + width] = torch.rand((), dtype=torch.float64, generator=draws)
    return images


def denoising(seed: int, images: int = 6, side: int = 64, noise: float = 0.1) -> TVDenoising:
    """Add white noise to simulated images.

    Args:
        seed: Of images and noise.
        images: Count.
        side: Pixels a side.
        noise: Standard deviation.
    """
    clean = piecewise_constant_images(images, side, generator(seed, "images"))
    noisy = clean + noise * torch.randn(clean.shape, dtype=torch.float64, generator=generator(seed, "noise"))
    return TVDenoising(noisy, clean)


def exact_value(problem: BilevelProblem, theta: Tensor, x: Tensor, max_iter: int = 3000) -> float:
    """Return f(θ) by a lower solve to 10⁻⁵, in closed form for a quadratic.

    Args:
        problem: The problem.
        theta: θ.
        x: Start of the solve.
        max_iter: Most iterations.
    """
    if isinstance(problem, BilevelQuadratic):
        closed: float = problem.value(theta)
        return closed

    def objective(at: Tensor) -> tuple[Tensor, Tensor]:
        leaf = at.detach().requires_grad_()
        value = problem.lower(leaf, theta)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    mu = problem.mu(theta)
    smoothness = problem.smoothness(theta) or mu
    found = fista(objective, x, tol=1e-5 * mu, mu=mu, smoothness=smoothness, max_iter=max_iter)
    value: float = problem.upper(found.x).item()
    return value
