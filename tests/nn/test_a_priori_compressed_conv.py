"""Factorised convolutions against loops over their filters, torch's dense convolutions, TensorLy and counts by hand."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from provenn.contracts import (
    BadInput,
    CompressorCase,
    Form,
    FunctionCase,
    KnownProblem,
    ModuleCase,
    RefusedProblem,
    SolverCase,
)
from provenn.core.experiment.accounting import model_size
from provenn.core.experiment.seeding import seeded
from provenn.nn import (
    CPConv2d,
    CPConvTranspose2d,
    OneWayConv2d,
    OneWayConvTranspose2d,
    QuadMesh,
    Tucker2Conv2d,
    Tucker2ConvTranspose2d,
    WaveFE2d,
    compress_before_training,
    wave_dataset,
)

PLAIN = [(OneWayConv2d, {}), (OneWayConv2d, {"mode": "spatial"}), (CPConv2d, {}), (Tucker2Conv2d, {})]
TRANSPOSED = [
    (OneWayConvTranspose2d, {}),
    (OneWayConvTranspose2d, {"mode": "spatial"}),
    (CPConvTranspose2d, {}),
    (Tucker2ConvTranspose2d, {}),
]


def name_of(form):
    return form[0].__name__ + "".join(form[1].values())


each_plain = pytest.mark.parametrize("form", PLAIN, ids=name_of)
each_transposed = pytest.mark.parametrize("form", TRANSPOSED, ids=name_of)
each_form = pytest.mark.parametrize("form", PLAIN + TRANSPOSED, ids=name_of)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(form, *sizes, seed=0, **options):
    """Build a layer whose bias is at work too."""
    kind, more = form
    with seeded(seed):
        layer = kind(*sizes, **{"dtype": torch.float64, **more, **options})
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return layer


def dense_like(form, *sizes, seed=0, **options):
    """Build torch's convolution of the same kind."""
    kind = nn.ConvTranspose2d if form[0].transposed else nn.Conv2d
    with seeded(seed):
        return kind(*sizes, **{"dtype": torch.float64, **options})


def images(generator, dtype, batch):
    return (torch.randn(batch, 2, 6, 5, generator=generator, dtype=torch.float64).to(dtype),)


def by_dense_kernel(layer, inputs):
    g = layer.geometry
    kernel, bias = layer.to_dense(), layer.bias
    if layer.transposed:
        return F.conv_transpose2d(*inputs, kernel, bias, g.stride, g.padding, g.output_padding, 1, g.dilation)
    return F.conv2d(*inputs, kernel, bias, g.stride, g.padding, g.dilation)


def module_case(form, bad):
    kind, more = form
    geometry = {"rank": 2, "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    geometry |= {"output_padding": (1, 1)} if kind.transposed else {}

    def make(**overrides):
        return kind(**{"in_channels": 2, "out_channels": 3, "kernel_size": (3, 2), **geometry, **more, **overrides})

    return ModuleCase(
        part=f"provenn.nn.{kind.__name__}",
        label=more.get("mode", ""),
        make=make,
        inputs=images,
        forms=(Form("dense kernel", by_dense_kernel),),
        bad_input=(
            BadInput("rank", lambda: make(rank=0)),
            BadInput("rank", lambda: make(rank=1.5), TypeError),
            BadInput("in_channels", lambda: make(in_channels=0)),
            BadInput("out_channels", lambda: make(out_channels=-1)),
            BadInput("kernel_size", lambda: make(kernel_size=1)),
            BadInput("kernel_size", lambda: make(kernel_size=(3, 3, 3))),
            BadInput("stride", lambda: make(stride=0)),
            BadInput("dilation", lambda: make(dilation=(1, 0))),
            BadInput("padding", lambda: make(padding=-1)),
            BadInput("x", lambda: make()(torch.ones(1, 3, 6, 5))),
            BadInput("x", lambda: make()(torch.ones(2, 6))),
            *bad(make),
        ),
    )


def plain_bad(make):
    return (
        BadInput("padding", lambda: make(padding="full")),
        BadInput("padding", lambda: make(padding="same")),  # with a stride
        BadInput("padding_mode", lambda: make(padding_mode="mirror")),
    )


def transposed_bad(make):
    return (BadInput("output_padding", lambda: make(output_padding=2)),)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(6, 8, (3, 5), padding="same", padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 1),
        nn.ConvTranspose2d(8, 6, 5, 2, 2, 1),
        nn.Flatten(),
        nn.Linear(6 * 64, 3),
    )


