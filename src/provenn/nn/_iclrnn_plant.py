"""A plant to model and to control: one reaction in a stirred tank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number


@dataclass(frozen=True)
class CSTR:
    """A continuous stirred-tank reactor in which A turns into B by a second-order, exothermic reaction.

    States are (C_A, T), the concentration of A in kmol/m³ and the temperature in K, inputs (C_A0, Q), the concentration
    of the feed in kmol/m³ and the heat in kJ/h; all are deviations from the unstable steady state that the fields
    ``concentration``, ``temperature``, ``feed`` and ``heat`` give:

        C_A' = F/V (C_A0 − C_A) − r,   T' = F/V (T₀ − T) − ΔH/(ρ C_p) r + Q/(ρ C_p V),   r = k₀ e^(−E/(R T)) C_A²

    Args:
        flow: F, m³/h.
        volume: V, m³.
        rate: k₀, m³/(kmol h).
        activation_energy: E, kJ/kmol.
        gas_constant: R, kJ/(kmol K).
        feed_temperature: T₀, K.
        density: ρ, kg/m³.
        heat_capacity: C_p, kJ/(kg K).
        reaction_heat: ΔH, kJ/kmol.
        concentration: C_A at the steady state.
        temperature: T at the steady state.
        feed: C_A0 at the steady state.
        heat: Q at the steady state.
        step: Length of an Euler step, h.

    Raises:
        TypeError: A field is no number.
        ValueError: A field that must be positive is not.

    Cost: O(n) a step for n trajectories at once.

    Source: Wang, Pravin & Wu, arXiv 2401.07494, section on the reactor; constants as in the authors' code.
    """

    flow: float = 5.0
    volume: float = 1.0
    rate: float = 8.46e6
    activation_energy: float = 5e4
    gas_constant: float = 8.314
    feed_temperature: float = 300.0
    density: float = 1000.0
    heat_capacity: float = 0.231
    reaction_heat: float = -1.15e4
    concentration: float = 1.9537
    temperature: float = 401.8727
    feed: float = 4.0
    heat: float = 0.0
    step: float = 1e-4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            free = field.name in ("reaction_heat", "heat")
            check_number(field.name, getattr(self, field.name), above=None if free else 0)

    def derivative(self, state: Float[Tensor, "*n 2"], inputs: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Return the time derivative of the states, per hour.

        Args:
            state: (C_A, T), deviations.
            inputs: (C_A0, Q), deviations.
        """
        C_A, T = state[..., 0] + self.concentration, state[..., 1] + self.temperature
        C_A0, Q = inputs[..., 0] + self.feed, inputs[..., 1] + self.heat
        r = self.rate * torch.exp(-self.activation_energy / (self.gas_constant * T)) * C_A.square()
        capacity = self.density * self.heat_capacity
        exchange = self.flow / self.volume
        of_C_A = exchange * (C_A0 - C_A) - r
        of_T = exchange * (self.feed_temperature - T) - self.reaction_heat / capacity * r + Q / (capacity * self.volume)
        return torch.stack((of_C_A, of_T), -1)

    def simulate(
        self, state: Float[Tensor, "n 2"], inputs: Float[Tensor, "n 2"], steps: int = 50, every: int = 5
    ) -> Float[Tensor, "n recorded 2"]:
        """Run the plant by explicit Euler steps with the inputs held.

        Args:
            state: Where it starts.
            inputs: What is held.
            steps: Steps.
            every: Steps from one recorded state to the next; the start is not recorded.

        Raises:
            TypeError: A tensor is not floating-point, a number no integer.
            ValueError: Tensors of another or of unequal size, ``every`` < 1, or ``steps`` no positive multiple of it.
        """
        for name, tensor in (("state", state), ("inputs", inputs)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
            if tensor.ndim != 2 or tensor.shape[1] != 2 or len(tensor) != len(state):
                raise ValueError(f"{name} must have shape ({len(state)}, 2), got {tuple(tensor.shape)}")
        check_integer("every", every, at_least=1)
        check_integer("steps", steps, at_least=1)
        if steps % every:
            raise ValueError(f"steps must be a multiple of every, got {steps} and {every}")
        recorded = []
        for done in range(1, steps + 1):
            state = state + self.step * self.derivative(state, inputs)
            if done % every == 0:
                recorded.append(state)
        return torch.stack(recorded, 1)

    def starts(self, grid: int = 100) -> Float[Tensor, "n 2"]:
        """Return the states of a grid that lie in the region 1060 c² + 44 c T + 0.52 T² < 372 around the steady state.

        Args:
            grid: Points along C_A in [0, 6] and along T in [300, 600].

        Returns:
            The states, T varying slowest: 772 of the grid of 100.

        Raises:
            ValueError: ``grid`` < 2.
        """
        check_integer("grid", grid, at_least=2)
        T = torch.linspace(300, 600, grid, dtype=torch.float64) - self.temperature
        C_A = torch.linspace(0, 6, grid, dtype=torch.float64) - self.concentration
        points = torch.cartesian_prod(T, C_A).flip(-1)
        c, t = points.unbind(-1)
        return points[1060 * c.square() + 44 * c * t + 0.52 * t.square() < 372]

    def trajectories(self, grid: int = 100, levels: int = 4) -> tuple[Float[Tensor, "n 4"], Float[Tensor, "n 10 2"]]:
        """Return the set of the paper: every start with every pair of inputs on a grid, and 10 states of each run.

        Args:
            grid: As in :meth:`starts`.
            levels: Levels of C_A0 in ±3.5 and of Q in ±5e5.

        Returns:
            (C_A, T, C_A0, Q) of each run, and its states after every fifth of 50 steps.

        Raises:
            ValueError: ``grid`` or ``levels`` < 2.

        Cost: 50 steps of all runs at once.
        """
        check_integer("levels", levels, at_least=2)
        state = self.starts(grid)
        sides = (torch.linspace(-end, end, levels, dtype=torch.float64) for end in (3.5, 5e5))
        inputs = torch.cartesian_prod(*sides)
        all_states = state.repeat(len(inputs), 1)
        all_inputs = inputs.repeat_interleave(len(state), 0)
        return torch.cat((all_states, all_inputs), 1), self.simulate(all_states, all_inputs)
