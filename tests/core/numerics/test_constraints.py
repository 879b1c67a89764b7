"""Constrained weights: singular values by LAPACK, and layers under optimizers that pull against the constraint."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from provenn.core.numerics.constraints import (
    Bjorck,
    Cayley,
    NonNegative,
    SpectralBound,
    convolution_bound,
    spectral_norm,
)

SHAPES = [(5, 5), (8, 3), (3, 8), (1, 6), (6, 1), (4, 2, 3, 3)]


def randn(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def singular_values(weight):
    return torch.linalg.svdvals(weight.flatten(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spectral_norm_never_exceeds_its_bound(shape, scale, dtype):
    for seed in range(20):
        weight = randn(*shape, seed=seed, scale=scale, dtype=dtype)
        for always in (False, True):
            # LAPACK's own values are rounded: one part in 1e6 in float32.
            assert singular_values(SpectralBound(0.7, always)(weight)).max() <= 0.7 * (
                1 + (1e-6 if dtype == torch.float32 else 0)
            )


def test_a_weight_within_the_bound_is_left_alone_unless_always():
    weight = 0.1 * torch.eye(3)
    assert torch.equal(SpectralBound(1.0)(weight), weight)
    torch.testing.assert_close(SpectralBound(1.0, always=True)(weight), torch.eye(3))
    assert torch.equal(SpectralBound(always=True)(torch.zeros(3, 3)), torch.zeros(3, 3))


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-30])
def test_gradients_of_tiny_and_zero_weights_are_finite(scale, always):
    """Below the bound the gradient passes; scaled up it is that of W / ‖W‖, which grows as 1 / ‖W‖, and k at zero."""
    if always and scale == 1e-30:
        scale = 1e-15  # the square of the inverse norm is still in float32's range
    weight = torch.full((4, 3), scale, requires_grad=True)
    (gradient,) = torch.autograd.grad((SpectralBound(0.5, always)(weight) * torch.eye(4, 3)).sum(), weight)
    assert gradient.isfinite().all()
    if not always:
        assert torch.equal(gradient, torch.eye(4, 3))
    elif scale == 0:
        torch.testing.assert_close(gradient, 0.5 * torch.eye(4, 3))


def test_nonnegative_weights_may_be_made_without_storage():
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", NonNegative())
    assert layer.weight.shape == (2, 3)


def test_nonnegative_weights_make_a_network_convex_while_an_optimizer_pulls():
    """Midpoints of random and of searched segments; without the constraint a gap opens at once."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(3, 8, dtype=torch.float64), nn.Linear(8, 2, dtype=torch.float64)
    with torch.no_grad():
        outer.weight.abs_()
    parametrize.register_parametrization(outer, "weight", NonNegative())
    optimizer = torch.optim.SGD([*inner.parameters(), *outer.parameters()], lr=1.0)
    ends = randn(2, 64, 3, seed=1).requires_grad_()

    def network(x):
        return outer(F.softplus(inner(x)))

    def gap():
        return network(ends.mean(0)) - network(ends).mean(0)

    for _ in range(20):
        optimizer.zero_grad()
        (-gap().sum()).backward()  # the optimizer lowers convexity, the segments look for where it is lost
        with torch.no_grad():
            ends -= 0.1 * ends.grad.sign()
        ends.grad = None
        for parameter in (*inner.parameters(), *outer.parameters()):
            parameter.grad.clamp_(-1, 1)
        optimizer.step()
        assert gap().max() <= 1e-12 * max(1.0, network(ends).abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_cayley_is_orthonormal_exactly(shape, seed):
    weight = Cayley(bound=2.0)(randn(*shape, seed=seed, scale=3.0))
    assert weight.shape == shape
    torch.testing.assert_close(singular_values(weight), torch.full_like(singular_values(weight), 2.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_bjorck_approaches_from_below_and_finds_the_nearest_orthonormal_matrix(shape, seed):
    start = randn(*shape, seed=seed)
    values = singular_values(start)
    weight = Bjorck(iterations=60, bound=2.0)(start)
    assert singular_values(Bjorck(iterations=3)(start)).max() <= 1 + 1e-12
    if values.min() / values.max() > 1e-3:
        torch.testing.assert_close(singular_values(weight), torch.full_like(values, 2.0))
        U, _, Vh = torch.linalg.svd(start.flatten(1), full_matrices=False)
        torch.testing.assert_close(weight.flatten(1), 2 * U @ Vh)


@pytest.mark.parametrize("method", ["softplus", "relu"])
def test_nonnegative_and_its_inverse(method):
    constraint = NonNegative(method)
    assert constraint(randn(50, scale=10.0)).min() >= 0
    for value in (0.0, 1e-9, 0.3, 50.0):
        weight = torch.tensor([value], dtype=torch.float64)
        torch.testing.assert_close(constraint(constraint.right_inverse(weight)), weight, rtol=1e-12, atol=1e-300)
    with pytest.raises(ValueError, match="weight must be ≥ 0, got -1"):
        constraint.right_inverse(torch.tensor([-1.0]))


@pytest.mark.parametrize("constraint", [SpectralBound(1.0), SpectralBound(1.0, always=True), Bjorck(), Cayley()])
def test_a_layer_stays_lipschitz_while_an_optimizer_pulls(constraint):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", constraint)
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    x = randn(32, 6, seed=1)
    for _ in range(20):
        optimizer.zero_grad()
        (-layer(x).square().mean()).backward()
        optimizer.step()
        # The Cayley map solves a system whose condition number grows with the weights.
        assert torch.linalg.svdvals(layer.weight).max() <= 1 + 1e-9
    gaps = (layer(x) - layer(x.flip(0))).norm(dim=1) / (x - x.flip(0)).norm(dim=1)
    assert gaps.max() <= 1 + 1e-9


@pytest.mark.parametrize("constraint", [SpectralBound(1.0), SpectralBound(1.0, always=True), Bjorck(), Cayley()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 32), (8, 3), (3, 8)])
def test_half_precision_is_off_by_the_rounding_of_the_entries_alone(constraint, dtype, shape):
    start = randn(*shape, seed=1).to(dtype)
    weight = constraint(start)
    assert weight.dtype == dtype
    # Each entry is off by half a unit in the last place, and the factor of a scaled weight too.
    torch.testing.assert_close(weight.float(), constraint(start.float()), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("constraint", [SpectralBound(1.0), Bjorck(), Cayley()])
def test_autocast_does_not_loosen_the_bound(constraint):
    start = randn(32, 16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        weight = constraint(start)
    assert torch.equal(weight, constraint(start))
    assert singular_values(weight.double()).max() <= 1 + 1e-5


@pytest.mark.parametrize("constraint", [SpectralBound(1.0, always=True), Bjorck(), Cayley()])
def test_a_vector_is_one_column(constraint):
    weight = constraint(randn(5, seed=1))
    assert weight.shape == (5,)
    assert weight.norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("constraint", [NonNegative(), SpectralBound(0.5), Bjorck(4), Cayley()])
def test_gradients(constraint):
    for shape in ((3, 2), (2, 3)):
        assert torch.autograd.gradcheck(constraint, (randn(*shape, seed=5).requires_grad_(),))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_stays_below_its_factor(stride):
    """Against the norm of the convolution as a dense matrix; a kernel of equal entries comes close on a large image."""
    worst = 0.0
    for seed in range(4):
        kernel = randn(2, 3, 3, 3, seed=seed) if seed else torch.ones(1, 1, 3, 3, dtype=torch.float64)
        channels = kernel.shape[1]
        images = torch.eye(channels * 144, dtype=torch.float64).view(-1, channels, 12, 12)
        dense = F.conv2d(images, kernel, stride=stride, padding=1).flatten(1)
        ratio = torch.linalg.matrix_norm(dense, 2) / spectral_norm(kernel)
        worst = max(worst, ratio.item())
    bound = convolution_bound((3, 3), stride)
    assert 0.5 * bound < worst <= bound + 1e-12


def test_bad_input():
    for make in (lambda: SpectralBound(0.0), lambda: Bjorck(bound=-1.0), lambda: Cayley(0)):
        with pytest.raises(ValueError, match="bound"):
            make()
    with pytest.raises(ValueError, match="iterations"):
        Bjorck(0)
    with pytest.raises(ValueError, match="softplus or relu"):
        NonNegative("exp")
    with pytest.raises(ValueError, match="kernel_size and stride"):
        convolution_bound((0,))
