"""Imitation in a simulator: a pole on a cart, an expert that balances it, and training by the expert's actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checkpoints import Epoch
from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator
from provenn.core.experiment.training import Batch, run_to_end, train
from provenn.optim._target_surrogates_sso import SSO

Expert = Callable[[Tensor], Tensor]
Progress = Callable[[Epoch], None]

_GRAVITY, _CART, _POLE, _HALF = 9.8, 1.0, 0.1, 0.5
_FORCE = 30.0
_BOX = (5.0, 10.0, 3.2, 20.0)


class Simulator(Protocol):
    """What states come from, many episodes at a time."""

    def reset(self, episodes: int, generator: torch.Generator) -> Tensor:
        """Draw the first states, one row an episode."""

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the next states, in the type and on the device of the states."""


class CartPole:
    """A pole on a cart, pushed by a force: 1 kg, 0.1 kg, 1 m; explicit Euler steps.

    A state is position (m), velocity (m/s), angle from upright (rad) and angular velocity (rad/s); an action is the
    force (N), which acts up to ±30. States are kept in a box, so that a fallen pole does no harm to the numbers.

    Args:
        spread: First states are uniform in ± this.
        dt: Length of a step (s).

    Shape:
        States (episodes, 4), actions (episodes, 1).

    Raises:
        ValueError: ``spread`` or ``dt`` ≤ 0.

    Cost: O(episodes) a step.

    Source: Barto, Sutton & Anderson, IEEE Trans. SMC 13 (1983), without friction.
    """

    def __init__(self, spread: float = 0.2, dt: float = 0.02) -> None:
        check_number("spread", spread, above=0)
        check_number("dt", dt, above=0)
        self.spread, self.dt = spread, dt

    def reset(self, episodes: int, generator: torch.Generator) -> Float[Tensor, "episodes 4"]:
        """Draw first states.

        Args:
            episodes: How many.
            generator: Draws them.
        """
        drawn = torch.rand(episodes, 4, generator=generator, device=generator.device, dtype=torch.float64)
        return self.spread * (2 * drawn - 1)

    def step(
        self, states: Float[Tensor, "episodes 4"], actions: Float[Tensor, "episodes 1"]
    ) -> Float[Tensor, "episodes 4"]:
        """Return the states one step later.

        Args:
            states: The states.
            actions: The forces.
        """
        _, velocity, angle, spin = states.unbind(1)
        sine, cosine, mass = angle.sin(), angle.cos(), _CART + _POLE
        pushed = (actions[:, 0].clamp(-_FORCE, _FORCE) + _POLE * _HALF * spin.square() * sine) / mass
        turn = (_GRAVITY * sine - cosine * pushed) / (_HALF * (4 / 3 - _POLE * cosine.square() / mass))
        thrust = pushed - _POLE * _HALF * turn * cosine / mass
        moved = states + self.dt * torch.stack([velocity, thrust, spin, turn], dim=1)
        box = moved.new_tensor(_BOX)
        return moved.clamp(-box, box)


class LQRExpert:
    """The linear–quadratic regulator of a simulator at the origin: actions −K s.

    Args:
        env: The simulator; its ``step`` can be differentiated at state 0 and action 0, a fixed point.
        state_dim: Numbers in a state.
        action_dim: Numbers in an action.
        action_cost: What a unit of squared action costs, beside 1 for a unit of squared state.

    Shape:
        Called with states (n, state_dim); returns actions (n, action_dim).

    Raises:
        ValueError: ``state_dim`` or ``action_dim`` < 1, or ``action_cost`` ≤ 0.

    Cost: one Riccati equation at construction; O(n · state_dim · action_dim) a call.

    Source: the discrete algebraic Riccati equation, K = (R + BᵀPB)⁻¹BᵀPA.
    """

    gain: Float[Tensor, "actions states"]

    def __init__(self, env: Simulator, state_dim: int = 4, action_dim: int = 1, action_cost: float = 0.1) -> None:
        check_integer("state_dim", state_dim, at_least=1)
        check_integer("action_dim", action_dim, at_least=1)
        check_number("action_cost", action_cost, above=0)
        rest = tuple(torch.zeros(1, size, dtype=torch.float64, device="cpu") for size in (state_dim, action_dim))
        jacobians = torch.autograd.functional.jacobian(env.step, rest)
        A, B = (one[0, :, 0, :].numpy() for one in jacobians)
        Q, R = np.eye(state_dim), action_cost * np.eye(action_dim)
        P = scipy.linalg.solve_discrete_are(A, B, Q, R)
        self.gain = torch.from_numpy(scipy.linalg.solve(R + B.T @ P @ B, B.T @ P @ A))

    def __call__(self, states: Float[Tensor, "n states"]) -> Float[Tensor, "n actions"]:
        """Return the expert's actions.

        Args:
            states: The states.
        """
        return -states @ self.gain.to(states).mT


