"""The linear state-space layer and the model that stacks it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._lssl_system import LinearStateSpace
from provenn.nn._lssl_transition import MEASURES, DenseTransition, StructuredTransition, Transition

Learn = Literal["none", "shared", "feature"]
Pooling = Literal["mean", "last", "none"]
RANDOM = "random"


class LSSL(nn.Module):
    r"""The linear state-space layer: a linear system a feature, then GELU, dropout and a linear map over features.

    Args:
        d_model: Features H.
        d_state: Order N of each feature's system.
        channels: Outputs M of each system.
        measure: ``"legs"``, ``"legt"`` or ``"lagt"``, as in :func:`hippo`; ``"random"`` for a dense A of N(0, 1)/N and
            B = 1, which remembers little (the paper's ablation).
        learn: ``"none"``: A and Δ are frozen (LSSL-f) and what the kernel needs of them is kept from call to call.
            ``"shared"``: A, B and Δ are trained, one A for all features. ``"feature"``: one A for each. See
            :func:`lssl_parameter_groups` for their step sizes.
        dt_min: Least Δ at the start; the range should reach about 1/L.
        dt_max: Largest; Δ is drawn log-uniformly, one a feature.
        alpha: Of the generalised bilinear transform: ½ bilinear, 0 forward and 1 backward Euler.
        dropout: Share of the systems' outputs dropped in training.

    Shape:
        u (batch, L, H) → (batch, L, H). A state is (batch, H, N).

    Returns:
        Calling it returns the outputs; with a state, outputs and the state after the last step.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size < 1, an unknown ``measure`` or ``learn``, 0 < ``dt_min`` ≤ ``dt_max`` violated, ``alpha``
            outside [0, 1], ``dropout`` outside [0, 1); in a call, L = 0, ``rate`` ≤ 0, shapes that do not fit, or
            I − αΔA singular.

    Cost: as :class:`LinearStateSpace`, and L products with an H × M·H matrix. Causal.

    Source: Gu, Johnson, Goel, Saab, Dao, Rudra & Ré, NeurIPS 2021, sections 3 to 5; defaults of the authors' ``lssl``
    module.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        channels: int = 1,
        measure: str = "legs",
        learn: Learn = "none",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        alpha: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("channels", channels)):
            check_integer(name, size, at_least=1)
        check_choice("measure", measure, (*MEASURES, RANDOM))
        check_choice("learn", learn, ("none", "shared", "feature"))
        check_number("dt_min", dt_min, above=0)
        check_number("dt_max", dt_max, at_least=dt_min)
        check_number("dropout", dropout, at_least=0, below=1)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = (low + (high - low) * torch.rand(d_model)).exp()
        C, D = torch.randn(d_model, channels, d_state), torch.randn(d_model, channels)
        transition = _transition(measure, d_state, d_model, learn)
        self.system = LinearStateSpace(transition, C, D, dt, alpha, learn_dt=learn != "none")
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels * d_model, d_model)

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
            state: x_0, (batch, H, N); zero without it.
            rate: Δ is multiplied by it: 2 for inputs sampled at half the rate.
        """
        if state is None:
            return self._mix(self.system(u, None, rate))
        y, after = self.system(u, state, rate)
        return self._mix(y), after

    def recurrent(
        self, u: Float[Tensor, "batch length features"], state: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch length features"], Float[Tensor, "batch features n"]]:
        """Evaluate step by step; see :meth:`LinearStateSpace.recurrent`."""
        y, after = self.system.recurrent(u, state, rate)
        return self._mix(y), after

    def step(
        self, u_t: Float[Tensor, "batch features"], state: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features n"]]:
        """Take one step of the recurrence; see :meth:`LinearStateSpace.step`."""
        y, after = self.system.step(u_t, state, rate)
        return self._mix(y), after

    def kernel(self, L: int, rate: float = 1.0) -> Float[Tensor, "features channels length"]:
        """Return the kernel of the convolution; see :meth:`LinearStateSpace.kernel`."""
        return self.system.kernel(L, rate)

    def _mix(self, y: Tensor) -> Tensor:
        mixed: Tensor = self.output(self.dropout(nn.functional.gelu(y)).flatten(-2))
        return mixed


def _transition(measure: str, d_state: int, d_model: int, learn: Learn) -> Transition:
    features = d_model if learn == "feature" else None
    if measure != RANDOM:
        return StructuredTransition(measure, d_state, features=features, trainable=learn != "none")  # type: ignore[arg-type]
    lead = () if features is None else (features,)
    A, B = torch.randn(*lead, d_state, d_state) / d_state, torch.ones(*lead, d_state)
    return DenseTransition(A, B, trainable=learn != "none")


def lssl_parameter_groups(
    model: nn.Module, lr: float, lr_transition: float = 1e-4, lr_dt: float = 1e-3
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, with the small step sizes that A, B and Δ are trained with.

    Args:
        model: Any model with :class:`LSSL` layers or :class:`LinearStateSpace` systems in it.
        lr: For all other parameters.
        lr_transition: For A and B.
        lr_dt: For log Δ.

    Returns:
        Up to three groups; empty ones are left out.

    Raises:
        ValueError: A step size < 0.

    Source: Gu et al., NeurIPS 2021, appendix F; defaults of the authors' ``lssl`` module.
    """
    for name, value in (("lr", lr), ("lr_transition", lr_transition), ("lr_dt", lr_dt)):
        check_number(name, value, at_least=0)
    systems = [one for one in model.modules() if isinstance(one, LinearStateSpace)]
    transition = {id(p): p for one in systems for p in one.transition.parameters()}
    steps = {id(one.log_dt): one.log_dt for one in systems if isinstance(one.log_dt, nn.Parameter)}
    rest = [p for p in model.parameters() if id(p) not in transition and id(p) not in steps]
    groups = [(rest, lr), (list(transition.values()), lr_transition), (list(steps.values()), lr_dt)]
    return [{"params": params, "lr": rate} for params, rate in groups if params]


