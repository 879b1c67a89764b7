"""Timelines of pipelines: the tasks of every stage with their times, simulated or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from matplotlib.figure import Figure

from provenn.core.experiment.reports import Report
from provenn.core.pipelines.schedule import bubble_fraction, clock_schedule

Kind = Literal["forward", "recompute", "backward"]
_COLOURS = {"forward": "tab:blue", "recompute": "tab:gray", "backward": "tab:orange"}


@dataclass(frozen=True)
class Task(Report):
    """A task of a pipeline: what a stage did with a micro-batch, and when (seconds, or units of cost)."""

    kind: Kind
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline(Report):
    """The tasks of one pass through a pipeline, forward and backward.

    Attributes:
        stages: Stages, K.
        micro_batches: Micro-batches, M.
        tasks: All tasks, by their start.
        makespan: Time from the first task's start to the last one's end, forward pass and backward pass each by itself:
            what the caller does between them does not count.
        bubble: Share of ``stages × makespan`` in which a stage has no task.
        theory: (K − 1)/(M + K − 1), the bubble of equal tasks.
    """

    nested: ClassVar[dict[str, type[Report]]] = {"tasks": Task}

    stages: int
    micro_batches: int
    tasks: tuple[Task, ...]
    makespan: float
    bubble: float
    theory: float

    def plot(self) -> Figure:
        """Draw the tasks as a Gantt chart, a row a stage; gaps are bubbles."""
        figure = Figure(figsize=(8, 1.2 + 0.4 * self.stages), layout="constrained")
        axes = figure.subplots()
        origin = min((task.start for task in self.tasks), default=0.0)
        for kind, colour in _COLOURS.items():
            of_kind = [task for task in self.tasks if task.kind == kind]
            if of_kind:
                axes.barh(
                    [task.stage for task in of_kind],
                    [task.end - task.start for task in of_kind],
                    left=[task.start - origin for task in of_kind],
                    height=0.8,
                    color=colour,
                    edgecolor="white",
                    label=kind,
                )
        for task in self.tasks:
            middle = (task.start + task.end) / 2 - origin
            axes.text(middle, task.stage, str(task.micro_batch), ha="center", va="center", fontsize=7)
        axes.set_yticks(range(self.stages), [f"stage {stage}" for stage in range(self.stages)])
        axes.invert_yaxis()
        axes.set_xlabel("time")
        axes.set_title(f"bubbles {self.bubble:.1%}, of equal tasks {self.theory:.1%}")
        if self.tasks:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False)
        return figure


def summarise(tasks: Sequence[Task], m: int, k: int) -> tuple[float, float]:
    """Return the makespan of tasks, and the share of it in which stages idle.

    Args:
        tasks: Tasks of one pass forward, and of one backward if there was one.
        m: Micro-batches.
        k: Stages.
    """
    makespan = 0.0
    for kinds in (("forward",), ("recompute", "backward")):
        phase = [task for task in tasks if task.kind in kinds]
        if phase:
            makespan += max(task.end for task in phase) - min(task.start for task in phase)
    busy = sum(task.end - task.start for task in tasks)
    return makespan, 1 - busy / (k * makespan) if makespan > 0 else 0.0


def timeline(tasks: Sequence[Task], m: int, k: int) -> Timeline:
    """Return the timeline of tasks.

    Args:
        tasks: Tasks of one pass forward, and of one backward if there was one.
        m: Micro-batches.
        k: Stages.
    """
    makespan, bubble = summarise(tasks, m, k)
    ordered = tuple(sorted(tasks, key=lambda task: (task.start, task.stage)))
    return Timeline(k, m, ordered, makespan, bubble, bubble_fraction(m, k))


def simulate(
    duration: Callable[[Kind, int, int], float], m: int, k: int, communication: float, checkpointed: int
) -> list[Task]:
    """Return the tasks of a pass forward and a pass backward with given durations, each started as early as it can.

    The backward pass starts when the forward pass has ended everywhere. In it a stage recomputes a micro-batch as soon
    as it has done with the one before, and takes it backward when the gradient is there.

    Args:
        duration: ``duration(kind, micro_batch, stage)`` returns how long a task takes.
        m: Micro-batches, M.
        k: Stages, K.
        communication: Time between the end of a task and the start of the one at the neighbour that needs its result.
        checkpointed: The first so many micro-batches are recomputed.

    Returns:
        The tasks.

    Cost: O(M K) time and memory.
    """
    tasks: list[Task] = []

    def run(kind: Kind, i: int, j: int, start: float) -> float:
        end = start + duration(kind, i, j)
        tasks.append(Task(kind, j, i, start, end))
        return end

    free, ready = [0.0] * k, [[0.0] * (k + 1) for _ in range(m)]  # when a stage is free, when its input is there
    clocks = clock_schedule(m, k)
    for i, j in (task for clock in clocks for task in clock):
        free[j] = run("forward", i, j, max(free[j], ready[i][j]))
        ready[i][j + 1] = free[j] + communication
    barrier = max(free)
    free, arrived = [barrier] * k, [[barrier] * (k + 1) for _ in range(m)]
    for i, j in (task for clock in reversed(clocks) for task in reversed(clock)):
        if i < checkpointed:
            free[j] = run("recompute", i, j, free[j])
        free[j] = run("backward", i, j, max(free[j], arrived[i][j + 1]))
        arrived[i][j] = free[j] + communication
    return tasks
