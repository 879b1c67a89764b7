"""A bank of linear state-space systems as one differentiable map of sequences, in its three views."""

from __future__ import annotations

import operator
from typing import Any, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.sequences.fft_convolution import fft_convolution
from provenn.nn._lssl_kernel import KrylovFactors, convolution_kernel, factorize, final_state, free_response
from provenn.nn._lssl_transition import DenseTransition, Transition


class LinearStateSpace(nn.Module):
    r"""One single-input linear system a feature, M outputs each: recurrent, convolutional, or at another rate.

    .. math::
        \dot x = Ax + Bu, \quad y = Cx + Du \qquad\to\qquad x_t = \bar A x_{t-1} + \bar B u_t, \quad y_t = C x_t + D u_t

    with Ā, B̄ from the generalised bilinear transform at the feature's step Δ. Calling it convolves u with the kernel
    (CB̄, CĀB̄, …) by FFT; :meth:`recurrent` and :meth:`step` walk through the same numbers.

    Args:
        transition: A and B, shared by all features or one for each: a :class:`StructuredTransition` or a
            :class:`DenseTransition`.
        C: What the state gives to the outputs, (features, channels, N).
        D: What the input gives to them directly, (features, channels).
        dt: Δ > 0, (features,); kept as its logarithm.
        alpha: ½ bilinear, 0 forward Euler, 1 backward Euler.
        learn_dt: Whether log Δ is a parameter; else it is a buffer.

    Shape:
        u (batch, L, features) → y (batch, L, features, channels). A state is (batch, features, N).

    Returns:
        y; with a state, y and the state after the last step.

    Raises:
        ValueError: Shapes that do not fit, a step ≤ 0, ``alpha`` outside [0, 1], L = 0, ``rate`` ≤ 0, or I − αΔA
            singular.

    Cost: the kernel O(N³ log L + N²·√(L·M) + N·L·M) a feature, in float64 (in float32 the powers of HiPPO matrices lose
    digits), holding O(N·max(N, √(L·M)) + L·M) numbers a feature, never N·L; the convolution O(L log L) a sequence,
    feature and channel. What does not depend on C is kept from call to call while nothing of it is trained (all is
    frozen, or gradients are off), for the last length and rate; compiled and exported code computes it in each call,
    and is of one length: ``torch.compile`` traces each length anew.
    States are kept in float64, unless one of another type is passed in.

    Source: Gu et al., NeurIPS 2021, sections 2 and 3.
    """

    log_dt: Tensor

    def __init__(
        self,
        transition: Transition,
        C: Float[Tensor, "features channels n"],
        D: Float[Tensor, "features channels"],
        dt: Float[Tensor, " features"],
        alpha: float = 0.5,
        *,
        learn_dt: bool = False,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha, at_least=0, at_most=1)
        if C.ndim != 3 or C.shape[-1] != transition.d_state or 0 in C.shape:
            raise ValueError(f"C must be (features, channels, {transition.d_state}), got shape {tuple(C.shape)}")
        if D.shape != C.shape[:2]:
            raise ValueError(f"D must have the shape {tuple(C.shape[:2])} of C's rows, got {tuple(D.shape)}")
        if dt.shape != C.shape[:1] or not (dt.is_meta or bool((dt > 0).all())):
            raise ValueError(f"dt must be {C.shape[0]} numbers > 0, got {dt}")
        if transition.features not in (None, len(C)):
            raise ValueError(f"transition must be of C's {len(C)} features, got {transition.features}")
        self.d_model, self.channels, self.d_state = C.shape
        self.alpha = alpha
        self.transition = transition
        self.C, self.D = nn.Parameter(C.clone()), nn.Parameter(D.clone())
        if learn_dt:
            self.register_parameter("log_dt", nn.Parameter(dt.log()))
        else:
            self.register_buffer("log_dt", dt.log())
        self._kept: dict[str, tuple[Any, Tensor, Any]] = {}

    @classmethod
    def from_gate(cls, z: Float[Tensor, " features"]) -> LinearStateSpace:
        """Return the gated recurrence h_t = (1 − σ(z)) h_{t−1} + σ(z) u_t as ẋ = −x + u, backward Euler, Δ = e^z.

        Args:
            z: The gate's argument, one a feature; for gates that follow the input see :func:`gated_recurrence`.

        Returns:
            A system of order 1, whose output is h.

        Source: Gu et al., NeurIPS 2021, lemma 3.1.
        """
        one = z.new_ones(len(z), 1, 1)
        transition = DenseTransition(-z.new_ones(1, 1), z.new_ones(1))
        return cls(transition, one, torch.zeros_like(one[..., 0]), z.exp(), alpha=1.0)

    @classmethod
    def from_convolution(cls, kernel: Float[Tensor, "features taps"]) -> LinearStateSpace:
        """Return the causal convolution y_t = Σ k_i u_{t−i} with a finite kernel as a system that shifts its state.

        Args:
            kernel: k, (features, taps), the present first.

        Returns:
            A system of order ``taps`` with Ā the nilpotent shift, as forward Euler with Δ = 1 gives it.

        Source: Gu et al., NeurIPS 2021, section 3.1 (convolutions as state spaces).
        """
        taps = kernel.shape[-1]
        shift = torch.diag(kernel.new_ones(taps - 1), -1)
        eye = torch.eye(taps, dtype=kernel.dtype, device=kernel.device)
        transition = DenseTransition(shift - eye, eye[0])
        return cls(
            transition, kernel[:, None], kernel.new_zeros(len(kernel), 1), kernel.new_ones(len(kernel)), alpha=0.0
        )

    @overload
    def forward(self, u: Tensor, state: None = None, rate: float = 1.0) -> Tensor: ...
    @overload
    def forward(self, u: Tensor, state: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, u: Float[Tensor, "batch length features"], state: Tensor | None = None, rate: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Evaluate by convolution.

        Args:
            u: The inputs.
            state: x_0, (batch, features, N); zero without it.
            rate: Δ is multiplied by it: 2 for inputs sampled at half the rate.
        """
        self._check(u, state)
        length = operator.index(u.shape[1])  # a number, as the products that make up the powers depend on it
        factors = self._factors(length, rate)
        C = self.C.double()
        wide = torch.promote_types(u.dtype, torch.float32)
        kernel = convolution_kernel(factors, C, length).to(wide)
        signal = u.transpose(1, 2)
        y = fft_convolution(signal[:, None], kernel.transpose(0, 1)).permute(0, 3, 2, 1)
        if state is None:
            return self._output(y, u)
        start = state.double()
        y = y + free_response(factors, C, start, length).permute(0, 3, 1, 2)
        return self._output(y, u), final_state(factors, signal.double(), start).to(state.dtype)

    def recurrent(
        self, u: Float[Tensor, "batch length features"], state: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch length features channels"], Float[Tensor, "batch features n"]]:
        """Evaluate step by step.

        Args:
            u: The inputs.
            state: x_0, (batch, features, N); zero without it. The steps are taken in its type.
            rate: As in :meth:`forward`.

        Returns:
            y, and the state after the last step.

        Raises:
            ValueError: As :meth:`forward`.

        Cost: L dependent steps of O(N²) a feature.
        """
        self._check(u, state)
        A, B = self._discrete(rate)
        x = u.new_zeros(u.shape[0], self.d_model, self.d_state, dtype=torch.float64) if state is None else state
        C, turned, entering = self.C.mT.to(x.dtype), A.mT.to(x.dtype), B[:, None].to(x.dtype)
        x, inputs = x.transpose(0, 1), u.to(x.dtype).permute(1, 2, 0)[..., None]
        outputs = []
        for u_t in inputs.unbind(0):
            x = torch.baddbmm(entering * u_t, x, turned)
            outputs.append(x @ C)
        return self._output(torch.stack(outputs, 1).permute(2, 1, 0, 3), u), x.transpose(0, 1)

    def step(
        self, u_t: Float[Tensor, "batch features"], state: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch features channels"], Float[Tensor, "batch features n"]]:
        """Take one step of the recurrence.

        Args:
            u_t: The input of the step.
            state: x_{t−1}; zero without it.
            rate: As in :meth:`forward`.

        Returns:
            y_t and x_t.

        Raises:
            ValueError: As :meth:`forward`.

        Cost: O(N²) a feature; where A or Δ is trained and gradients are on, each step discretises anew.
        """
        y, after = self.recurrent(u_t[:, None], state, rate)
        return y[:, 0], after

    def kernel(self, L: int, rate: float = 1.0) -> Float[Tensor, "features channels length"]:
        """Return the convolution's kernel (CB̄, CĀB̄, …, CĀ^{L−1}B̄), in float64 rounded to C's type.

        Args:
            L: Its length.
            rate: As in :meth:`forward`.

        Returns:
            The kernel.

        Raises:
            ValueError: ``L`` < 1 or ``rate`` ≤ 0.
        """
        check_integer("L", L, at_least=1)
        return convolution_kernel(self._factors(L, rate), self.C.double(), L).to(self.C.dtype)

    def reset_cache(self) -> None:
        """Forget what is kept from call to call, to free its memory."""
        self._kept.clear()

    def _output(self, y: Tensor, u: Tensor) -> Tensor:
        return (y + u[..., None] * self.D).to(u.dtype)

    def _check(self, u: Tensor, state: Tensor | None) -> None:
        if u.ndim != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"u must be (batch, length, {self.d_model}), got shape {tuple(u.shape)}")
        if u.shape[1] == 0:
            raise ValueError("u must be at least one step long, got L = 0")
        if state is not None and state.shape != (u.shape[0], self.d_model, self.d_state):
            expected = (u.shape[0], self.d_model, self.d_state)
            raise ValueError(f"state must have the shape {expected}, got {tuple(state.shape)}")

    def _discrete(self, rate: float) -> tuple[Tensor, Tensor]:
        check_number("rate", rate, above=0)
        kept = self._recall("discrete", rate)
        if kept is None:
            kept = self.transition.discretize(rate * self.log_dt.double().exp(), self.alpha)
            self._keep("discrete", rate, kept)
        return cast(tuple[Tensor, Tensor], kept)

    def _factors(self, length: int, rate: float) -> KrylovFactors:
        kept = self._recall("factors", (length, rate))
        if kept is None:
            kept = factorize(*self._discrete(rate), length, self.channels)
            self._keep("factors", (length, rate), kept)
        return cast(KrylovFactors, kept)

    # What is kept is compared with the values that it came from, which may be written to in ways that leave no trace.

    def _source(self) -> Tensor | None:
        """Return all that Ā and B̄ come from, or nothing where nothing may be kept."""
        if torch.compiler.is_compiling() or self.log_dt.is_meta or torch.is_inference_mode_enabled():
            return None
        held = (self.log_dt, *self.transition.parameters(), *self.transition.buffers())
        if torch.is_grad_enabled() and any(one.requires_grad for one in held):
            return None
        return torch.cat([one.detach().flatten() for one in held])

    def _recall(self, what: str, key: Any) -> Any:
        source = self._source()
        if source is None or what not in self._kept:
            return None
        known, values, kept = self._kept[what]
        same = known == key and values.dtype == source.dtype and values.device == source.device
        return kept if same and torch.equal(values, source) else None

    def _keep(self, what: str, key: Any, value: Any) -> None:
        source = self._source()
        if source is not None:
            self._kept[what] = (key, source, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is kept for speed out of copies and files."""
        return {**self.__dict__, "_kept": {}}
