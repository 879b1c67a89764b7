"""The page of a claim: self-contained HTML with verdict, table, figures and how to run it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from provenn.catalog.results import read_results
from provenn.claims import figures
from provenn.claims.display import figure, interval, margin, settings_in_words
from provenn.claims.errors import NothingToReportError, UsageError
from provenn.claims.registry import Found
from provenn.claims.summary import Summary

_VERDICTS = {
    "reproduced": "Reproduced",
    "partly": "Partly reproduced",
    "not reproduced": "Not reproduced",
    None: "No verdict",
}


def write_page(found: Found, tier: str, summary: Summary, output: Path | None = None) -> Path:
    """Write the page of a claim at a tier, and return its path.

    Args:
        found: The claim.
        tier: The tier that the summary is of.
        summary: The figures.
        output: Where the page goes; default ``reports/SLUG-TIER.html``.

    Raises:
        UsageError: The file cannot be written.
    """
    slug = re.sub(r"[^\w.-]", "-", found.claim.slug)
    path = output or Path("reports") / f"{slug}-{tier}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(found, tier, summary), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the report {path} cannot be written: {error}") from error
    return path


def shipped_summary(found: Found, tier: str) -> Summary:
    """Return the summary that ships for a claim at a tier.

    Raises:
        NothingToReportError: None ships.
    """
    shipped = read_results(found.card).get("claim", {}) if found.card is not None else {}
    if tier not in shipped:
        again = f"provenn run {name_of(found)} --tier {tier}"
        raise NothingToReportError(
            f"nothing to report for {found.claim.slug} at tier {tier}: the ledger has no complete run, and no result"
            f" ships; run it first: {again}"
        )
    summary: Summary = shipped[tier]
    return summary


def page(found: Found, tier: str, summary: Summary) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("provenn.claims"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=figure, interval=interval, words=settings_in_words, seconds=_seconds, mebibytes=_mebibytes
    )
    return environment.get_template("report.html").render(
        claim=found.claim,
        card=found.card,
        tier=tier,
        summary=summary,
        verdict=_VERDICTS[summary["outcome"]],
        margins={name: margin(value) for name, value in summary["margins"].items()},
        studies=[_study(summary, one["study"], one["arms"]) for one in summary["order"]],
        command=f"provenn run {name_of(found)} --tier {tier}",
        series=figures.SERIES,
    )


def name_of(found: Found) -> str:
    """Return what a user types to name the claim."""
    return found.card.slug if found.card is not None else found.reference


def _study(summary: Summary, name: str, order: list[str]) -> dict[str, Any]:
    """Return what the template shows of a study; what ships keeps the order of lists alone, hence ``order``."""
    arms = {arm: summary["arms"][name][arm] for arm in order}
    dots = [
        figures.dots(
            {arm: values[metric] for arm, values in arms.items() if metric in values}, label, f"dots {name} {metric}"
        )
        for metric, label in _labels(summary, name).items()
    ]
    lines = [
        figures.lines(_ordered(curve, order), order, label, f"lines {name} {label}")
        for label, curve in summary["curves"].get(name, {}).items()
    ]
    charts = [
        figures.bars(rows, f"{label} · {arm}", f"bars {name} {label} {arm}")
        for label, arms_of_chart in summary.get("bars", {}).get(name, {}).items()  # older results have none
        for arm, rows in _ordered(arms_of_chart, order).items()
    ]
    tuning = summary["tuning"].get(name)
    seeds = {len(values) for metrics in arms.values() for values in metrics.values()}
    return {
        "name": name,
        "arms": order,
        "seeds": max(seeds),
        "figures": [Markup(svg) for svg in dots + lines + charts],
        "settings": {arm: one for arm, one in _ordered(summary["settings"][name], order).items() if one},
        "tuning": tuning and {**tuning, "arms": _ordered(tuning["arms"], order)},
    }


def _labels(summary: Summary, name: str) -> dict[str, str]:
    """Return the metrics to draw, with their names in words: those compared, or all where nothing is compared."""
    labels: dict[str, str] = {}
    for row in summary["comparisons"]:
        if row["study"] == name:
            labels.setdefault(row["metric"], row["label"])
    return labels or {metric: metric for metrics in summary["arms"][name].values() for metric in metrics}


def _ordered(table: dict[str, Any], order: list[str]) -> dict[str, Any]:
    return {name: table[name] for name in order if name in table}


def _seconds(value: float) -> str:
    """Word a duration."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB"