def compressor_case(form, rank):
    return CompressorCase(
        part="provenn.nn.compress_before_training",
        label=form,
        make=lambda: lambda model: compress_before_training(model, rank, (torch.ones(2, 1, 8, 8),), form=form),
        compress=lambda compressor, model: compressor(model),
        model=network,
        example_inputs=lambda generator: (torch.randn(2, 1, 8, 8, generator=generator),),
        budget={"params": 0.65, "bytes": 0.65, "macs": 0.6},
        bad_input=(
            BadInput("rank", lambda: compress_before_training(network(), 0)),
            BadInput("rank", lambda: compress_before_training(network(), 1.5), TypeError),
            BadInput("form", lambda: compress_before_training(network(), 1, form="svd")),
            BadInput("model", lambda: compress_before_training(torch.ones(3), 1), TypeError),
            BadInput("layers", lambda: compress_before_training(network(), 1, layers="0"), TypeError),
            BadInput(
                "example_inputs", lambda: compress_before_training(network(), 1, torch.ones(2, 1, 8, 8)), TypeError
            ),
            BadInput("model", lambda: compress_before_training(nn.Sequential(nn.LazyConv2d(4, 3)), 1)),
            BadInput("layers", lambda: compress_before_training(network(), 1, layers=["9"])),
            BadInput("layers", lambda: compress_before_training(network(), 1, layers=["1"])),
            BadInput("groups", lambda: compress_before_training(network(), 1, layers=["4"])),
        ),
    )


# the wave solver, on a rectangle whose matrices are products of those of two lines

WIDTH, HEIGHT, COLUMNS, ROWS, SPEED, DT, STEPS = 2.0, 1.0, 7, 5, 1.7, 0.2, 30
MESH = QuadMesh.rectangle(WIDTH, HEIGHT, COLUMNS, ROWS)
MODE = torch.sin(math.pi * MESH.nodes[:, 0] / WIDTH) * torch.sin(math.pi * MESH.nodes[:, 1] / HEIGHT)


def line_matrices(length, count):
    """Mass and stiffness of hat functions on an interval."""
    h, ends = length / count, np.diag([1.0] + [2.0] * (count - 1) + [1.0])
    beside = np.eye(count + 1, k=1) + np.eye(count + 1, k=-1)
    return h / 6 * (2 * ends + beside), (ends - beside) / h


def mode_eigenvalue():
    """c² times the sum of the two lines' quotients (2 − 2 cos θ)/h² · 3/(2 + cos θ), θ = π/count."""
    turns = [(math.cos(math.pi / count), length / count) for length, count in ((WIDTH, COLUMNS), (HEIGHT, ROWS))]
    return SPEED**2 * sum(6 * (1 - turn) / (2 + turn) / h**2 for turn, h in turns)


def swinging():
    """cos(nφ) with tan(φ/2) = ω dt/2: what the trapezoidal rule makes of cos(ωt)."""
    phase = 2 * math.atan(DT * math.sqrt(mode_eigenvalue()) / 2)
    return torch.cos(phase * torch.arange(STEPS + 1, dtype=torch.float64))[:, None]


def wave_certificate(problem, result):
    """Energy, work and their balance from the displacements, with matrices that are products of the lines'."""
    (Mx, Kx), (My, Ky) = line_matrices(WIDTH, COLUMNS), line_matrices(HEIGHT, ROWS)
    M, K = np.kron(My, Mx) / SPEED**2, np.kron(My, Kx) + np.kron(Ky, Mx)
    u = result.displacement.numpy()
    F = np.zeros_like(u) if problem["f"] is None else problem["f"].numpy() @ M
    v, energy, work = np.zeros_like(u[0]), [], [0.0]
    for n in range(STEPS + 1):
        energy.append((v @ M @ v + u[n] @ K @ u[n]) / 2)
        if n < STEPS:
            moved = u[n + 1] - u[n]
            v = 2 / DT * moved - v
            work.append(work[-1] + moved @ (F[n] + F[n + 1]) / 2)
    drift = np.abs(np.array(energy) - energy[0] - np.array(work)).max() / max(max(energy), 1e-300)
    return {"energy": energy, "work": work, "dissipation": np.zeros(STEPS + 1), "energy_drift": drift, "residual": 0.0}


