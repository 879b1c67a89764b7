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
    monkeypatch.setenv("PROVENN_DB", str(tmp_path / "kept" / "ledger.sqlite"))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(APP, [*arguments, "--output", str(tmp_path)])

    yield run
    planted.LOG.clear()


def arguments(*parts: str, task: str = UP) -> tuple[str, ...]:
    names = ",".join(f"compare.planted.{part}" for part in parts)
    return ("optim", "--task", task, "--parts", names, "--trials", "2", "--seeds", "2")


def test_a_comparison_ends_in_a_table_and_files(inline, tmp_path) -> None:
    result = inline(*arguments("poor", "good", "stumbling"))
    assert result.exit_code == 0, result.output
    assert result.stdout.index("good") < result.stdout.index("poor") < result.stdout.index("stumbling")
    assert "failed" in result.stdout
    for end in ("csv", "json", "png", "html"):
        assert str(tmp_path / f"compare-optim-planted.{end}") in result.stdout
    ranking = json.loads((tmp_path / "compare-optim-planted.json").read_text())["ranking"]
    assert [row["part"].rpartition(".")[2] for row in ranking] == ["good", "poor", "stumbling"]


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
        ((*arguments("good", "poor"), "--device", "gpu"), "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        ((*arguments("good", "poor"), "--device", "cuda:99"), "--device cuda:99: torch sees"),
    ],
)
def test_what_does_not_exist_is_exit_code_2(inline, tmp_path, given, words) -> None:
    result = inline(*given)
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(inline, tmp_path) -> None:
    (tmp_path / "taken").write_text("")
    given = (*arguments("good", "poor"), "--output", str(tmp_path / "taken"))
    result = CliRunner().invoke(APP, [*given])
    assert result.exit_code == 2
    assert f"--output {tmp_path / 'taken'} cannot be written" in result.stderr
    assert ran() == []


