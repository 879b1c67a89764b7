"""Spectrogram layers against direct sums, closed forms, torch.stft, scipy, librosa and the authors' package."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from scipy import fft, signal
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.contracts import BadInput, FunctionCase, ModuleCase, Symmetry
from provenn.core.experiment.accounting import TensorMemory
from provenn.nn import _nn_audio_frames as frames
from provenn.nn import _nn_audio_stft as stft
from provenn.nn import audio
from provenn.nn._nn_audio_decimation import decimate, low_pass
from provenn.nn._nn_audio_frames import correlate, padded

DOUBLE = {"dtype": torch.float64}
RATE = 22050


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tone(frequency, samples=RATE, rate=RATE, phase=0.3):
    return torch.sin(2 * math.pi * frequency / rate * torch.arange(samples, dtype=torch.float64) + phase)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def complex_of(output):
    return torch.complex(output[..., 0].contiguous(), output[..., 1].contiguous())


# The suites.

SMALL_CQT = {"sr": 64, "hop_length": 8, "fmin": 4.0, "n_bins": 6, "bins_per_octave": 3}
SMALL_MEL = {"sr": 64, "n_fft": 16, "hop_length": 4}
SCALING = Symmetry("scaling", before=lambda inputs: (-2 * inputs[0],), after=lambda output: 2 * output)
POWER = Symmetry("scaling of a power", before=lambda inputs: (-2 * inputs[0],), after=lambda output: 4 * output)


def clips(samples):
    def inputs(generator, dtype, batch):
        return (torch.randn(batch, samples, generator=generator, dtype=torch.float64).to(dtype),)

    return inputs


def spectrograms(bins, frames):
    def inputs(generator, dtype, batch):
        return (torch.randn(batch, bins, frames, 2, generator=generator, dtype=torch.float64).to(dtype),)

    return inputs


def magnitudes_and_phases(generator, dtype, batch):
    draws = torch.rand(2, batch, 9, 12, generator=generator, dtype=torch.float64)
    return (draws[0] + 0.5).to(dtype), (6 * draws[1]).to(dtype)


def refused(kind, argument, error=ValueError, **options):
    return BadInput(argument, lambda: kind(**options), error)


def refused_clip(layer, samples, options, error=ValueError, dtype=torch.float32, argument="x"):
    return BadInput(argument, lambda: layer(**options)(torch.zeros(samples, dtype=dtype)), error)


FRAMED = (
    ("hop_length", {"hop_length": 0}),
    ("pad_mode", {"pad_mode": "symmetric"}),
    ("window", {"window": "no such window"}),
)


def bad_layer(kind, small, *extra):
    return (
        *(refused(kind, name, **{**small, **options}) for name, options in (*FRAMED, *extra)),
        refused(kind, "hop_length", TypeError, **{**small, "hop_length": 4.0}),
        refused_clip(kind, 3, small),
        refused_clip(kind, (2, 2, 99), small),
        refused_clip(kind, 99, small, TypeError, torch.int64),
    )


STFT_BAD = bad_layer(
    audio.STFT,
    {"n_fft": 16},
    ("n_fft", {"n_fft": 1}),
    ("win_length", {"win_length": 17}),
    ("freq_bins", {"freq_bins": 10}),
    ("freq_bins", {"freq_bins": 0, "freq_scale": "log"}),
    ("freq_scale", {"freq_scale": "mel"}),
    ("fmax", {"freq_scale": "log", "fmin": 90.0, "fmax": 80.0}),
    ("fmin", {"freq_scale": "log", "fmin": 0.0}),
    ("fmax", {"freq_scale": "linear", "sr": 8000, "fmax": 4001.0}),
    ("output_format", {"output_format": "magnitude"}),
)
BANK_BAD = (
    ("fmax", {"fmin": 20.0, "fmax": 10.0}),
    ("fmax", {"fmax": 33.0}),
    ("power", {"power": 0.0}),
    ("trainable", {"trainable": "mel"}),
)
CQT_BAD = (
    ("n_bins", {"n_bins": 20}),
    ("n_bins", {"n_bins": 0}),
    ("fmax", {"fmax": 3.0}),
    ("fmin", {"fmin": 0.0}),
    ("bins_per_octave", {"bins_per_octave": 0}),
    ("filter_scale", {"filter_scale": 0.0}),
    ("normalization", {"normalization": "l1"}),
    ("output_format", {"output_format": "magnitude"}),
)
RECURSIVE_BAD = (("hop_length", {"hop_length": 7}),)


def module_case(kind, inputs, bad, label="", **case):
    options = case.pop("options")
    return ModuleCase(
        f"provenn.nn.audio.{kind.__name__}", make=lambda **other: kind(**{**options, **other}), inputs=inputs,
        bad_input=bad, label=label, **case,
    )  # fmt: skip


def cqt_cases():
    for kind in (audio.CQT1992, audio.CQT1992v2, audio.CQT2010, audio.CQT2010v2, audio.VQT):
        recursive = kind in (audio.CQT2010, audio.CQT2010v2, audio.VQT)
        small = {**SMALL_CQT, "gamma": 1.0} if kind is audio.VQT else SMALL_CQT
        bad = (
            CQT_BAD
            + (RECURSIVE_BAD if recursive else ())
            + ((("gamma", {"gamma": -1.0}),) if kind is audio.VQT else ())
        )
        bad = bad_layer(kind, small, *bad)
        if not recursive:
            bad += (refused_clip(kind, 63, {**small, "center": False}),)
        yield module_case(kind, clips(75), bad, "fixed", options=small, symmetries=(SCALING,))
        yield module_case(kind, clips(75), bad[:1], "trained", options={**small, "trainable": True})
        yield module_case(kind, clips(75), bad[:1], "complex", options={**small, "output_format": "Complex"})


CASES = [
    module_case(audio.STFT, clips(40), STFT_BAD, "fast", options={"n_fft": 16}),
    module_case(
        audio.STFT, clips(40), STFT_BAD[:1], "magnitude", options={"n_fft": 16, "output_format": "Magnitude"},
        symmetries=(SCALING,),
    ),
    module_case(
        audio.STFT, clips(40), STFT_BAD[:1], "trained",
        options={"n_fft": 16, "trainable": True, "output_format": "Magnitude", "win_length": 12},
    ),
    module_case(
        audio.STFT, clips(40), STFT_BAD[:1], "logarithmic",
        options={"n_fft": 16, "freq_scale": "log", "freq_bins": 5, "fmin": 800.0},
    ),
    *(
        module_case(
            audio.ISTFT, spectrograms(9, 7),
            (
                refused(audio.ISTFT, "hop_length", n_fft=16, hop_length=0),
                refused(audio.ISTFT, "win_length", n_fft=16, win_length=17),
                refused(audio.ISTFT, "n_fft", TypeError, n_fft=16.0),
                BadInput("X", lambda: audio.ISTFT(16)(torch.zeros(1, 8, 4, 2))),
                BadInput("length", lambda: audio.ISTFT(16)(torch.zeros(1, 9, 4, 2), length=21)),
            ),
            "trained" if trainable else "fast", options={"n_fft": 16, "trainable": trainable}, bfloat16_tolerance=0.2,
        )
        for trainable in (False, True)
    ),
    module_case(
        audio.GriffinLim, magnitudes_and_phases,
        (
            refused(audio.GriffinLim, "n_iter", n_iter=-1),
            refused(audio.GriffinLim, "momentum", momentum=-0.1),
            refused(audio.GriffinLim, "hop_length", n_fft=16, hop_length=0),
            refused(audio.GriffinLim, "n_iter", TypeError, n_iter=2.0),
            BadInput("S", lambda: audio.GriffinLim(16)(torch.ones(1, 8, 9))),
            BadInput("phase", lambda: audio.GriffinLim(16)(torch.ones(1, 9, 9), torch.ones(1, 9, 8))),
            BadInput("x", lambda: audio.GriffinLim(16)(torch.ones(1, 9, 2))),
        ),
        options={"n_fft": 16, "n_iter": 3}, bfloat16_tolerance=0.3,
    ),
    module_case(
        audio.MelSpectrogram, clips(40),
        bad_layer(audio.MelSpectrogram, SMALL_MEL, *BANK_BAD, ("n_mels", {"n_mels": 0}), ("norm", {"norm": "l1"})),
        "fixed", options={**SMALL_MEL, "n_mels": 5}, symmetries=(POWER,),
    ),
    *(
        module_case(
            audio.MelSpectrogram, clips(40), (refused(audio.MelSpectrogram, "power", power=0.0),), f"trained {what}",
            options={**SMALL_MEL, "n_mels": 5, "trainable": what, "power": 1.0},
        )
        for what in (True, "bank", "stft")
    ),
    module_case(
        audio.MFCC, clips(40),
        bad_layer(
            audio.MFCC, {**SMALL_MEL, "n_mels": 5, "n_mfcc": 3}, *BANK_BAD, ("n_mfcc", {"n_mfcc": 6}),
            ("amin", {"amin": 0.0}), ("top_db", {"top_db": -1.0}),
        ),
        options={**SMALL_MEL, "n_mels": 5, "n_mfcc": 3},
    ),
    module_case(
        audio.Gammatonegram, clips(40),
        bad_layer(audio.Gammatonegram, {**SMALL_MEL, "fmin": 2.0}, *BANK_BAD, ("n_bins", {"n_bins": 0})),
        "fixed", options={**SMALL_MEL, "n_bins": 5, "fmin": 2.0}, symmetries=(POWER,),
    ),
    module_case(
        audio.Gammatonegram, clips(40), (refused(audio.Gammatonegram, "power", power=0.0),), "trained",
        options={**SMALL_MEL, "n_bins": 5, "fmin": 2.0, "trainable": True},
    ),
    *cqt_cases(),
    ModuleCase(
        "provenn.nn.audio.CQT", make=lambda: audio.CQT(**SMALL_CQT), inputs=clips(75),
        bad_input=(refused(audio.CQT, "n_bins", n_bins=400),),
        excluded={"public_name": "CQT is another name of CQT1992v2, the default constant-Q transform"},
    ),
    FunctionCase(
        "provenn.nn.audio.fourier_kernels", call=lambda: audio.fourier_kernels(16),
        bad_input=(
            refused(audio.fourier_kernels, "fmax", freq_scale="log", fmin=9.0, fmax=8.0),
            refused(audio.fourier_kernels, "n_fft", TypeError, n_fft=16.0),
        ),
    ),
    FunctionCase(
        "provenn.nn.audio.cqt_kernels", call=lambda: audio.cqt_kernels(n_bins=3),
        bad_input=(
            refused(audio.cqt_kernels, "n_bins", n_bins=120),
            refused(audio.cqt_kernels, "fmax", fmax=20.0),
            refused(audio.cqt_kernels, "gamma", gamma=-1.0),
            refused(audio.cqt_kernels, "n_bins", TypeError, n_bins=3.0),
        ),
    ),
    FunctionCase(
        "provenn.nn.audio.mel_filterbank", call=lambda: audio.mel_filterbank(n_mels=3),
        bad_input=(
            refused(audio.mel_filterbank, "fmax", fmin=9.0, fmax=8.0),
            refused(audio.mel_filterbank, "norm", norm="l2"),
            refused(audio.mel_filterbank, "n_mels", TypeError, n_mels=3.0),
        ),
    ),
    FunctionCase(
        "provenn.nn.audio.gammatone_filterbank", call=lambda: audio.gammatone_filterbank(n_bins=3),
        bad_input=(
            refused(audio.gammatone_filterbank, "fmax", fmin=9.0, fmax=8.0),
            refused(audio.gammatone_filterbank, "n_bins", TypeError, n_bins=3.0),
        ),
    ),
]  # fmt: skip


# What the layers stand on.


@pytest.mark.parametrize(("width", "hop"), [(16, 4), (17, 4), (5, 1), (3, 8), (8, 8), (30, 7)])
def test_correlation_in_blocks_is_a_strided_convolution(width, hop):
    x, kernels = noise(2, 61), noise(3, width, seed=1)
    expected = functional.conv1d(x[:, None], kernels[:, None], stride=hop)
    torch.testing.assert_close(correlate(x, kernels, hop), expected, rtol=0, atol=1e-12)


def test_samples_that_no_frame_touches_do_not_matter():
    x, kernels = noise(1, 20), noise(1, 3, seed=1)
    broken = x.clone()
    broken[:, 3:8] = math.nan  # between frames, and after the last one
    broken[:, 19:] = math.nan
    torch.testing.assert_close(correlate(broken, kernels, 8), correlate(x, kernels, 8))


@pytest.mark.parametrize("samples", [300, 301, 1000, 20])
@pytest.mark.parametrize("factor", [2, 4])
def test_decimation_is_a_strided_convolution(samples, factor):
    x, taps = noise(2, samples), torch.from_numpy(low_pass(1 / factor, 0.03))
    expected = functional.conv1d(x[:, None], taps[None, None], stride=factor, padding=127)[:, 0]
    torch.testing.assert_close(decimate(x, taps, factor), expected, rtol=0, atol=1e-12)


def test_low_pass_keeps_what_is_below_and_stops_what_is_above():
    _, response = signal.freqz(low_pass(0.5, 0.001), worN=1000)
    gain = np.abs(response)
    assert np.abs(gain[:480] - 1).max() < 0.01
    assert gain[520:].max() < 0.01


def test_reflection_is_numpys():
    x = noise(2, 9)
    expected = np.pad(x.numpy(), ((0, 0), (8, 8)), mode="reflect")
    np.testing.assert_array_equal(padded(x, 8, "reflect"), expected)


def test_too_short_a_clip_is_named_with_both_lengths():
    with pytest.raises(ValueError, match=r"\b15 samples.*\b16\b"):
        audio.STFT(16, center=False)(torch.zeros(15))
    with pytest.raises(ValueError, match=r"\b1024 samples.*\b1024\b"):
        audio.STFT()(torch.zeros(1024))
    with pytest.raises(ValueError, match=r"\b8192 samples.*\b8192\b"):
        audio.CQT()(torch.zeros(8192))
    assert audio.STFT()(torch.zeros(1025)).shape == (1, 1025, 3, 2)


@pytest.mark.parametrize("layer", [audio.STFT(64), audio.MFCC(n_fft=64, n_mels=20), audio.CQT2010v2(**SMALL_CQT)])
def test_three_shapes_of_input_are_one(layer):
    x = noise(2, 200, dtype=torch.float32)
    expected = layer(x)
    torch.testing.assert_close(layer(x[:, None]), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer(x[1]), expected[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [audio.STFT, audio.MelSpectrogram, audio.Gammatonegram])
def test_many_clips_are_transformed_a_few_at_a_time(make, monkeypatch):
    layer, x = make(n_fft=256, hop_length=64, dtype=torch.float64), noise(7, 1000)
    expected = layer(x)
    sizes, transform = [], frames.spectra
    monkeypatch.setattr(stft, "spectra", lambda x, *rest: sizes.append(len(x)) or transform(x, *rest))
    monkeypatch.setattr(frames, "_BLOCK", 3 * 15 * 256)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert sizes == [3, 3, 1]


# STFT.


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize(
    ("n_fft", "win_length", "hop", "window"), [(64, 64, 16, "hann"), (64, 41, 10, "hamming"), (31, 20, 7, "hann")]
)
def test_stft_is_torchs(n_fft, win_length, hop, window, center, pad_mode):
    x = noise(3, 200)
    values = torch.from_numpy(signal.get_window(window, win_length, fftbins=True))
    expected = torch.stft(x, n_fft, hop, win_length, values, center, pad_mode, return_complex=True)
    for trainable in (False, True):
        layer = audio.STFT(
            n_fft,
            win_length,
            hop_length=hop,
            window=window,
            center=center,
            pad_mode=pad_mode,
            trainable=trainable,
            **DOUBLE,
        )
        torch.testing.assert_close(complex_of(layer(x)), expected, rtol=0, atol=1e-11)


def test_default_stft_is_torchs_in_float32():
    x = noise(2, RATE, dtype=torch.float32)
    expected = torch.stft(x, 2048, 512, window=torch.hann_window(2048), return_complex=True)
    assert relative(complex_of(audio.STFT()(x)), expected) < 1e-5


@pytest.mark.parametrize("scale", ["linear", "log", "log2"])
def test_other_scales_are_direct_sums(scale):
    frequencies = {"linear": 100 + 80 * np.arange(5), "log": 100 * 5 ** (np.arange(5) / 5)}[
        scale[:3] if scale != "linear" else scale
    ]
    x, window = noise(90), signal.get_window("hann", 24, fftbins=True)
    layer = audio.STFT(
        32, 24, 5, 8, freq_scale=scale, fmin=100.0, fmax=500.0, sr=2000, center=False, output_format="Complex", **DOUBLE
    )
    found = complex_of(layer(x))[0].numpy()
    for i, frequency in enumerate(frequencies):
        for t in range(found.shape[1]):
            frame = x.numpy()[8 * t + 4 : 8 * t + 28] * window  # the window stands in the middle of the frame
            turns = np.exp(-2j * np.pi * frequency / 2000 * np.arange(4, 28))
            assert abs(found[i, t] - (frame * turns).sum()) < 1e-11
    np.testing.assert_allclose(layer.frequencies, frequencies)


def test_fewer_bins_are_the_lowest():
    x = noise(1, 100)
    every = audio.STFT(32, **DOUBLE)(x)
    for trainable in (False, True):
        few = audio.STFT(32, freq_bins=6, trainable=trainable, **DOUBLE)(x)
        torch.testing.assert_close(few, every[:, :6], rtol=0, atol=1e-12)


def test_parseval_for_touching_rectangular_frames():
    x = noise(1, 160)
    spectrum = audio.STFT(32, hop_length=32, window="boxcar", center=False, **DOUBLE)(x)
    power = spectrum.square().sum((0, 2, 3))
    two_sided = power[0] + 2 * power[1:-1].sum() + power[-1]
    assert two_sided.item() == pytest.approx(32 * x.square().sum().item())


def test_formats_belong_together():
    x = noise(1, 100)
    layers = {name: audio.STFT(32, output_format=name, **DOUBLE)(x) for name in ("Complex", "Magnitude", "Phase")}
    value = complex_of(layers["Complex"])
    torch.testing.assert_close(layers["Magnitude"], value.abs())
    torch.testing.assert_close(layers["Phase"], value.angle())
    trained = audio.STFT(32, output_format="Magnitude", trainable=True, **DOUBLE)(x)
    torch.testing.assert_close(trained, (value.abs() ** 2 + 1e-8).sqrt(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [
    lambda trainable: audio.STFT(64, output_format="Magnitude", trainable=trainable),
    lambda trainable: audio.MelSpectrogram(n_fft=64, n_mels=8, power=1.0, trainable=trainable),
    lambda trainable: audio.CQT1992v2(**SMALL_CQT, trainable=trainable),
    lambda trainable: audio.CQT2010v2(**SMALL_CQT, trainable=trainable),
])  # fmt: skip
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_at_silence_are_finite(make, trainable):
    layer, x = make(trainable), torch.zeros(1, 100, requires_grad=True)
    layer(x).sum().backward()
    assert all(one.grad.isfinite().all() for one in (x, *layer.parameters()))


@pytest.mark.parametrize("output_format", ["Complex", "Magnitude", "Phase"])
def test_gradients_are_those_of_finite_differences(output_format):
    layer = audio.STFT(16, output_format=output_format, trainable=True, hop_length=16, **DOUBLE)
    x = noise(1, 64).requires_grad_()
    kernels = layer.kernels.detach().clone().requires_grad_()
    if output_format == "Phase":  # no bins at 0 and Nyquist's frequency: their angles jump between 0 and π
        layer = audio.STFT(
            16, freq_bins=7, freq_scale="linear", sr=16, fmin=1.0, fmax=8.0, center=False, output_format="Phase",
            trainable=True, hop_length=16, **DOUBLE,
        )  # fmt: skip
        kernels = layer.kernels.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, k: torch.func.functional_call(layer, {"kernels": k}, (x,)), (x, kernels), fast_mode=True
    )


def test_trained_kernels_change_the_output():
    layer, x = audio.STFT(32, trainable=True, output_format="Magnitude"), noise(2, 100, dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert not list(audio.STFT(32).parameters())


# Inverse STFT and Griffin–Lim.


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("n_fft", "win_length", "hop"), [(64, 64, 16), (64, 37, 9), (64, 50, 20), (31, 31, 8)])
def test_inverse_undoes_the_transform(n_fft, win_length, hop, trainable):
    x = noise(2, 300, dtype=torch.float32)
    spectrum = audio.STFT(n_fft, win_length, hop_length=hop)(x)
    found = audio.ISTFT(n_fft, win_length, hop, trainable=trainable)(spectrum)
    assert found.shape[-1] == (spectrum.shape[2] - 1) * hop + n_fft % 2
    assert (found - x[:, : found.shape[-1]]).abs().max() < 1e-5
    longer = audio.ISTFT(n_fft, win_length, hop, trainable=trainable)(spectrum, length=300)
    assert (longer - x).abs().max() < 1e-5


def test_inverse_is_torchs_for_spectra_of_no_signal():
    spectrum, window = noise(2, 33, 9, 2), torch.hann_window(64, dtype=torch.float64)
    value = complex_of(spectrum)
    value[:, [0, -1]] = value[:, [0, -1]].real + 0j
    expected = torch.istft(value, 64, 16, window=window)
    torch.testing.assert_close(audio.ISTFT(64, **DOUBLE)(spectrum), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(audio.ISTFT(64, trainable=True, **DOUBLE)(spectrum), expected, rtol=0, atol=1e-12)


def test_two_sided_inverse_is_the_real_part():
    spectrum = noise(1, 8, 1, 2)
    found = audio.ISTFT(8, hop_length=8, window="boxcar", center=False, onesided=False, **DOUBLE)(spectrum)
    expected = np.fft.ifft(complex_of(spectrum)[0, :, 0].numpy()).real
    np.testing.assert_allclose(found[0], expected, atol=1e-14)


def test_without_centre_nothing_is_cut():
    x = noise(1, 96)
    spectrum = audio.STFT(32, hop_length=8, window="hamming", center=False, **DOUBLE)(x)
    torch.testing.assert_close(audio.ISTFT(32, hop_length=8, window="hamming", center=False, **DOUBLE)(spectrum), x)


class Angles(TorchDispatchMode):
    """Notes whether the arguments of arc tangents are contiguous."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.atan2.default:
            self.contiguous += [one.is_contiguous() for one in args]
        return func(*args, **(kwargs or {}))