def load_of(value):
    return (value * MODE).expand(STEPS + 1, -1)


WAVE_CASES = [
    SolverCase(
        part="provenn.nn.WaveFE2d",
        make=lambda: WaveFE2d(MESH, SPEED, "clamped", DT),
        solve=lambda solver, problem: solver.run(steps=STEPS, **problem),
        answer=lambda result: result.displacement,
        converged=lambda result: max(result.certificate.energy_drift, result.certificate.residual) < 1e-10,
        known=(
            KnownProblem("a standing wave", lambda: {"f": None, "initial": MODE}, lambda: swinging() * MODE, 1e-10),
            KnownProblem(
                "a load that starts and stays",
                lambda: {"f": load_of(3.0)},
                lambda: 3.0 / mode_eigenvalue() * (1 - swinging()) * MODE,
                1e-10,
            ),
            KnownProblem("nothing moves", lambda: {"f": None}, lambda: torch.zeros(STEPS + 1, len(MODE)), 0.0),
        ),
        refused=(
            RefusedProblem("an infinite load", lambda: {"f": load_of(math.inf)}, "finite"),
            RefusedProblem("a load for other steps", lambda: {"f": load_of(1.0)[1:]}, "f must be of shape"),
        ),
        certificate=wave_certificate,
        tolerance=1e-9,
        excluded={"early_stop": "a run takes every step that it is asked for"},
        bad_input=(
            BadInput("mesh", lambda: WaveFE2d(MODE, 1.0, "clamped", 0.1), TypeError),
            BadInput("c", lambda: WaveFE2d(MESH, -1.0, "clamped", 0.1)),
            BadInput("c", lambda: WaveFE2d(MESH, torch.ones(3), "clamped", 0.1)),
            BadInput("boundary", lambda: WaveFE2d(MESH, 1.0, "open", 0.1)),
            BadInput("boundary", lambda: WaveFE2d(MESH, 1.0, {"hole": "free"}, 0.1)),
            BadInput("dt", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.0)),
            BadInput("dt", lambda: WaveFE2d(MESH, 1.0, "clamped", 1.0, mass="lumped", method="explicit")),
            BadInput("mass", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.01, method="explicit")),
            BadInput("method", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.1, method="leapfrog")),
            BadInput("steps", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.1).run(None, 0)),
            BadInput("f", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.1).run(3.0, 2), TypeError),
            BadInput("initial", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.1).run(None, 2, torch.ones(3))),
            BadInput("velocity", lambda: WaveFE2d(MESH, 1.0, "clamped", 0.1).run(None, 2, None, torch.ones(3))),
        ),
    ),
    FunctionCase(
        part="provenn.nn.QuadMesh",
        call=lambda: QuadMesh.rectangle(1.0, 1.0, 4, 4, hole=(0.5, 0.5, 0.2)),
        bad_input=(
            BadInput("nodes", lambda: QuadMesh(MESH.nodes * math.nan, MESH.quads)),
            BadInput("nodes", lambda: QuadMesh(MESH.nodes.long(), MESH.quads), TypeError),
            BadInput("quads", lambda: QuadMesh(MESH.nodes, MESH.quads.flip(1))),
            BadInput("quads", lambda: QuadMesh(MESH.nodes, MESH.quads + 1)),
            BadInput("sides", lambda: QuadMesh(MESH.nodes, MESH.quads, {"left": MESH.sides["left"]})),
            BadInput("width", lambda: QuadMesh.rectangle(0.0, 1.0, 2, 2)),
            BadInput("columns", lambda: QuadMesh.rectangle(1.0, 1.0, 0, 2)),
            BadInput("hole", lambda: QuadMesh.rectangle(1.0, 1.0, 2, 2, hole=(0.5, 0.5))),
        ),
    ),
    FunctionCase(
        part="provenn.nn.wave_dataset",
        call=lambda: wave_dataset(2, torch.Generator().manual_seed(0), resolution=8, frames=2),
        bad_input=(
            BadInput("n", lambda: wave_dataset(0, torch.Generator())),
            BadInput("generator", lambda: wave_dataset(1, None), TypeError),
            BadInput("resolution", lambda: wave_dataset(1, torch.Generator(), resolution=0)),
            BadInput("frames", lambda: wave_dataset(1, torch.Generator(), frames=0)),
            BadInput("interval", lambda: wave_dataset(1, torch.Generator(), interval=-0.1)),
            BadInput("boundary", lambda: wave_dataset(1, torch.Generator(), boundary="periodic")),
            BadInput("dtype", lambda: wave_dataset(1, torch.Generator(), dtype=torch.int64), TypeError),
        ),
    ),
]


