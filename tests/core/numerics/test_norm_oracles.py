"""Oracles against duality, brute force, the singular value decomposition and torch's Muon."""

from __future__ import annotations

import math

import pytest
import torch

from provenn.core.numerics.norm_oracles import dual_norm, lmo, newton_schulz, orthogonal_factor


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm_of(Z: torch.Tensor, norm: str) -> torch.Tensor:
    """The primal norm from its definition."""
    if norm == "rms":
        return Z.norm() / math.sqrt(Z.numel())
    rows, columns = Z.shape[0], Z[0].numel()
    if norm == "sign":
        return columns * Z.abs().max()
    return math.sqrt(columns / rows) * torch.linalg.matrix_norm(Z.reshape(rows, -1), 2)


SHAPES = [(5, 3), (3, 5), (4, 4), (4, 2, 3, 3)]


@pytest.mark.parametrize("norm", ["spectral", "sign", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_is_of_unit_norm_and_reaches_the_dual_norm(norm: str, shape: tuple[int, ...]) -> None:
    B = draw(*shape)
    Z = lmo(B, norm, "svd")
    assert Z.shape == B.shape
    assert norm_of(Z, norm).item() == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close((B * Z).sum(), dual_norm(B, norm, "svd"), rtol=1e-10, atol=0)


@pytest.mark.parametrize("norm", ["spectral", "sign", "rms"])
def test_no_other_tensor_of_unit_norm_does_better(norm: str) -> None:
    B = draw(2, 2, seed=1)
    best = dual_norm(B, norm, "svd").item()
    tries = draw(20_000, 2, 2, seed=2)
    products = torch.stack([(B * Z).sum() / norm_of(Z, norm) for Z in tries[:4000]])
    assert products.max().item() <= best + 1e-12
    assert products.max().item() > 0.85 * best


def test_scales_come_from_the_original_shape() -> None:
    tall = draw(8, 2)
    assert torch.linalg.svdvals(lmo(tall, "spectral", "svd")).tolist() == pytest.approx([2.0, 2.0])  # √(8/2)
    assert torch.linalg.svdvals(lmo(tall.T, "spectral", "svd")).tolist() == pytest.approx([0.5, 0.5])
    assert set(lmo(tall, "sign").abs().flatten().tolist()) == {0.5}
    assert lmo(draw(9), "rms").norm().item() == pytest.approx(3.0)
    assert set(lmo(draw(4), "sign").abs().tolist()) == {0.25}


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 20, 20)])
def test_newton_schulz_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, ...]) -> None:
    X = draw(*shape, seed=3)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = torch.linspace(50, 1, S.shape[-1], dtype=torch.float64).expand(S.shape)  # condition number 50
    got = newton_schulz(U @ torch.diag_embed(S) @ Vh)
    inside = U.mT @ got @ Vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-10)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_newton_schulz_does_not_depend_on_scale_and_takes_batches_one_by_one() -> None:
    X = draw(3, 6, 4, seed=4)
    together = newton_schulz(X)
    torch.testing.assert_close(together, newton_schulz(1e6 * X), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together, torch.stack([newton_schulz(one) for one in X]))


def test_newton_schulz_agrees_with_torchs_muon() -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 24))
    B = draw(24, 24, seed=5).float()
    optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    weight.grad = B.clone()
    optimizer.step()
    direction = -weight.detach() / weight.detach().norm()
    ours = newton_schulz(B)
    assert (direction * ours / ours.norm()).sum().item() > 0.99  # Muon computes in bfloat16


@pytest.mark.parametrize("norm", ["spectral", "sign", "rms"])
@pytest.mark.parametrize("how", ["svd", "newton-schulz"])
def test_zeros_give_zeros_and_types_are_kept(norm: str, how: str) -> None:
    for dtype in (torch.float32, torch.float64):
        Z = lmo(torch.zeros(3, 2, dtype=dtype), norm, how)
        assert Z.dtype == dtype
        assert not Z.any()
        assert dual_norm(torch.zeros(3, 2, dtype=dtype), norm, how) == 0
    assert newton_schulz(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_exact_factor_leaves_out_directions_without_singular_value() -> None:
    B = torch.outer(draw(5, seed=6), draw(4, seed=7))
    values = torch.linalg.svdvals(orthogonal_factor(B))
    assert values.tolist() == pytest.approx([1, 0, 0, 0], abs=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'spectral'"):
        lmo(draw(2, 2), "nuclear")
    with pytest.raises(ValueError, match=r"matrix or a kernel for the spectral norm, got shape \(3,\)"):
        lmo(draw(3), "spectral")
    with pytest.raises(ValueError, match="orthogonalize must be one of"):
        lmo(draw(2, 2), "spectral", "qr")
    with pytest.raises(ValueError, match="steps must be"):
        newton_schulz(draw(2, 2), 0)
    with pytest.raises(ValueError, match="two dimensions or more"):
        newton_schulz(draw(2))