class LSSLModel(nn.Module):
    """A stack of LSSL blocks between two linear maps: x + dropout(LSSL(norm(x))), a norm at the end, a head.

    Args:
        d_input: Features of an input.
        d_output: Numbers a sequence, or a step with ``pooling="none"``.
        d_model: Features H inside.
        n_layers: Blocks.
        d_state: N of the layers.
        pooling: What the head sees: the ``"mean"`` over time, the ``"last"`` step, or each step (``"none"``).
        dropout: In the layers, and of what a block adds.
        layer: Further options of :class:`LSSL`.

    Shape:
        u (batch, L, d_input) → (batch, d_output), or (batch, L, d_output) with ``pooling="none"``.

    Returns:
        The outputs.

    Raises:
        ValueError: A size < 1, an unknown ``pooling``, or as :class:`LSSL`.

    Cost: that of its layers.

    Source: Gu et al., NeurIPS 2021, section 5 and appendix F (depth 6, H = N = 256 in the larger runs); blocks
    normalise first, as the authors' configurations do.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        d_model: int = 256,
        n_layers: int = 6,
        d_state: int = 256,
        *,
        pooling: Pooling = "mean",
        dropout: float = 0.0,
        **layer: Any,
    ) -> None:
        super().__init__()
        for name, size in (("d_input", d_input), ("d_output", d_output), ("n_layers", n_layers)):
            check_integer(name, size, at_least=1)
        check_choice("pooling", pooling, ("mean", "last", "none"))
        self.pooling = pooling
        self.encoder = nn.Linear(d_input, d_model)
        self.layers = nn.ModuleList(LSSL(d_model, d_state, dropout=dropout, **layer) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers + 1))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, d_output)

    def forward(self, u: Float[Tensor, "batch length inputs"], rate: float = 1.0) -> Tensor:
        """Evaluate whole sequences.

        Args:
            u: The inputs.
            rate: As in :class:`LSSL`.
        """
        x = self.encoder(u)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + self.dropout(layer(norm(x), None, rate))
        if self.pooling == "mean":
            x = self.norms[-1](x).mean(1)
        else:
            x = self.norms[-1](x[:, -1] if self.pooling == "last" else x)
        output: Tensor = self.head(x)
        return output

    def step(
        self, u_t: Float[Tensor, "batch inputs"], states: Sequence[Tensor] | None = None, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch outputs"], list[Tensor]]:
        """Take one step in all layers.

        Args:
            u_t: The input of the step.
            states: One a layer, as the step before returned them; zero without them.
            rate: As in :class:`LSSL`.

        Returns:
            The head's output for this step, and the layers' states.

        Raises:
            ValueError: ``pooling`` is ``"mean"``, which needs all steps, or there are not as many states as layers.
        """
        if self.pooling == "mean":
            raise ValueError("pooling must be 'last' or 'none' for steps, got 'mean'")
        if states is not None and len(states) != len(self.layers):
            raise ValueError(f"states must be {len(self.layers)}, one a layer, got {len(states)}")
        x, after = self.encoder(u_t), []
        for place, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=False)):
            y, state = layer.step(norm(x), None if states is None else states[place], rate)
            x = x + self.dropout(y)
            after.append(state)
        return self.head(self.norms[-1](x)), after
