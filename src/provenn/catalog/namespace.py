"""Areas whose parts load when first asked for, by what the cards say; there is no list to edit.

A part's public name may lie in another area than its paper, and in a submodule of an area (``provenn.nn.functional``):
the card says the name, the paper's module holds the code.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from provenn.catalog.card import Card, cards
from provenn.catalog.tree import holds, module_path
from provenn.core.nearest import unknown_name_message


class NotBuiltError(NotImplementedError):
    """The part is in the catalogue, but its paper is not built yet.

    Neither an ``ImportError`` nor an ``AttributeError``: ``from provenn.optim import X`` would replace the
    words of the latter by its own.
    """


@cache
def _parts_of(namespace: str) -> dict[str, Card]:
    return {part.attribute: one for one in cards() for part in one.parts if part.namespace == namespace}


@cache
def _modules() -> dict[str, Card]:
    """Map every module a card speaks of, the paper's own and its parts' namespaces, to a card that does."""
    own = {one.module: one for one in cards()}
    return {part.namespace: one for one in cards() for part in one.parts} | own


def _not_built(name: str, paper: Card) -> NotBuiltError:
    return NotBuiltError(f"{name} is not built yet (paper {paper.slug}: {paper.title})")


class _NotBuiltFinder(importlib.abc.MetaPathFinder):
    """Asked last, for modules that no file provides: says which of them are only not built yet."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith("provenn.") and fullname in _modules() and module_path(fullname) is None:
            raise _not_built(fullname, _modules()[fullname])
        return None


class _Namespace(ModuleType):
    """An area in which a part keeps its name when the module of the same name is imported (``provenn.optim.tract``)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _parts_of(self.__name__):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


def lazy_parts(namespace: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the module-level ``__getattr__`` and ``__dir__`` of an area, or of a submodule of one.

    Args:
        namespace: The dotted name, such as ``"provenn.optim"``.

    Returns:
        A ``__getattr__`` that imports the module of the paper whose card names the part, and a
        ``__dir__`` that lists the parts that are built. ``from provenn.optim import *`` gives these.
    """
    if not any(isinstance(finder, _NotBuiltFinder) for finder in sys.meta_path):
        sys.meta_path.append(_NotBuiltFinder())
    sys.modules[namespace].__class__ = _Namespace

    def load(name: str) -> Any:
        if name == "__all__":
            return names()
        if name.startswith("_"):
            raise AttributeError(f"module {namespace!r} has no attribute {name!r}")
        full = f"{namespace}.{name}"
        parts = _parts_of(namespace)
        if name not in parts:
            if full in _modules():
                return importlib.import_module(full)
            raise AttributeError(unknown_name_message("part", full, (f"{namespace}.{known}" for known in parts)))
        paper = parts[name]
        if not holds(paper, full):
            raise _not_built(full, paper)
        value = getattr(importlib.import_module(paper.module), name)
        setattr(sys.modules[namespace], name, value)
        return value

    def names() -> list[str]:
        return sorted(name for name, paper in _parts_of(namespace).items() if holds(paper, f"{namespace}.{name}"))

    return load, names
