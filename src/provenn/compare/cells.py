"""One run of one part as a cell that the claims' executors run: in this process, in workers, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator

from provenn.claims.claim import Claim, Event, Evidence, Trial, Verdict
from provenn.compare.lookup import find_kind, find_part, find_task
from provenn.core.experiment.seeding import seeded

REFERENCE = f"{__name__}:CELLS"


def study_name(kind: str, task: str) -> str:
    """Return what a trial's ``study`` is for a comparison."""
    return f"{kind}/{task}"


def run(trial: Trial) -> Iterator[Event]:
    """Run the part that ``trial.arm`` names on the task that ``trial.study`` names."""
    kind_name, _, task_name = trial.study.partition("/")
    kind, task = find_kind(kind_name), find_task(task_name)
    setup = task.setup(trial.seed, trial.device, trial.tuning)
    # Whatever a part draws from torch's global generator depends on the seed alone.
    with seeded(trial.seed, "part"):
        yield from kind.run(setup, find_part(kind, trial.arm, task), trial.settings)


def _judge(evidence: Evidence) -> Verdict:
    raise TypeError("a comparison has no verdict")


CELLS = Claim(
    slug="compare",
    statement="",
    figures=(),
    rule="",
    studies={},
    comparisons=(),
    run=run,
    judge=_judge,
)
"""What an executor needs to run cells of a comparison: a claim of no paper, without studies or verdict."""
