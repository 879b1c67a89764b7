"""Ackley's function in 2 dimensions, scaled to unit variance, no noise."""

from provenn.compare.search_task import SearchTask
from provenn.core.numerics.objectives import ackley

TASK = SearchTask(
    name="ackley",
    summary="Ackley's function in 2 dimensions, of unit variance, no noise, 40 evaluations",
    objective=ackley,
    evaluations=40,
)