CASES = [
    *(module_case(form, plain_bad) for form in PLAIN),
    *(module_case(form, transposed_bad) for form in TRANSPOSED),
    compressor_case("one-way", 1),
    compressor_case("cp", 4),
    compressor_case("tucker", 3),
    *WAVE_CASES,
]


# the kernel, from the weights as they lie in the chain


def filters(layer):
    return {name: factor.weight.detach() for name, factor in layer.factors.named_children()}


def kernel_by_loops(layer, rank):
    """The card's formulas, one product at a time."""
    w, (k_y, k_x) = filters(layer), layer.geometry.kernel_size
    outs, ins = layer.out_channels, layer.in_channels
    kernel = torch.zeros(outs, ins, k_y, k_x, dtype=torch.float64)
    for o, c, y, x in itertools.product(range(outs), range(ins), range(k_y), range(k_x)):
        total = 0.0
        if isinstance(layer, Tucker2Conv2d):
            for p, q in itertools.product(range(rank[1]), range(rank[0])):
                total += w["output"][o, p, 0, 0] * w["core"][p, q, y, x] * w["channel"][q, c, 0, 0]
        elif isinstance(layer, CPConv2d):
            for r in range(rank):
                total += (
                    w["output"][o, r, 0, 0]
                    * w["channel"][r, c, 0, 0]
                    * w["vertical"][r, 0, y, 0]
                    * w["horizontal"][r, 0, 0, x]
                )
        elif layer.mode == "channel":
            for r in range(rank):
                term = o * rank + r
                total += w["channel"][term, c, 0, 0] * w["vertical"][term, 0, y, 0] * w["horizontal"][o, r, 0, x]
        else:
            for r in range(rank):
                total += w["vertical"][(c * outs + o) * rank + r, 0, y, 0] * w["horizontal"][o, r * ins + c, 0, x]
        kernel[o, c, y, x] = total
    return kernel