def test_angles_are_taken_of_contiguous_parts():
    """Parts of a complex tensor have strides, with which a CPU's arc tangent is not vectorised: 18 times as slow."""
    for trainable in (False, True):
        layer = audio.STFT(64, output_format="Phase", trainable=trainable)
        with torch.no_grad(), Angles() as angles:
            layer(torch.zeros(2, 256))
        assert angles.contiguous == [True, True]


def test_the_inverse_holds_the_frames_of_a_few_clips_at_a_time():
    """All frames of 64 clips at once leave a processor's cache, and take three times as long."""
    spectra = torch.zeros(64, 1025, 44, 2)
    with torch.no_grad(), TensorMemory() as memory:
        audio.ISTFT()(spectra)
    assert memory.peak < 4 * 64 * 44 * 2048


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_griffin_lim_is_librosas(momentum):
    librosa = pytest.importorskip("librosa")
    magnitude = np.abs(librosa.stft(tone(400, 4000).numpy() + noise(4000).numpy(), n_fft=128))
    expected = librosa.griffinlim(
        magnitude, n_iter=4, hop_length=32, n_fft=128, momentum=momentum, init=None, pad_mode="reflect"
    )
    S = torch.from_numpy(magnitude)[None]
    found = audio.GriffinLim(128, 4, momentum=momentum, **DOUBLE)(S, torch.zeros_like(S))
    np.testing.assert_allclose(found[0], expected, atol=1e-9)


