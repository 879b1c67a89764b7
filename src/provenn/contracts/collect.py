"""Find the cases of papers in the tests of a source checkout: each ``tests/<area>/test_<slug>.py`` has ``CASES``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from provenn.catalog.card import AREAS, Card, cards
from provenn.contracts.case import Case
from provenn.contracts.suite import has_suite

TESTS = Path(__file__).parents[3] / "tests"
"""The tests, in a source checkout."""


def cases_in(path: Path) -> list[Case]:
    """Return the ``CASES`` of a test file; it is imported under a name of its own.

    Args:
        path: A test file.

    Raises:
        ValueError: ``CASES`` is not a list of cases.
    """
    name = f"provenn_cases.{path.parent.name}.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"path must be a Python file, got {path}")
        module = importlib.util.module_from_spec(spec)
        # So that what the file defines can be pickled: pickle imports the module's parents too.
        for parent in ("provenn_cases", f"provenn_cases.{path.parent.name}"):
            sys.modules.setdefault(parent, ModuleType(parent))
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    found = getattr(sys.modules[name], "CASES", [])
    if not isinstance(found, list) or not all(isinstance(case, Case) for case in found):
        raise ValueError(f"CASES of {path} must be a list of cases")
    return found


def cases_of(card: Card, tests: Path = TESTS) -> list[Case]:
    """Return the cases of a paper's parts.

    Raises:
        FileNotFoundError: The paper has no test file, or there are no tests: this is no source checkout.
    """
    path = tests / card.area / f"test_{card.module_name}.py"
    if not path.is_file():
        raise FileNotFoundError(f"no cases of {card.slug}: {path} does not exist (they come with the source)")
    return cases_in(path)


def every_case(tests: Path = TESTS) -> list[Case]:
    """Return the cases of every test file of every area, in the order of their names."""
    return [case for area in AREAS for path in sorted((tests / area).glob("test_*.py")) for case in cases_in(path)]


def kind_to_meet(kind: str) -> str:
    """Return the kind whose suite a part of this kind is held to: its own, or the common checks of functions."""
    return kind if has_suite(kind) else "function"


def mismatches(cases: list[Case]) -> list[str]:
    """Return in words where cards and cases disagree.

    A part of a built paper needs a case of its kind; a case needs a card that names its part; the names of cases
    must differ.
    """
    named = {part.name: part.kind for card in cards() for part in card.parts}
    built = [part for card in cards() if card.built for part in card.parts]
    covered = {case.part for case in cases}
    names = [case.name for case in cases]
    missing = [f"{part.name} ({part.kind}) is built and has no case" for part in built if part.name not in covered]
    unknown = [f"{case.part} has a case and is in no card" for case in cases if case.part not in named]
    wrong = [
        f"{case.part} is of kind {named[case.part]} and its case of kind {case.kind}"
        for case in cases
        if case.part in named and case.kind != kind_to_meet(named[case.part])
    ]
    twice = [f"{name} names {names.count(name)} cases; give them labels" for name in sorted(set(names))]
    return missing + unknown + wrong + [text for text in twice if " names 1 " not in text]
