"""Write a comparison: a table on the terminal; CSV, JSON, PNG and one self-contained HTML page in a folder."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.table import Table
from rich.text import Text

from provenn.claims.cells import environment
from provenn.claims.errors import UsageError
from provenn.compare.lookup import find_kind, find_task
from provenn.compare.plotting import draw
from provenn.compare.ranking import Row
from provenn.compare.running import Comparison, tuning_runs
from provenn.core.experiment.statistics import Interval

COLUMNS = ("rank", "part", "score", "behind the leader", "settings", "steps")


def cells(rows: Sequence[Row], figures: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Return the ranking as text, one tuple a row: :data:`COLUMNS` and the figures asked for, as means over seeds."""
    return [(*_cells(row), *(_figure(row, name) for name in figures)) for row in rows]


def _figure(row: Row, name: str) -> str:
    if row.rank is None:
        return ""
    value = row.mean_figure(name)
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def _cells(row: Row) -> tuple[str, ...]:
    one = row.result
    settings = ", ".join(f"{name} {value:.3g}" for name, value in one.settings.items()) or "defaults"
    if row.rank is None or row.score is None:
        return ("–", one.part, f"failed: {one.failure}", "", settings if one.settings else "", "")
    behind = ""
    if row.behind is not None:
        behind = _shown(row.behind, row) + ("" if row.beaten else ", not told apart")
    return (str(row.rank), one.part, _shown(row.score, row), behind, settings, str(one.runs[0].steps))


def _shown(interval: Interval, row: Row) -> str:
    """Return a figure with its interval, which one seed does not have."""
    return str(interval) if len(row.result.runs) > 1 else f"{interval.estimate:.4g}"


def table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """Return the ranking as a table for a terminal."""
    made = Table(title=Text(heading(comparison)), caption=Text(_caption(comparison)))
    for column in COLUMNS:
        made.add_column(column, overflow="fold")
    for row in cells(rows):
        made.add_row(*map(Text, row))
    return made


def figures_table(comparison: Comparison, rows: Sequence[Row]) -> Table | None:
    """Return the kind's figures of the parts that did not fail as a table for a terminal; ``None`` if it has none."""
    figures = find_kind(comparison.kind).figures
    if not figures:
        return None
    made = Table(title=Text("what the networks cost"), caption=Text(_note(comparison)))
    for column in ("rank", "part"):
        made.add_column(column, overflow="fold")
    for column in figures:
        made.add_column(column, justify="right")
    for row in rows:
        if row.rank is not None:
            made.add_row(*map(Text, (*_cells(row)[:2], *(_figure(row, name) for name in figures))))
    return made


def _note(comparison: Comparison) -> str:
    note = find_kind(comparison.kind).note
    return "" if note is None else note(find_task(comparison.task))


def heading(comparison: Comparison) -> str:
    """Return the comparison in a line."""
    kind, task = find_kind(comparison.kind), find_task(comparison.task)
    metric = kind.headline(task)
    return f"{comparison.kind} on {task.name}: {metric}, {'more' if kind.maximize(task) else 'less'} is better"


def _caption(comparison: Comparison) -> str:
    seeds = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
    words = {1: "one seed says little", 2: "mean and range: two seeds tell nothing apart"}
    interval = words.get(comparison.seeds, "mean over seeds and 95 % bootstrap interval")
    runs = tuning_runs(comparison)
    tuning = f"{runs} tuning run{'s' if runs > 1 else ''} a part" if runs else "no tuning"
    return f"{tuning}, {seeds}; {interval}; task: {find_task(comparison.task).summary}"


def plain(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Any]:
    """Return everything as plain data for JSON; a tuning run that failed has the score ``None``."""
    kind, task = find_kind(comparison.kind), find_task(comparison.task)
    cost, over = kind.axes(task)
    return {
        **asdict(comparison),
        "metric": task.metric,
        "headline": kind.headline(task),
        "maximize": kind.maximize(task),
        "cost": cost,
        "over": over,
        "note": _note(comparison),
        "environments": _environments(comparison, rows),
        "ranking": [_plain_row(row) for row in rows],
    }


def _environments(comparison: Comparison, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the distinct conditions that runs had, those kept from before included; of no runs, those of here."""
    found = [dict(run.environment) for row in rows for run in row.result.runs if run.environment]
    distinct = [one for place, one in enumerate(found) if one not in found[:place]]
    return distinct or [environment(comparison.device)]


def _plain_row(row: Row) -> dict[str, Any]:
    one = row.result
    tried = [{"settings": dict(s), "score": score if score == score else None} for s, score in one.tried]
    return {
        "rank": row.rank,
        "part": one.part,
        "score": None if row.score is None else asdict(row.score),
        "behind": None if row.behind is None else asdict(row.behind),
        "settings": dict(one.settings),
        "tried": tried,
        "runs": [{name: value for name, value in asdict(run).items() if name != "environment"} for run in one.runs],
        "failure": one.failure,
    }


def as_csv(rows: Sequence[Row], figures: Sequence[str] = ()) -> str:
    """Return one line a part and seed, with the figures asked for; a part that failed has one line without seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("rank", "part", "seed", "score", "steps", "seconds", "settings", "failure", *figures))
    for row in rows:
        one = row.result
        settings = json.dumps(dict(one.settings), sort_keys=True)
        if row.rank is None:
            writer.writerow(("", one.part, "", "", "", "", settings, one.failure, *("" for _ in figures)))
            continue
        for run in one.runs:
            known = (row.rank, one.part, run.seed, run.score, run.steps, round(run.seconds, 3), settings, "")
            writer.writerow((*known, *(run.figures[name] for name in figures)))
    return stream.getvalue()


def write(comparison: Comparison, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``compare-KIND-TASK`` as ``.csv``, ``.json``, ``.png`` and ``.html`` into a folder, made if need be.

    Returns:
        The files; earlier ones of the same name are replaced.

    Raises:
        UsageError: The folder cannot be written.
    """
    kind, task = find_kind(comparison.kind), find_task(comparison.task)
    cost, over = kind.axes(task)
    headline = kind.headline(task) if cost is None else task.metric
    png = draw(rows, headline, task.maximize, cost, over, f"{comparison.kind} on {task.name}", kind.figures)
    contents: Mapping[str, bytes] = {
        "csv": as_csv(rows, kind.figures).encode(),
        "json": (json.dumps(plain(comparison, rows), indent=1, ensure_ascii=False) + "\n").encode(),
        "png": png,
        "html": _page(comparison, rows, png).encode(),
    }
    stem = re.sub(r"[^\w.-]+", "-", f"compare-{comparison.kind}-{task.name}")
    check_folder(folder)
    try:
        return [_replace(folder / f"{stem}.{suffix}", content) for suffix, content in contents.items()]
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written: {error}") from error


def check_folder(folder: Path) -> None:
    """Make a folder if need be, and check that files can be made there.

    Raises:
        UsageError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written: {error}") from error


def _page(comparison: Comparison, rows: Sequence[Row], png: bytes) -> str:
    figures = find_kind(comparison.kind).figures
    pages = Environment(loader=PackageLoader("provenn.compare", "."), autoescape=select_autoescape())
    return pages.get_template("page.html").render(
        heading=heading(comparison),
        caption=_caption(comparison),
        columns=(*COLUMNS, *figures),
        rows=cells(rows, figures),
        plot=base64.b64encode(png).decode(),
        note=_note(comparison),
        environments=_environments(comparison, rows),
    )


def _replace(path: Path, content: bytes) -> Path:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return path
