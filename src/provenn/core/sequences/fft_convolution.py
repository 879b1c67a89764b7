"""Long convolutions by FFT: a kernel as long as the sequence, at O(L log L)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def fft_convolution(
    signal: Float[Tensor, "... length"],
    kernel: Float[Tensor, "... taps"],
    backward_kernel: Float[Tensor, "... more"] | None = None,
) -> Float[Tensor, "... length"]:
    """Convolve causally, y_t = Σ_{s ≤ t} k_{t−s} u_s, and on request with a second kernel against time.

    Args:
        signal: u.
        kernel: k; shorter than the signal or longer (what is beyond the signal's length has no effect).
        backward_kernel: k', adds Σ_{s > t} k'_{s−t−1} u_s, so that a place sees all of the sequence, itself once.

    Shape:
        ``signal`` (…, L); kernels (…, taps), leading dimensions broadcasting. The result (…, L).

    Returns:
        y.

    Raises:
        ValueError: A length is 0.

    Cost: O(L log L) time and O(L) memory a sequence. Padded to at least the full length, so that nothing wraps round.
    Half precision is raised to float32 inside, as FFTs need it. The error is of rounding size against the largest y,
    not against each.

    Source: Gu et al., "Combining recurrent, convolutional, and continuous-time models with linear state-space layers",
    NeurIPS 2021, section 3.
    """
    length = signal.shape[-1]
    for name, one in (("signal", signal), ("kernel", kernel), ("backward_kernel", backward_kernel)):
        if one is not None and one.shape[-1] == 0:
            raise ValueError(f"{name} must be at least one step long, got shape {tuple(one.shape)}")
    kind = torch.promote_types(signal.dtype, kernel.dtype)
    wide = torch.promote_types(kind, torch.float32)
    if signal.numel() == 0:  # FFTs of no sequences are refused; the product has their shape and their derivative
        first: Tensor = (signal.to(wide) * kernel[..., :1].to(wide)).to(kind)
        return first
    forward = kernel[..., :length].to(wide)
    if backward_kernel is None:
        size = _fast_length(length + forward.shape[-1] - 1)
        spectrum = torch.fft.rfft(forward, size)
    else:
        back = backward_kernel[..., : length - 1].to(wide)
        size = _fast_length(length + max(forward.shape[-1] - 1, back.shape[-1]))
        # k'_j acts at lag −(j + 1): it stands at the end of the circle, in reverse.
        gap = size - forward.shape[-1] - back.shape[-1]
        whole = torch.broadcast_shapes(forward.shape[:-1], back.shape[:-1])
        zeros = forward.new_zeros(*whole, gap)
        circle = torch.cat((forward.expand(*whole, -1), zeros, back.flip(-1).expand(*whole, -1)), -1)
        spectrum = torch.fft.rfft(circle, size)
    full: Tensor = torch.fft.irfft(torch.fft.rfft(signal.to(wide), size) * spectrum, size)
    return full[..., :length].to(kind)


def _fast_length(length: int) -> int:
    """Return the least number of the form 2^a 3^b 5^c that is not below a length: FFTs are fast on it."""
    best = 1 << (length - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three << max(0, (-(-length // three) - 1).bit_length())
            best = min(best, size)
            three *= 3
        five *= 5
    return best
