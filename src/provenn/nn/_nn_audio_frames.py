"""What every spectrogram layer stands on: clips, padding, strided correlation, spectra of frames, streaming.

Two exact rewritings make the layers fast on a CPU. A correlation of stride h is one of stride 1 over blocks of h
samples taken as channels, which dense convolution kernels handle well where a single channel leaves them idle. And
reflection padding by flips avoids torch's, which on a CPU is slower than the transform itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from provenn.core.experiment.checks import check_choice

Output = Literal["Magnitude", "Complex", "Phase"]
PadMode = Literal["reflect", "constant"]
OUTPUTS, PAD_MODES = get_args(Output), get_args(PadMode)
_BLOCK = 2**19
"""Samples of all frames that are transformed at once on a CPU: 2 MB in float32."""
SILENCE = 1e-8
"""Added to the power before the root where kernels are trained, so that the gradient at silence is finite."""


def as_batch(x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "batch samples"]:
    """Bring (samples,), (batch, samples) or (batch, 1, samples) to (batch, samples).

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: ``x`` has another shape.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    if x.ndim == 1:
        return x[None]
    if x.ndim == 3 and x.shape[1] == 1:
        return x[:, 0]
    if x.ndim != 2:
        raise ValueError(f"x must be (samples,), (batch, samples) or (batch, 1, samples), got {tuple(x.shape)}")
    return x


def padded(x: Float[Tensor, "batch samples"], amount: int, mode: PadMode) -> Float[Tensor, "batch padded"]:
    """Pad both ends by reflection about the end samples, or by zeros.

    Raises:
        ValueError: The clip is too short to be reflected; the message says both lengths.
    """
    if mode == "constant":
        return functional.pad(x, (amount, amount))
    if x.shape[-1] <= amount:
        raise ValueError(f"x must be longer than the reflection padding, got {x.shape[-1]} samples to pad by {amount}")
    return torch.cat([x[:, 1 : amount + 1].flip(-1), x, x[:, x.shape[-1] - amount - 1 : -1].flip(-1)], -1)


