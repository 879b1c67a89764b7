"""AF-KAN and its rivals against scalar loops, SciPy's splines, closed forms and the counting formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import nn
from torch.nn import functional as F

from provenn.contracts import BadInput, FunctionCase, ModuleCase, Symmetry
from provenn.nn import (
    AFKAN,
    AFKANLayer,
    BSplineKANLayer,
    ChebyKANLayer,
    FourierKANLayer,
    RBFKANLayer,
    ReLUKANLayer,
    WavKANLayer,
    match_parameters,
)
from provenn.nn import _af_kan_bases as bases
from provenn.nn._af_kan_reductions import JOINS, REDUCTIONS

LAYERS = {
    "AFKANLayer": AFKANLayer,
    "ReLUKANLayer": ReLUKANLayer,
    "BSplineKANLayer": BSplineKANLayer,
    "RBFKANLayer": RBFKANLayer,
    "ChebyKANLayer": ChebyKANLayer,
    "FourierKANLayer": FourierKANLayer,
    "WavKANLayer": WavKANLayer,
}
BASELINES = {name: layer for name, layer in LAYERS.items() if name != "AFKANLayer"}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(generator, dtype, batch):
    return (torch.randn(batch, 5, generator=generator, dtype=dtype),)


def bad(make):
    return (
        BadInput("in_features", lambda: make(0, 3)),
        BadInput("in_features", lambda: make(2.0, 3), TypeError),
        BadInput("out_features", lambda: make(5, 0)),
        BadInput("grid", lambda: make(5, 3, grid=0)),
        BadInput("order", lambda: make(5, 3, order=-1)),
        BadInput("norm", lambda: make(5, 3, norm="group")),
        BadInput("x", lambda: make(5, 3)(torch.ones(2, 4))),
        BadInput("x", lambda: make(5, 3)(torch.ones(2, 1, 5))),
    )


AF_BAD = (
    *bad(AFKANLayer),
    BadInput("activation", lambda: AFKANLayer(5, 3, activation="swish")),
    BadInput("func", lambda: AFKANLayer(5, 3, func="quad3")),
    BadInput("norm_scope", lambda: AFKANLayer(5, 3, norm_scope="all")),
    BadInput("method", lambda: AFKANLayer(5, 3, method="attention")),
    BadInput("method", lambda: AFKANLayer(5, 3, method=())),
    BadInput("method", lambda: AFKANLayer(5, 3, grid=1, order=0, method="local_attn")),
    BadInput("join", lambda: AFKANLayer(5, 3, join="mean")),
)
WHOLE_BATCH = "basis values are scaled by those of the whole batch, as in the authors' code"


def shuffled(inputs):
    return (inputs[0].flip(1),)


CASES = [
    *(
        ModuleCase(
            "provenn.nn.AFKANLayer",
            lambda method=method: AFKANLayer(5, 3, method=method),
            rows,
            label=method,
            bfloat16_tolerance=0.3,  # layer norm scales small differences between features up
            bad_input=AF_BAD,
        )
        for method in REDUCTIONS
    ),
    ModuleCase(
        "provenn.nn.AFKANLayer",
        lambda: AFKANLayer(5, 3, norm_scope="batch", method=("global_attn", "multistep"), join="quadratic"),
        rows,
        label="whole batch, joined",
        bfloat16_tolerance=0.5,
        independent_samples=False,
        independent_samples_reason=WHOLE_BATCH,
        bad_input=AF_BAD,
    ),
    ModuleCase(
        "provenn.nn.AFKAN",
        lambda: AFKAN((5, 4, 3)),
        rows,
        bfloat16_tolerance=0.5,
        bad_input=(
            BadInput("widths", lambda: AFKAN((5,))),
            BadInput("out_features", lambda: AFKAN((5, 0))),
            BadInput("func", lambda: AFKAN((5, 3), func="none")),
        ),
    ),
    *(
        ModuleCase(
            f"provenn.nn.{name}",
            lambda layer=layer: layer(5, 3),
            rows,
            bfloat16_tolerance=0.5 if name in ("ChebyKANLayer", "FourierKANLayer") else 0.2,
            training_equals_eval=name != "WavKANLayer",
            training_equals_eval_reason="batch norm of the outputs" if name == "WavKANLayer" else "",
            bad_input=(
                *bad(layer),
                *((BadInput("grid", lambda: RBFKANLayer(5, 3, grid=1, order=0)),) if name == "RBFKANLayer" else ()),
            ),
        )
        for name, layer in BASELINES.items()
    ),
    ModuleCase(
        "provenn.nn.FourierKANLayer",
        lambda: FourierKANLayer(5, 3, norm="none"),
        rows,
        label="without norm",
        symmetries=(Symmetry("period 2π", lambda inputs: (inputs[0] + 2 * math.pi,), lambda y: y),),
        bfloat16_tolerance=0.5,
        bad_input=bad(FourierKANLayer),
    ),
    FunctionCase(
        "provenn.nn.match_parameters",
        lambda: match_parameters(AFKANLayer, 1000, 20, 3),
        bad_input=(
            BadInput("budget", lambda: match_parameters(nn.Linear, 0)),
            BadInput("budget", lambda: match_parameters(nn.Linear, 700)),
            BadInput("in_features", lambda: match_parameters(nn.Linear, 1000, 0)),
            BadInput("out_features", lambda: match_parameters(nn.Linear, 1000, 5, 0)),
        ),
    ),
]


# Basis functions


@pytest.mark.parametrize(("grid", "order"), [(3, 3), (5, 3), (4, 1), (2, 0)])
def test_relu_pairs_live_on_their_intervals_and_peak_in_the_middle(grid, order):
    low, high = bases.interval_ends(grid, order)
    assert low.tolist() == pytest.approx([i / grid for i in range(-order, grid)])
    assert (high - low).tolist() == pytest.approx([(order + 1) / grid] * (grid + order))
    x = torch.linspace(-2, 3, 2001, dtype=torch.float64)[:, None]
    z = bases.activation_pairs(x, low.double(), high.double(), "relu", "quad1")[:, 0]
    inside = (x > low) & (x < high)
    assert (z[~inside] == 0).all()
    assert (z[inside] > 0).all()
    middle = ((low + high) / 2).double()[None]
    peak = bases.activation_pairs(middle.T, low.double(), high.double(), "relu", "quad1")[:, 0].diagonal()
    torch.testing.assert_close(peak, torch.full_like(peak, ((order + 1) / (2 * grid)) ** 4), rtol=1e-6, atol=0)
    layer = ReLUKANLayer(1, 1, grid, order, norm="none").double()
    torch.testing.assert_close(layer.basis(x)[:, 0], z * 16 * grid**4 / (order + 1) ** 4, rtol=1e-5, atol=1e-9)


SCALAR = {
    "quad1": lambda u, v: (u * v) ** 2,
    "quad2": lambda u, v: u * v + u**2 + v**2,
    "sum": lambda u, v: u + v,
    "prod": lambda u, v: u * v,
    "sum_prod": lambda u, v: u + v + u * v,
    "cubic1": lambda u, v: (u + v) * (u**2 + v**2),
    "cubic2": lambda u, v: (u * v) ** 3,
}


def silu(t):
    return t / (1 + math.exp(-t))


@pytest.mark.parametrize("func", SCALAR)
def test_combinations_are_those_of_a_scalar_loop_and_symmetric(func):
    x, low, high = randn(4, 3, seed=1), randn(5, seed=2), randn(5, seed=3)
    z = bases.activation_pairs(x, low, high, "silu", func)
    for b, d, i in itertools.product(range(4), range(3), range(5)):
        value = x[b, d].item()
        expected = SCALAR[func](silu(value - low[i].item()), silu(high[i].item() - value))
        assert z[b, d, i].item() == pytest.approx(expected, rel=1e-9)
    mirrored = bases.activation_pairs((low + high)[:, None] - x[:1, :1], low, high, "silu", func)[:, 0].diagonal()
    torch.testing.assert_close(mirrored, z[0, 0])


@pytest.mark.parametrize("name", bases.ACTIVATIONS)
def test_activations_are_the_functions_they_are_called_after(name):
    t = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = torch.sigmoid(t) if name == "sigmoid" else torch.tanh(t) if name == "tanh" else getattr(F, name)(t)
    torch.testing.assert_close(bases.ACTIVATIONS[name](t), expected)


@pytest.mark.parametrize(("grid", "order"), [(5, 3), (3, 2), (4, 0), (3, 1)])
def test_splines_are_scipys_and_sum_to_one_inside_the_grid(grid, order):
    layer = BSplineKANLayer(1, 1, grid, order, norm="none").double()
    x = torch.linspace(-1.5, 1.4999, 301, dtype=torch.float64)[:, None]
    ours = layer.basis(x)[:, 0]
    assert ours.shape == (301, grid + order)
    torch.testing.assert_close(ours.sum(1), torch.ones(301, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    knots = layer.knots.numpy()
    for i in range(grid + order):
        theirs = BSpline.basis_element(knots[i : i + order + 2], extrapolate=False)(x[:, 0].numpy())
        # SciPy closes the last interval, we open it: at a knot a step differs.
        off = ~np.isclose(x.numpy(), knots).any(1)
        np.testing.assert_allclose(ours[off, i], np.nan_to_num(theirs)[off], atol=1e-9)


def test_chebyshev_and_fourier_are_cosines():
    theta = torch.linspace(0.01, 3.1, 40, dtype=torch.float64)[:, None]
    n = torch.arange(7)
    torch.testing.assert_close(bases.chebyshev_basis(theta.cos(), 6)[:, 0], (n * theta).cos())
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bases.chebyshev_basis(x, 4)[..., 4].sum(), x)
    assert slope.flatten().tolist() == pytest.approx([16.0, -16.0])  # T_n'(±1) = (±1)^{n+1} n²
    waves = bases.fourier_basis(theta, 3)[:, 0]
    torch.testing.assert_close(
        waves, torch.cat([(k * theta).cos() for k in (1, 2, 3)] + [(k * theta).sin() for k in (1, 2, 3)], 1)
    )
    assert bases.chebyshev_basis(theta.cos(), 0).shape[-1] == 1


def test_gaussians_have_their_centres_on_the_grid():
    layer = RBFKANLayer(1, 1, 3, 3, norm="none").double()
    at_centres = layer.basis(layer.centres[:, None])[:, 0]
    torch.testing.assert_close(at_centres.diagonal(), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(at_centres.diagonal(1), torch.full((5,), math.exp(-1)).double(), rtol=1e-5, atol=0)


# Layers


def test_every_layer_is_a_sum_of_one_dimensional_functions():
    for name, kind in BASELINES.items():
        layer = kind(3, 2, norm="none").double().eval()
        x = randn(6, 3, seed=4)
        base = layer(torch.zeros(6, 3, dtype=torch.float64))
        alone = sum(layer(x * torch.eye(3, dtype=torch.float64)[i]) - base for i in range(3))
        torch.testing.assert_close(layer(x), base + alone, msg=name)


def test_the_wavelet_layer_is_its_formula():
    layer = WavKANLayer(3, 2, norm="none").double().eval()
    with torch.no_grad():
        layer.scale.uniform_(0.5, 2)
        layer.place.normal_()
    x = randn(2, 3, seed=5)
    for b, o in itertools.product(range(2), range(2)):
        u = [(x[b, i] - layer.place[o, i]) / layer.scale[o, i] for i in range(3)]
        y = sum(-t * torch.exp(-t * t / 2) * layer.weight[o, i] for i, t in enumerate(u))
        assert layer(x)[b, o].item() == pytest.approx(y.item() / math.sqrt(1 + 1e-5))


def test_the_layer_is_its_formula():
    layer = AFKANLayer(4, 2, grid=2, order=1, activation="tanh", func="sum_prod").double()
    x = randn(3, 4, seed=6)
    score = layer.reductions[0].score
    for b in range(3):
        z = torch.zeros(4, 3, dtype=torch.float64)
        for d, i in itertools.product(range(4), range(3)):
            u, v = torch.tanh(x[b, d] - layer.low[i]), torch.tanh(layer.high[i] - x[b, d])
            z[d, i] = u + v + u * v
        z = (z - z.min()) / (z.max() - z.min())
        temperature = max(1.0, layer.reductions[0].temperature.item())
        w = torch.softmax((z @ score.weight[0] + score.bias) / temperature, 0)
        h = F.layer_norm((z * w[:, None]).sum(1), (4,))
        torch.testing.assert_close(layer(x)[b], torch.tanh(h) @ layer.weight.T)


def test_global_attention_weights_features_and_is_uniform_without_scores():
    reduction = REDUCTIONS["global_attn"](6, 4).double()
    z = torch.rand(3, 6, 4, dtype=torch.float64)
    assert reduction.temperature.item() == pytest.approx(math.sqrt(6))
    with torch.no_grad():
        weights = reduction(z) / z.sum(2)
        torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
        reduction.score.weight.zero_()
        torch.testing.assert_close(reduction(z), z.sum(2) / 6)


def test_temperature_never_sharpens_beyond_one():
    for name in ("global_attn", "spatial_attn", "self_attn", "local_attn"):
        reduction, z = REDUCTIONS[name](3, 4).double(), torch.rand(2, 3, 4, dtype=torch.float64)
        with torch.no_grad():
            reduction.temperature.fill_(1.0)
            at_one = reduction(z)
            reduction.temperature.fill_(0.1)
            torch.testing.assert_close(reduction(z), at_one)
            reduction.temperature.fill_(3.0)
            assert not torch.allclose(reduction(z), at_one)


def test_spatial_and_local_attention_by_hand():
    z = torch.rand(1, 3, 4, dtype=torch.float64)
    spatial = REDUCTIONS["spatial_attn"](3, 4).double()
    kernel, bias = spatial.conv.weight[:, 0], spatial.conv.bias
    padded = F.pad(z[0].T, (1, 1))
    scores = torch.stack([(padded[:, d : d + 3] * kernel).sum(1) + bias for d in range(3)])
    expected = (z[0] * torch.softmax(scores / math.sqrt(3), 1)).sum(1)
    torch.testing.assert_close(spatial(z)[0], expected)
    local = REDUCTIONS["local_attn"](3, 5).double()
    z = torch.rand(1, 3, 5, dtype=torch.float64)
    windows = torch.stack((z[..., 0:2], z[..., 2:4]), 2)  # the fifth value has no window
    weights = torch.softmax(local.query(windows) @ local.key(windows).mT / math.sqrt(3), -1)
    torch.testing.assert_close(local(z), local.linear((weights @ local.value(windows)).flatten(2))[..., 0])


def test_a_sample_depends_on_its_batch_only_where_that_is_asked_for():
    x = randn(6, 5, seed=7)
    for scope, alone in (("sample", True), ("batch", False)):
        layer = AFKANLayer(5, 3, norm_scope=scope).double().eval()
        assert torch.allclose(layer(x)[:1], layer(x[:1])) is alone


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_scaled_basis_values_fill_the_unit_interval_and_constants_give_no_nan(scope):
    layer = AFKANLayer(5, 3, norm_scope=scope).double()
    z = layer.basis(randn(6, 5, seed=8))
    over = (1, 2) if scope == "sample" else (0, 1, 2)
    torch.testing.assert_close(z.amin(over), torch.zeros_like(z.amin(over)))
    torch.testing.assert_close(z.amax(over), torch.ones_like(z.amax(over)))
    flat = AFKANLayer(5, 3, grid=1, order=0, norm_scope=scope).double()
    x = torch.full((1, 5), 0.3, dtype=torch.float64, requires_grad=True)
    y = flat(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    raw = AFKANLayer(5, 3, func_norm=False).double()
    torch.testing.assert_close(raw.basis(x), bases.activation_pairs(x, raw.low, raw.high, "silu", "quad1"))


def test_several_methods_share_the_weights_and_are_joined():
    layer = AFKANLayer(5, 3, method=("global_attn", "multistep")).double()
    x = randn(4, 5, seed=9)
    alone = []
    for place in range(2):
        one = AFKANLayer(5, 3, method=("global_attn", "multistep")[place]).double()
        state = {
            name.replace(f"reductions.{place}.", "reductions.0."): value for name, value in layer.state_dict().items()
        }
        one.load_state_dict({name: value for name, value in state.items() if name in one.state_dict()})
        with torch.no_grad():
            for target, source in zip(
                one.reductions[0].parameters(), layer.reductions[place].parameters(), strict=True
            ):
                target.copy_(source)
        alone.append(one(x))
    a, b = alone
    expected = {"sum": a + b, "product": a * b, "sum_product": a + b + a * b, "quadratic": a + b + a * b + a**2 + b**2}
    assert set(expected) == set(JOINS)
    for join, value in expected.items():
        layer.join = join
        torch.testing.assert_close(layer(x), value)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("grid", "order", "inputs", "outputs"), [(3, 3, 20, 7), (5, 2, 4, 4)])
def test_parameters_follow_the_formula(grid, order, inputs, outputs):
    G, D, out = grid + order, inputs, outputs
    reductions = {
        "global_attn": G + 2,
        "multistep": G + 1,
        "spatial_attn": 4 * G + 1,
        "self_attn": 3 * G * (G + 1) + 1,
        "multihead_attn": 4 * G * (G + 1),
        "local_attn": 19 + 2 * ((G - 2) // 2 + 1) + 1,
    }
    for method, extra in reductions.items():
        layer = AFKANLayer(D, out, grid, order, method=method)
        assert count(layer) == D * out + 2 * G + extra + 2 * D, method
    assert count(ReLUKANLayer(D, out, grid, order)) == D * out * G + out + 2 * D * G + 2 * D
    assert count(BSplineKANLayer(D, out, grid, order)) == D * out * (G + 2) + 2 * D
    assert count(RBFKANLayer(D, out, grid, order)) == D * out * (G + 1) + 2 * D
    assert count(ChebyKANLayer(D, out, grid, order)) == D * out * (G + 1) + 2 * D
    assert count(FourierKANLayer(D, out, grid, order)) == 2 * D * out * G + out + 2 * D
    assert count(WavKANLayer(D, out, grid, order)) == 3 * D * out + 2 * out + 2 * D


@pytest.mark.parametrize("kind", LAYERS.values())
def test_matched_networks_use_the_budget_and_not_more(kind):
    budget = 9000
    width = match_parameters(kind, budget, 64, 10)
    assert count(nn.Sequential(kind(64, width), kind(width, 10))) <= budget
    assert count(nn.Sequential(kind(64, width + 1), kind(width + 1, 10))) > budget
    assert match_parameters(kind, count(nn.Sequential(kind(64, 1), kind(1, 10))), 64, 10) == 1


def test_every_layer_learns_a_function_of_one_variable():
    """A basis out of place (knots, ends, scale) cannot fit a wave between −1 and 1 that a line misses."""
    x = torch.linspace(-1, 1, 200)[:, None]
    y = (4 * x).sin()
    line = (y - x * (x * y).sum() / (x * x).sum()).square().mean().item()
    for name, kind in LAYERS.items():
        torch.manual_seed(0)
        model = (
            kind(1, 1, norm="none")
            if name != "AFKANLayer"
            else AFKANLayer(1, 1, norm="none", func_norm=False, method="multistep")
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        # One wavelet, and one composed function, are less flexible than a whole basis.
        assert loss.item() < (0.8 if name in ("WavKANLayer", "AFKANLayer") else 0.2) * line, name
