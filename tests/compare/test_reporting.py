"""What is written of a comparison: tables, files and pages, on made-up results."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from provenn.compare.plotting import mean_points, scale_of
from provenn.compare.ranking import rank
from provenn.compare.reporting import as_csv, cells, heading, plain, table, write
from provenn.compare.running import Comparison, PartResult, SeedRun

COMPARISON = Comparison("optim", "digits-mlp", ("a.B", "c.D", "e.F"), trials=2, seeds=3)


def results() -> list[PartResult]:
    def runs(*scores: float) -> list[SeedRun]:
        return [SeedRun(seed, score, 640, seconds=0.5) for seed, score in enumerate(scores, start=1)]

    return [
        PartResult("a.B", [({"lr": 0.01}, 0.7), ({"lr": 1.0}, float("nan"))], {"lr": 0.01}, runs(0.5, 0.6, 0.7)),
        PartResult("c.D", [({"lr": 0.1}, 0.8)] * 2, {"lr": 0.1}, runs(0.8, 0.9, 1.0)),
        PartResult("e.F", [], {}, [], "every tuning run; the last: ValueError: <script>alert(1)</script>"),
    ]


def test_the_table_ranks_and_says_what_failed() -> None:
    rows = rank(results(), maximize=True)
    text = cells(rows)
    assert [row[:2] for row in text] == [("1", "c.D"), ("2", "a.B"), ("–", "e.F")]
    assert text[0][2].startswith("0.9 [")
    assert text[0][3] == ""
    assert text[1][3].startswith("0.3 [0.3, 0.3]")
    assert "told apart" not in text[1][3]
    assert text[1][4:] == ("lr 0.01", "640")
    assert text[2][2].startswith("failed: every tuning run")
    console = Console(width=200, file=io.StringIO())
    console.print(table(COMPARISON, rows))
    shown = console.file.getvalue()
    assert "optim on digits-mlp: accuracy, more is better" in shown
    assert "<script>" in shown
    assert "2 tuning runs a part, 3 seeds" in shown


def test_parts_that_seeds_do_not_tell_apart_say_so() -> None:
    close = [PartResult("a", runs=[SeedRun(s, v, 1) for s, v in enumerate([0.1, 0.9, 0.5])])]
    close.append(PartResult("b", runs=[SeedRun(s, v, 1) for s, v in enumerate([0.9, 0.1, 0.4])]))
    text = cells(rank(close, maximize=True))
    assert text[1][3].endswith("not told apart")
    assert text[1][4] == "defaults"
    two = [PartResult(name, runs=[SeedRun(s, v, 1) for s in (1, 2)]) for name, v in (("a", 0.9), ("b", 0.1))]
    assert cells(rank(two, maximize=True))[1][3] == "0.8 [0.8, 0.8], not told apart"
    single = [PartResult("a", runs=[SeedRun(1, 0.9, 1)]), PartResult("b", runs=[SeedRun(1, 0.1, 1)])]
    assert cells(rank(single, maximize=True))[1][2:4] == ("0.1", "0.8, not told apart")


def test_files_hold_everything_and_replace_earlier_ones(tmp_path) -> None:
    rows = rank(results(), maximize=True)
    folder = tmp_path / "new" / "reports"
    paths = write(COMPARISON, rows, folder)
    assert [path.name for path in paths] == [
        f"compare-optim-digits-mlp.{end}" for end in ("csv", "json", "png", "html")
    ]
    write(COMPARISON, rows, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)

    table_rows = list(csv.DictReader(io.StringIO(paths[0].read_text())))
    assert [(row["part"], row["seed"], row["score"]) for row in table_rows if row["seed"]] == [
        ("c.D", "1", "0.8"), ("c.D", "2", "0.9"), ("c.D", "3", "1.0"),
        ("a.B", "1", "0.5"), ("a.B", "2", "0.6"), ("a.B", "3", "0.7"),
    ]  # fmt: skip
    assert "ValueError" in table_rows[-1]["failure"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    held = json.loads(paths[1].read_text(), parse_constant=refuse)
    assert held["ranking"][1]["tried"] == [
        {"settings": {"lr": 0.01}, "score": 0.7},
        {"settings": {"lr": 1.0}, "score": None},
    ]
    assert held["ranking"][0]["runs"][2]["score"] == 1.0
    assert held["seeds"] == 3
    assert held["environments"][0]["versions"]["torch"]

    assert paths[2].read_bytes().startswith(b"\x89PNG")
    page = paths[3].read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_report_says_where_the_runs_ran_and_not_where_it_is_written(tmp_path) -> None:
    def where(torch: str, threads: int) -> dict[str, object]:
        return {"versions": {"torch": torch}, "hardware": {"cpu": f"planted {threads}"}, "threads": threads}

    runs = [SeedRun(seed, 0.5, 1, environment=where("9.9", 1 + seed // 3)) for seed in (1, 2, 3)]
    rows = rank([PartResult("a", runs=runs)], maximize=True)
    paths = write(COMPARISON, rows, tmp_path)
    held = json.loads(paths[1].read_text())
    assert held["environments"] == [where("9.9", 1), where("9.9", 2)]
    assert "environment" not in held["ranking"][0]["runs"][0]
    page = " ".join(paths[3].read_text().split())
    assert "torch 9.9 on planted 1, 1 thread a run" in page
    assert "torch 9.9 on planted 2, 2 threads a run" in page


def test_a_task_of_any_name_can_be_written(tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    from compare import planted

    monkeypatch.setattr(planted, "ODD", replace(planted.UP, name="mine/of an odd name"), raising=False)
    paths = write(replace(COMPARISON, task="compare.planted.ODD"), rank(results(), maximize=True), tmp_path)
    assert {path.name.partition(".")[0] for path in paths} == {"compare-optim-mine-of-an-odd-name"}


def test_headings_name_metric_and_direction() -> None:
    assert heading(COMPARISON) == "optim on digits-mlp: accuracy, more is better"
    down = Comparison("optim", "compare.planted.DOWN", ("a", "b"), 1, 1)
    assert heading(down) == "optim on planted: bias, less is better"
    assert plain(down, [])["maximize"] is False
    assert "hypervolume" in heading(Comparison("compress", "digits-mlp", ("a", "b"), 1, 1))


def test_a_trade_off_is_averaged_point_by_point_and_drawn(tmp_path) -> None:
    runs = [SeedRun(1, 1.0, 5, ((100.0, 0.9), (10.0, 0.5))), SeedRun(2, 2.0, 5, ((200.0, 0.7), (30.0, 0.3)))]
    two = [PartResult("a", runs=runs), PartResult("b", runs=runs[::-1])]
    rows = rank(two, maximize=True)
    (first, second) = mean_points(rows[0])
    assert first == pytest.approx((150.0, 0.8))
    assert second == pytest.approx((20.0, 0.4))
    paths = write(Comparison("compress", "digits-mlp", ("a", "b"), 0, 2), rows, tmp_path)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_nothing_but_failures_can_be_written(tmp_path) -> None:
    rows = rank([PartResult("a", failure="x"), PartResult("b", failure="y")], maximize=True)
    for kind in ("optim", "compress"):
        assert len(write(Comparison(kind, "digits-mlp", ("a", "b"), 0, 2), rows, tmp_path)) == 4
    assert as_csv(rows).count("\n") == 3


def test_an_axis_is_logarithmic_where_values_differ_by_a_factor_of_ten() -> None:
    assert scale_of([1.0, 10.0]) == "log"
    assert scale_of([9490.0, 13410.0]) == "linear"
    assert scale_of([0.0, 1e6]) == "linear"
    assert scale_of([]) == "linear"
