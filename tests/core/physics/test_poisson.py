"""The Poisson matrix against Kronecker sums, manufactured solutions and counting neighbours one by one."""

import itertools
import math

import numpy as np
import pytest
import torch

from provenn.core.physics.poisson import Cell, divergence, poisson_matrix


def one_by_one(flags, spacings):
    """Count neighbours of every cell in a loop."""
    shape = flags.shape
    A = np.zeros((flags.numel(),) * 2)
    for place in itertools.product(*map(range, shape)):
        row = np.ravel_multi_index(place, shape)
        if flags[place] != 0:
            continue
        for axis, shift in itertools.product(range(len(shape)), (-1, 1)):
            beside = tuple(p + shift * (a == axis) for a, p in enumerate(place))
            inside = all(0 <= p < side for p, side in zip(beside, shape, strict=True))
            kind = int(flags[beside]) if inside else 1
            if kind != 2:
                A[row, row] += 1 / spacings[axis] ** 2
            if kind == 0:
                A[row, np.ravel_multi_index(beside, shape)] -= 1 / spacings[axis] ** 2
    return A


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 3)])
def test_matrix_by_counting_neighbours(shape):
    flags = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(1))
    spacings = [0.5, 1.0, 2.0][: len(shape)]
    np.testing.assert_allclose(poisson_matrix(flags, spacings).to_dense(), one_by_one(flags, spacings))


def test_open_box_has_the_known_eigenvalues():
    n, m = 5, 7
    A = poisson_matrix(torch.zeros(n, m, dtype=torch.int64)).to_dense()
    line = [[4 * math.sin(math.pi * k / (2 * (s + 1))) ** 2 for k in range(1, s + 1)] for s in (n, m)]
    expected = sorted(a + b for a in line[0] for b in line[1])
    np.testing.assert_allclose(torch.linalg.eigvalsh(A), expected, atol=1e-12)


def test_closed_box_keeps_constants():
    flags = torch.nn.functional.pad(torch.zeros(3, 4, dtype=torch.int64), (1, 1, 1, 1), value=int(Cell.NEUMANN))
    A = poisson_matrix(flags).to_dense()
    fluid = (flags == 0).flatten().double()
    assert (A @ fluid).abs().max() < 1e-12
    assert int((torch.linalg.eigvalsh(A[fluid.bool()][:, fluid.bool()]) < 1e-10).sum()) == 1


def test_second_order_in_the_spacing():
    errors = []
    for n in (16, 32):
        h = 1 / (n + 1)
        x = torch.arange(1, n + 1, dtype=torch.float64) * h
        u = torch.sin(math.pi * x)[:, None] * torch.sin(2 * math.pi * x)
        A = poisson_matrix(torch.zeros(n, n, dtype=torch.int64), h)
        errors.append((A @ u.flatten() - 5 * math.pi**2 * u.flatten()).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx((33 / 17) ** 2, rel=0.05)


def test_matrix_is_minus_the_divergence_of_the_gradient():
    flags = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(3))
    p = torch.where(flags == 0, torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double(), 0.0)
    gradients = []
    for axis in range(2):
        pads = (0, 0, 1, 1) if axis == 0 else (1, 1, 0, 0)
        gradients.append(torch.nn.functional.pad(p, pads).diff(dim=axis) / 0.5)
    expected = -divergence(gradients, flags, 0.5).flatten()
    torch.testing.assert_close(poisson_matrix(flags, 0.5) @ p.flatten(), expected)


def test_divergence_of_linear_velocity_and_solid_faces():
    flags = torch.zeros(4, 4, dtype=torch.int64)
    u = 3 * torch.arange(5, dtype=torch.float64)[:, None].expand(5, 4)
    v = -torch.arange(5, dtype=torch.float64).expand(4, 5)
    assert torch.equal(divergence((u, v), flags), torch.full((4, 4), 2.0).double())
    flags[1, 1] = int(Cell.NEUMANN)
    blocked = divergence((u, v), flags)
    assert blocked[1, 1] == 0
    assert blocked[0, 1] == 2 - 3 * 1  # the face below it, where u = 3, is closed
    assert blocked[1, 2] == 2 - 2  # the face to its left, where v = −2, is closed


def test_closed_region_has_no_net_source():
    flags = torch.nn.functional.pad(torch.zeros(3, 3, dtype=torch.int64), (1, 1, 1, 1), value=int(Cell.NEUMANN))
    draws = torch.Generator().manual_seed(0)
    velocity = (torch.randn(6, 5, generator=draws), torch.randn(5, 6, generator=draws))
    assert divergence(velocity, flags).sum().abs() < 1e-5


def test_wrong_velocities_are_refused():
    flags = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"velocity\[1\] must have shape \(3, 5\)"):
        divergence((torch.zeros(4, 4), torch.zeros(3, 4)), flags)
    with pytest.raises(ValueError, match="velocity must have 2 components"):
        divergence((torch.zeros(4, 4),), flags)
