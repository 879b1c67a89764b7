"""The clock schedule of a pipeline: which task runs when, and how much of the time the workers idle."""

from __future__ import annotations

from provenn.core.experiment.checks import check_integer


def clock_schedule(m: int, k: int) -> list[list[tuple[int, int]]]:
    """Return the tasks of each clock of a forward pass; the backward pass is the same in reverse.

    At clock c the tasks (micro-batch i, stage j) with i + j = c run side by side, so that (i, j) comes after (i, j − 1)
    and after (i − 1, j).

    Args:
        m: Micro-batches, M.
        k: Stages, K.

    Returns:
        For each of the M + K − 1 clocks its tasks (i, j), by ascending stage.

    Raises:
        ValueError: ``m`` or ``k`` < 1.
        TypeError: Either is not an integer.

    Cost: O(M K) time and memory.

    Source: Huang et al., "GPipe", NeurIPS 2019, figure 2; Kim et al., "torchgpipe", 2020, section 2.1.
    """
    check_integer("m", m, at_least=1)
    check_integer("k", k, at_least=1)
    return [
        [(clock - stage, stage) for stage in range(max(0, clock - m + 1), min(k, clock + 1))]
        for clock in range(m + k - 1)
    ]


def bubble_fraction(m: int, k: int) -> float:
    """Return the share of time that workers idle when every task takes as long: (K − 1)/(M + K − 1).

    Args:
        m: Micro-batches, M.
        k: Stages, K.

    Raises:
        ValueError: ``m`` or ``k`` < 1.

    Source: Huang et al., "GPipe", NeurIPS 2019, section 2.3.
    """
    check_integer("m", m, at_least=1)
    check_integer("k", k, at_least=1)
    return (k - 1) / (m + k - 1)
