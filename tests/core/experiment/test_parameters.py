"""Flat views share memory with the parameters; noise comes back from its seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from provenn.core.experiment import parameters
from provenn.core.experiment.parameters import FlatParameters, add_noise_, flat_view, seeded_normal


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_the_vector_and_the_parameters_are_one_memory() -> None:
    model, plain = network(), network()
    x = torch.randn(5, 3)
    flat = FlatParameters(model.parameters())
    assert torch.equal(flat.vector, nn.utils.parameters_to_vector(plain.parameters()).detach())
    assert torch.equal(model(x), plain(x))
    flat.vector.mul_(2)
    assert all(torch.equal(a, 2 * b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        model[2].bias.fill_(7)
    assert flat.vector[-2:].tolist() == [7, 7]


def test_an_optimizer_made_before_still_moves_the_vector() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    flat = FlatParameters(model.parameters())
    before = flat.vector.clone()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(flat.vector, before - 0.5 * flat.gradient())
    assert flat.gradient().any()


def test_gradients_and_pieces_follow_the_order_and_shapes() -> None:
    model = network()
    flat = FlatParameters(model.parameters())
    assert not flat.gradient().any()
    model[0].weight.grad = torch.arange(12.0).view(4, 3)
    assert flat.gradient()[:12].tolist() == list(range(12))
    assert not flat.gradient()[12:].any()
    pieces = flat.split(flat.vector)
    assert [piece.shape for piece in pieces] == [one.shape for one in model.parameters()]
    assert all(p.data_ptr() == one.data_ptr() for p, one in zip(pieces, model.parameters(), strict=True))


def test_a_shared_parameter_counts_once() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert len(FlatParameters([weight, weight]).vector) == 3


def test_what_cannot_be_one_vector_is_named() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        FlatParameters([])
    with pytest.raises(ValueError, match=r"torch\.float32 on cpu, torch\.float64 on cpu"):
        FlatParameters([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).double())])
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\)"):
        FlatParameters([nn.Parameter(torch.ones(3))]).split(torch.ones(4))


def gathered(tensors, seed) -> list[torch.Tensor]:
    noise = [torch.full_like(flat_view(one), torch.nan) for one in tensors]
    for index, piece, z in seeded_normal(tensors, seed):
        noise[index][piece] = z
    return noise


def test_noise_covers_every_entry_once_and_repeats(monkeypatch) -> None:
    tensors = [torch.zeros(7, 3), torch.zeros(0), torch.zeros(()), torch.zeros(40, dtype=torch.float64)]
    monkeypatch.setattr(parameters, "_PIECE", 8)
    covered = [(i, entry) for i, piece, _ in seeded_normal(tensors, 1) for entry in range(piece.start, piece.stop)]
    assert covered == [(i, entry) for i, one in enumerate(tensors) for entry in range(one.numel())]
    first, again, other = gathered(tensors, 1), gathered(tensors, 1), gathered(tensors, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[3].dtype == torch.float64


def test_noise_is_standard_normal_and_differs_between_tensors() -> None:
    tensors = [torch.zeros(300, 1000), torch.zeros(300_000)]
    first, second = gathered(tensors, 3)
    for z in (first, second):
        assert abs(z.mean().item()) < 5 / 300_000**0.5
        assert abs(z.var().item() - 1) < 5 * (2 / 300_000) ** 0.5
    assert abs((first * second).mean().item()) < 5 / 300_000**0.5
    pieces = [first[:1000], first[parameters._PIECE : parameters._PIECE + 1000]]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(pieces))


def test_adding_there_and_back_returns_but_for_rounding() -> None:
    model = network()
    tensors = list(model.parameters())
    before = [one.detach().clone() for one in tensors]
    z = gathered(tensors, 11)
    add_noise_(tensors, 0.25, 11)
    for one, start, noise in zip(tensors, before, z, strict=True):
        torch.testing.assert_close(one.detach(), start + 0.25 * noise.view_as(start), rtol=1e-6, atol=1e-7)
    add_noise_(tensors, -0.5, 11)
    add_noise_(tensors, 0.25, 11)
    for one, start in zip(tensors, before, strict=True):
        torch.testing.assert_close(one.detach(), start, rtol=0, atol=1e-6)


def test_neither_drawing_nor_adding_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    add_noise_([torch.zeros(9)], 1.0, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_tensors_without_a_flat_view_are_named() -> None:
    with pytest.raises(ValueError, match=r"contiguous, got one of shape \(3, 2\)"):
        add_noise_([torch.zeros(2, 3).T], 1.0, 0)
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        add_noise_([torch.zeros(2)], float("nan"), 0)
