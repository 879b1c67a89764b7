"""Branin's function in 2 dimensions, scaled to unit variance, noise of 0.3 standard deviations."""

from provenn.compare.search_task import SearchTask
from provenn.core.numerics.objectives import branin

TASK = SearchTask(
    name="branin-noisy",
    summary="Branin's function in 2 dimensions, of unit variance, noise 0.3, 30 evaluations",
    objective=branin,
    evaluations=30,
    noise=0.3,
)
