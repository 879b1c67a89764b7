"""What can be compared, in words: the tasks of a kind, and the parts of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from provenn.claims.errors import UsageError
from provenn.compare.lookup import find_kind, find_task, fitting_parts, references, task_names


def tasks_in_words(kind: str) -> Iterator[str]:
    """Yield a line for each task that compares a kind.

    Raises:
        UsageError: There is no such kind.
    """
    find_kind(kind)
    yield f"tasks that compare {kind}; --task NAME alone lists a task's parts"
    for name in task_names():
        task = find_task(name)
        if kind in task.kinds:
            yield f"  {name}: {task.summary}; {task.metric}"


def parts_in_words(kind: str, task: str) -> Iterator[str]:
    """Yield lines on a task, what it has a place for, the parts that fit it, and why each other does not.

    Raises:
        UsageError: There is no such kind or task, it does not compare this kind, or its data are not there.
    """
    found, its = find_kind(kind), find_task(task)
    if kind not in its.kinds:
        raise UsageError(f"task {task} compares {', '.join(its.kinds)}, not {kind}")
    yield f"{its.name}: {its.summary}; {its.metric}"
    place = getattr(its, "place", "")
    if place:
        yield f"it has a place for {place}"
    names, reasons = fitting_parts(found, its)
    known = references(found, its)
    yield f"references: {', '.join(name for name in names if name in known) or 'none'}"
    yield f"parts: {', '.join(name for name in names if name not in known) or 'none'}"
    if found.unfit is None:
        yield f"whether a part of the kind {kind} fits shows when it runs"
        return
    yield "what does not fit:" if reasons else "all fit"
    for line in by_reason(reasons):
        yield f"  {line}"


def by_reason(reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each reason, with all the names that it holds for."""
    for reason in dict.fromkeys(reasons.values()):
        yield f"{', '.join(name for name, its in reasons.items() if its == reason)}: {reason}"
