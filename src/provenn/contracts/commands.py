"""``provenn conform``: hold a paper's parts to their contracts, and record what was seen."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from provenn.catalog.card import Card, card
from provenn.catalog.namespace import NotBuiltError
from provenn.catalog.results import module_digest, write_section


def conform(
    slug: Annotated[str, typer.Argument(help="The paper's slug.")],
    record: Annotated[bool, typer.Option(help="Write what was seen into the results that ship.")] = False,
) -> None:
    """Hold a paper's parts to the contracts of their kinds. Needs a source checkout: the cases are in its tests."""
    paper = card(slug)
    if not paper.built:
        raise NotBuiltError(f"{paper.slug} is not built yet ({paper.title})")
    console = Console(soft_wrap=True)
    try:
        parts = examine(paper, console)
    except FileNotFoundError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    console.print(_table(paper, parts))
    if record:
        section = {"digest": module_digest(paper), "parts": parts, "versions": versions()}
        console.print(f"recorded in {write_section(paper, 'conformance', section)}")
    uncovered = [part.name for part in paper.parts if part.name not in parts]
    if uncovered:
        console.print(f"no case of {', '.join(uncovered)}", style="red")
    if uncovered or any(found["failed"] for found in parts.values()):
        raise typer.Exit(1)


def examine(paper: Card, console: Console) -> dict[str, dict[str, Any]]:
    """Run every check of every case of a paper, with a line each.

    Args:
        paper: A built paper.
        console: Where the lines go.

    Returns:
        For each part the number of ``checks`` run, the names of those that ``failed``, and the ``excluded`` ones with
        their reasons; a check of a labelled case has the label before its name.

    Raises:
        FileNotFoundError: The tests are not there: this is no source checkout.
    """
    from provenn.contracts.collect import TESTS, cases_of
    from provenn.contracts.suite import ContractError, checks_of, exclusions_of

    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))  # test files import their helpers from there
    parts: dict[str, dict[str, Any]] = {}
    for case in cases_of(paper, TESTS):
        found = parts.setdefault(case.part, {"checks": 0, "failed": [], "excluded": {}})
        prefix = f"{case.label}: " if case.label else ""
        found["excluded"].update({prefix + name: reason for name, reason in exclusions_of(case).items()})
        for name, check in checks_of(case).items():
            found["checks"] += 1
            try:
                check()
            except ContractError as error:
                found["failed"].append(prefix + name)
                console.print(f"✗ {case.name} {name}", style="red", markup=False)
                console.print(f"  {error}", markup=False, highlight=False)
            else:
                console.print(f"✓ {case.name} {name}", markup=False, highlight=False)
    return parts


def versions() -> dict[str, str]:
    """Return the versions that the checks ran with."""
    packages = ("provenn", "torch", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _table(paper: Card, parts: dict[str, dict[str, Any]]) -> Table:
    table = Table("part", "checks", "failed", "excluded", title=f"{paper.slug}: conformance")
    for name, found in parts.items():
        reasons = "\n".join(f"{check}: {reason}" for check, reason in found["excluded"].items())
        table.add_row(name, str(found["checks"]), ", ".join(found["failed"]) or "none", reasons or "none")
    return table
