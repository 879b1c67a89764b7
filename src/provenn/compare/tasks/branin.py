"""Branin's function in 2 dimensions, scaled to unit variance, no noise."""

from provenn.compare.search_task import SearchTask
from provenn.core.numerics.objectives import branin

TASK = SearchTask(
    name="branin",
    summary="Branin's function in 2 dimensions, of unit variance, no noise, 25 evaluations",
    objective=branin,
    evaluations=25,
)