def test_griffin_lim_finds_a_signal_of_these_magnitudes():
    x = sum(tone(f, 4000) for f in (300, 700, 1234))[None]
    transform = audio.STFT(256, output_format="Magnitude", **DOUBLE)
    S = transform(x)

    def gap(n_iter):
        found = audio.GriffinLim(256, n_iter, **DOUBLE)(S, generator=torch.Generator().manual_seed(0))
        return (transform(found) - S).norm() / S.norm()

    assert gap(32) < 0.25 * gap(0)
    draws = [audio.GriffinLim(256, 1)(S.float(), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2], atol=1e-2)


# Mel, MFCC, gammatone.


@pytest.mark.parametrize("htk", [True, False])
@pytest.mark.parametrize("norm", ["slaney", None])
def test_mel_bank_is_librosas(htk, norm):
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(
        sr=8000, n_fft=512, n_mels=40, fmin=50, fmax=3900, htk=htk, norm=norm, dtype=np.float64
    )
    found = audio.mel_filterbank(8000, 512, 40, 50.0, 3900.0, htk, norm, **DOUBLE)
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_mel_bands_have_one_peak_and_unit_area():
    bank = audio.mel_filterbank(RATE, 2**16, 40, **DOUBLE)
    assert (bank >= 0).all()
    for row in bank:
        rises = torch.sign(row.diff())
        assert (rises[rises != 0].diff() != 0).sum() == 1
    torch.testing.assert_close(bank.sum(1) * RATE / 2**16, torch.ones(40, **DOUBLE), rtol=1e-3, atol=0)


