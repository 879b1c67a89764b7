"""TrAct against ridge problems solved by least squares, unfolded patches, limits in λ, and torch's own layers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, unfold

from provenn.claims import Evidence
from provenn.claims.optim import tract as claim
from provenn.contracts import BadInput, FunctionCase, ModuleCase
from provenn.core.experiment.accounting import TensorMemory
from provenn.optim import TrActConv2d, TrActLinear, _tract_gradient, apply_tract_first_layer, tract, tract_weight_grad

GEOMETRIES = (
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)},
    {"groups": 2, "padding": 1},
    {"groups": 2, "stride": 2, "dilation": 2, "padding": 2},
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ridge(x: torch.Tensor, g: torch.Tensor, lambda_: float) -> torch.Tensor:
    """argmin_V ‖b g − x Vᵀ‖² + λ b ‖V‖², stacked as one least-squares problem."""
    rows, inputs = x.shape
    weight = math.sqrt(lambda_ * rows)
    stacked = torch.cat([x, weight * torch.eye(inputs, dtype=x.dtype)])
    wanted = torch.cat([rows * g, torch.zeros(inputs, g.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T


def trained(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    output = layer(x)
    layer.zero_grad()
    output.backward(g)
    return output.detach(), x.grad, layer.weight.grad.clone(), None if layer.bias is None else layer.bias.grad.clone()


def bad(argument: str, call, error: type[Exception] = ValueError) -> BadInput:
    return BadInput(argument, call, error)


GRADCHECK = "its gradient is another on purpose: it solves a ridge problem, which the tests solve by least squares"
CASES = [
    ModuleCase(
        part="provenn.optim.TrActLinear",
        make=lambda **options: TrActLinear(4, 3, **options),
        inputs=lambda generator, dtype, batch: (
            torch.randn(batch, 2, 4, generator=generator, dtype=torch.float64).to(dtype),
        ),
        excluded={"gradcheck": GRADCHECK},
        bad_input=(
            bad("lambda_", lambda: TrActLinear(4, 3, lambda_=0.0)),
            bad("lambda_", lambda: TrActLinear(4, 3, lambda_=math.nan)),
            bad("lambda_", lambda: TrActLinear(4, 3, lambda_="0.1"), TypeError),
        ),
    ),
    ModuleCase(
        part="provenn.optim.TrActConv2d",
        make=lambda **options: TrActConv2d(4, 6, 3, stride=2, padding=1, groups=2, **options),
        inputs=lambda generator, dtype, batch: (
            torch.randn(batch, 4, 5, 6, generator=generator, dtype=torch.float64).to(dtype),
        ),
        excluded={"gradcheck": GRADCHECK},
        bad_input=(
            bad("lambda_", lambda: TrActConv2d(3, 4, 3, lambda_=-1.0)),
            bad("padding", lambda: TrActConv2d(3, 4, 3, padding="same"), TypeError),
            bad("padding_mode", lambda: TrActConv2d(3, 4, 3, padding_mode="reflect")),
        ),
    ),
    FunctionCase(
        part="provenn.optim.tract",
        call=lambda: tract(nn.Linear(3, 2)).weight,
        bad_input=(
            bad("layer", lambda: tract(nn.Embedding(3, 2)), TypeError),
            bad("layer", lambda: tract(nn.ConvTranspose2d(3, 2, 3)), TypeError),
            bad("padding", lambda: tract(nn.Conv2d(3, 2, 3, padding="same")), TypeError),
            bad("padding_mode", lambda: tract(nn.Conv2d(3, 2, 3, padding_mode="circular"))),
            bad("lambda_", lambda: tract(nn.Linear(3, 2), 0.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.apply_tract_first_layer",
        call=lambda: apply_tract_first_layer(nn.Sequential(nn.Linear(3, 2))),
        bad_input=(
            bad(
                "model", lambda: apply_tract_first_layer(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))), TypeError
            ),
            bad("model", lambda: apply_tract_first_layer(nn.ReLU())),
            bad("lambda_", lambda: apply_tract_first_layer(nn.Sequential(nn.Linear(3, 2)), lambda_=0.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.tract_weight_grad",
        call=lambda: tract_weight_grad(normal(5, 3), normal(5, 2)),
        bad_input=(
            bad("lambda_", lambda: tract_weight_grad(normal(5, 3), normal(5, 2), 0.0)),
            bad("x", lambda: tract_weight_grad(normal(5, 3), normal(4, 2))),
        ),
    ),
]


@pytest.mark.parametrize(("rows", "inputs"), [(3, 8), (8, 8), (7, 8), (20, 8), (1, 5)])
@pytest.mark.parametrize("lambda_", [1e-3, 0.1, 5.0])
def test_the_gradient_solves_the_ridge_problem(rows: int, inputs: int, lambda_: float) -> None:
    x, g = normal(rows, inputs), normal(rows, 4, seed=1)
    torch.testing.assert_close(tract_weight_grad(x, g, lambda_), ridge(x, g, lambda_), rtol=1e-9, atol=1e-9)
    layer = TrActLinear(inputs, 4, lambda_=lambda_, dtype=torch.float64)
    torch.testing.assert_close(trained(layer, x, g)[2], ridge(x, g, lambda_), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_both_forms_agree_on_either_side_of_the_square(rows: int) -> None:
    x, g, lambda_ = normal(rows, 8), normal(rows, 3, seed=1), 0.1
    wide = g.T @ x @ torch.linalg.inv(x.T @ x / rows + lambda_ * torch.eye(8, dtype=x.dtype))
    tall = g.T @ torch.linalg.inv(x @ x.T / rows + lambda_ * torch.eye(rows, dtype=x.dtype)) @ x
    torch.testing.assert_close(wide, tall, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tract_weight_grad(x, g, lambda_), wide, rtol=1e-9, atol=1e-9)


def test_a_large_penalty_gives_the_ordinary_gradient() -> None:
    x, g = normal(20, 6), normal(20, 3, seed=1)
    lambdas = [1e2, 1e3, 1e4]
    errors = [(lam * tract_weight_grad(x, g, lam) - g.T @ x).norm().log10().item() for lam in lambdas]
    slopes = [b - a for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([-1, -1], abs=0.02)


def test_whitened_inputs_only_rescale_the_gradient() -> None:
    x = math.sqrt(12) * torch.linalg.qr(normal(12, 5))[0]  # xᵀx = 12 I
    g = normal(12, 3, seed=1)
    torch.testing.assert_close(tract_weight_grad(x, g, 0.3), g.T @ x / 1.3, rtol=1e-12, atol=1e-12)


def test_contrast_does_not_change_how_outputs_move() -> None:
    x, g = normal(30, 6), normal(30, 3, seed=1)
    moves = [s * x @ tract_weight_grad(s * x, g, 1e-10).T for s in (0.1, 1.0, 20.0)]
    for move in moves:
        torch.testing.assert_close(move, moves[1], rtol=1e-6, atol=1e-6)
    plain = [s * x @ (g.T @ (s * x)).T for s in (1.0, 20.0)]
    torch.testing.assert_close(plain[1], 400 * plain[0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("batch", [1, 6])
def test_a_convolution_is_a_linear_layer_on_patches(geometry: dict, batch: int) -> None:
    layer = TrActConv2d(4, 6, (3, 2), **geometry, dtype=torch.float64)
    x = normal(batch, 4, 7, 6)
    g = normal(*layer(x).shape, seed=1)
    _, _, weight, bias = trained(layer, x, g)
    groups = geometry.get("groups", 1)
    for group in range(groups):
        channels = slice(group * 4 // groups, (group + 1) * 4 // groups)
        outputs = slice(group * 6 // groups, (group + 1) * 6 // groups)
        options = {key: value for key, value in geometry.items() if key != "groups"}
        patches = unfold(x[:, channels], (3, 2), **options).mT.reshape(-1, 4 // groups * 6)
        rows = g[:, outputs].flatten(2).mT.reshape(len(patches), -1)
        torch.testing.assert_close(weight[outputs].flatten(1), ridge(patches, rows, 0.1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, g.sum((0, 2, 3)))


def test_fewer_patches_than_entries_take_the_other_form() -> None:
    layer = TrActConv2d(8, 3, 3, dtype=torch.float64)  # 72 entries, 2 · 2 · 2 patches
    x, g = normal(2, 8, 4, 4), normal(2, 3, 2, 2, seed=1)
    patches = unfold(x, 3).mT.reshape(-1, 72)
    expected = ridge(patches, g.flatten(2).mT.reshape(8, 3), 0.1)
    torch.testing.assert_close(trained(layer, x, g)[2].flatten(1), expected, rtol=1e-9, atol=1e-9)


def test_kernels_of_one_pixel_are_linear_layers() -> None:
    conv, line = TrActConv2d(5, 3, 1, dtype=torch.float64), TrActLinear(5, 3, dtype=torch.float64)
    with torch.no_grad():
        line.weight.copy_(conv.weight.flatten(1))
    x, g = normal(4, 5, 3, 3), normal(4, 3, 3, 3, seed=1)
    flat = trained(line, x.permute(0, 2, 3, 1), g.permute(0, 2, 3, 1))
    torch.testing.assert_close(trained(conv, x, g)[2].flatten(1), flat[2], rtol=1e-10, atol=1e-10)


def test_patches_in_pieces_give_the_same_gradient(monkeypatch) -> None:
    layer, x = TrActConv2d(2, 3, 3, dtype=torch.float64), normal(7, 2, 5, 5)
    g = normal(*layer(x).shape, seed=1)
    whole = trained(layer, x, g)[2]
    monkeypatch.setattr(_tract_gradient, "_PATCH_ENTRIES", 9 * 18 * 2)  # two images at a time
    torch.testing.assert_close(trained(layer, x, g)[2], whole, rtol=1e-12, atol=1e-12)


def test_pieces_bound_the_memory_of_a_backward_pass(monkeypatch) -> None:
    layer, x = TrActConv2d(2, 4, 3), normal(64, 2, 12, 12, dtype=torch.float32)

    def peak() -> int:
        output = layer(x)
        with TensorMemory() as memory:
            output.sum().backward()
        return memory.peak

    whole = peak()
    monkeypatch.setattr(_tract_gradient, "_PATCH_ENTRIES", 1800)  # an image at a time
    assert peak() < whole / 3


@pytest.mark.parametrize(
    ("plain", "x"),
    [
        (nn.Linear(6, 4), normal(5, 3, 6, dtype=torch.float32)),
        (nn.Linear(6, 4, bias=False), normal(6, dtype=torch.float32)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), normal(3, 4, 7, 7, dtype=torch.float32)),
        (nn.Conv2d(4, 6, 3, dilation=2, bias=False), normal(3, 4, 7, 7, dtype=torch.float32)),
    ],
)
def test_all_but_the_weight_gradient_is_the_plain_layer_bit_for_bit(plain: nn.Module, x: torch.Tensor) -> None:
    layer = tract(plain)
    g = normal(*plain(x).shape, seed=1, dtype=torch.float32)
    ours, theirs = trained(layer, x, g), trained(plain, x, g)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert plain.bias is None or torch.equal(ours[3], theirs[3])
    assert not torch.allclose(ours[2], theirs[2])
    assert ours[2].shape == theirs[2].shape


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer, x = TrActLinear(4, 3), normal(5, 4, dtype=torch.float32)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 5.0))


def test_black_images_give_a_zero_gradient() -> None:
    for layer, x in ((TrActLinear(4, 3), torch.zeros(6, 4)), (TrActConv2d(2, 3, 3), torch.zeros(2, 2, 5, 5))):
        assert not trained(layer, x, torch.ones_like(layer(x)))[2].any()


def test_the_order_of_a_batch_does_not_matter() -> None:
    layer, x = TrActConv2d(2, 3, 3, dtype=torch.float64), normal(8, 2, 5, 5)
    g, order = normal(8, 3, 3, 3, seed=1), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(trained(layer, x[order], g[order])[2], trained(layer, x, g)[2], rtol=0, atol=1e-12)


def test_half_precision_keeps_its_gram_matrix_wide() -> None:
    layer, x = TrActConv2d(3, 4, 3), 4 + normal(8, 3, 8, 8, dtype=torch.float32)  # bright: ill-conditioned
    g = normal(8, 4, 6, 6, seed=1, dtype=torch.float32)
    exact = trained(layer, x, g)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    layer.zero_grad()
    output.backward(g.bfloat16())
    assert layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad - exact).norm() < 0.01 * exact.norm()  # of g's rounding to 8 bits alone


def test_a_second_derivative_is_refused() -> None:
    for layer, x in ((TrActLinear(4, 3), normal(5, 4)), (TrActConv2d(2, 3, 3), normal(2, 2, 5, 5))):
        x = x.float().requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()


def test_a_wrapped_layer_shares_its_parameters_and_turns_back() -> None:
    for plain in (nn.Linear(4, 3, bias=False), nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), 1, 2)):
        plain.eval()
        layer = tract(plain, 0.5)
        assert layer.weight is plain.weight
        assert layer.bias is plain.bias
        assert not layer.training
        assert layer.lambda_ == 0.5
        assert layer.state_dict().keys() == plain.state_dict().keys()
        back = layer.plain()
        assert type(back) is type(plain)
        assert back.weight is plain.weight
        assert repr(back) == repr(plain)
        again = tract(layer, 0.2)
        assert (again.lambda_, again.weight) == (0.2, plain.weight)


class Branching(nn.Module):
    """Its forward depends on values, so it cannot be traced; the layer defined first runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.embed = nn.Linear(3, 2), nn.Conv2d(1, 3, 2)
        self.again = self.embed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > -1e9:
            x = self.again(x)
        return self.last(x.mean((2, 3)))


