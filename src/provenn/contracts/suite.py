"""Suites: a table of named checks a kind, found by the kind's name, and how to run them.

A kind's suite is the module ``provenn.contracts.<kind>``. It has ``CHECKS``, which maps a name to a function of the
case that raises :class:`ContractError`, and ``exercise``, which uses the part once. The first line of a check's
docstring is the promise it checks. To add a kind: a case beside the others (``case.py``, ``cases_training.py``,
``cases_results.py``) and such a module.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

from provenn.contracts.case import Case


class ContractError(AssertionError):
    """A part does not keep its kind's contract; the message says what was promised and what was seen."""


def expect(holds: object, seen: str) -> None:
    """Raise :class:`ContractError` with what was seen, unless the promise holds."""
    if not holds:
        raise ContractError(seen)


C = TypeVar("C", bound=Case)


class Suite(Protocol):
    """What a kind's module has."""

    CHECKS: Mapping[str, Callable[[Any], None]]

    def exercise(self, case: Any) -> Callable[[], object]:
        """Prepare one ordinary use of the part, and return the call that makes it."""


def has_suite(kind: str) -> bool:
    """Return whether a kind has a suite; the parts of other kinds are held to the common checks."""
    return kind.isidentifier() and importlib.util.find_spec(f"provenn.contracts.{kind}") is not None


def suite_of(kind: str) -> Suite:
    """Return the suite of a kind.

    Raises:
        ValueError: The kind has no suite.
    """
    if not has_suite(kind):
        raise ValueError(f"kind {kind!r} has no suite")
    return cast(Suite, importlib.import_module(f"provenn.contracts.{kind}"))


def table_of(kind: str) -> dict[str, Callable[[Any], None]]:
    """Return every check of a kind by name: the common ones first, then its own."""
    from provenn.contracts import common  # common uses suite_of

    return {**common.CHECKS, **suite_of(kind).CHECKS}


def checks_of(case: Case) -> dict[str, Callable[[], None]]:
    """Return the checks of a case by name, ready to run; those declared away are left out.

    Args:
        case: What a test says of a part.

    Returns:
        Name to check. A check raises :class:`ContractError` that names the part and the check, and says what was
        promised and what was seen; any other error in a check counts as seen too.

    Raises:
        ValueError: The case excludes a check that does not exist.
    """
    table = table_of(case.kind)
    away = exclusions_of(case)
    return {name: _ready(case, name, check) for name, check in table.items() if name not in away}


def exclusions_of(case: Case) -> dict[str, str]:
    """Return the checks that a case declares away, with the reasons.

    Raises:
        ValueError: The case excludes a check that does not exist.
    """
    table = table_of(case.kind)
    of_libraries = getattr(suite_of(case.kind), "names_of_libraries", lambda name: False)
    unknown = [name for name in case.excluded if name not in table and not of_libraries(name)]
    if unknown:
        raise ValueError(
            f"excluded: {case.name} excludes unknown checks {unknown}; a {case.kind} has {', '.join(table)}"
        )
    return case.declared_away


def _ready(case: Case, name: str, check: Callable[[Any], None]) -> Callable[[], None]:
    promise = (check.__doc__ or "").strip().split("\n")[0]

    def run() -> None:
        where = f"{case.name}, check {name!r}: promised: {promise} Seen: "
        try:
            check(case)
        except ContractError as error:
            raise ContractError(where + str(error)) from error
        except Exception as error:
            raise ContractError(f"{where}{type(error).__name__}: {error}") from error

    return run


def check_case(case: Case) -> None:
    """Run every check of a case.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    failures = []
    for check in checks_of(case).values():
        try:
            check()
        except ContractError as error:
            failures.append(str(error))
    if failures:
        raise ContractError(f"{len(failures)} of the checks of {case.name} fail:\n" + "\n".join(failures))


def check_part(case_type: type[C], case_or_make: C | Callable[..., Any], options: dict[str, Any]) -> None:
    """Run every check of a case, or of one made from a factory (the first field after ``part``) and options.

    Raises:
        ContractError: At least one check fails.
        TypeError: Options come with a case, or a case of another kind is given.
    """
    if isinstance(case_or_make, Case):
        if not isinstance(case_or_make, case_type) or options:
            raise TypeError(f"case_or_make must be a {case_type.__name__} alone, or a factory, got {case_or_make!r}")
        check_case(case_or_make)
        return
    part = options.pop("part", f"{case_or_make.__module__}.{case_or_make.__qualname__}")
    build: Callable[..., Case] = case_type
    check_case(build(part, case_or_make, **options))
