"""The command: exit codes, messages, files; once with real worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import typer
from compare import planted
from typer.testing import CliRunner, Result

from provenn.claims import workers
from provenn.compare import lookup
from provenn.compare.commands import compare

APP = typer.Typer()
APP.command()(compare)
UP = "compare.planted.UP"


@pytest.fixture
def inline(monkeypatch, tmp_path) -> Callable[..., Result]:
    """Run the command in this process, with its files in a folder of the test's."""
    monkeypatch.setattr(workers, "Workers", lambda count, threads, timeout: workers.Inline())

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(APP, [*arguments, "--output", str(tmp_path)])

    yield run
    planted.LOG.clear()


def arguments(*parts: str, task: str = UP) -> tuple[str, ...]:
    names = ",".join(f"compare.planted.{part}" for part in parts)
    return ("optim", "--task", task, "--parts", names, "--trials", "2", "--seeds", "2")


def test_a_comparison_ends_in_a_table_and_files(inline, tmp_path) -> None:
    result = inline(*arguments("poor", "good", "raising"))
    assert result.exit_code == 0, result.output
    assert result.stdout.index("good") < result.stdout.index("poor") < result.stdout.index("raising")
    assert "failed" in result.stdout
    for end in ("csv", "json", "png", "html"):
        assert str(tmp_path / f"compare-optim-planted.{end}") in result.stdout
    ranking = json.loads((tmp_path / "compare-optim-planted.json").read_text())["ranking"]
    assert [row["part"].rpartition(".")[2] for row in ranking] == ["good", "poor", "raising"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("optm", "--task", UP, "--parts", "a,b"), "optim"),
        (("optim", "--task", "digits", "--parts", "a,b"), "digits-mlp"),
        (("optim", "--task", UP, "--parts", "torch.optim.Adam,DifGrad"), "DiffGrad"),
        (("optim", "--task", UP, "--parts", "torch.optim.Adam"), "two or more"),
        (("optim", "--task", UP, "--parts", "torch.optim.Adam, torch.optim.Adam"), "different"),
        ((*arguments("good", "poor")[:5], "--seeds", "0"), "--seeds must be at least 1"),
        ((*arguments("good", "poor")[:5], "--trials", "-1"), "--trials must be at least 0"),
        ((*arguments("good", "poor")[:5], "--workers", "0"), "--workers must be at least 1"),
    ],
)
def test_what_does_not_exist_is_exit_code_2(inline, tmp_path, given, words) -> None:
    result = inline(*given)
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_all_parts_are_ranked_at_once(inline, tmp_path, monkeypatch) -> None:
    names = tuple(f"compare.planted.{one}" for one in ("poor", "asking", "good"))
    monkeypatch.setattr(lookup, "all_parts", lambda kind, task: names)
    result = inline("optim", "--task", UP, "--parts", "all", "--trials", "2", "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "left out: compare.planted.asking needs horizon" in result.stdout
    ranking = json.loads((tmp_path / "compare-optim-planted.json").read_text())["ranking"]
    assert [row["part"].rpartition(".")[2] for row in ranking] == ["good", "poor"]


def test_a_comparison_in_which_every_part_fails_is_exit_code_5(inline) -> None:
    result = inline(*arguments("raising", "diverging"))
    assert result.exit_code == 5
    assert "failed" in result.stdout


def test_an_interrupt_closes_the_executor_and_is_exit_code_130(inline, monkeypatch) -> None:
    closed = []

    class Interrupted(workers.Inline):
        def wait(self):
            raise KeyboardInterrupt

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(workers, "Workers", lambda count, threads, timeout: Interrupted())
    result = inline(*arguments("good", "poor"))
    assert result.exit_code == 130
    assert closed == [True]


# Two fresh interpreters import torch and scikit-learn: some ten seconds.
@pytest.mark.slow
def test_worker_processes_give_the_figures_of_this_process(inline, monkeypatch, tmp_path) -> None:
    assert inline(*arguments("seedy", "peaked")).exit_code == 0
    here = json.loads((tmp_path / "compare-optim-planted.json").read_text())
    monkeypatch.undo()
    result = CliRunner().invoke(APP, [*arguments("seedy", "peaked"), "--output", str(tmp_path), "--workers", "2"])
    assert result.exit_code == 0, result.output
    there = json.loads((tmp_path / "compare-optim-planted.json").read_text())
    for one, other in zip(here["ranking"], there["ranking"], strict=True):
        assert one["part"] == other["part"]
        assert one["tried"] == other["tried"]
        assert [run["score"] for run in one["runs"]] == [run["score"] for run in other["runs"]]
