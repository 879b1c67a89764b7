"""What optimizers that only evaluate the loss share: seeded steps, counted queries, bad losses, and resuming."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_number
from provenn.core.experiment.parameters import flat_view
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.seeding import derive_seed
from provenn.core.numerics.zeroth_order import Difference, SeededDirection, finite_difference, perturbed_layers

Closure = Callable[[], Tensor | float]

LIMIT = 10
"""Steps in a row whose loss may be NaN or infinite."""


class NonFiniteLossError(ArithmeticError):
    """An evaluation gave NaN or an infinity, so that the step has no direction."""


class Evaluations:
    """A closure as a loss that is only evaluated: without gradients, counted, its first value kept.

    A closure that calls ``backward`` gets gradients enabled, and a warning says that nobody reads them.

    Args:
        closure: Returns the loss, a scalar tensor or a number.
        with_grad: Whether a run before found that the closure needs gradients enabled.

    Attributes:
        first: What the first evaluation returned, without its graph.
        count: Evaluations so far.
        with_grad: Whether the closure needs gradients enabled.
    """

    def __init__(self, closure: Closure, with_grad: bool = False) -> None:
        self._closure, self.with_grad = closure, with_grad
        self.first: Tensor | float | None = None
        self.count = 0

    def __call__(self) -> Tensor | float:
        """Evaluate the loss."""
        loss = self.evaluate()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def evaluate(self) -> Tensor | float:
        """Evaluate the loss, and return it with whatever derivatives it carries."""
        self.count += 1
        loss = self._evaluate()
        if isinstance(loss, Tensor) and loss.requires_grad and not self.with_grad:
            self._warn()
        if self.first is None:
            self.first = loss.detach() if isinstance(loss, Tensor) else loss
        return loss

    def _evaluate(self) -> Tensor | float:
        if not self.with_grad:
            try:
                with torch.no_grad():
                    return self._closure()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._warn()
        with torch.enable_grad():
            return self._closure()

    def _warn(self) -> None:
        self.with_grad = True
        warnings.warn(
            "the closure builds a graph or calls backward; only the loss is used, so leave that out to save the memory",
            stacklevel=2,
        )


class GradientFreeOptimizer(torch.optim.Optimizer):
    """Base of optimizers whose step needs only values of the loss.

    One seed is drawn at construction; whatever a step draws derives from it and the number of the step, so that two
    optimizers with the same seed and count draw alike, wherever they run.

    Args:
        params: Parameters or groups of them; real, contiguous.
        defaults: The options of a group.
        generator: Draws the seed, once. ``None`` draws it from torch's global generator.
        model: Is in evaluation mode while a step evaluates the loss, and as it was after. ``None``: the caller sees to
            it that dropout and the like are off.

    Attributes:
        seed: What all draws derive from.
        steps: Steps taken, skipped ones included.
        queries: Evaluations of the loss.
        skipped: Steps that a NaN or an infinity made void.

    Raises:
        ValueError: A parameter is complex, holds integers or is not contiguous.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], generator: torch.Generator | None, model: nn.Module | None = None
    ) -> None:
        device = "cpu" if generator is None else generator.device
        self.seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
        self.steps = self.queries = self.skipped = 0
        self.model = model
        self._skipped_in_a_row = 0
        self._with_grad = False
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # As with torch's optimizers, hooks stay behind; torch's own method would leave the rest behind too.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: Parameters and their options.

        Raises:
            ValueError: A parameter is complex, holds integers or is not contiguous.
        """
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                if not parameter.is_floating_point():
                    kind = "complex" if parameter.is_complex() else str(parameter.dtype)
                    raise ValueError(f"params must be real floating-point tensors, got a {kind} one")
                flat_view(parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss at the parameters as they stand, on one batch, and returns it; called several
                times, without gradients.

        Returns:
            The loss of the first evaluation.

        Raises:
            RuntimeError: The loss was NaN or infinite in ten steps in a row.
        """
        evaluations = Evaluations(closure, self._with_grad)
        try:
            with nullcontext() if self.model is None else evaluating(self.model):
                self._take_step(evaluations)
            self._skipped_in_a_row = 0
        except NonFiniteLossError as error:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= LIMIT:
                raise RuntimeError(f"{LIMIT} steps in a row were skipped, the last because {error}") from None
        finally:
            self.steps += 1
            self.queries += evaluations.count
            self._with_grad = evaluations.with_grad
        return evaluations.first

    @abstractmethod
    def _take_step(self, loss: Evaluations) -> None:
        """Evaluate the loss and change the parameters; raise :class:`NonFiniteLossError` to skip the step."""

    def draw_seed(self, *keys: int | str) -> int:
        """Return the seed that belongs to keys in this step."""
        return derive_seed(self.seed, self.steps, *keys)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, with the entry ``"gradient_free"`` of seed and counts."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**super().state_dict(), "gradient_free": counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer was, draws included.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It is of another kind of optimizer, or of other groups.
        """
        counts = state_dict.get("gradient_free")
        if counts is None:
            raise ValueError(f"state_dict must have the entry 'gradient_free', got the entries {sorted(state_dict)}")
        super().load_state_dict(state_dict)
        for name in _COUNTS:
            setattr(self, name, counts[name])


_COUNTS = ("seed", "steps", "queries", "skipped", "_skipped_in_a_row")


def checked(difference: Difference) -> Difference:
    """Return a difference, if it is finite.

    Args:
        difference: Of two losses.

    Raises:
        NonFiniteLossError: It is not.
    """
    if not math.isfinite(difference.derivative):
        raise NonFiniteLossError(f"the losses were {difference.ahead} and {difference.behind}")
    return difference


def layerwise_difference(
    loss: Closure,
    model: nn.Module,
    direction: SeededDirection,
    step: float,
    two_sided: bool = True,
    base: float | None = None,
) -> Difference:
    """Estimate the derivative along a direction as ``finite_difference`` does, with each layer moved in its forward.

    The parameters in memory never move, so they are the same bit for bit after it, and a mask of the direction may
    read them.

    Args:
        loss: Evaluates the loss by running the model.
        model: Its layers are moved while they run.
        direction: Over parameters of the model.
        step: > 0, in units of the direction.
        two_sided: Whether to evaluate at −step too, or at 0.
        base: f(θ), for the one-sided quotient, where it is known already.

    Returns:
        The quotient and both losses.

    Raises:
        RuntimeError: A parameter is owned by two modules, or used outside its own module's forward.
        ValueError: ``step`` ≤ 0.

    Cost: two evaluations, a draw a layer in each that is moved; memory of the largest layer.

    Source: Liu et al., arXiv 2402.15751, section 3.3.
    """

    def moved(by: float) -> float:
        with perturbed_layers(model, direction, by):
            return float(loss())

    check_number("step", step, above=0)
    if two_sided:
        ahead, behind = moved(step), moved(-step)
    else:
        behind = float(loss()) if base is None else base
        ahead = moved(step)
    return Difference((ahead - behind) / (2 * step if two_sided else step), ahead, behind)


def restoring_difference(
    loss: Closure, direction: SeededDirection, step: float, two_sided: bool = True, base: float | None = None
) -> Difference:
    """Estimate the derivative as ``finite_difference`` does, and put the tensors back from a copy, bit for bit.

    Args:
        loss: Evaluates the loss.
        direction: Over the tensors that are moved and copied.
        step: > 0.
        two_sided: As in ``finite_difference``.
        base: As in ``finite_difference``.

    Returns:
        The quotient and both losses.

    Cost: as ``finite_difference``, and memory of the direction's tensors.
    """
    copies = [tensor.detach().clone() for tensor in direction.tensors]
    try:
        return finite_difference(loss, direction, step, two_sided, base)
    finally:
        restore_(direction.tensors, copies)


@torch.no_grad()
def restore_(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Copy values back, in place.

    Args:
        tensors: Where to.
        copies: The values.
    """
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.copy_(copy)