def test_mel_scale_is_slaneys():
    """3 mels every 200 Hz up to 1000 Hz; there 27 steps reach 6400 Hz. So 15 + 27 mels end at 6400 Hz."""
    bank = audio.mel_filterbank(12800, 2**14, 41, 0.0, 6400.0, **DOUBLE)
    peaks = bank.argmax(1) * 12800 / 2**14
    expected = [200 / 3 * m for m in range(1, 15)] + [1000 * 6.4 ** (m / 27) for m in range(27)]
    np.testing.assert_allclose(peaks, expected, atol=12800 / 2**14)


@pytest.mark.parametrize("n_mels", [128, 100, 7])
@pytest.mark.parametrize("power", [2.0, 1.0, 0.7])
def test_mel_spectrogram_is_bank_times_power(n_mels, power):
    x, window = noise(2, 6000), torch.hann_window(2048, dtype=torch.float64)
    magnitude = torch.stft(x, 2048, 512, window=window, return_complex=True).abs()
    expected = audio.mel_filterbank(n_mels=n_mels, **DOUBLE) @ magnitude**power
    found = audio.MelSpectrogram(n_mels=n_mels, power=power, **DOUBLE)(x)
    torch.testing.assert_close(found, expected)
    trained = audio.MelSpectrogram(n_mels=n_mels, power=power, trainable="bank", **DOUBLE)(x)
    torch.testing.assert_close(trained, expected)


