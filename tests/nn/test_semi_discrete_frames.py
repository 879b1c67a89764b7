"""Generalised scattering against dense convolutions, energies by hand, kymatio's filters and the theorems' bounds."""

import math
import warnings

import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, ModuleCase, ProbeCase, Symmetry
from provenn.nn import (
    FilterBank,
    GeneralizedScattering,
    ScatteringLayer,
    deform,
    deformation_probe,
    energy_probe,
    translation_probe,
)

KINDS = ("modulus", "relu", "tanh", "logistic")


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    """Banks are made in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def banks(grid):
    made = {
        "haar": FilterBank.haar(grid),
        "daubechies": FilterBank.haar(grid, 2),
        "gabor": FilterBank.gabor(grid, 3),
        "random": FilterBank.random(grid, 3, 2, draws(1)),
    }
    if len(grid) == 2:
        made |= {"morlet": FilterBank.morlet(grid, 2, 3), "curvelet": FilterBank.curvelet(grid, 2, 2)}
        made["conv"] = FilterBank.from_conv(nn.Conv2d(1, 3, 2), grid)
    return made


def network(grid=(8, 8), depth=2, nonlinearity="modulus", pooling="average", stride=2, bank="haar"):
    layers = []
    for level in range(depth):
        here = tuple(n // stride**level for n in grid)
        layers.append(ScatteringLayer(banks(here)[bank], nonlinearity, pooling, stride))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GeneralizedScattering(layers).normalized()


def images(generator, dtype, batch):
    return (torch.randn(batch, 1, 8, 8, generator=generator, dtype=dtype),)


def shifted(inputs):
    return (inputs[0].roll((4, -8), (2, 3)),)


def features_shifted(outputs):
    scales = (1, 2, 4)
    return [one.roll((4 // s, -8 // s), (2, 3)) for one, s in zip(outputs, scales, strict=True)]


COMPUTED = "filters are computed from their values, which the meta device has none of; build, then move"
PLAIN = {"gradients": "has no parameters, and is differentiated by its inputs in gradcheck", "meta": COMPUTED}


def inadmissible():
    return GeneralizedScattering([ScatteringLayer(FilterBank.haar((8, 8)).scaled(2.0), stride=2)])


def smooth_field(grid=(8, 8), seed=3):
    tau = randn(len(grid), *grid, seed=seed)
    radius = sum(
        torch.fft.fftfreq(n).view([-1 if a == b else 1 for b in range(len(grid))]) ** 2 for a, n in enumerate(grid)
    )
    dims = tuple(range(1, len(grid) + 1))
    return torch.fft.ifftn(torch.fft.fftn(tau, dim=dims) * torch.exp(-radius / (2 * 0.1**2)), dim=dims).real


CASES = [
    FunctionCase(
        "provenn.nn.FilterBank",
        lambda: FilterBank.haar((8,)),
        bad_input=(
            BadInput("filters", lambda: FilterBank(torch.ones(1, 8))),
            BadInput("filters", lambda: FilterBank(torch.ones(2, 4, 4, 4))),
            BadInput("output", lambda: FilterBank(torch.ones(2, 8), output=2)),
            BadInput("output", lambda: FilterBank(torch.ones(2, 8), output=0.0), TypeError),
            BadInput("moments", lambda: FilterBank.haar((8,), 3)),
            BadInput("grid", lambda: FilterBank.haar((8, 8, 8))),
            BadInput("grid", lambda: FilterBank.morlet((8,), 2)),
            BadInput("scales", lambda: FilterBank.morlet((8, 8), 0)),
            BadInput("orientations", lambda: FilterBank.curvelet((8, 8), 2, 0)),
            BadInput("channels", lambda: FilterBank.gabor((8,), 1)),
            BadInput("width", lambda: FilterBank.gabor((8,), 2, 0.0)),
            BadInput("count", lambda: FilterBank.random((8,), 0)),
            BadInput("size", lambda: FilterBank.random((8,), 1, 9)),
            BadInput("grid", lambda: FilterBank.from_conv(nn.Conv2d(1, 1, 5), (4, 4))),
            BadInput("factor", lambda: FilterBank.haar((8,)).scaled(0.0)),
            BadInput("bound", lambda: FilterBank.haar((8,)).complete(0.5)),
        ),
    ),
    ModuleCase(
        "provenn.nn.ScatteringLayer",
        lambda: ScatteringLayer(FilterBank.haar((8, 8)), "modulus", "average", 2),
        images,
        float32_tolerance=1e-5,
        lipschitz=lambda module, inputs: 1.0,
        excluded=PLAIN,
        bad_input=(
            BadInput("bank", lambda: ScatteringLayer(torch.ones(2, 8)), TypeError),
            BadInput("nonlinearity", lambda: ScatteringLayer(FilterBank.haar((8,)), "sigmoid")),
            BadInput("nonlinearity", lambda: ScatteringLayer(FilterBank.haar((8,)), (torch.sigmoid, 0.25))),
            BadInput("nonlinearity", lambda: ScatteringLayer(FilterBank.haar((8,)), (torch.relu, 0.0))),
            BadInput("pooling", lambda: ScatteringLayer(FilterBank.haar((8,)), pooling="mean")),
            BadInput("stride", lambda: ScatteringLayer(FilterBank.haar((8,)), stride=3)),
            BadInput("pooling", lambda: ScatteringLayer(FilterBank.haar((8,)), "tanh", "max", 2)(randn(1, 8) + 0j)),
            BadInput("signal", lambda: ScatteringLayer(FilterBank.haar((8,)))(randn(1, 7))),
        ),
    ),
    *(
        ModuleCase(
            "provenn.nn.GeneralizedScattering",
            lambda bank=bank: network(bank=bank),
            images,
            label=bank,
            float32_tolerance=1e-5,
            symmetries=(Symmetry("shift by the strides", shifted, features_shifted),),
            lipschitz=lambda module, inputs: 1.0,
            excluded=PLAIN,
            bad_input=(
                BadInput("layers", lambda: GeneralizedScattering([])),
                BadInput("layers", lambda: GeneralizedScattering([nn.Identity()]), TypeError),
                BadInput(
                    "layers", lambda: GeneralizedScattering([ScatteringLayer(FilterBank.haar((8,)), stride=2)] * 2)
                ),
                BadInput("domain", lambda: GeneralizedScattering([ScatteringLayer(FilterBank.haar((8,)))], "line")),
                BadInput(
                    "output", lambda: GeneralizedScattering([ScatteringLayer(FilterBank.haar((8,)))], output=randn(4))
                ),
                BadInput("output", lambda: GeneralizedScattering([ScatteringLayer(FilterBank(randn(2, 8)))])),
                BadInput("f", lambda: network()(randn(2, 1, 8, 4))),
                BadInput("f", lambda: network()(randn(2, 2, 8, 8))),
            ),
        )
        for bank in ("haar", "gabor", "curvelet")
    ),
    FunctionCase(
        "provenn.nn.deform",
        lambda: deform(randn(8), torch.zeros(1, 8)),
        bad_input=(
            BadInput("tau", lambda: deform(randn(8), torch.zeros(2, 8))),
            BadInput("tau", lambda: deform(randn(8), torch.zeros(1, 7))),
            BadInput("omega", lambda: deform(randn(8), torch.zeros(1, 8), torch.zeros(7))),
        ),
    ),
    *(
        ProbeCase(
            f"provenn.nn.{probe.__name__}",
            run=run,
            model=network,
            data=lambda generator: images(generator, torch.float64, 3)[0],
            brute_force=brute,
            bad_input=(BadInput("net", lambda run=run: run(inadmissible(), randn(1, 1, 8, 8))), *more),
        )
        for probe, run, brute, more in (
            (
                translation_probe,
                lambda net, f: translation_probe(net, f, (1, 4)),
                lambda net, f: {"shifts": (1, 4)},
                (
                    BadInput("shifts", lambda: translation_probe(network(), randn(1, 1, 8, 8), (0,))),
                    BadInput("shifts", lambda: translation_probe(network(), randn(1, 1, 8, 8), (0.5,)), TypeError),
                ),
            ),
            (
                deformation_probe,
                lambda net, f: deformation_probe(net, f, smooth_field()),
                lambda net, f: {"amplitudes": (0.05, 0.1, 0.2, 0.4)},
                (
                    BadInput("tau", lambda: deformation_probe(network(), randn(1, 1, 8, 8), torch.zeros(2, 8, 8))),
                    BadInput("tau", lambda: deformation_probe(network(), randn(1, 1, 8, 8), smooth_field(), (50.0,))),
                    BadInput(
                        "amplitudes", lambda: deformation_probe(network(), randn(1, 1, 8, 8), smooth_field(), (0.0,))
                    ),
                ),
            ),
            (
                energy_probe,
                energy_probe,
                lambda net, f: {"bound": 1.0},
                (),
            ),
        )
    ),
]


# Banks


@pytest.mark.parametrize("grid", [(16,), (8, 8), (8, 16)])
def test_wavelets_and_curvelets_are_tight_and_completion_makes_all_so(grid):
    for name, bank in banks(grid).items():
        lower, upper = bank.frame_bounds()
        if name in ("haar", "daubechies", "curvelet"):
            assert (lower, upper) == pytest.approx((1, 1)), name
        assert bank.grid == grid
        assert bank.complete().frame_bounds() == pytest.approx((upper, upper)), name
        assert bank.complete(2 * upper).frame_bounds() == pytest.approx((2 * upper, 2 * upper)), name
        assert bank.scaled(2.0).frame_bounds() == pytest.approx((4 * lower, 4 * upper)), name


def test_haar_taps_are_half_sums_and_half_differences():
    taps = torch.fft.ifft(FilterBank.haar((8,)).transfer()).real
    expected = torch.zeros(2, 8)
    expected[:, :2] = torch.tensor([[0.5, 0.5], [0.5, -0.5]])
    torch.testing.assert_close(taps, expected)


def test_daubechies_wavelet_is_blind_to_lines():
    taps = torch.fft.ifft(FilterBank.haar((16,), 2).transfer()).real
    n = torch.arange(16.0)
    assert taps[1].sum().abs() < 1e-12
    assert (taps[1] * n).sum().abs() < 1e-12
    assert taps[0].sum() == pytest.approx(1)


def test_morlets_are_kymatios():
    bank = pytest.importorskip("kymatio.scattering2d.filter_bank").filter_bank(16, 16, 2, L=4)
    ours = FilterBank.morlet((16, 16), 2, 4).transfer()
    theirs = [bank["phi"]["levels"][0], *(one["levels"][0] for one in bank["psi"])]
    for mine, other in zip(ours, theirs, strict=True):
        # theirs has π to five digits
        torch.testing.assert_close(mine, torch.from_numpy(other).double(), rtol=0, atol=1e-4)


def test_wedges_double_at_every_second_scale_and_look_both_ways():
    bank = FilterBank.curvelet((32, 32), 4, 3)
    assert len(bank.transfer()) == 1 + 3 + 6 + 6 + 12
    filters = bank.transfer()
    mirrored = filters.flip(1, 2).roll((1, 1), (1, 2))
    torch.testing.assert_close(filters[:, 1:16, 1:16], mirrored[:, 1:16, 1:16])


def test_drawn_and_learned_banks_are_where_their_filters_are():
    conv = nn.Conv2d(1, 3, 3)
    expected = FilterBank.random((8, 8), 3, 2, draws(1)), FilterBank.from_conv(conv, (8, 8))
    with torch.device("meta"):  # the default device, where what is made without one would be, without values
        found = FilterBank.random((8, 8), 3, 2, draws(1)), FilterBank.from_conv(conv, (8, 8))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.parts, other.parts)


def test_a_learned_bank_filters_as_its_convolution_does():
    conv = nn.Conv2d(1, 3, 3, bias=False, padding=1, padding_mode="circular")
    f = randn(2, 1, 8, 8)
    bank = FilterBank.from_conv(conv, (8, 8))
    assert bank.frame_bounds()[1] <= 2 + 1e-9  # scaled to 1, and a low-pass of height 1
    filtered = torch.fft.ifft2(torch.fft.fft2(f) * bank.transfer()[1:]).real
    # The layer pads by one pixel, which shifts its output; the sizes of the spectra do not see that.
    ratio = torch.fft.fft2(filtered).abs() / torch.fft.fft2(conv(f)).abs()
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))


# Layers


def test_a_layer_by_hand_on_eight_points():
    f = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0, -1.0, 3.0, 2.0])[None]
    layer = ScatteringLayer(FilterBank.haar((8,)), "modulus", "identity", 2)
    details = [abs(f[0, n] - f[0, n - 1]) / 2 for n in range(8)]
    torch.testing.assert_close(layer(f)[0, 0], torch.stack(details[::2]) * math.sqrt(2))
    averaged = ScatteringLayer(FilterBank.haar((8,)), "modulus", "average", 2)(f)[0, 0]
    torch.testing.assert_close(averaged, torch.stack(details).view(4, 2).mean(1) * math.sqrt(2))
    largest = ScatteringLayer(FilterBank.haar((8,)), "modulus", "max", 2)(f)[0, 0]
    torch.testing.assert_close(largest, torch.stack(details).view(4, 2).amax(1) * math.sqrt(2))
    with pytest.warns(UserWarning, match="not admissible"):
        net = GeneralizedScattering([layer], output=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    first, second = net(f[:, None])
    torch.testing.assert_close(first[0, 0], torch.stack([(f[0, n] + f[0, n - 1]) / 2 for n in range(8)]))
    torch.testing.assert_close(second[0, 0], layer(f)[0, 0].mean().expand(4))


def test_pooling_in_the_plane_takes_boxes():
    f = randn(1, 8, 8).abs()
    layer = ScatteringLayer(FilterBank(torch.ones(2, 8, 8)), "identity", "average", 4)
    expected = nn.functional.avg_pool2d(f, 4) * 4
    torch.testing.assert_close(layer(f)[:, 0].real, expected)
    every = ScatteringLayer(FilterBank(torch.ones(2, 8, 8)), "identity", "identity", 4)
    torch.testing.assert_close(every(f)[:, 0].real, f[:, ::4, ::4] * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_nonlinearities_act_on_both_parts_and_have_their_constants(kind):
    layer = ScatteringLayer(FilterBank(torch.ones(2, 8)), kind)
    z = torch.complex(randn(5, 8, seed=1), randn(5, 8, seed=2))
    y = layer(z)[:, 0]
    scalar = {"relu": torch.relu, "tanh": torch.tanh, "logistic": lambda t: torch.sigmoid(t) - 0.5}
    expected = z.abs() if kind == "modulus" else torch.complex(scalar[kind](z.real), scalar[kind](z.imag))
    torch.testing.assert_close(y, expected)
    assert layer.lipschitz == {"modulus": 1, "relu": 2, "tanh": 2, "logistic": 0.5}[kind]
    other = layer(z + 0.1)[:, 0]
    assert (other - y).norm() <= layer.lipschitz * (0.1 * torch.ones(5, 8)).norm()


@pytest.mark.parametrize("grid", [(16,), (8, 8)])
@pytest.mark.parametrize("name", ["haar", "daubechies"])
def test_a_tight_layer_without_subsampling_keeps_all_energy(grid, name):
    bank, f = banks(grid)[name], randn(3, *grid)
    layer = ScatteringLayer(bank, "modulus")
    chi = bank.transfer()[bank.output]
    dims = tuple(range(-len(grid), 0))
    smooth = torch.fft.ifftn(torch.fft.fftn(f, dim=dims) * chi, dim=dims)
    kept = layer(f).square().sum() + smooth.abs().square().sum()
    assert kept.item() == pytest.approx(f.square().sum().item(), rel=1e-10)


# Networks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["identity", "average"])
@pytest.mark.parametrize("bank", ["haar", "gabor", "random", "morlet", "curvelet", "conv"])
def test_features_change_by_no_more_than_the_signal(kind, pooling, bank):
    net = network(nonlinearity=kind, pooling=pooling, bank=bank)
    assert net.constants().admissible
    draw = draws(5)
    for scale in (0.01, 1.0, 100.0):
        f = torch.randn(60, 1, 8, 8, generator=draw)
        spikes = torch.zeros_like(f).index_put(
            (torch.arange(60), torch.tensor(0), torch.tensor(3), torch.tensor(4)), torch.tensor(5.0)
        )
        h = f + scale * torch.randn(f.shape, generator=draw) if scale < 50 else spikes
        change = sum((a - b).abs().square().flatten(1).sum(1) for a, b in zip(net(f), net(h), strict=True)).sqrt()
        assert (change <= (f - h).flatten(1).norm(dim=1) * (1 + 1e-6)).all()
        energy = sum(a.abs().square().flatten(1).sum(1) for a in net(h))
        assert (energy <= h.flatten(1).square().sum(1) * (1 + 1e-6)).all()


def test_subsampling_alone_can_raise_the_energy_which_its_constant_tells():
    f = torch.zeros(1, 8)
    f[0, 0] = 1
    layer = ScatteringLayer(FilterBank(torch.ones(2, 8)), "modulus", "identity", 2)
    assert layer(f).square().sum() == pytest.approx(2.0)
    assert layer.pooling_constants() == pytest.approx((1.0, math.sqrt(2)))
    assert layer.admissibility() == pytest.approx(2 * 2)  # two filters of height 1: B = 2
    assert ScatteringLayer(FilterBank(torch.ones(2, 8)), "modulus", "average", 2).pooling_constants() == (1.0, 1.0)


def test_an_inadmissible_network_warns_and_is_normalised_to_an_admissible_one():
    with pytest.warns(UserWarning, match=r"max\(B, B L² R²\) = 16"):
        net = inadmissible()
    assert not net.constants().admissible
    fixed = net.normalized().constants()
    assert fixed.admissible
    assert fixed.admissibility[0] == pytest.approx(1)
    assert ScatteringLayer(FilterBank.haar((8,)), "relu").admissibility() == pytest.approx(4)
    assert not GeneralizedScattering([ScatteringLayer(FilterBank.haar((8,)), pooling="max")]).constants().pointwise


def test_without_nonlinearity_and_subsampling_the_network_is_linear():
    net = network(nonlinearity="identity", stride=1)
    f, h = randn(2, 1, 8, 8, seed=1), randn(2, 1, 8, 8, seed=2)
    for a, b, c in zip(net(f), net(h), net(2 * f - 3 * h), strict=True):
        torch.testing.assert_close(c, 2 * a - 3 * b)


def test_paths_multiply_and_are_the_nested_layers():
    net, f = network(), randn(2, 1, 8, 8)
    outputs = net(f)
    assert [tuple(one.shape) for one in outputs] == [(2, 1, 8, 8), (2, 3, 4, 4), (2, 9, 2, 2)]
    first, second = net.layers
    for a in range(3):
        u = first(f[:, 0])[:, a]
        for b in range(3):
            v = second(u)[:, b]
            smooth = torch.fft.ifft2(torch.fft.fft2(v) * net.output).real
            torch.testing.assert_close(outputs[2][:, 3 * a + b], smooth)


def test_the_gradient_passes_the_modulus_and_is_zero_at_zero():
    net = network()
    f = randn(1, 1, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: tuple(net(f)), (f,))
    zero = torch.zeros(1, 1, 8, 8, requires_grad=True)
    sum(one.sum() for one in net(zero)[1:]).backward()
    assert (zero.grad == 0).all()


# Deformations and probes


def test_deformations_of_waves_are_exact():
    x = torch.arange(16.0)
    tau = 0.7 * torch.sin(2 * math.pi * x / 16)[None]
    wave = torch.cos(2 * math.pi * 3 * x / 16)
    torch.testing.assert_close(deform(wave, tau), torch.cos(2 * math.pi * 3 * (x - tau[0]) / 16))
    y, z = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    plane = torch.sin(2 * math.pi * (2 * y / 8 - z / 6))
    field = torch.stack((0.3 * torch.cos(2 * math.pi * z / 6), 0.2 * torch.sin(2 * math.pi * y / 8)))
    expected = torch.sin(2 * math.pi * (2 * (y - field[0]) / 8 - (z - field[1]) / 6))
    torch.testing.assert_close(deform(plane, field), expected)
    turned = deform(wave, tau, 0.1 * x)
    torch.testing.assert_close(turned, torch.polar(torch.ones(16), 2 * math.pi * 0.1 * x) * deform(wave, tau))


def test_a_whole_shift_is_a_roll():
    f = randn(2, 8, 8)
    tau = torch.stack((torch.full((8, 8), 3.0), torch.full((8, 8), -2.0)))
    torch.testing.assert_close(deform(f, tau), f.roll((3, -2), (1, 2)))


def test_shifts_change_no_more_than_the_theorem_says_where_it_is_exact():
    net, f = network(depth=2), randn(4, 1, 8, 8)
    report = translation_probe(net, f, (4, 8))
    for measured, bound in zip(report.measured, report.bound, strict=True):
        assert measured[0] <= bound[0]
        assert measured[1] < 1e-12  # once round
    scales, decay = (1, 2, 4), net.constants().decay
    for n, row in enumerate(report.bound):
        assert row[0] == pytest.approx(2 * math.pi * 4 * decay[n] / scales[n])
    chi = net.output.abs()
    radius = (torch.fft.fftfreq(2)[:, None] ** 2 + torch.fft.fftfreq(2) ** 2).sqrt()
    assert decay[2] == pytest.approx((chi * radius).max().item())


def test_deformations_change_in_proportion_to_a_small_amplitude():
    f = torch.fft.irfft2(torch.fft.rfft2(randn(3, 1, 8, 8)) * (torch.fft.fftfreq(8)[:, None].abs() < 0.2), s=(8, 8))
    report = deformation_probe(network(), f, smooth_field(), (0.01, 0.02, 0.04))
    assert all(m <= b for m, b in zip(report.measured, report.bound, strict=True))
    assert report.slope == pytest.approx(1, abs=0.15)
    one = deform(f, 0.02 / smooth_field().abs().max() * smooth_field())
    assert report.bound[1] == pytest.approx(((one - f).flatten(1).norm(dim=1) / f.flatten(1).norm(dim=1)).mean().item())


def test_energies_are_those_of_the_features():
    net, f = network(), randn(3, 1, 8, 8)
    report = energy_probe(net, f)
    share = [one.square().flatten(1).sum(1) / f.square().flatten(1).sum(1) for one in net(f)]
    assert report.layers == pytest.approx([one.mean().item() for one in share])
    assert report.total == pytest.approx(sum(share).max().item())
    assert report.total <= 1
