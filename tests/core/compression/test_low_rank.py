"""Canonical and Tucker forms, against plain loops, singular values, TensorLy and what no approximation can do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from provenn.core.compression.low_rank import alternating_sweep, canonical_factors, canonical_tensor, tucker_factors


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(tensors: torch.Tensor, rank: int, **options: int) -> torch.Tensor:
    fitted = canonical_tensor(canonical_factors(tensors, rank, **options))
    return (tensors - fitted).flatten(1).norm(dim=1)


@pytest.mark.parametrize("sizes", [(2, 3), (4, 2, 3), (2, 3, 2, 3)])
def test_the_tensor_is_the_sum_of_outer_products(sizes: tuple[int, ...]):
    factors = [randn(2, size, 3, seed=size) for size in sizes]
    found = canonical_tensor(factors)
    for batch in range(2):
        for place in itertools.product(*map(range, sizes)):
            terms = [math.prod(f[batch, i, r].item() for f, i in zip(factors, place, strict=True)) for r in range(3)]
            assert found[(batch, *place)].item() == pytest.approx(sum(terms), abs=1e-12)


def test_two_modes_give_the_truncated_svd():
    matrices = randn(3, 6, 5)
    for rank in (1, 2, 4):
        tail = torch.linalg.svdvals(matrices)[:, rank:].norm(dim=1)
        torch.testing.assert_close(error(matrices, rank), tail, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [(2, 3, 3), (3, 2, 4), (4, 3, 2), (2, 2, 2, 2), (5, 1, 3)])
def test_enough_terms_give_the_tensor_itself(sizes: tuple[int, ...]):
    tensors = randn(3, *sizes)
    enough = math.prod(sizes) // max(sizes)
    for rank in (enough, enough + 2):
        assert error(tensors, rank).max() < 1e-12
    assert all(
        f.shape == (3, n, enough + 2) for f, n in zip(canonical_factors(tensors, enough + 2), sizes, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_error_never_grows_with_the_rank(seed: int):
    tensors = randn(4, 5, 4, 3, seed=seed)
    errors = torch.stack([error(tensors, rank, iterations=8) for rank in range(1, 14)])
    assert (errors.diff(dim=0) <= 1e-10).all()
    assert (errors[0] < 0.95 * tensors.flatten(1).norm(dim=1)).all(), "one term must already help"


@pytest.mark.parametrize("seed", range(4))
def test_the_error_never_grows_from_sweep_to_sweep(seed: int):
    tensors, factors = randn(4, 5, 4, 3, seed=seed), [randn(4, n, 3, seed=10 * seed + n) for n in (5, 4, 3)]
    errors = []
    for _ in range(20):
        factors = alternating_sweep(tensors, factors)
        errors.append((tensors - canonical_tensor(factors)).flatten(1).norm(dim=1))
    changes = torch.stack(errors).diff(dim=0)
    assert (changes <= 1e-11).all()
    assert changes[0].max() < -1e-4, "a sweep must do something"


@pytest.mark.parametrize("iterations", [1, 3, 10, 30])
def test_more_sweeps_of_one_term_are_no_worse(iterations: int):
    tensors = randn(6, 5, 4, 3)
    assert (error(tensors, 1, iterations=2 * iterations) <= error(tensors, 1, iterations=iterations) + 1e-12).all()


def test_a_tensor_of_low_rank_is_found():
    planted = canonical_tensor([randn(5, n, 2, seed=n) for n in (8, 6, 7)])
    assert (error(planted, 2, iterations=200) < 1e-5 * planted.flatten(1).norm(dim=1)).all()


def test_one_term_is_as_good_as_any_search_finds():
    tensors = randn(2, 2, 2, 2)
    angles = torch.linspace(0, math.pi, 181, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()])
    # the best term's weight is the largest value of the tensor on unit vectors
    best = torch.einsum("bxyz,xi,yj,zk->bijk", tensors, circle, circle, circle).flatten(1).abs().amax(dim=1)
    least = (tensors.flatten(1).square().sum(dim=1) - best.square()).sqrt()
    assert (error(tensors, 1) <= least * 1.001).all()


def test_the_entries_of_a_batch_do_not_mix():
    tensors = randn(3, 4, 3, 5)
    together = canonical_factors(tensors, 2)
    alone = canonical_factors(tensors[1:2], 2)
    torch.testing.assert_close(canonical_tensor(together)[1:2], canonical_tensor(alone), rtol=1e-7, atol=1e-7)


def test_zeros_and_types():
    factors = canonical_factors(torch.zeros(2, 3, 4, 5), 2)
    assert all(factor.dtype == torch.float32 and (factor == 0).all() for factor in factors)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("rank", [1, 2, 6, 12])
def test_very_small_and_large_tensors_are_fitted_as_well(rank: int, scale: float):
    tensors = randn(3, 5, 4, 3)
    factors = canonical_factors(tensors * scale, rank)
    # a third of the scale is in each factor
    plain = canonical_tensor([factor / scale ** (1 / 3) for factor in factors])
    torch.testing.assert_close(plain, canonical_tensor(canonical_factors(tensors, rank)), rtol=1e-6, atol=1e-6)
    assert ((tensors - plain).flatten(1).norm(dim=1) < 0.95 * tensors.flatten(1).norm(dim=1)).all()


def test_the_terms_are_balanced():
    norms = torch.stack([factor.norm(dim=1) for factor in canonical_factors(randn(3, 5, 4, 3), 2)])
    torch.testing.assert_close(norms, norms.mean(dim=0).expand_as(norms), rtol=1e-8, atol=0)


def test_against_tensorly():
    tensorly = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    tensor = randn(1, 6, 5, 4)
    for rank in (1, 2, 3):
        with tensorly.backend_context("numpy"):  # importing TensorLy-Torch, in another test, changes the default
            runs = [
                decomposition.parafac(
                    tensor[0].numpy(), rank, n_iter_max=500, init="random", random_state=seed, tol=1e-12
                )
                for seed in range(8)
            ]
            best = min(float(((tensor[0].numpy() - tensorly.cp_to_tensor(run)) ** 2).sum()) for run in runs) ** 0.5
        assert error(tensor, rank, iterations=300).item() <= 1.02 * best


def test_tucker_bases_are_orthonormal_and_the_full_form_exact():
    tensor = randn(6, 4, 3, 3)
    left, core, right = tucker_factors(tensor, (6, 4))
    torch.testing.assert_close(torch.einsum("mp,pqyx,nq->mnyx", left, core, right), tensor, rtol=0, atol=1e-12)
    left, core, right = tucker_factors(tensor, (3, 2))
    assert core.shape == (3, 2, 3, 3)
    torch.testing.assert_close(left.T @ left, torch.eye(3, dtype=left.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(right.T @ right, torch.eye(2, dtype=left.dtype), rtol=0, atol=1e-12)


def test_tucker_error_falls_with_iterations_and_equals_tensorly():
    tensorly = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    tensor = randn(8, 6, 3, 3)

    def left_over(iterations: int) -> float:
        left, core, right = tucker_factors(tensor, (3, 2), iterations)
        return (tensor - torch.einsum("mp,pqyx,nq->mnyx", left, core, right)).norm().item()

    errors = [left_over(iterations) for iterations in (0, 1, 2, 5, 20, 100)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    with tensorly.backend_context("numpy"):
        (core, factors), _ = decomposition.partial_tucker(
            tensor.numpy(), [3, 2], modes=[0, 1], n_iter_max=500, tol=1e-12
        )
        found = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    assert errors[-1] == pytest.approx(float(((tensor.numpy() - found) ** 2).sum()) ** 0.5, rel=1e-3)


def test_tucker_with_a_narrow_unfolding():
    tensor = randn(9, 2, 1, 1)
    left, core, right = tucker_factors(tensor, (5, 1))
    assert left.shape == (9, 5)
    assert core.shape == (5, 1, 1, 1)
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=left.dtype), rtol=0, atol=1e-12)
    best = torch.linalg.svdvals(tensor[..., 0, 0])[1]
    fitted = torch.einsum("mp,pqyx,nq->mnyx", left, core, right)
    assert (tensor - fitted).norm().item() == pytest.approx(best.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rank", lambda: canonical_factors(randn(2, 3, 3), 0)),
        ("iterations", lambda: canonical_factors(randn(2, 3, 3), 1, 0)),
        ("tensors", lambda: canonical_factors(randn(2, 3), 1)),
        ("tensors must be finite", lambda: canonical_factors(randn(2, 3, 3) / 0, 1)),
        ("tensors must be finite", lambda: canonical_factors(randn(2, 3, 3) * math.nan, 3)),
        ("matrices must be finite", lambda: tucker_factors(randn(2, 3) * math.nan, (1, 1))),
        ("ranks", lambda: tucker_factors(randn(2, 3), (3, 1))),
        ("ranks", lambda: tucker_factors(randn(2, 3), (1, 0))),
        ("iterations", lambda: tucker_factors(randn(2, 3), (1, 1), -1)),
    ],
)
def test_bad_input_is_named(name: str, call):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128])
def test_only_real_numbers_are_approximated(dtype: torch.dtype):
    with pytest.raises(TypeError, match="tensors must be real floating-point"):
        canonical_factors(torch.ones(2, 3, 3, dtype=dtype), 1)
    with pytest.raises(TypeError, match="matrices must be real floating-point"):
        tucker_factors(torch.ones(2, 3, dtype=dtype), (1, 1))


@pytest.mark.parametrize("rank", [1, 9])
def test_no_tensors_have_no_factors(rank: int):
    for sizes in ((3, 4), (2, 3, 3)):
        factors = canonical_factors(torch.zeros(0, *sizes), rank)
        assert [tuple(factor.shape) for factor in factors] == [(0, size, rank) for size in sizes]
        assert canonical_tensor(factors).shape == (0, *sizes)


def test_tuckers_form_of_a_matrix_is_its_truncated_svd():
    matrix = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, core, right = tucker_factors(matrix, (2, 2))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left @ core @ right.T, U[:, :2] * S[:2] @ Vh[:2])