def test_mfcc_is_the_cosine_transform_of_decibels():
    x = torch.stack((tone(500, 6000), 1e-2 * tone(900, 6000)))  # each clip is cut below its own maximum
    mel = audio.MelSpectrogram(**DOUBLE)(x).numpy()
    level = 10 * np.log10(np.maximum(mel, 1e-10))
    cut = np.stack([np.maximum(one, one.max() - 80) for one in level])
    assert (cut > level).any((1, 2)).all()
    found = audio.MFCC(**DOUBLE)(x)
    np.testing.assert_allclose(found, fft.dct(cut, axis=1, norm="ortho")[:, :20], atol=1e-9)
    open_end = audio.MFCC(top_db=None, n_mfcc=13, **DOUBLE)(x)
    np.testing.assert_allclose(open_end, fft.dct(level, axis=1, norm="ortho")[:, :13], atol=1e-9)


def test_gammatone_bank_is_scipys_filters():
    """To the digits that scipy keeps, whose polynomials of degree 8 have nearly equal roots."""
    bank = audio.gammatone_filterbank(16000, 512, 8, 100.0, **DOUBLE).numpy()
    erb = 9.26449 * 24.7
    steps = np.arange(8, 0, -1) / 8
    centres = -erb + np.exp(steps * np.log(100 + erb) + (1 - steps) * np.log(8000 + erb))
    assert centres[0] == pytest.approx(100)
    for row, centre in zip(bank, centres, strict=True):
        b, a = signal.gammatone(centre, "iir", fs=16000)
        _, response = signal.freqz(b, a, worN=2 * np.pi * np.arange(257) / 512)
        np.testing.assert_allclose(512 * row, np.abs(response), rtol=2e-3, atol=1e-6)


