"""Find kinds, tasks and parts: by name where they ship, by dotted path where they are a user's own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn.catalog import cards
from provenn.claims.errors import UsageError
from provenn.core.nearest import unknown_name_message

if TYPE_CHECKING:
    from provenn.compare.kind import Kind
    from provenn.compare.task import AnyTask

_HERE = Path(__file__).parent


def kind_names() -> list[str]:
    """Return the names of the kinds, without importing them."""
    return _modules("kinds")


def task_names() -> list[str]:
    """Return the names of the tasks that ship, without importing them."""
    return _modules("tasks")


def _modules(folder: str) -> list[str]:
    found = (path.stem.replace("_", "-") for path in (_HERE / folder).glob("*.py"))
    return sorted(name for name in found if not name.startswith("-"))


@cache
def find_kind(name: str) -> Kind:
    """Return a kind.

    Raises:
        UsageError: There is no such kind; the message names the nearest.
    """
    if name not in kind_names():
        raise UsageError(unknown_name_message("kind", name, kind_names()))
    found: Kind = importlib.import_module(f"provenn.compare.kinds.{name.replace('-', '_')}").KIND
    return found


@cache
def find_task(name: str) -> AnyTask:
    """Return a task: one that ships, or ``module.NAME`` of a user's own, a ``Task``, a ``CountedTask``, a
    ``LossTask``, a ``LayerTask``, a ``SearchTask`` or what returns one.

    Raises:
        UsageError: There is no such task; for one without a dot the message names the nearest.
    """
    from provenn.compare.counted_task import CountedTask
    from provenn.compare.layer_task import LayerTask
    from provenn.compare.loss_task import LossTask
    from provenn.compare.search_task import SearchTask
    from provenn.compare.task import Task

    if name in task_names():
        shipped: AnyTask = importlib.import_module(f"provenn.compare.tasks.{name.replace('-', '_')}").TASK
        return shipped
    if "." not in name:
        raise UsageError(unknown_name_message("task", name, task_names()))
    found = import_dotted("task", name)
    task = found() if callable(found) else found
    if not isinstance(task, Task | CountedTask | LossTask | LayerTask | SearchTask):
        wanted = "a Task, CountedTask, LossTask, LayerTask or SearchTask of provenn.compare, or return one"
        raise UsageError(f"task {name} must be {wanted}, got {type(task).__name__}")
    return task


def references(kind: Kind, task: AnyTask | None = None) -> dict[str, Any]:
    """Return the parts that come with a kind and with a task, by name."""
    return {**kind.references, **getattr(task, "references", {})}


def find_part(kind: Kind, name: str, task: AnyTask | None = None) -> Any:
    """Return a part: a reference of kind or task, a part of that kind in the catalogue, or what a dotted path names.

    Raises:
        UsageError: There is no such part, or it is not built yet; without a dot the message names the nearest.
    """
    known = references(kind, task)
    if name in known:
        return known[name]
    if "." in name:
        return import_dotted("part", name)
    catalogued = {
        part.attribute: (part, card) for card in cards() for part in card.parts if part.kind == kind.part_kind
    }
    if name not in catalogued:
        raise UsageError(unknown_name_message(f"part of the kind {kind.name}", name, [*known, *catalogued]))
    part, card = catalogued[name]
    if not card.built:
        raise UsageError(f"{part.name} is not built yet (paper {card.slug})")
    return getattr(importlib.import_module(part.namespace), name)


def all_parts(kind: Kind, task: AnyTask | None = None) -> tuple[str, ...]:
    """Return the names of all that a kind can compare: built parts of the catalogue, and references."""
    catalogued = (
        part.attribute for card in cards() if card.built for part in card.parts if part.kind == kind.part_kind
    )
    return tuple(dict.fromkeys([*catalogued, *references(kind, task)]))


def fitting_parts(kind: Kind, task: AnyTask) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the names of all parts that fit a task, and why each other does not.

    Raises:
        UsageError: The task's data are not there, or damaged.
    """
    names = all_parts(kind, task)
    reasons = unfit_parts(kind, task, names)
    return tuple(name for name in names if name not in reasons), reasons


def unfit_parts(kind: Kind, task: AnyTask, names: tuple[str, ...]) -> dict[str, str]:
    """Return why parts do not fit a task, of those that do not.

    Raises:
        UsageError: The task's data are not there, or damaged.
    """
    from provenn.data import CorruptDataError, DataUnavailableError

    if kind.unfit is None:
        return {}
    try:
        task.setup(0, "cpu", tuning=True)
    except (DataUnavailableError, CorruptDataError) as error:
        raise UsageError(f"task {task.name}: {error}") from error
    told = {name: kind.unfit(task, find_part(kind, name, task)) for name in names}
    return {name: reason for name, reason in told.items() if reason is not None}


def import_dotted(what: str, path: str) -> Any:
    """Import ``package.module.Name``, with the current folder on the path.

    Args:
        what: What it is, for the message.
        path: The dotted path.

    Raises:
        UsageError: There is no such module, it does not import, or it has no such name.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(f"there is no module {error.name!r} to take the {what} {path} from") from None
        raise UsageError(f"{what} {path}: {module} does not import: {error}") from error
    except Exception as error:
        raise UsageError(f"{what} {path}: {module} does not import: {type(error).__name__}: {error}") from error
    try:
        return getattr(found, attribute)
    except AttributeError:
        public = [name for name in dir(found) if not name.startswith("_")]
        raise UsageError(unknown_name_message(f"name in {module}", attribute, public)) from None
    except NotImplementedError as error:
        raise UsageError(str(error)) from error
