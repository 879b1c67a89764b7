"""Keep the runs of comparisons in the ledger, each as it ends, and find them again."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from provenn.catalog import cards
from provenn.catalog.results import module_digest
from provenn.claims.ledger import CellKey, Ledger, Record, RunKey
from provenn.compare.lookup import find_kind, find_task, references, task_names

_HERE = Path(__file__).parent
SLUG, TIER = "compare", "small"


class Keeper:
    """What a comparison keeps, and has kept.

    Args:
        ledger: Where.
        kind: Name of the kind.
        task: Name of the task.
        parts: Names of the parts.
        device: Where they run.

    Attributes:
        kept: Runs of this comparison that are in the ledger, from before or stored since.
    """

    def __init__(self, ledger: Ledger, kind: str, task: str, parts: Sequence[str], device: str) -> None:
        self._ledger = ledger
        # All now, as files may change while the first part runs, which the workers do not see.
        self._keys = {part: run_key(kind, task, device, part) for part in parts}
        self._known: dict[str, dict[CellKey, Record]] = {}
        self.kept = 0

    def find(self, key: CellKey) -> Record | None:
        """Return what a run left, if it was kept; counts it."""
        if key.arm not in self._known:
            self._known[key.arm] = self._ledger.finished(self._keys[key.arm])
        record = self._known[key.arm].get(key)
        self.kept += record is not None
        return record

    def keep(self, key: CellKey, record: Record) -> None:
        """Store what a run left, durably when this returns."""
        self._ledger.store(self._keys[key.arm], key, record)
        self.kept += 1

    def forget(self, study: str) -> None:
        """Delete what was kept of the parts."""
        for key in self._keys.values():
            self._ledger.forget(key, (study,))


@cache
def run_key(kind: str, task: str, device: str, part: str) -> RunKey:
    """Return the ledger's key of a part's runs: runs that differ in it never mix.

    It has a digest of this package, of the files that task and part come from, torch's version and the device's type.
    """
    digest = hashlib.sha256()
    for path in sorted(_HERE.rglob("*.py")):
        _add(digest, path)
    for source in (() if task in task_names() else (task,)), _dotted(kind, task, part):
        for name in source:
            for path in _files(name):
                _add(digest, path)
    digest.update(_paper(kind, task, part).encode())
    digest.update(f"torch {importlib.metadata.version('torch')}\0device {device.partition(':')[0]}".encode())
    return RunKey(SLUG, TIER, digest.hexdigest())


def _add(digest: hashlib._Hash, path: Path) -> None:
    digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")


def _dotted(kind: str, task: str, part: str) -> tuple[str, ...]:
    """Return the part's name if it is a dotted path, not a name that ships."""
    known = references(find_kind(kind), find_task(task))
    return (part,) if "." in part and part not in known else ()


def _paper(kind: str, task: str, part: str) -> str:
    """Return the digest of the paper's module that a part of the catalogue stands in."""
    found, name = find_kind(kind), part.rpartition(".")[2]
    if part in references(found, find_task(task)):
        return ""
    built = [one for one in cards() if one.built and name in {part.attribute for part in one.parts}]
    return "".join(module_digest(one) for one in built)


def _files(dotted: str) -> list[Path]:
    """Return the files that decide what ``package.module.Name`` does: the package's, or a module's and those beside it.

    Of a library that is installed, the module's own file stands for all.
    """
    module = dotted.rpartition(".")[0]
    file = getattr(importlib.import_module(module), "__file__", None)
    if file is None:
        return []
    path = Path(file).resolve()
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    if libraries & set(path.parents):
        return [path]
    top = Path(getattr(importlib.import_module(module.partition(".")[0]), "__file__", None) or path).resolve()
    found = top.parent.rglob("*.py") if top.name == "__init__.py" else top.parent.glob("*.py")
    return sorted(found)