def test_gammatonegram_is_bank_times_power():
    x, window = noise(2, 6000), torch.hann_window(2048, dtype=torch.float64)
    power = torch.stft(x, 2048, 512, window=window, return_complex=True).abs().square()
    expected = audio.gammatone_filterbank(**DOUBLE) @ power
    torch.testing.assert_close(audio.Gammatonegram(**DOUBLE)(x), expected)


# Constant Q.

NOTES = 32.70 * 2 ** (np.arange(84) / 12)


def test_cqt_kernels_are_the_formula():
    kernels = audio.cqt_kernels(8000, 100.0, 24, 12, filter_scale=0.8, **DOUBLE)
    values = torch.complex(kernels.real, kernels.imaginary).numpy()
    width = values.shape[1]
    for k in range(24):
        f = 100 * 2 ** (k / 12)
        length = math.ceil(0.8 / (2 ** (1 / 12) - 1) * 8000 / f)
        assert kernels.lengths[k] == length
        n = np.arange(width) - width // 2  # phase 0 at the frame's middle
        place = n + (length + 1) // 2
        window = np.where((place >= 0) & (place < length), 0.5 - 0.5 * np.cos(2 * np.pi * place / length), 0)
        np.testing.assert_allclose(values[k], window / window.sum() * np.exp(2j * np.pi * f * n / 8000), atol=1e-14)
    assert width == 2 ** math.ceil(math.log2(kernels.lengths.max()))


def test_every_kernel_has_unit_l1_norm():
    kernels = audio.cqt_kernels(**DOUBLE)
    torch.testing.assert_close(torch.complex(kernels.real, kernels.imaginary).abs().sum(1), torch.ones(84, **DOUBLE))
    np.testing.assert_allclose(kernels.frequencies, NOTES)


def test_kernels_are_librosas_wavelets_of_these_lengths():
    librosa = pytest.importorskip("librosa")
    kernels = audio.cqt_kernels(**DOUBLE)
    lengths = kernels.lengths.numpy()
    alpha = RATE / NOTES / lengths
    for _ in range(8):  # to the last bit: a length of a hair more than an even number is cut one sample longer
        alpha = np.where(1 / alpha * RATE / NOTES > lengths, np.nextafter(alpha, 1), alpha)
        alpha = np.where(1 / alpha * RATE / NOTES < lengths, np.nextafter(alpha, 0), alpha)
    exact = 1 / alpha * RATE / NOTES == lengths
    assert exact.sum() > 40
    expected, _ = librosa.filters.wavelet(freqs=NOTES, sr=RATE, alpha=alpha, norm=1, dtype=np.complex128)
    found = torch.complex(kernels.real, kernels.imaginary).numpy()
    np.testing.assert_allclose(found[exact], expected[exact], atol=1e-12)


