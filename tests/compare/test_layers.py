"""Comparing layers: networks of one size, equal data order, and what each network costs beside its score."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from compare.planted_layers import TASK, Huge, Layer, Refuses, Wide

from provenn.claims.workers import Inline
from provenn.compare.kinds.nn import unfit
from provenn.compare.layer_task import FIGURES, matching_width
from provenn.compare.plotting import draw
from provenn.compare.ranking import rank
from provenn.compare.reporting import as_csv, cells, write
from provenn.compare.running import Comparison, run_comparison


def compared(*parts: str, trials: int = 0, seeds: int = 1):
    names = tuple(f"compare.planted_layers.{part}" for part in parts)
    comparison = Comparison("nn", "compare.planted_layers.TASK", names, trials, seeds)
    return comparison, run_comparison(comparison, Inline())


def test_every_network_gets_the_width_nearest_to_the_budget() -> None:
    assert TASK.fitting_width(Layer) == 32  # 96 of 100 weights; the next, 36, has 108
    assert TASK.fitting_width(Wide) == 8  # 88; 12 has 180
    with pytest.raises(ValueError, match="no width comes near 100 parameters: width 4 has 4000"):
        TASK.fitting_width(Huge)


@pytest.mark.parametrize("budget", [50, 333, 1000, 2999])
def test_bisection_finds_what_a_search_through_all_widths_finds(budget: int) -> None:
    def count(width: int) -> int:
        return 3 * width + width * width // 50

    best = min(range(4, 1025, 4), key=lambda width: abs(count(width) - budget))
    assert abs(count(matching_width(count, budget)) - budget) == abs(count(best) - budget)


def test_a_budget_that_only_a_far_width_meets_is_refused() -> None:
    with pytest.raises(ValueError, match="no width"):
        matching_width(lambda width: width, 10_000)
    with pytest.raises(ValueError, match="budget"):
        matching_width(lambda width: width, 0)


def test_a_run_trains_scores_and_weighs() -> None:
    _, (layer, wide) = compared("Layer", "Wide", trials=2, seeds=2)
    for result, parameters in ((layer, 96), (wide, 88)):
        assert result.failure is None
        assert [run.steps for run in result.runs] == [6, 6]
        figures = result.runs[0].figures
        assert set(figures) == set(FIGURES)
        assert figures["parameters"] == parameters
        assert figures["MACs a sample"] == 0  # elementwise work is none
        assert figures["ms a batch"] > 0
        assert figures["peak MiB a step"] > 0
    # The factor starts at 1 and must reach 2; tuning is scored on shifted targets.
    assert all(0 < run.score < 100 for run in layer.runs)
    assert all(score > 1000 for _, score in layer.tried)
    # A seed decides the order, not the part: both have one factor, moved alike by Adam.
    assert layer.runs[0].score != layer.runs[1].score


def test_what_does_not_fit_says_why() -> None:
    assert unfit(TASK, Layer) is None
    assert unfit(TASK, Refuses) == "does not fit: width must be planted"
    assert unfit(TASK, torch.nn.Bilinear).startswith("does not fit: ")


def test_figures_are_shown_written_and_drawn(tmp_path) -> None:
    comparison, results = compared("Layer", "Refuses")
    rows = rank(results, maximize=False)
    text = cells(rows, FIGURES)
    assert text[0][6] == "96"
    assert text[1][6:] == ("", "", "", "")
    read = list(csv.DictReader(io.StringIO(as_csv(rows, FIGURES))))
    assert float(read[0]["parameters"]) == 96
    assert read[1]["parameters"] == ""
    paths = write(comparison, rows, tmp_path)
    page, plain = (next(path for path in paths if path.suffix == suffix).read_text() for suffix in (".html", ".json"))
    assert "MACs a sample" in page
    assert json.loads(plain)["ranking"][0]["runs"][0]["figures"]["parameters"] == 96
    assert draw(rows, "error", False, None, None, "t", FIGURES) != draw(rows, "error", False, None, None, "t")