@each_plain
def test_the_kernel_is_the_formula(form):
    rank = (3, 2) if form[0] is Tucker2Conv2d else 3
    layer = made(form, 4, 5, (2, 3), rank)
    torch.testing.assert_close(layer.to_dense(), kernel_by_loops(layer, rank), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@each_plain
def test_forward_is_a_dense_convolution(form, padding_mode, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    x = normal(2, 3, 11, 9, dtype=dtype)
    for stride, dilation, padding in itertools.product(
        (1, 2, (1, 3)), (1, (2, 1), (1, 2)), (0, 1, (2, 0), "same", "valid")
    ):
        if padding == "same" and stride != 1:
            continue
        options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": padding_mode}
        layer = made(form, 3, 4, (3, 4), 2, dtype=dtype, **options)
        dense = dense_like(form, 3, 4, (3, 4), dtype=dtype, **options)
        with torch.no_grad():
            dense.weight.copy_(layer.to_dense())
            dense.bias.copy_(layer.bias)
            wanted = dense(x)
            torch.testing.assert_close(layer(x), wanted, rtol=0, atol=tolerance * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_transposed
def test_forward_is_a_dense_transposed_convolution(form, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    x = normal(2, 3, 5, 6, dtype=dtype)
    for stride, dilation, padding, added in itertools.product(
        (1, 2, (2, 3)), (1, (2, 1), (1, 2)), (0, 1, (2, 0)), (0, (1, 0), (0, 1))
    ):
        options = {"stride": stride, "dilation": dilation, "padding": padding, "output_padding": added}
        if added != 0 and (stride == 1 or dilation != 1):
            continue  # refused by torch and by us, or no more told apart
        layer = made(form, 3, 4, (3, 4), 2, dtype=dtype, **options)
        dense = dense_like(form, 3, 4, (3, 4), dtype=dtype, **options)
        with torch.no_grad():
            dense.weight.copy_(layer.to_dense())
            dense.bias.copy_(layer.bias)
            wanted = dense(x)
            torch.testing.assert_close(layer(x), wanted, rtol=0, atol=tolerance * max(1, wanted.abs().max().item()))


@each_form
def test_without_batch_and_without_bias(form):
    layer = made(form, 3, 4, 3, 2, bias=False, padding=1)
    assert layer.bias is None
    x = normal(3, 7, 6)
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=0, atol=0)
    assert not layer(torch.zeros_like(x)).any()


@pytest.mark.parametrize("mode", ["channel", "spatial"])
def test_a_transposed_layer_is_the_adjoint(mode):
    forward = made((OneWayConv2d, {"mode": mode}), 3, 4, (3, 5), 2, stride=2, padding=1, bias=False)
    kernel = nn.ConvTranspose2d(4, 3, (3, 5), stride=2, padding=1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        kernel.weight.copy_(forward.to_dense())
    x, y = normal(1, 3, 9, 11), normal(1, 4, 5, 5, seed=1)
    enough = 9 if mode == "channel" else 3
    backward = OneWayConvTranspose2d.from_dense(kernel, enough, mode=mode)
    torch.testing.assert_close((forward(x) * y).sum(), (x * backward(y)).sum(), rtol=1e-10, atol=1e-10)


# sizes and initialisation


@pytest.mark.parametrize(("ins", "outs", "k_y", "k_x", "rank"), [(16, 16, 5, 5, 1), (3, 7, 3, 4, 2), (1, 6, 5, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_parameter_counts(ins, outs, k_y, k_x, rank, bias, transposed):
    one_way, cp, tucker = (
        (OneWayConvTranspose2d, CPConvTranspose2d, Tucker2ConvTranspose2d)
        if transposed
        else (OneWayConv2d, CPConv2d, Tucker2Conv2d)
    )
    extra = outs if bias else 0

    def count(kind, *rank, **options):
        return model_size(kind(ins, outs, (k_y, k_x), *rank, bias=bias, **options)).parameters - extra

    assert count(one_way, rank) == outs * rank * (ins + k_y + k_x)
    assert count(one_way, rank, mode="spatial") == outs * ins * rank * (k_y + k_x)
    assert count(cp, rank) == rank * (ins + k_y + k_x + outs)
    inner = (min(rank, ins), rank)
    assert count(tucker, inner) == inner[0] * ins + inner[0] * inner[1] * k_y * k_x + inner[1] * outs


@pytest.mark.parametrize(
    ("form", "rank"),
    [(PLAIN[0], 1), (PLAIN[0], 3), (PLAIN[1], 1), (PLAIN[1], 3), (PLAIN[2], 2000), (PLAIN[3], (32, 400))],
    ids=str,
)
def test_outputs_vary_as_those_of_the_dense_he_layer(form, rank):
    """1000 inputs; many outputs, or where they share factors many of those: a few products vary much in themselves."""
    layer = made(form, 32, 1000, 5, rank, bias=False, dtype=torch.float32)
    dense = nn.Conv2d(32, 1000, 5, bias=False)
    nn.init.kaiming_normal_(dense.weight, generator=torch.Generator().manual_seed(2))
    x = normal(1000, 32 * 5 * 5, dtype=torch.float32)
    seen, wanted = ((x @ kernel.flatten(1).T).var().item() for kernel in (layer.to_dense(), dense.weight))
    assert seen == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
def test_transposed_outputs_keep_the_variance_too(stride):
    layer = made((OneWayConvTranspose2d, {}), 16, 1000, 6, 2, stride=stride, bias=False, dtype=torch.float32)
    with torch.no_grad():
        inner = layer(normal(4, 16, 16, 16, dtype=torch.float32))[..., 6:-6, 6:-6]
    assert inner.var().item() == pytest.approx(2, rel=0.05)


@each_form
def test_the_factors_start_with_one_variance(form):
    layer = made(form, 40, 40, 9, 30, bias=False)
    spreads = [weight.var().item() for weight in filters(layer).values()]
    assert max(spreads) < 1.3 * min(spreads)
    assert all(weight.mean().abs() < 0.15 * weight.std() for weight in filters(layer).values())


def test_reset_draws_from_the_generator_and_zeroes_the_bias():
    layer = made((OneWayConv2d, {}), 3, 4, 3, 2)
    twin = copy.deepcopy(layer)
    state = torch.get_rng_state()
    layer.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(layer.to_dense(), twin.to_dense())
    twin.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(layer.to_dense(), twin.to_dense())
    assert not layer.bias.any()


# dense kernels


@pytest.mark.parametrize("transposed", [False, True])
def test_a_full_rank_represents_any_kernel(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer_kind = OneWayConvTranspose2d if transposed else OneWayConv2d
    dense = kind(2, 4, 3, dtype=torch.float64)
    for rank in (6, 7):  # min(2·3, 2·3, 3·3)
        layer = layer_kind.from_dense(dense, rank)
        assert (layer.to_dense() - dense.weight).abs().max() < 1e-6
        assert torch.equal(layer.bias, dense.bias)
    assert (layer_kind.from_dense(dense, 3, mode="spatial").to_dense() - dense.weight).abs().max() < 1e-12


@each_form
def test_the_error_falls_with_the_rank(form):
    dense = dense_like(form, 5, 5, (3, 4))
    errors = [(form[0].from_dense(dense, r, **form[1]).to_dense() - dense.weight).norm().item() for r in range(1, 6)]
    assert all(later <= earlier + 1e-10 for earlier, later in itertools.pairwise(errors))
    assert errors[0] > errors[-1]


def test_the_error_falls_with_iterations():
    dense = nn.Conv2d(5, 6, 4, dtype=torch.float64)
    nn.init.normal_(dense.weight, generator=torch.Generator().manual_seed(0))
    errors = [
        (OneWayConv2d.from_dense(dense, 2, iterations=n).to_dense() - dense.weight).norm().item() for n in (1, 3, 9, 27)
    ]
    assert all(later <= earlier + 1e-10 for earlier, later in itertools.pairwise(errors))


def test_each_output_channel_is_fitted_by_itself():
    dense = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    layer = OneWayConv2d.from_dense(dense, 1)
    scaled = copy.deepcopy(dense)
    with torch.no_grad():
        scaled.weight[1:] *= 1000
    again = OneWayConv2d.from_dense(scaled, 1)
    torch.testing.assert_close(again.to_dense()[0], layer.to_dense()[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(again.to_dense()[1:], 1000 * layer.to_dense()[1:], rtol=1e-8, atol=1e-8)


def test_a_separable_gaussian_needs_one_spatial_term():
    dense = nn.Conv2d(1, 1, 7, bias=False, dtype=torch.float64)
    grid = torch.arange(-3.0, 4.0, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(torch.exp(-(grid[:, None] ** 2 / 2 + grid**2 / 5)))
    layer = OneWayConv2d.from_dense(dense, 1, mode="spatial")
    torch.testing.assert_close(layer.to_dense(), dense.weight, rtol=0, atol=1e-14)
    assert model_size(layer).parameters == 14


@each_form
def test_from_dense_keeps_geometry_type_and_mode(form):
    options = {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)}
    options |= {"output_padding": 1} if form[0].transposed else {"padding_mode": "circular"}
    dense = dense_like(form, 2, 2, (3, 2), **options).eval().requires_grad_(False)
    state = torch.get_rng_state()
    enough = {CPConv2d: 12, CPConvTranspose2d: 12}.get(form[0], 2 if form[0].__name__.startswith("T") else 6)
    layer = form[0].from_dense(dense, enough, **form[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not layer.training
    x = normal(2, 2, 9, 8)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


def test_from_dense_leaves_the_state_of_a_parametrization():
    dense = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, dtype=torch.float64))
    state = copy.deepcopy(dense.state_dict())
    layer = OneWayConv2d.from_dense(dense, 9)
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert dense.training
    assert layer.training
    assert (layer.to_dense() - dense.eval().weight).abs().max() < 1e-12


def filled(value, dtype=torch.float32):
    dense = nn.Conv2d(4, 4, 3, dtype=dtype)
    nn.init.constant_(dense.weight, value)
    return dense


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: OneWayConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "groups"),
        (lambda: OneWayConv2d.from_dense(nn.Conv2d(4, 4, 1)), ValueError, "kernel_size"),
        (lambda: OneWayConv2d.from_dense(nn.Conv2d(4, 4, 3), 0), ValueError, "rank"),
        (lambda: OneWayConv2d.from_dense(nn.Conv2d(4, 4, 3), 1, 0), ValueError, "iterations"),
        (lambda: OneWayConv2d.from_dense(filled(math.nan), 9), ValueError, "conv must have finite weights"),
        (lambda: Tucker2Conv2d.from_dense(filled(math.inf)), ValueError, "conv must have finite weights"),
        (lambda: CPConv2d.from_dense(filled(1j, torch.complex64)), TypeError, "conv must have real weights"),
        (lambda: OneWayConv2d.from_dense(nn.ConvTranspose2d(4, 4, 3)), TypeError, "nn.Conv2d"),
        (lambda: OneWayConvTranspose2d.from_dense(nn.Conv2d(4, 4, 3)), TypeError, "nn.ConvTranspose2d"),
        (lambda: OneWayConv2d(2, 2, 3, mode="depth"), ValueError, "mode"),
        (lambda: Tucker2Conv2d(2, 4, 3, (3, 2)), ValueError, "rank must not exceed in_channels = 2"),
        (lambda: Tucker2Conv2d(2, 4, 3, (2, 5)), ValueError, "rank must not exceed out_channels = 4"),
        (lambda: Tucker2Conv2d(2, 4, 3, (2, 0)), ValueError, "rank"),
    ],
)
def test_bad_input_is_named(call, error, name):
    with pytest.raises(error, match=name):
        call()


# whole models


def test_the_report_tells_each_layer():
    torch.manual_seed(0)
    model = network()
    smaller, report = compress_before_training(model, 1, (torch.ones(1, 1, 8, 8),))
    changes = {one.name: one for one in report.layers}
    assert list(changes) == ["0", "2", "4", "5", "6"]
    # 6 of 5 + 5 (spatial), 8 of 6 + 3 + 5, 6 of 8 + 5 + 5, and the biases
    assert [changes[name].params for name in "026"] == [60 + 6, 112 + 8, 108 + 6]
    assert [changes[name].dense_params for name in "026"] == [150 + 6, 720 + 8, 1200 + 6]
    assert "groups = 8" in changes["4"].note
    assert "1×1" in changes["5"].note
    for name in "45":
        assert changes[name].params == changes[name].dense_params
        assert torch.equal(smaller[int(name)].weight, model[int(name)].weight)
    assert report.dense.params == model_size(model).parameters
    left = sum(one.dense_params - one.params for one in report.layers)
    assert report.params == report.dense.params - left == model_size(smaller).parameters
    # one-way kernel: MACs of channel, vertical and horizontal steps at an 8×8 input, 4×4 inside
    steps = 6 * 4 * 8 * 5 + 6 * 16 * 5
    inner = 8 * 16 * (6 + 3 + 5)
    rest = 8 * 16 * 9 + 64 * 16
    up = 6 * 8 * 16 + 6 * 16 * 5 + 6 * 8 * 4 * 5
    assert report.macs == steps + inner + rest + up + 6 * 64 * 3
    assert report.latency > 0
    assert report.dense.latency > 0
    assert report.plot().axes[0].get_legend() is not None


def test_the_chains_are_those_of_the_layers():
    dense = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), padding_mode="reflect", dtype=torch.float64)
    draws = torch.Generator().manual_seed(3)
    chain, report = compress_before_training(dense, 2, generator=draws)
    layer = OneWayConv2d(4, 6, (3, 5), 2, 2, (1, 2), padding_mode="reflect", dtype=torch.float64)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    x = normal(2, 4, 9, 8)
    assert torch.equal(chain(x), layer(x))
    assert (report.macs, report.latency, report.layers[0].rank) == (None, None, 2)


def test_only_the_named_layers_change():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    smaller, report = compress_before_training(model, 1, layers=["0.1", "1"])
    assert [type(part) for part in (smaller[0][0], smaller[0][1], smaller[1])] == [
        nn.Conv2d,
        nn.Sequential,
        nn.Sequential,
    ]
    assert [one.name for one in report.layers] == ["0.1", "1"]
    _, report = compress_before_training(model, 1, layers=["0"])
    assert [one.name for one in report.layers] == ["0.0", "0.1"]


def test_a_layer_used_twice_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    smaller, report = compress_before_training(model, 1)
    assert smaller[0] is smaller[2]
    assert len(report.layers) == 1
    assert report.params == 4 * (4 + 3 + 3) + 4
    for name in ("2", "inner", "inner.0"):  # it answers to each of its names
        model = nn.Sequential(OrderedDict([("0", conv), ("2", conv), ("inner", nn.Sequential(conv))]))
        smaller, report = compress_before_training(model, 1, layers=[name])
        assert smaller[0] is smaller[1] is smaller[2][0]
        assert [one.name for one in report.layers] == ["0"]


def test_what_cannot_shrink_is_left_and_told():
    tied, other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    other.weight = tied.weight
    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "large": nn.Conv2d(4, 4, 3),
            "line": nn.Conv1d(4, 4, 3),
            "normed": parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            "tied": tied,
            "other": other,
            "hooked": hooked,
        }
    )
    state = copy.deepcopy(model.state_dict())
    smaller, report = compress_before_training(model, 4)
    notes = {one.name: one.note for one in report.layers}
    assert "at rank 4 the factors would have 160 weights, the kernel has 144" in notes["large"]
    assert "Conv1d" in notes["line"]
    assert "subclass" in notes["normed"]
    assert "shares" in notes["tied"]
    assert "shares" in notes["other"]
    assert "hooks" in notes["hooked"]
    assert all(torch.equal(value, state[name]) for name, value in smaller.state_dict().items())
    assert smaller["other"].weight is smaller["tied"].weight


def test_modes_and_frozen_layers_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 3).requires_grad_(False), nn.Conv2d(4, 4, 3)).eval()
    smaller, _ = compress_before_training(model, 1)
    assert not any(part.training for part in smaller.modules())
    assert [p.requires_grad for p in smaller.parameters()] == [False] * 4 + [True] * 4
    model[1].weight.requires_grad_(False)
    model[0].bias.requires_grad_()
    smaller, _ = compress_before_training(model, 1)
    assert [p.requires_grad for p in smaller.parameters()] == [False, False, False, True] * 2


def test_tucker_ranks_are_cut_to_the_channels():
    _, report = compress_before_training(nn.Conv2d(3, 16, 5), 6, form="tucker")
    assert report.layers[0].rank == (3, 6)
    assert report.params == 9 + 3 * 6 * 25 + 6 * 16 + 16


def test_the_result_trains_and_loads_without_provenn(tmp_path):
    smaller, _ = compress_before_training(network(), 1, generator=torch.Generator().manual_seed(0))
    x = normal(4, 1, 8, 8, dtype=torch.float32)
    optimizer = torch.optim.Adam(smaller.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = smaller(x).square().mean() + (smaller(x)[:, 0] - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(smaller.eval()))
    code = (
        "import sys, pickle, torch; sys.modules['provenn'] = None\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        "print(model(torch.ones(2, 1, 8, 8)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) == pytest.approx(smaller(torch.ones(2, 1, 8, 8)).sum().item(), rel=1e-4)


# the peer


def test_against_tensorly_torch():
    tltorch = pytest.importorskip("tltorch")
    ours = made((CPConv2d, {}), 4, 6, (3, 5), 3, padding=(1, 2), dtype=torch.float32)
    kernel = ours.to_dense().detach()
    dense = nn.Conv2d(4, 6, (3, 5), padding=(1, 2))
    with torch.no_grad():
        dense.weight.copy_(kernel)
        dense.bias.copy_(ours.bias)
    theirs = tltorch.FactorizedConv.from_conv(dense, rank=3, factorization="cp", implementation="factorized")
    with torch.no_grad():
        w = filters(ours)
        theirs.weight.weights.fill_(1.0)
        for factor, value in zip(
            theirs.weight.factors,
            (
                w["output"][:, :, 0, 0],
                w["channel"][:, :, 0, 0].T,
                w["vertical"][:, 0, :, 0].T,
                w["horizontal"][:, 0, 0].T,
            ),
            strict=True,
        ):
            factor.copy_(value)
    torch.testing.assert_close(theirs.weight.to_tensor(), kernel, rtol=0, atol=1e-5)
    x = normal(2, 4, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5 * math.ceil(ours(x).abs().max().item()))