def test_cqt_is_a_direct_sum():
    x, kernels = noise(2, 9000), audio.cqt_kernels(fmin=200.0, n_bins=40, **DOUBLE)
    wave = torch.complex(kernels.real, kernels.imaginary).numpy()
    width = wave.shape[1]
    signal_ = np.pad(x.numpy(), ((0, 0), (width // 2, width // 2)), mode="reflect")
    frames = [signal_[:, t * 300 : t * 300 + width] for t in range(9000 // 300 + 1)]
    expected = np.stack([frame @ wave.conj().T for frame in frames], -1) * np.sqrt(kernels.lengths.numpy())[:, None]
    options = {"hop_length": 300, "fmin": 200.0, "n_bins": 40, "output_format": "Complex", **DOUBLE}
    for kind, tolerance in ((audio.CQT1992v2, 1e-12), (audio.CQT1992, 2e-4)):  # one leaves negative frequencies out
        found = complex_of(kind(**options)(x)).numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    trained = complex_of(audio.CQT1992v2(trainable=True, **options)(x)).detach().numpy()
    assert np.abs(trained - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [audio.CQT1992v2, audio.CQT2010v2])
def test_a_pure_tone_peaks_in_its_bin(kind):
    """For all 84 bins; at half the frequency 12 bins lower; and "wrap" gives its amplitude."""
    layer = kind(normalization="wrap")
    middle = torch.cat(
        [layer(torch.stack([tone(f, 24576).float() for f in part]))[:, :, 24] for part in np.split(NOTES, 4)]
    )
    assert torch.equal(middle.argmax(1), torch.arange(84))
    assert (middle.diagonal() - 1).abs().max() < 0.01


@pytest.mark.parametrize("n_bins", [84, 80, 60, 7])
@pytest.mark.parametrize("normalization", ["librosa", "convolutional", "wrap"])
def test_recursive_transforms_agree_with_the_direct_one(n_bins, normalization):
    """With 60 bins the signal is thinned out early: rate, hop and lengths change, the output's scale must not."""
    rise = torch.linspace(math.log(40), math.log(3900 if n_bins > 60 else 900), 2 * RATE, dtype=torch.float64).exp()
    x = torch.sin(2 * math.pi * (rise / RATE).cumsum(0))
    options = {"n_bins": n_bins, "normalization": normalization, **DOUBLE}
    direct = audio.CQT1992v2(**options)(x)[..., 16:-16]
    for kind in (audio.CQT2010v2, audio.CQT2010):
        layer = kind(**options)
        assert layer.factor == {84: 1, 80: 1, 60: 4, 7: 32}[n_bins]
        assert relative(layer(x)[..., 16:-16], direct) < 0.02
    late = audio.CQT2010v2(early_downsample=False, **options)
    assert late.factor == 1
    assert relative(late(x)[..., 16:-16], direct) < 0.02


def test_recursive_frames_are_as_many_as_the_direct_ones():
    for samples in (9727, 9728, 10239, 10240):
        assert (
            audio.CQT2010v2(n_bins=60)(torch.zeros(samples)).shape
            == audio.CQT1992v2(n_bins=60)(torch.zeros(samples)).shape
        )


def test_normalisations_differ_by_their_factors():
    x = noise(1, 9000)
    options = {"fmin": 400.0, "n_bins": 24, **DOUBLE}
    plain = audio.CQT(normalization="convolutional", **options)(x)
    lengths = torch.ceil(RATE / (2 ** (1 / 12) - 1) / (400 * 2 ** (torch.arange(24, dtype=torch.float64) / 12)))
    torch.testing.assert_close(audio.CQT(**options)(x), plain * lengths.sqrt()[:, None])
    torch.testing.assert_close(audio.CQT(normalization="wrap", **options)(x), 2 * plain)


def test_a_shift_by_hops_shifts_the_frames():
    x = noise(1, 12000)
    for layer in (
        audio.STFT(512, hop_length=100, **DOUBLE),
        audio.CQT(hop_length=100, fmin=300.0, n_bins=40, **DOUBLE),
    ):
        found, later = layer(x), layer(x[:, 700:])
        torch.testing.assert_close(later[:, :, 20:80], found[:, :, 27:87], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [audio.CQT1992, audio.CQT1992v2, audio.CQT2010v2])
def test_phase_of_cqt_is_cosine_and_sine(kind):
    x = noise(1, 200)
    phase = kind(output_format="Phase", **SMALL_CQT, **DOUBLE)(x)
    torch.testing.assert_close(phase.square().sum(-1), torch.ones_like(phase[..., 0]))
    value = complex_of(kind(output_format="Complex", **SMALL_CQT, **DOUBLE)(x))
    torch.testing.assert_close(complex_of(phase), value / value.abs())
    torch.testing.assert_close(kind(**SMALL_CQT, **DOUBLE)(x), value.abs())


def test_fmax_says_how_many_bins():
    assert audio.CQT(fmin=100.0, fmax=400.0).frequencies.shape == (24,)
    assert audio.CQT2010v2(fmin=100.0, fmax=401.0).frequencies.shape == (25,)


def test_variable_q_without_offset_is_constant_q():
    x = noise(1, RATE)
    assert torch.equal(audio.VQT(**DOUBLE)(x), audio.CQT2010v2(**DOUBLE)(x))


def test_variable_q_is_a_direct_sum_with_shorter_kernels():
    rise = torch.linspace(math.log(40), math.log(3900), 2 * RATE, dtype=torch.float64).exp()
    x = torch.sin(2 * math.pi * (rise / RATE).cumsum(0))
    alpha = 2 ** (1 / 12) - 1
    lengths = np.ceil(RATE / alpha / (NOTES + 20 / alpha))
    layer = audio.VQT(gamma=20.0, **DOUBLE)
    np.testing.assert_array_equal(layer.lengths, lengths)
    found = layer(x)[0].numpy()
    wave = audio.cqt_kernels(gamma=20.0, **DOUBLE)
    np.testing.assert_array_equal(wave.lengths, lengths)
    for t in (30, 45, 60):
        for k in range(0, 84, 5):
            n = np.arange(lengths[k]) - (lengths[k] + 1) // 2
            window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(lengths[k]) / lengths[k])
            frame = x.numpy()[(512 * t + n).astype(int)]
            value = abs((frame * window * np.exp(-2j * np.pi * NOTES[k] * n / RATE)).sum()) / window.sum()
            assert abs(found[k, t] - value * lengths[k] ** 0.5) < 0.02 * found.max()


# Streams.


@pytest.mark.parametrize("layer", [
    audio.STFT(64, hop_length=10, center=False, **DOUBLE),
    audio.MelSpectrogram(n_fft=64, hop_length=16, n_mels=10, center=False, **DOUBLE),
    audio.CQT1992v2(**SMALL_CQT, center=False, **DOUBLE),
])  # fmt: skip
def test_a_stream_gives_the_frames_of_the_whole(layer):
    x, sizes = noise(2, 300), (3, 64, 1, 100, 0, 60, 72)
    assert sum(sizes) == 300
    parts = [layer.step(chunk) for chunk in x.split(sizes, -1)]
    torch.testing.assert_close(torch.cat(parts, 2), layer(x), rtol=0, atol=1e-12)
    layer.reset()
    torch.testing.assert_close(layer.step(x), layer(x), rtol=0, atol=1e-12)
    layer.reset()


def test_a_stream_keeps_a_frame_less_a_hop():
    layer = audio.STFT(64, hop_length=16, center=False)
    layer.step(torch.zeros(1, 160))
    assert layer._kept.shape == (1, 48)
    with pytest.raises(ValueError, match="chunk"):
        layer.step(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="center"):
        audio.STFT(64).step(torch.zeros(1, 160))


# Half precision, and the packages.


@pytest.mark.parametrize("make", [audio.STFT, audio.MelSpectrogram, audio.CQT2010v2])
def test_autocast_keeps_fixed_layers_near(make):
    layer, x = make(), noise(1, 16000, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert relative(found.float(), layer(x)) < 0.03


def quiet(make):
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def test_numbers_are_those_of_the_authors_package():
    package = pytest.importorskip("nnAudio.features")
    x = (noise(2, RATE) * 0.1 + 0.5 * tone(440)).float()
    pairs = [
        (audio.STFT(1024, 800, hop_length=256), package.STFT(1024, 800, hop_length=256, verbose=False)),
        (
            audio.STFT(512, freq_bins=60, freq_scale="log", output_format="Magnitude"),
            package.STFT(512, freq_bins=60, freq_scale="log", output_format="Magnitude", verbose=False),
        ),
        (audio.MelSpectrogram(htk=True), package.MelSpectrogram(htk=True, verbose=False)),
        (audio.MFCC(), package.MFCC(verbose=False)),
        (audio.Gammatonegram(), package.Gammatonegram(fmin=20.0, verbose=False)),
        (audio.CQT1992(fmin=220.0, n_bins=60), quiet(lambda: package.CQT1992(fmin=220, n_bins=60))),
        (audio.CQT1992v2(output_format="Complex"), package.CQT1992v2(output_format="Complex", verbose=False)),
        (audio.CQT2010(), package.CQT2010(verbose=False)),
        (audio.CQT2010v2(output_format="Complex"), package.CQT2010v2(output_format="Complex", verbose=False)),
        (audio.VQT(gamma=5.0), package.VQT(gamma=5, verbose=False)),
    ]
    for ours, theirs in pairs:
        assert relative(ours(x), theirs(x)) < 1e-4, type(ours).__name__


def test_numbers_are_those_of_librosa():
    librosa = pytest.importorskip("librosa")
    x = (noise(RATE) * 0.1 + 0.5 * tone(440)).float()
    y, reflect = x.numpy(), {"pad_mode": "reflect"}
    pairs = [
        (complex_of(audio.STFT()(x)), librosa.stft(y, **reflect)),
        (audio.MelSpectrogram()(x), librosa.feature.melspectrogram(y=y, **reflect)),
        (audio.MFCC()(x), librosa.feature.mfcc(y=y, **reflect)),
        (audio.MelSpectrogram(pad_mode="constant", power=1.0)(x), librosa.feature.melspectrogram(y=y, power=1.0)),
    ]
    for ours, theirs in pairs:
        assert relative(ours[0], torch.from_numpy(theirs)) < 1e-4
