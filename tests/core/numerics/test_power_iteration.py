"""Power iteration against exact eigenvalues and singular values."""

from __future__ import annotations

import pytest
import torch

from provenn.core.numerics.power_iteration import largest_eigenvalue, operator_norm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_finds_the_largest_eigenvalue_and_its_direction() -> None:
    A = torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64))
    value, v = largest_eigenvalue(A.matmul, normal(3), steps=60)
    assert value == pytest.approx(5, abs=1e-10)  # (3/5)^120
    torch.testing.assert_close(v.abs(), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_never_exceeds_the_largest_eigenvalue_and_grows(steps: int) -> None:
    B = normal(12, 8)
    A = B.T @ B
    exact = torch.linalg.eigvalsh(A)[-1].item()
    value, _ = largest_eigenvalue(A.matmul, normal(8, seed=1), steps)
    more, _ = largest_eigenvalue(A.matmul, normal(8, seed=1), steps + 1)
    assert value <= more <= exact * (1 + 1e-12)


def test_a_second_call_goes_on_where_the_first_ended() -> None:
    B = normal(12, 8)
    A = B.T @ B
    _, v = largest_eigenvalue(A.matmul, normal(8, seed=1), 3)
    value, _ = largest_eigenvalue(A.matmul, v, 4)
    assert value == pytest.approx(largest_eigenvalue(A.matmul, normal(8, seed=1), 7)[0], rel=1e-12)


def test_norm_of_a_rectangular_map() -> None:
    B = normal(12, 5)
    norm, _ = operator_norm(B.matmul, B.T.matmul, normal(5, seed=1), 300)
    assert norm == pytest.approx(torch.linalg.matrix_norm(B, 2).item(), rel=1e-9)


def test_zeros() -> None:
    zero = torch.zeros(3, 3)
    assert largest_eigenvalue(zero.matmul, torch.ones(3))[0] == 0
    assert largest_eigenvalue(torch.eye(3).matmul, torch.zeros(3))[0] == pytest.approx(1, rel=1e-6)
    assert operator_norm(zero.matmul, zero.matmul, torch.ones(3))[0] == 0


def test_bad_steps() -> None:
    with pytest.raises(ValueError, match="steps"):
        largest_eigenvalue(torch.eye(3).matmul, torch.ones(3), 0)
