"""Directions come back from their seeds, quotients from exact derivatives, and weights to where they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from provenn.core.experiment import parameters as flat
from provenn.core.numerics.zeroth_order import (
    QueryCounter,
    SeededDirection,
    finite_difference,
    forward_derivative,
    perturbed_layers,
)


def tensors() -> list[torch.Tensor]:
    return [torch.arange(12.0).view(3, 4), torch.zeros(5, dtype=torch.float64), torch.ones(2, 1, 3)]


def quadratic(dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    b = torch.randn(dim, generator=generator, dtype=torch.float64)
    return A @ A.T, b, torch.randn(dim, generator=generator, dtype=torch.float64)


def test_the_same_seed_draws_the_same_direction_whole_or_alone(monkeypatch) -> None:
    monkeypatch.setattr(flat, "_PIECE", 5)
    direction = SeededDirection(tensors(), 7)
    whole = direction.materialize()
    assert all(torch.equal(a, b) for a, b in zip(whole, SeededDirection(tensors(), 7).materialize(), strict=True))
    alone = torch.cat([noise for _, _, noise in direction.pieces(2)])
    assert torch.equal(alone, whole[2].flatten())
    assert not torch.equal(whole[0], SeededDirection(tensors(), 8).materialize()[0])


def test_tensors_of_one_shape_draw_unrelated_noise() -> None:
    first, second = SeededDirection([torch.zeros(4000), torch.zeros(4000)], 0).materialize()
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / 4000**0.5
    assert abs(first.mean()) < 4 / 4000**0.5
    assert abs(first.var() - 1) < 4 * (2 / 4000) ** 0.5


def test_adding_moves_by_the_scaled_noise() -> None:
    moved, still = tensors(), tensors()
    direction = SeededDirection(moved, 1)
    noise = direction.materialize()
    direction.add_(-0.5)
    for a, b, z in zip(moved, still, noise, strict=True):
        torch.testing.assert_close(a, b - 0.5 * z)


def test_a_mask_multiplies_the_noise_of_its_piece() -> None:
    keep = [torch.arange(12) % 2, None, torch.zeros(6)]

    def mask(index: int, piece: slice) -> torch.Tensor | None:
        return None if keep[index] is None else keep[index][piece]

    plain, masked = SeededDirection(tensors(), 2).materialize(), SeededDirection(tensors(), 2, mask).materialize()
    assert torch.equal(masked[0], plain[0] * keep[0].view(3, 4))
    assert torch.equal(masked[1], plain[1])
    assert not masked[2].any()


@pytest.mark.parametrize("step", [1e-2, 1.0, 30.0])
def test_two_sided_quotients_of_a_quadratic_are_exact_at_any_step(step: float) -> None:
    A, b, x = quadratic()
    direction = SeededDirection([x], 4)
    z = direction.materialize()[0]
    start = x.clone()
    result = finite_difference(lambda: 0.5 * x @ A @ x + b @ x, direction, step)
    torch.testing.assert_close(result.derivative, ((A @ start + b) @ z).item(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x, start, rtol=0, atol=1e-13)
    ahead = start + step * z
    torch.testing.assert_close(result.ahead, (0.5 * ahead @ A @ ahead + b @ ahead).item(), rtol=1e-12, atol=0)


def test_one_sided_quotients_carry_the_curvature_and_save_a_query() -> None:
    A, b, x = quadratic()
    direction = SeededDirection([x], 4)
    z, start = direction.materialize()[0], x.clone()
    loss = QueryCounter(lambda: 0.5 * x @ A @ x + b @ x)
    result = finite_difference(loss, direction, 0.1, two_sided=False)
    expected = ((A @ start + b) @ z + 0.05 * z @ A @ z).item()
    assert loss.count == 2
    torch.testing.assert_close(result.derivative, expected, rtol=1e-10, atol=0)
    known = finite_difference(loss, direction, 0.1, two_sided=False, base=result.behind)
    assert loss.count == 3
    torch.testing.assert_close(known.derivative, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("two_sided", [True, False])
def test_a_loss_that_raises_leaves_the_tensors_in_place(failing: int, two_sided: bool) -> None:
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = x.clone()

    def loss() -> float:
        if counter.count == failing:
            raise ArithmeticError("broken")
        return 0.0

    counter = QueryCounter(loss)
    with pytest.raises(ArithmeticError):
        finite_difference(counter, SeededDirection([x], 0), 0.3, two_sided)
    torch.testing.assert_close(x, start, rtol=0, atol=1e-15 * 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def test_layers_compute_with_moved_weights_while_the_clean_ones_stay() -> None:
    model, moved = network(), network()
    weights = list(model.parameters())
    before = [one.detach().clone() for one in weights]
    SeededDirection(list(moved.parameters()), 5).add_(0.2)
    x = torch.randn(7, 4)
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append([one.detach().clone() for one in weights]))
    with perturbed_layers(model, SeededDirection(weights, 5), 0.2):
        output = model(x)
        again = model(x)
    torch.testing.assert_close(output, moved(x), rtol=0, atol=0)
    assert torch.equal(output, again)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], before, strict=True))
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(model.parameters(), weights, before, strict=True))
    assert not torch.equal(model(x), output)


def test_layers_are_whole_again_after_an_error() -> None:
    model = network()
    before = [one.detach().clone() for one in model.parameters()]
    with (
        pytest.raises(RuntimeError, match="shape"),
        perturbed_layers(model, SeededDirection([model[0].weight], 0), 1.0),
    ):
        model(torch.zeros(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_weights_that_no_hook_can_reach_are_named() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    with (
        pytest.raises(RuntimeError, match=r"0\.weight.*tied"),
        perturbed_layers(tied, SeededDirection([tied[0].weight], 0), 1),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="no module"),
        perturbed_layers(tied, SeededDirection([torch.zeros(2)], 0), 1),
    ):
        pass
    attention = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 1, 4)
    with (
        pytest.raises(RuntimeError, match=r"out_proj\.weight, out_proj\.bias were not reached"),
        perturbed_layers(attention, SeededDirection(list(attention.parameters()), 0), 1),
    ):
        attention(x, x, x)


def test_forward_mode_agrees_with_back_propagation() -> None:
    model = network().double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    weights = dict(model.named_parameters())
    tangents = {name: torch.randn_like(one) for name, one in weights.items()}
    value, derivative = forward_derivative(
        lambda p: nn.functional.cross_entropy(torch.func.functional_call(model, dict(p), (x,)), y), weights, tangents
    )
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True))
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(derivative, expected)
    assert not derivative.requires_grad


def test_operations_without_a_forward_rule_are_named() -> None:
    def loss(p):
        return nn.functional.ctc_loss(
            p["x"].log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
        )

    x = {"x": torch.randn(4, 1, 3)}
    with pytest.raises(NotImplementedError, match="ctc_loss"):
        forward_derivative(loss, x, x)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="at least one tensor"):
        SeededDirection([], 0)
    with pytest.raises(ValueError, match="contiguous"):
        SeededDirection([torch.zeros(3, 2).T], 0)
    with pytest.raises(ValueError, match="seed"):
        SeededDirection([x], -1)
    with pytest.raises(ValueError, match="step"):
        finite_difference(lambda: 0.0, SeededDirection([x], 0), 0.0)
    with pytest.raises(ValueError, match="base"):
        finite_difference(lambda: 0.0, SeededDirection([x], 0), 1.0, base=1.0)
    with pytest.raises(ValueError, match="names"):
        forward_derivative(lambda p: p["x"].sum(), {"x": x}, {"y": x})
    with pytest.raises(ValueError, match="scalar"):
        forward_derivative(lambda p: p["x"], {"x": x}, {"x": x})
