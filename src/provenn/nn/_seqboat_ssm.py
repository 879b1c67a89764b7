"""The linear state-space models that run on every element: MEGA's moving averages, and S4D."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer
from provenn.core.numerics.precision import full_precision
from provenn.core.sequences.attention import wide
from provenn.core.sequences.fft_convolution import fft_convolution

Coefficients = tuple[Tensor, Tensor, Tensor]


def truncated_normal_(tensor: Tensor, std: float = 0.02) -> Tensor:
    """Draw a parameter from a normal distribution cut off at two standard deviations."""
    return nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std)


class DiagonalSSM(nn.Module, ABC):
    """A diagonal linear recurrence of each channel, h_t = q ⊙ h_{t−1} + b x_t and y_t = Re(c · h_t) + ω x_t.

    Forward it is a convolution with k[l] = Re Σ_n c_n b_n q_n^l. A subclass owns the parameters and says what q, b and
    c are. With ``bidirectional`` a second recurrence runs against time, and an element counts in both.
    """

    def __init__(self, dim: int, ndim: int, bidirectional: bool) -> None:
        super().__init__()
        check_integer("dim", dim, at_least=1)
        check_integer("ndim", ndim, at_least=1)
        self.dim, self.ndim, self.bidirectional = dim, ndim, bidirectional
        self.omega = nn.Parameter(torch.empty(dim))

    @abstractmethod
    def coefficients(self) -> Coefficients:
        """Return q, b and c, each (channels, states), of D channels, or of 2D, those against time last."""

    def kernel(self, length: int) -> Float[Tensor, "channels length"]:
        """Return the kernel's first taps, in float32 at least.

        Args:
            length: L ≥ 1, the number of taps.

        Shape:
            (D, L), or (2D, L) where it is bidirectional: the kernels against time are the last D.

        Cost: O(D · N · L) products and O(D (N √L + L)) memory: q^l is a product of q^(l mod s) and q^(s ⌊l/s⌋), s = √L.
        """
        q, b, c = self.coefficients()
        length = operator.index(length)  # a number, where a compiler has a symbol for it
        size = math.isqrt(length - 1) + 1
        steps = torch.arange(size, device=q.device)
        small = torch.pow(q[..., None], steps)
        large = torch.pow(q[..., None], size * steps[: -(-length // size)]) * (b * c)[..., None]
        with full_precision(q.device):
            taps = large.mT @ small
        return (taps.real if taps.is_complex() else taps).flatten(1)[:, :length]

    def forward(
        self, x: Float[Tensor, "batch time dim"], padding_mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """Run over sequences.

        Args:
            x: The sequences.
            padding_mask: True where an element is padding: it enters no other element's output.

        Returns:
            The outputs, in the type of ``x``.
        """
        check_features("x", x, self.dim, 3)
        signal = x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0)
        length = x.shape[1]
        forward, backward = self.kernel(max(length, 2)), None
        if self.bidirectional:
            forward, against = forward.chunk(2)
            # Tap 0 of both kernels falls on the element itself; the others of the second on those after it.
            forward = torch.cat((forward[:, :1] + against[:, :1], forward[:, 1:]), 1)
            backward = against[:, 1:]
        y = fft_convolution(signal.mT, forward, backward).mT
        return (y + x * self.omega).to(x.dtype)

    def step(
        self, x: Float[Tensor, "batch dim"], state: Shaped[Tensor, "batch dim states"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Shaped[Tensor, "batch dim states"]]:
        """Take one element.

        Args:
            x: The next element of each sequence.
            state: What the step before returned; ``None`` at the beginning.

        Returns:
            Output and state h.

        Raises:
            RuntimeError: It is bidirectional.

        Cost: O(D · N) a sequence, whatever came before.
        """
        check_features("x", x, self.dim, 2)
        if self.bidirectional:
            raise RuntimeError("step needs a causal model: bidirectional=True has to see the end of the sequence")
        q, b, c = self.coefficients()
        entering = b * x[..., None]
        state = entering if state is None else q * state + entering
        y = (c * state).sum(-1)
        return ((y.real if y.is_complex() else y) + x * self.omega).to(x.dtype), state

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.dim}, ndim={self.ndim}, bidirectional={self.bidirectional}"


class MultiHeadEMA(DiagonalSSM):
    r"""Multi-dimensional damped exponential moving average: N averages of each channel, by learned weights.

    With p = σ(δ) and q = 1 − σ(δ) σ(α), of each channel and component n,

    .. math::
        h_t = q \odot h_{t-1} + p \beta\, x_t,\qquad y_t = \sum_n \gamma_n h_{t,n} / \sqrt{N} + \omega x_t

    Args:
        dim: D, the number of channels.
        ndim: N, components a channel.
        bidirectional: Whether a second average, with weights of its own, runs against time; an element then counts in
            both.

    Shape:
        x (batch, time, D), ``padding_mask`` (batch, time), True at padding → (batch, time, D).

    Returns:
        Calling it returns the averages, in the type of x; they are computed in float32 at least.

    Raises:
        TypeError: A size is no integer.
        ValueError: ``dim`` or ``ndim`` < 1, or x of another number of features.
        RuntimeError: ``step`` of a bidirectional one.

    Cost: O(D L log L) for the convolution and O(D N L) products for its kernel, once a batch; ``step`` O(D N).

    Source: section 2.1 of the paper; Ma et al., "Mega: Moving average equipped gated attention", ICLR 2023, equation 2.
    """

    def __init__(self, dim: int, ndim: int = 16, bidirectional: bool = False) -> None:
        super().__init__(dim, ndim, bidirectional)
        channels = 2 * dim if bidirectional else dim
        self.delta, self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(channels, ndim)) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew; β alternates about ±1 along the components."""
        truncated_normal_(self.delta, 0.2)
        truncated_normal_(self.alpha, 0.2)
        truncated_normal_(self.gamma, 1.0)
        truncated_normal_(self.omega, 1.0)
        with torch.no_grad():
            sign = 1.0 - 2.0 * (torch.arange(self.ndim, device=self.beta.device) % 2)
            truncated_normal_(self.beta).add_(sign.to(self.beta.dtype))

    def coefficients(self) -> Coefficients:
        """Return q, pβ and γ/√N."""
        delta, alpha, beta, gamma = (_widened(one) for one in (self.delta, self.alpha, self.beta, self.gamma))
        p = torch.sigmoid(delta)
        return 1 - p * torch.sigmoid(alpha), p * beta, gamma / math.sqrt(self.ndim)