def test_the_first_layer_is_the_first_that_runs() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(4, 2), nn.Sequential(nn.Flatten(), nn.Linear(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x).relu())

    for inputs in ((), (torch.zeros(1, 2, 3),)):
        model = Reversed()
        weight = model.stem[1].weight
        assert apply_tract_first_layer(model, *inputs, lambda_=0.3) is model
        assert type(model.stem[1]) is TrActLinear
        assert model.stem[1].weight is weight
        assert model.stem[1].lambda_ == 0.3
        assert type(model.head) is nn.Linear
    branching = Branching()
    with pytest.raises(TypeError, match="cannot be traced"):
        apply_tract_first_layer(branching)
    branching.train()
    apply_tract_first_layer(branching, torch.zeros(1, 1, 4, 4))
    assert type(branching.embed) is TrActConv2d
    assert branching.again is branching.embed
    assert branching.training
    assert type(apply_tract_first_layer(nn.Conv2d(1, 2, 3))) is TrActConv2d


def test_gradients_of_the_authors_code_on_their_own_example() -> None:
    torch.manual_seed(0)  # their numbers come from the global generator
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = torch.randn(30, 8), torch.randn(30, 5)
        layer = TrActLinear(8, 5)
        (y - layer(x)).square().mean().backward()
    expected = torch.tensor([0.0741, 0.0949, -0.0559, -0.0398, -0.1364, 0.0013, 0.1603, -0.0468])
    torch.testing.assert_close(layer.weight.grad[0], expected, rtol=0, atol=6e-5)
    assert layer.bias.grad.tolist() == pytest.approx([-0.1162, 0.1062, -0.1275, -0.0206, -0.1149], abs=6e-5)


