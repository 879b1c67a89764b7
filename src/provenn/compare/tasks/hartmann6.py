"""Hartmann's function in 6 dimensions, scaled to unit variance, no noise."""

from provenn.compare.search_task import SearchTask
from provenn.core.numerics.objectives import hartmann

TASK = SearchTask(
    name="hartmann6",
    summary="Hartmann's function in 6 dimensions, of unit variance, no noise, 40 evaluations",
    objective=hartmann,
    evaluations=40,
)
