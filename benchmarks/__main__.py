"""``python -m benchmarks [SLUG ...] [--record]``: measure parts beside their peers, print a table, keep the figures.

A benchmark is a module ``benchmarks/<area>/<slug>.py`` with ``measure() -> dict``. Its result has at least ``peer``
(name and version, None if no package installs), ``agrees`` (None without a peer), ``largest_difference`` and
``speed_ratio`` (peer's time over ours: above 1 we are faster; None without a peer), and whatever else it measures,
such as ``growth``. Exit code 1 if one fails or disagrees with its peer, 2 for an unknown slug.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from provenn.catalog.card import AREAS, card
from provenn.catalog.results import module_digest, write_section
from provenn.core.nearest import unknown_name_message

HERE = Path(__file__).parent
NEEDED = ("peer", "agrees", "largest_difference", "speed_ratio")
USAGE = 2


def benchmarks() -> dict[str, str]:
    """Return the module of every benchmark by its paper's slug."""
    files = [path for area in AREAS for path in sorted((HERE / area).glob("*.py")) if not path.name.startswith("_")]
    return {path.stem.replace("_", "-"): f"benchmarks.{path.parent.name}.{path.stem}" for path in files}


def measured(module: str) -> dict[str, Any]:
    """Run one benchmark, whatever it draws from torch's generator being the same every time.

    Raises:
        ValueError: Its result lacks a figure that every benchmark has.
    """
    measure = importlib.import_module(module).measure
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result: dict[str, Any] = measure()
    missing = [name for name in NEEDED if name not in result]
    if missing:
        raise ValueError(f"{module}.measure() left out {', '.join(missing)}")
    return result


def conditions() -> dict[str, Any]:
    """Return what the figures were measured with."""
    names = ("provenn", "torch", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
        "hardware": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def show(console: Console, results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("paper", "peer", "agrees", "largest difference", "peer's time / ours"):
        table.add_column(name, overflow="fold")
    for slug, result in results.items():
        table.add_row(slug, *(Text(_word(result[name])) for name in NEEDED))
    console.print(table)
    for slug, result in results.items():
        more = [f"{name} {_word(value)}" for name, value in result.items() if name not in NEEDED]
        console.print(Text(f"{slug}: {'; '.join(more)}"), soft_wrap=True)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_word(one)}" for name, one in value.items())
    return "–" if value is None else str(value)


def main(arguments: list[str]) -> int:
    """Measure the papers named, or all, and return the exit code."""
    parser = argparse.ArgumentParser(prog="./dev bench", description="Measure parts beside their peers.")
    parser.add_argument("slug", nargs="*", help="papers to measure; default: all that have a benchmark")
    parser.add_argument("--record", action="store_true", help="write the figures that ship in the catalogue")
    asked = parser.parse_args(arguments)
    known = benchmarks()
    slugs = [slug.replace("_", "-") for slug in asked.slug] or list(known)
    for slug in slugs:
        if slug not in known:
            print(unknown_name_message("benchmark", slug, known), file=sys.stderr)
            return USAGE
    results: dict[str, dict[str, Any]] = {}
    for slug in slugs:
        print(f"measuring {slug} ...", file=sys.stderr)
        try:
            results[slug] = measured(known[slug])
        except Exception:
            print(f"{slug} FAILED\n{traceback.format_exc()}", file=sys.stderr)
            continue
        if asked.record:
            paper = card(slug)
            write_section(paper, "peer", {**results[slug], **conditions(), "digest": module_digest(paper)})
    show(Console(), results)
    agree = all(result["agrees"] is not False for result in results.values())
    return 0 if agree and len(results) == len(slugs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