def test_all_parts_are_ranked_at_once(inline, tmp_path, monkeypatch) -> None:
    names = tuple(f"compare.planted.{one}" for one in ("poor", "asking", "good"))
    monkeypatch.setattr(lookup, "all_parts", lambda kind, task: names)
    result = inline("optim", "--task", UP, "--parts", "all", "--trials", "2", "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "left out: compare.planted.asking: needs horizon" in result.stdout
    ranking = json.loads((tmp_path / "compare-optim-planted.json").read_text())["ranking"]
    assert [row["part"].rpartition(".")[2] for row in ranking] == ["good", "poor"]


def test_a_comparison_in_which_every_part_fails_is_exit_code_5(inline) -> None:
    result = inline(*arguments("stumbling", "diverging"))
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
    assert "0 of 8 runs are kept" in result.stderr


def ran() -> list[str]:
    """The runs since the last call, but for the steps that showed whether parts fit."""
    names = [run.name for run in planted.LOG if len(run.batches) > 1]
    planted.LOG.clear()
    return names


def test_what_was_finished_before_an_interrupt_is_not_run_again(inline, monkeypatch, tmp_path) -> None:
    class Interrupted(workers.Inline):
        waits = 0

        def wait(self):
            if self.waits == 5:
                raise KeyboardInterrupt
            self.waits += 1
            return super().wait()

    asked = arguments("peaked", "seedy")
    whole = inline(*asked)
    assert whole.exit_code == 0
    assert ran() == ["peaked"] * 4 + ["seedy"] * 4
    held = (tmp_path / "compare-optim-planted.csv").read_text()
    assert "peaked, seed 2: kept from before" not in whole.stderr

    with monkeypatch.context() as patch:
        patch.setattr(workers, "Workers", lambda count, threads, timeout: Interrupted())
        first = inline(*asked, "--fresh")
    assert first.exit_code == 130
    assert "interrupted: 5 of 8 runs are kept; the same command (without --fresh) continues" in first.stderr
    assert ran() == ["peaked"] * 4 + ["seedy"]

    second = inline(*asked)
    assert second.exit_code == 0
    assert ran() == ["seedy"] * 3
    assert "[4/8] compare.planted.peaked, seed 2: 1" not in second.stderr
    assert second.stderr.count("kept from before") == 5
    scores = [[line.split(",")[:5] for line in text.splitlines()] for text in (held, whole_csv(tmp_path))]
    assert scores[0] == scores[1]

    # Nothing is left to do; more seeds need those alone; who asks for it starts over.
    assert inline(*asked).exit_code == 0
    assert ran() == []
    assert inline(*asked[:-1], "3").exit_code == 0
    assert ran() == ["peaked", "seedy"]
    assert inline(*asked, "--fresh").exit_code == 0
    assert ran() == ["peaked"] * 4 + ["seedy"] * 4


def whole_csv(folder) -> str:
    return (folder / "compare-optim-planted.csv").read_text()


def test_a_run_that_failed_is_tried_again(inline) -> None:
    for expected in (["good"] * 4 + ["stumbling"] * 2, ["stumbling"] * 2):
        assert inline(*arguments("good", "stumbling")).exit_code == 0
        assert ran() == expected


def test_what_was_kept_counts_no_more_once_its_code_changes(tmp_path, monkeypatch) -> None:
    from provenn.compare.keeping import run_key

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept_helper.py").write_text("SCALE = 1\n")
    (tmp_path / "kept_part.py").write_text("import kept_helper\n\n\ndef Mine(params):\n    ...\n")

    def key(part: str, device: str = "cpu") -> str:
        run_key.cache_clear()
        return run_key("optim", "digits-mlp", device, part).fingerprint

    first = key("kept_part.Mine")
    assert first == key("kept_part.Mine")
    (tmp_path / "kept_helper.py").write_text("SCALE = 2\n")
    assert key("kept_part.Mine") != first
    assert key("DiffGrad") == key("DiffGrad", "cpu:0") != key("DiffGrad", "cuda")
    assert len({key(name) for name in ("DiffGrad", "sgd", "torch.optim.Adam")}) == 3


def test_parts_that_do_not_fit_are_refused_before_anything_runs(inline, tmp_path) -> None:
    result = inline(*arguments("good", "asking", "raising"))
    assert result.exit_code == 2
    assert "nothing was run: these parts cannot stand in planted" in result.stderr
    assert "compare.planted.asking: needs horizon" in result.stderr
    assert "compare.planted.raising: cannot take a step: planted <b>fault</b>" in result.stderr
    assert ran() == []
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_not_there_are_named_before_anything_runs(inline, tmp_path, monkeypatch) -> None:
    from provenn.compare import layer_task

    monkeypatch.setenv("PROVENN_DATA", str(tmp_path / "none"))
    layer_task._split.cache_clear()
    result = inline("nn", "--task", "spoken-digits", "--parts", "lstm,gru")
    assert result.exit_code == 2
    assert "task spoken-digits: data set 'fsdd' needs the file fsdd.npz" in result.stderr


def test_without_a_task_or_parts_they_are_listed(inline, monkeypatch) -> None:
    monkeypatch.setattr(lookup, "all_parts", lambda kind, task: ("LSSL", "compare.planted_layers.Refuses", "planted"))
    listed = inline("optim")
    assert listed.exit_code == 0
    assert "digits-mlp: " in listed.stdout
    assert "branin" not in listed.stdout
    assert "optim" in inline("optm").stderr
    parts = inline("nn", "--task", "compare.planted_layers.TASK")
    assert parts.exit_code == 0, parts.output
    assert "planted-layers: planted; error" in parts.stdout
    assert "it has a place for planted ones" in parts.stdout
    assert "references: planted" in parts.stdout
    assert "compare.planted_layers.Refuses: width must be planted" in parts.stdout
    monkeypatch.setattr(lookup, "all_parts", lambda kind, task: ("random",))
    unknown = inline("search", "--task", "branin").stdout
    assert "shows when it runs" in unknown
    assert "all fit" not in unknown
    wrong = inline("optim", "--task", "compare.planted_layers.TASK")
    assert wrong.exit_code == 2
    assert "compares nn, not optim" in wrong.stderr


# Two fresh interpreters import torch and scikit-learn: some ten seconds.
@pytest.mark.slow
def test_worker_processes_give_the_figures_of_this_process(inline, monkeypatch, tmp_path) -> None:
    assert inline(*arguments("seedy", "peaked")).exit_code == 0
    here = json.loads((tmp_path / "compare-optim-planted.json").read_text())
    monkeypatch.undo()
    monkeypatch.setenv("PROVENN_DB", str(tmp_path / "other.sqlite"))
    result = CliRunner().invoke(APP, [*arguments("seedy", "peaked"), "--output", str(tmp_path), "--workers", "2"])
    assert result.exit_code == 0, result.output
    there = json.loads((tmp_path / "compare-optim-planted.json").read_text())
    for one, other in zip(here["ranking"], there["ranking"], strict=True):
        assert one["part"] == other["part"]
        assert one["tried"] == other["tried"]
        assert [run["score"] for run in one["runs"]] == [run["score"] for run in other["runs"]]


def test_runs_are_kept_under_the_code_that_they_began_with(tmp_path, monkeypatch) -> None:
    from provenn.claims.ledger import CellKey, Ledger, Record
    from provenn.compare.keeping import Keeper, run_key

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    part, file = "begun_part.Mine", tmp_path / "begun_part.py"
    file.write_text("Mine = 1\n")
    cell = CellKey("optim/digits-mlp", part, "{}", 1, False)

    def keeper(ledger: Ledger) -> Keeper:
        run_key.cache_clear()
        return Keeper(ledger, "optim", "digits-mlp", (part,), "cpu")

    with Ledger(str(tmp_path / "ledger.sqlite")) as ledger:
        first = keeper(ledger)
        file.write_text("Mine = 2\n")
        first.keep(cell, Record({"score": 1.0}))
        assert first.find(cell) is not None
        assert keeper(ledger).find(cell) is None
        file.write_text("Mine = 1\n")
        assert keeper(ledger).find(cell) is not None
