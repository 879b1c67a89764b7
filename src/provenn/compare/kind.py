"""What a kind of part is to a comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from provenn.claims.claim import Event, Settings
from provenn.compare.task import AnyTask


@dataclass(frozen=True)
class Kind:
    """A kind of part that can be compared. A kind's module defines one as ``KIND``.

    Args:
        name: Its name on the command line.
        part_kind: The kind of its parts in the catalogue.
        run: ``run(setup, part, settings)`` runs a part once, with the setup that its tasks make. It yields
            ``Metric("score", ...)``, the headline figure; ``Metric("steps", ...)``, the optimizer steps or evaluations
            it took; ``Progress`` as a sign of life; where there are two axes, a ``Point("front", cost, score)`` for
            each point of the trade-off; and where ``over`` is given, a ``Point("course", x, score)`` for each point of
            the way to the headline figure, at the same x for every part.
        references: Parts that come with the kind, by name, to compare with.
        score: What the headline is; ``None``: the task's metric. More of it is better, unless it is the task's metric
            and the task says otherwise.
        cost: What the second axis is, less of it being better; ``None`` if there is none.
        over: What the headline figure's course is drawn over (evaluations, say); ``None`` if it is not.
        unfit: ``unfit(task, part)`` → why a part cannot run on a task, in a few words, or ``None`` if it can. Who
            asks for all parts gets those that fit; a named part that does not is refused before anything is trained.
        figures: Further figures that ``run`` yields as ``Metric``, shown beside the headline and drawn against it.
        note: ``note(task)`` → how the figures are measured, in words.

    A task may bring ``references``, ``cost`` and ``over`` of its own; its ``cost`` and ``over`` come before the kind's.
    """

    name: str
    part_kind: str
    run: Callable[[Any, Any, Settings], Iterator[Event]]
    references: Mapping[str, Any] = field(default_factory=dict)
    score: str | None = None
    cost: str | None = None
    over: str | None = None
    unfit: Callable[[Any, Any], str | None] | None = None
    figures: tuple[str, ...] = ()
    note: Callable[[Any], str] | None = None

    def axes(self, task: AnyTask) -> tuple[str | None, str | None]:
        """Return what the second axis is, and what the course is drawn over, on a task."""
        return getattr(task, "cost", None) or self.cost, getattr(task, "over", None) or self.over

    def headline(self, task: AnyTask) -> str:
        """Return the name of the headline figure."""
        return self.score or task.metric

    def maximize(self, task: AnyTask) -> bool:
        """Return whether more of the headline figure is better."""
        return self.score is not None or task.maximize


def accepted(part: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that a part's signature takes."""
    parameters = inspect.signature(part).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return dict(settings)
    return {name: value for name, value in settings.items() if name in parameters}
