"""What the suites of compressors, probes and solvers expect of a report."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from provenn.contracts.suite import ContractError, expect
from provenn.contracts.watch import same
from provenn.core.experiment.reports import Report


def expect_frozen(report: Any) -> None:
    """Expect a frozen dataclass that is a Report."""
    expect(isinstance(report, Report), f"it is a {type(report).__name__}, which is no Report")
    fields = dataclasses.fields(report)
    expect(fields, f"{type(report).__name__} has no fields")
    try:
        setattr(report, fields[0].name, None)
    except dataclasses.FrozenInstanceError:
        return
    raise ContractError(f"{type(report).__name__}.{fields[0].name} could be set")


def expect_json_round_trip(report: Any) -> None:
    """Expect the report back from its JSON, value by value and type by type."""
    again = type(report).from_json(report.to_json())
    changed = [f.name for f in dataclasses.fields(report) if not same(getattr(report, f.name), getattr(again, f.name))]
    expect(not changed, f"{', '.join(changed)} changed on the way through JSON")


def expect_plot(report: Any) -> None:
    """Expect a matplotlib figure that can be drawn, and none left open in pyplot."""
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = report.plot()
    try:
        expect(isinstance(figure, Figure), f"plot() returned a {type(figure).__name__}")
        expect(figure.axes, "the figure has no axes")
        figure.savefig(io.BytesIO(), format="svg")
        expect(pyplot.get_fignums() == before, "plot() left a figure open in pyplot; make a matplotlib.figure.Figure")
    finally:
        for number in set(pyplot.get_fignums()) - set(before):
            pyplot.close(number)


def expect_close(name: str, found: Any, expected: Any, tolerance: float) -> None:
    """Expect a field's value: numbers to a relative tolerance, words exactly, mappings entry by entry."""
    if isinstance(expected, Mapping):
        expect(isinstance(found, Mapping) and found.keys() == expected.keys(), f"{name} is {found}, not {expected}")
        for key, value in expected.items():
            expect_close(f"{name}[{key!r}]", found[key], value, tolerance)
        return
    if isinstance(expected, (str, bool, type(None))):
        expect(found == expected, f"{name} is {found!r}, not {expected!r}")
        return
    try:
        one, other = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    except (TypeError, ValueError) as error:
        raise ContractError(f"{name} is {found!r}, which is no array of numbers") from error
    expect(one.shape == other.shape, f"{name} has the shape {one.shape}, not {other.shape}")
    close = np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    expect(close, f"{name} is {found}, expected {expected}")
