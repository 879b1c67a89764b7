"""The summary of a run: plain JSON data that the terminal, the page and the catalogue all draw from.

Keys: ``outcome`` and ``reason`` (None at the smoke tier), ``margins``, ``seeds`` (the fewest over studies),
``comparisons`` (the result table), ``order`` (each study with its arms, the method first, since tables lose theirs in
what ships), ``arms`` (study → arm → metric → values by seed), ``settings`` (study → arm), ``tuning`` (study → metric,
maximize, and by arm each setting with its value and whether it was picked), ``curves`` (study → curve → arm → x, mean,
low, high over seeds, at most 60 points), ``bars`` (study → chart → arm → rows of row, kind, start, end; of the first
seed that left any), and how it ran: ``versions``, ``hardware``,
``platform``, ``threads``, ``device``, ``wall_seconds`` (time with at least one cell running), ``cell_seconds`` (their
sum), ``peak_memory`` and ``peak_cuda`` (the greatest of any cell, bytes), ``fingerprint``, ``date`` (UTC day of the
last cell). A figure that is not finite is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from provenn.claims.claim import Bar, Cell, Comparison, Evidence, Verdict
from provenn.claims.harness import Ran
from provenn.claims.ledger import CellKey, Record
from provenn.core.experiment.statistics import Interval

Summary = dict[str, Any]
CURVE_POINTS = 60
OF_THE_RUN = ("wall_seconds", "cell_seconds", "peak_memory", "peak_cuda", "date")
"""The keys that may differ between two runs of the same cells; all others are bit for bit the same."""


def summarise(ran: Ran, verdict: Verdict | None) -> Summary:
    """Return the summary of a complete run.

    Args:
        ran: The run; every cell of its plan is finished.
        verdict: The verdict, or None at the smoke tier.
    """
    plan, evidence = ran.plan, ran.plan.evidence(ran.finished)
    records = [ran.finished[key] for key in _in_order(ran)]
    return {
        "outcome": verdict.outcome if verdict else None,
        "reason": verdict.reason if verdict else None,
        "margins": {name: _margin(value) for name, value in verdict.margins.items()} if verdict else {},
        "seeds": min(len(cells) for cells in evidence.cells.values()),
        "comparisons": [_row(evidence, one) for one in plan.claim.comparisons if one.study in plan.studies],
        "order": [{"study": name, "arms": list(plan.claim.studies[name].arms)} for name in plan.studies],
        "arms": _by_study((key, _values(cells)) for key, cells in evidence.cells.items()),
        "settings": _by_study((key, dict(cells[0].settings)) for key, cells in evidence.cells.items()),
        "tuning": {study: table for study in plan.studies if (table := _tuning(ran, study))},
        "curves": {study: table for study in plan.studies if (table := _curves(evidence, study))},
        "bars": {study: table for study in plan.studies if (table := _bars(evidence, study))},
        **_conditions(records),
        "fingerprint": ran.key.fingerprint,
    }


def environments(ran: Ran) -> list[dict[str, Any]]:
    """Return the distinct versions and thread counts that the cells of a run ran with."""
    found: list[dict[str, Any]] = []
    for key in _in_order(ran):
        whole = ran.finished[key].environment
        part = {"versions": whole["versions"], "threads": whole["threads"]}
        if part not in found:
            found.append(part)
    return found


def _in_order(ran: Ran) -> list[CellKey]:
    keys: list[CellKey] = []
    for study, arm in ran.plan.arms():
        choice = ran.plan.choice(study, arm, ran.finished)
        assert choice is not None
        keys += ran.plan.tuning(study, arm) + ran.plan.seed_cells(study, arm, choice)
    return keys


def _by_study(entries: Iterable[tuple[tuple[str, str], Any]]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for (study, arm), value in entries:
        table.setdefault(study, {})[arm] = value
    return table


def _values(cells: Sequence[Cell]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for cell in cells for name in cell.metrics)
    return {name: [cell.metrics[name] for cell in cells if name in cell.metrics] for name in sorted(names)}


def _row(evidence: Evidence, row: Comparison) -> dict[str, Any]:
    difference = evidence.difference(row.study, row.method, row.baseline, row.metric)
    return {
        "study": row.study,
        "metric": row.metric,
        "label": row.label or row.metric,
        "maximize": row.maximize,
        "method": row.method,
        "baseline": row.baseline,
        "method_mean": evidence.mean(row.study, row.method, row.metric),
        "baseline_mean": evidence.mean(row.study, row.baseline, row.metric),
        "difference": difference.estimate,
        "low": difference.low,
        "high": difference.high,
    }


def _margin(value: Interval | float) -> Any:
    if isinstance(value, Interval):
        return {"estimate": value.estimate, "low": value.low, "high": value.high}
    return _finite(float(value))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tuning(ran: Ran, study: str) -> dict[str, Any]:
    tuned = ran.plan.claim.studies[study].tuning
    arms = {}
    for _, arm in (pair for pair in ran.plan.arms() if pair[0] == study):
        keys, choice = ran.plan.tuning(study, arm), ran.plan.choice(study, arm, ran.finished)
        if tuned is None or choice is None or not keys:
            return {}
        arms[arm] = [
            {
                "settings": json.loads(key.settings),
                "value": _finite(ran.finished[key].metrics[tuned.metric]),
                "picked": index == choice.index,
            }
            for index, key in enumerate(keys)
        ]
    return {"metric": tuned.metric, "maximize": tuned.maximize, "arms": arms} if tuned else {}


def _curves(evidence: Evidence, study: str) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for (of, arm), cells in evidence.cells.items():
        if of != study:
            continue
        for name in dict.fromkeys(name for cell in cells for name in cell.curves if Bar.place(name) is None):
            curves = [np.asarray(cell.curves[name], dtype=np.float64) for cell in cells if name in cell.curves]
            table.setdefault(name, {})[arm] = _band(curves)
    return table


def _bars(evidence: Evidence, study: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    table: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (of, arm), cells in evidence.cells.items():
        drawn = [cell for cell in cells if any(Bar.place(name) for name in cell.curves)] if of == study else []
        for name, ends in drawn[0].curves.items() if drawn else ():
            place = Bar.place(name)
            if place is not None:
                chart, row, kind = place
                bars = [{"row": row, "kind": kind, "start": _drawn(a), "end": _drawn(b)} for a, b in ends]
                table.setdefault(chart, {}).setdefault(arm, []).extend(bars)
    return table


def _band(curves: Sequence[np.ndarray]) -> dict[str, list[float | None]]:
    """Return the mean and range over seeds, at the first seed's abscissas, thinned out."""
    first = curves[0]
    kept = np.unique(np.linspace(0, len(first) - 1, min(len(first), CURVE_POINTS)).round().astype(int))
    x = first[kept, 0]
    rows = [row for curve in curves if (row := _at(curve, first, kept)) is not None]
    y = np.stack(rows)
    return {
        "x": _rounded(x),
        "mean": _rounded(y.mean(axis=0)),
        "low": _rounded(y.min(axis=0)),
        "high": _rounded(y.max(axis=0)),
    }


