"""Cases of what prepares and runs a training: initialisations, trainers, searchers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from provenn.contracts.case import Case, Inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

Progress = Callable[[Any], None]
"""What a trainer calls after every round, with the round's record."""


@dataclass(frozen=True)
class Moment:
    """What an initialisation states of one tensor's elements.

    Args:
        std: Their standard deviation around ``mean``; 0 for a constant.
        mean: Their mean.
        largest: A bound on their magnitude, if there is one.
    """

    std: float
    mean: float = 0.0
    largest: float | None = None


@dataclass(frozen=True)
class InitCase(Case):
    """A case of an initialisation: a function that sets tensors of a module in place.

    Args:
        initialize: ``initialize(module, generator)`` calls the part on the module, and returns what it returns.
        make: Builds a small module, with tensors that the part must leave alone if there can be such.
        changes: The names of the parameters and buffers that the part sets. All others stay as they are.
        moments: ``moments()`` gives for some names of ``changes`` what the part states of them. The draws of 256
            initialisations are compared; right ones fail with a probability of one in a million.
        returns_module: Whether the part returns the module that it was given.
        returns_module_reason: Why not.
        generator: Whether the part draws from the generator that it is given, and from no other. Without, it draws
            from torch's global one.
        generator_reason: Why not.
        random: Whether it draws at all.
        random_reason: Why not.
        forgets: Whether what was in the tensors before has no effect.
        forgets_reason: Why not.
    """

    kind: ClassVar[str] = "init"

    initialize: Callable[[nn.Module, torch.Generator], Any]
    make: Callable[[], nn.Module]
    changes: tuple[str, ...]
    moments: Callable[[], Mapping[str, Moment]]
    returns_module: bool = True
    returns_module_reason: str = ""
    generator: bool = True
    generator_reason: str = ""
    random: bool = True
    random_reason: str = ""
    forgets: bool = True
    forgets_reason: str = ""


def fit_with_method(trainer: Any, data: Inputs, checkpoint: Path | None, progress: Progress) -> Any:
    """Call ``trainer.fit(*data, checkpoint=checkpoint, progress=progress)``."""
    return trainer.fit(*data, checkpoint=checkpoint, progress=progress)


def history_of(result: Any) -> Sequence[Any]:
    """Return ``result.history``."""
    history: Sequence[Any] = result.history
    return history


def model_of(trainer: Any, result: Any) -> Any:
    """Return ``result.model``."""
    return result.model


@dataclass(frozen=True)
class TrainerCase(Case):
    """A case of a trainer: ``fit(...)`` trains, reports after every round, and returns a result with the history.

    A round is an epoch, a step or a stage, whichever the trainer reports. After a round the trainer first saves to
    the checkpoint, if it was given one, then reports. If the checkpoint exists when ``fit`` is called, the training
    goes on after the last round saved. An exception raised by ``progress`` ends the training and reaches the caller.

    Args:
        make: ``make(model, seed)`` builds the trainer over the model, so that no other seed matters.
        data: ``data(generator)`` returns the arguments of ``fit`` as a tuple of tensors (or of containers of them).
        rounds: How many rounds a fit takes; at least 3.
        model: Builds the model; ``None`` for a trainer that makes its own (exclude ``device_and_dtype``, with the
            reason). Several networks go into one ``nn.ModuleDict``.
        fit: ``fit(trainer, data, checkpoint, progress)`` trains and returns the result; default
            ``trainer.fit(*data, checkpoint=checkpoint, progress=progress)``.
        history: ``history(result)`` returns the records, one a round, without times; default ``result.history``.
        trained: ``trained(trainer, result)`` returns what was trained: a module, or tensors in containers; default
            ``result.model``.
        random: Whether another seed gives another history.
        random_reason: Why not.
    """

    kind: ClassVar[str] = "trainer"

    make: Callable[[Any, int], Any]
    data: Callable[[torch.Generator], Inputs]
    rounds: int
    model: Callable[[], nn.Module] | None = None
    fit: Callable[[Any, Inputs, Path | None, Progress], Any] = fit_with_method
    history: Callable[[Any], Sequence[Any]] = history_of
    trained: Callable[[Any, Any], Any] = model_of
    random: bool = True
    random_reason: str = ""


def ask_with_method(searcher: Any, count: int) -> Any:
    """Call ``searcher.ask(count)``."""
    return searcher.ask(count)


def tell_with_method(searcher: Any, points: Any, values: Sequence[Any]) -> None:
    """Call ``searcher.tell(points, values)``."""
    searcher.tell(points, values)


def best_with_attribute(searcher: Any) -> tuple[Any, Any]:
    """Return ``searcher.best.point`` and ``searcher.best.value``."""
    best = searcher.best
    return best.point, best.value


@dataclass(frozen=True)
class SearcherCase(Case):
    """A case of a searcher: ``ask(n)`` proposes points, ``tell(points, values)`` takes what they are worth.

    Points are the rows of a tensor, or the entries of a list. Values come as a list, in the order of the points.

    Args:
        make: ``make(seed)`` builds the searcher, so that no other seed matters.
        valid: ``valid(point)`` is whether a point is of the right type and within bounds.
        random_point: ``random_point(generator)`` draws a valid point uniformly.
        objective: ``objective(point)`` is the worth of a point: a known function, without noise, of which the best
            value is rarely met by chance within ``budget``.
        direction: Whether the largest or the smallest value is best.
        budget: Evaluations of one search.
        batch: Points asked for at once.
        quality: ``quality(values)`` is the worth of a whole search, larger is better; default its best value.
        failed: What is told of an evaluation that failed, beside infinities; a tuple of NaN for several objectives.
        ask: ``ask(searcher, n)``; default ``searcher.ask(n)``.
        tell: ``tell(searcher, points, values)``; default ``searcher.tell(points, values)``.
        best: ``best(searcher)`` returns point and value; default ``searcher.best.point``, ``searcher.best.value``.
        unknown_points: Whether points that were never asked for can be told, or raise a ``ValueError``.
        best_of_told: Whether ``best`` is the best point told, with its value; ``False`` where it is a model's belief,
            or a set.
        best_of_told_reason: Why not.
        random: Whether another seed gives other points.
        random_reason: Why not.
    """

    kind: ClassVar[str] = "searcher"

    make: Callable[[int], Any]
    valid: Callable[[Any], bool]
    random_point: Callable[[torch.Generator], Any]
    objective: Callable[[Any], Any]
    direction: Literal["maximize", "minimize"] = "maximize"
    budget: int = 30
    batch: int = 1
    quality: Callable[[Sequence[Any]], float] | None = None
    failed: Any = math.nan
    ask: Callable[[Any, int], Any] = ask_with_method
    tell: Callable[[Any, Any, Sequence[Any]], None] = tell_with_method
    best: Callable[[Any], tuple[Any, Any]] = best_with_attribute
    unknown_points: Literal["accepted", "refused"] = "accepted"
    best_of_told: bool = True
    best_of_told_reason: str = ""
    random: bool = True
    random_reason: str = ""
