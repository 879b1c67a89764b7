"""Hartmann's function in 6 dimensions, scaled to unit variance, noise of 0.3 standard deviations."""

from provenn.compare.search_task import SearchTask
from provenn.core.numerics.objectives import hartmann

TASK = SearchTask(
    name="hartmann6-noisy",
    summary="Hartmann's function in 6 dimensions, of unit variance, noise 0.3, 45 evaluations",
    objective=hartmann,
    evaluations=45,
    noise=0.3,
)
