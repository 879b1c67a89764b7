"""The simulator: bubbles, makespan and memory of a pipeline from the costs of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.reports import Report
from provenn.core.pipelines.partition import optimal_blocks
from provenn.core.pipelines.timeline import Kind, Task, Timeline, simulate, timeline


@dataclass(frozen=True)
class PipelineReport(Timeline):
    """A simulated pass through a pipeline, forward and backward. ``plot()`` draws it as a Gantt chart.

    Attributes:
        stages: Stages, K.
        micro_batches: Micro-batches, M.
        tasks: All tasks with their simulated times, by their start.
        makespan: Time of the forward pass and of the backward pass together.
        bubble: Share of ``stages × makespan`` in which a stage has no task.
        theory: (K − 1)/(M + K − 1), the bubble of equal tasks.
        balance: The number of layers of each stage.
        peak_memory: The most activations that each stage holds at once, in outputs of one layer for the whole
            mini-batch.
    """

    nested: ClassVar[dict[str, type[Report]]] = {"tasks": Task}

    balance: tuple[int, ...]
    peak_memory: tuple[float, ...]


def pipeline_report(
    costs: Sequence[float],
    m: int,
    k: int,
    comm: float = 0.0,
    *,
    backward: float = 2.0,
    checkpoint: str = "except_last",
) -> PipelineReport:
    """Simulate a mini-batch's passes through a pipeline.

    Layers are cut into stages by their costs; a micro-batch costs a share 1/M of the mini-batch, in a recomputation as
    much as the first time.

    Args:
        costs: Forward time of each layer for the whole mini-batch.
        m: Micro-batches, M.
        k: Stages, K.
        comm: Time to send a micro-batch, or its gradient, from a stage to the next one.
        backward: Time of a backward task, relative to the forward one.
        checkpoint: As for :class:`~provenn.runtime.GPipe`.

    Returns:
        The report.

    Raises:
        ValueError: ``m`` or ``k`` < 1, fewer layers than stages, ``comm`` or ``backward`` or a cost negative or not
            finite, or an unknown ``checkpoint``.

    Cost: O(M K + k n²) time, O(M K + k n) memory.

    Source: the paper, section 2.3.
    """
    check_integer("m", m, at_least=1)
    check_number("comm", comm, at_least=0)
    check_number("backward", backward, at_least=0)
    check_choice("checkpoint", checkpoint, ("always", "except_last", "never"))
    balance = optimal_blocks(costs, k)
    ends = [0, *accumulate(balance)]
    of_stage = [sum(costs[start:stop]) / m for start, stop in pairwise(ends)]

    def duration(kind: Kind, _: int, stage: int) -> float:
        return of_stage[stage] * (backward if kind == "backward" else 1.0)

    checkpointed = {"always": m, "except_last": m - 1, "never": 0}[checkpoint]
    found = timeline(simulate(duration, m, k, comm, checkpointed), m, k)
    peaks = tuple(_peak(found.tasks, stage, layers, m, checkpointed) for stage, layers in enumerate(balance))
    return PipelineReport(
        found.stages, found.micro_batches, found.tasks, found.makespan, found.bubble, found.theory,
        balance=tuple(balance), peak_memory=peaks,
    )  # fmt: skip


def _peak(tasks: Sequence[Task], stage: int, layers: int, m: int, checkpointed: int) -> float:
    """Follow what a stage holds: inputs of checkpointed micro-batches, and all activations of others."""
    held = peak = 0.0
    inner = (layers - 1) / m  # beside the input
    for task in sorted((one for one in tasks if one.stage == stage), key=lambda one: one.start):
        recomputed = task.micro_batch < checkpointed
        if task.kind == "forward":
            held += 1 / m if recomputed else 1 / m + inner
        elif task.kind == "recompute":
            held += inner
        peak = max(peak, held)
        if task.kind == "backward":
            held -= 1 / m + inner
    return peak