def _at(curve: np.ndarray, first: np.ndarray, kept: np.ndarray) -> np.ndarray | None:
    """Return a curve's ordinates at those of the first; None for a path that cannot be aligned with it."""
    if curve.shape == first.shape and np.array_equal(curve[:, 0], first[:, 0]):
        return np.asarray(curve[kept, 1])
    if np.all(np.diff(curve[:, 0]) > 0) and np.all(np.diff(first[:, 0]) > 0):
        return np.asarray(np.interp(first[kept, 0], curve[:, 0], curve[:, 1], left=np.nan, right=np.nan))
    return None


def _rounded(values: np.ndarray) -> list[float | None]:
    """Five significant digits are enough to draw."""
    return [_finite(_drawn(value)) for value in values]


def _drawn(value: float) -> float:
    return float(f"{value:.5g}")


def _conditions(records: Sequence[Record]) -> dict[str, Any]:
    last = max(record.started for record in records)
    where = records[-1].environment
    cuda = [record.peak_cuda for record in records if record.peak_cuda is not None]
    return {
        **{name: where[name] for name in ("versions", "hardware", "platform", "threads", "device")},
        "wall_seconds": round(_covered(records), 1),
        "cell_seconds": round(sum(record.seconds for record in records), 1),
        "peak_memory": max(record.peak_memory for record in records),
        "peak_cuda": max(cuda, default=None),
        "date": last[:10],
    }


def _covered(records: Sequence[Record]) -> float:
    """Return the time during which at least one cell ran."""
    spans = sorted((datetime.fromisoformat(record.started).timestamp(), record.seconds) for record in records)
    covered, until = 0.0, -math.inf
    for start, seconds in spans:
        end = start + seconds
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