def test_a_step_moves_outputs_further_where_inputs_are_dim() -> None:
    # The mechanism itself: one bright image no longer drowns the others.
    x = torch.cat([normal(1, 3, 6, 6) * 30, normal(15, 3, 6, 6, seed=2) * 0.3])
    layer = TrActConv2d(3, 4, 3, dtype=torch.float64, bias=False)
    g = normal(16, 4, 4, 4, seed=3)
    _, _, ours, _ = trained(layer, x, g)
    _, _, plain, _ = trained(layer.plain(), x, g)
    shares = [conv2d(x, step)[1:].norm() / conv2d(x, step).norm() for step in (ours, plain)]
    assert shares[0] > 1.5 * shares[1]


def made_up(sgd: tuple[float, float], adam: tuple[float, float], reached: int, epochs: int = 6) -> Evidence:
    """Plain and TrAct's last accuracies, and the epoch at which TrAct first stands at plain SGD's last."""
    figures = {}
    for study, (plain, ours) in (("CIFAR-10, SGD", sgd), ("CIFAR-10, Adam", adam)):
        for arm, last in (("plain", plain), ("TrAct", ours)):
            courses = {f"test accuracy, epoch {e}": [plain if e >= reached else 0.1] * 3 for e in range(1, epochs + 1)}
            figures[study, arm] = {**courses, "test accuracy": [last - 0.01, last, last + 0.01]}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("sgd", "adam", "reached", "outcome"),
    [
        ((0.60, 0.621), (0.60, 0.6051), 5, "reproduced"),
        ((0.60, 0.63), (0.60, 0.6049), 5, "partly"),
        ((0.60, 0.63), (0.60, 0.62), 6, "partly"),
        ((0.60, 0.63), (0.60, 0.62), 7, "partly"),
        ((0.60, 0.619), (0.60, 0.65), 3, "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(sgd, adam, reached, outcome) -> None:
    assert claim.judge(made_up(sgd, adam, reached)).outcome == outcome