@dataclass(frozen=True)
class ImitationResult:
    """What imitation leaves.

    Args:
        history: One entry a round: its index, the optimizer's steps, the loss on the round's states before its step.
        model: The policy.

    Source: arXiv 2302.02607, online imitation learning.
    """

    history: list[Epoch]
    model: nn.Module


class ImitationTrainer:
    """Train a policy online to act as an expert does, in the states that the policy itself gets to.

    A round runs the policy from fresh states, asks the expert what it would have done in every state on the way, and
    takes one step of the optimizer on ½‖π(s) − a‖², averaged over states: with :class:`SSO` one gradient by the
    actions and m inner steps, with another optimizer one step with a closure.

    Args:
        policy: Maps states to actions; trained in place.
        expert: States to actions.
        env: The simulator.
        optimizer: Of the policy's parameters.
        rounds: Rounds of a fit.
        episodes: Episodes a round, run at the same time.
        horizon: States an episode.
        seed: Draws first states.

    Shape:
        States (episodes · horizon, state), actions (episodes · horizon, action), of the policy's type and device.

    Raises:
        ValueError: ``rounds``, ``episodes`` or ``horizon`` < 1.
        TypeError: ``seed`` or one of these is no integer.

    Cost: a round takes ``horizon`` forward passes on ``episodes`` states and steps of the simulator, and the
    optimizer's step on all of them.

    Source: arXiv 2302.02607, online imitation learning; Ross, Gordon & Bagnell, arXiv 1011.0686 (DAgger), without a
    mixture with the expert and without replay of earlier rounds.
    """

    def __init__(
        self,
        policy: nn.Module,
        expert: Expert,
        env: Simulator,
        optimizer: torch.optim.Optimizer,
        rounds: int = 100,
        episodes: int = 8,
        horizon: int = 25,
        seed: int = 0,
    ) -> None:
        check_integer("rounds", rounds, at_least=1)
        check_integer("episodes", episodes, at_least=1)
        check_integer("horizon", horizon, at_least=1)
        check_integer("seed", seed)
        self.policy, self.expert, self.env, self.optimizer = policy, expert, env, optimizer
        self.rounds, self.episodes, self.horizon, self.seed = rounds, episodes, horizon, seed

    def fit(self, *, checkpoint: str | Path | None = None, progress: Progress | None = None) -> ImitationResult:
        """Train.

        Args:
            checkpoint: File that holds everything after every round; if it exists, training goes on from it.
            progress: Called after every round, once it is saved.

        Returns:
            History and policy.

        Raises:
            ValueError: A checkpoint of another run.
            FloatingPointError: The loss is no finite number any more.
        """
        rounds = train(
            self.policy,
            self.optimizer,
            self._batches,
            _unused,
            epochs=self.rounds,
            update=self._update,
            checkpoint=checkpoint,
        )
        return ImitationResult(run_to_end(rounds, checkpoint, progress), self.policy)

    @torch.no_grad()
    def rollout(self, draws: torch.Generator) -> Float[Tensor, "samples states"]:
        """Run the policy from fresh states, and return all states on the way.

        Args:
            draws: Draws the first states.
        """
        like = next(self.policy.parameters())
        states = self.env.reset(self.episodes, draws).to(like)
        seen = [states]
        for _ in range(self.horizon - 1):
            states = self.env.step(states, self.policy(states))
            seen.append(states)
        return torch.cat(seen)

    def _batches(self, index: int) -> Iterator[Batch]:
        device = next(self.policy.parameters()).device
        states = self.rollout(generator(self.seed, "round", index, device=device))
        yield states, self.expert(states).detach()

    def _update(self, batch: Batch) -> Tensor:
        states, actions = batch

        def target_loss(z: Tensor) -> Tensor:
            return (z - actions).square().sum() / (2 * len(z))

        if isinstance(self.optimizer, SSO):
            return self.optimizer.step(lambda: (lambda: self.policy(states), target_loss))

        def closure() -> Tensor:
            loss = target_loss(self.policy(states))
            if torch.is_grad_enabled():
                self.optimizer.zero_grad()
                loss.backward()
            return loss

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[assignment, arg-type]
        return loss


def _unused(model: nn.Module, *batch: Tensor) -> Tensor:
    raise AssertionError("the update takes over the whole step")