class S4D(DiagonalSSM):
    """Diagonal state-space layer with complex modes, discretised by the bilinear rule: the paper's alternative.

    Half of the channels start at S4D-Inv's frequencies, the others at S4D-Lin's; decays start at ½, and steps Δ evenly
    in log between 0.001 and 0.1.

    Args:
        dim: D.
        ndim: N, even: N/2 conjugate pairs a channel.
        bidirectional: As in :class:`MultiHeadEMA`.

    Source: Gu et al., "On the parameterization and initialization of diagonal state space models", NeurIPS 2022.
    """

    def __init__(self, dim: int, ndim: int = 16, bidirectional: bool = False) -> None:
        super().__init__(dim, ndim, bidirectional)
        if ndim % 2:
            raise ValueError(f"ndim must be even for S4D, whose modes come in conjugate pairs, got {ndim}")
        channels, pairs = (2 * dim if bidirectional else dim), ndim // 2
        self.log_step = nn.Parameter(torch.empty(channels))
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(channels, pairs)) for _ in range(2))
        self.output = nn.Parameter(torch.empty(channels, pairs, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.uniform_(self.log_step, math.log(0.001), math.log(0.1))
        nn.init.constant_(self.log_decay, math.log(0.5))
        order = torch.arange(self.ndim // 2, device=self.frequency.device, dtype=self.frequency.dtype)
        half = len(self.frequency) // 2
        self.frequency[:half] = self.ndim / math.pi * (self.ndim / (1 + 2 * order) - 1)
        self.frequency[half:] = math.pi * order
        nn.init.normal_(self.output, std=math.sqrt(0.5))
        truncated_normal_(self.omega, 1.0)

    def coefficients(self) -> Coefficients:
        """Return (1 + ΔA/2)/(1 − ΔA/2), 1, and 2 C Δ/(1 − ΔA/2) with A = −decay + i frequency."""
        names = (self.log_step, self.log_decay, self.frequency, self.output)
        log_step, log_decay, frequency, output = (_widened(one) for one in names)
        step = log_step.exp()[:, None]
        half = torch.complex(-step * log_decay.exp(), step * frequency) / 2
        c = 2 * torch.view_as_complex(output) * step / (1 - half)
        return (1 + half) / (1 - half), torch.ones_like(c), c


def check_features(name: str, x: Tensor, dim: int, ndim: int) -> None:
    """Check that a tensor has so many dimensions, the last of them so long."""
    if x.ndim != ndim or x.shape[-1] != dim:
        wanted = "(batch, time, {})" if ndim == 3 else "(batch, {})"
        raise ValueError(f"{name} must be {wanted.format(dim)}, got shape {tuple(x.shape)}")


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor.dtype))