def framed_input(x: Tensor, width: int, center: bool, mode: PadMode) -> Float[Tensor, "batch padded"]:
    """Bring clips to a batch, pad them where frames are centred, and check that a frame fits.

    Raises:
        ValueError: As :func:`as_batch` and :func:`padded`, or the clip is shorter than one frame.
    """
    x = as_batch(x)
    if center:
        x = padded(x, width // 2, mode)
    if x.shape[-1] < width:
        raise ValueError(f"x must be at least as long as a frame, got {x.shape[-1]} samples for a width of {width}")
    return x


def correlate(
    x: Float[Tensor, "batch samples"], kernels: Float[Tensor, "kernels width"], hop: int
) -> Float[Tensor, "batch kernels frames"]:
    """Return the inner products of every kernel with the frames that start at multiples of ``hop``.

    The same numbers as ``conv1d(x[:, None], kernels[:, None], stride=hop)``.
    """
    (count, width), (batch, samples) = kernels.shape, x.shape
    frames = (samples - width) // hop + 1
    taps = -(-width // hop)
    x = functional.pad(x, (0, (frames - 1 + taps) * hop - samples))
    blocks = x.reshape(batch, frames - 1 + taps, hop).transpose(1, 2)
    if taps == 1:  # frames do not touch: leave out the samples between them
        return functional.conv1d(blocks[:, :width], kernels[:, :, None])
    kernels = functional.pad(kernels, (0, taps * hop - width))
    return functional.conv1d(blocks, kernels.reshape(count, taps, hop).transpose(1, 2))


def wide(x: Tensor) -> Tensor:
    """Return float32 for half precision, in which there are no Fourier transforms."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def spectra(x: Tensor, width: int, hop: int, window: Tensor | None = None) -> Tensor:
    """Return the real and imaginary parts of the transforms of all frames, as (batch, frames, width//2 + 1, 2)."""
    frames = wide(x).unfold(-1, width, hop)
    if window is not None:
        frames = frames * window.to(frames.dtype)
    if frames.numel() == 0:  # no clips: MKL has no plan for them
        return frames.new_zeros(*frames.shape[:-1], width // 2 + 1, 2)
    return torch.view_as_real(torch.fft.rfft(frames))


def in_blocks(function: Callable[[Tensor], Tensor], x: Float[Tensor, "batch samples"], width: int, hop: int) -> Tensor:
    """Apply a function of single clips to a few at a time, so that their frames stay in a processor's cache."""
    return few_at_a_time(function, x, max(1, x.shape[-1] // hop) * width)


def few_at_a_time(function: Callable[[Tensor], Tensor], x: Shaped[Tensor, "batch ..."], samples: int) -> Tensor:
    """Apply a function of a batch's entries, of which each has so many samples in all frames, to a few at a time."""
    count = max(1, _BLOCK // max(1, samples))
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.shape[0] <= count:
        return function(x)
    return torch.cat([function(part) for part in x.split(count)])


def power_of(real: Tensor, imaginary: Tensor, trained: bool) -> Tensor:
    """Return re² + im², on a floor where kernels are trained."""
    power = torch.addcmul(real.square(), imaginary, imaginary)
    return power + SILENCE if trained else power


def formatted(real: Tensor, imaginary: Tensor, output_format: Output, trained: bool) -> Tensor:
    """Return the magnitude, the angle, or both parts stacked last.

    Untrained kernels have no floor; there the root's slope at silence is set to 0 instead of infinity.
    """
    if output_format == "Complex":
        return torch.stack((real, imaginary), -1)
    if output_format == "Phase":
        # + 0.0: no −0, whose angle would be −π. Contiguous: with strides a CPU takes its many times slower path.
        return torch.atan2(imaginary + 0.0, real.contiguous())
    power = power_of(real, imaginary, trained)
    return (power if trained else power.clamp_min_(torch.finfo(power.dtype).tiny)).sqrt_()


def check_layer(output_format: str, pad_mode: str) -> None:
    """Check the choices that all layers share."""
    check_choice("output_format", output_format, OUTPUTS)
    check_choice("pad_mode", pad_mode, PAD_MODES)


def hold(module: nn.Module, name: str, value: Tensor, trainable: bool) -> None:
    """Register kernels as a parameter, or as a buffer."""
    if trainable:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class Streaming(nn.Module):
    """A layer of frames that can also take a signal chunk by chunk; frames then are not centred.

    Attributes:
        frame_length: Samples of a frame.
        hop_length: Samples between frames.
        center: Whether frames are centred; streaming wants ``False``.
    """

    frame_length: int
    hop_length: int
    center: bool
    _kept: Tensor | None = None

    def step(self, chunk: Tensor) -> Tensor:
        """Take the next samples of a stream and return the frames that they complete, possibly none.

        Chunks may be of any length; at most ``frame_length − 1`` samples are kept between calls, and
        ``frame_length − hop_length`` of them after a chunk of whole hops.

        Args:
            chunk: The next samples.

        Shape:
            chunk: (samples,), (batch, samples) or (batch, 1, samples), with the same batch in every call.

        Returns:
            What the layer makes of the frames; all calls' outputs, put one after the other, are the layer's output of
            the whole signal.

        Raises:
            ValueError: The layer centres its frames, or the batch differs from the chunk before.
        """
        if self.center:
            raise ValueError("center must be False to stream: a centred frame needs samples that are yet to come")
        chunk = as_batch(chunk)
        kept = self._kept
        if kept is not None and kept.shape[0] != chunk.shape[0]:
            raise ValueError(
                f"chunk must have the stream's batch of {kept.shape[0]}, got {chunk.shape[0]}; see reset()"
            )
        x = chunk if kept is None else torch.cat([kept, chunk], -1)
        frames = max(0, (x.shape[-1] - self.frame_length) // self.hop_length + 1)
        self._kept = x[:, frames * self.hop_length :].detach()
        if frames == 0:  # the shape of an output, without any frame
            return self(functional.pad(x, (0, self.frame_length - x.shape[-1]))).narrow(2, 0, 0)
        result: Tensor = self(x)
        return result

    def reset(self) -> None:
        """Forget the stream: the next chunk begins another."""
        self._kept = None
