"""The commands as a person meets them: what they print, where they leave the page, and their exit codes."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from provenn.catalog import results
from provenn.catalog.card import Card, Part, cards
from provenn.claims import commands
from provenn.claims.cells import Failed, Live, environment
from provenn.claims.display import LiveDisplay, display_on
from provenn.claims.errors import ExitCode
from provenn.claims.ledger import CellKey, Record
from provenn.claims.registry import built, find
from provenn.claims.workers import Inline
from provenn.cli import app


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    """Cells run in this process: what workers do is tested elsewhere."""
    monkeypatch.setattr(commands, "Workers", lambda count, threads, timeout: Inline())


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def run(name, *arguments):
    return call("run", f"claims.fake_claims:{name}", *arguments)


def test_a_run_prints_cells_table_verdict_and_page():
    said = run("TUNED")
    assert said.exit_code == ExitCode.OK, said.output
    lines = said.stdout.splitlines()
    assert sum(line.startswith("[") for line in lines) == 14
    assert lines[0].startswith('[1/14] main · method · tuning {"gain":1.0}: validation -1 (')
    assert any(line.startswith("[14/14] main · baseline · seed 2: ") for line in lines)
    assert any(line.split() == ["metric", "method", "baseline", "difference"] for line in lines)
    assert any(line.startswith("reproduced: the method scores") for line in lines)
    assert lines[-1] == "report: reports/fake-tuned-small.html"
    assert "<!doctype html>" in Path("reports/fake-tuned-small.html").read_text()


def test_a_second_run_says_that_all_is_there_and_gives_the_same_verdict():
    first, second = run("TUNED"), run("TUNED")
    assert second.stdout.startswith("14 of 14 cells were finished before\n")
    assert second.stdout.splitlines()[1:] == [line for line in first.stdout.splitlines() if not line.startswith("[")]


def test_smoke_gives_no_verdict_and_no_page():
    said = run("QUICK", "--tier", "smoke")
    assert said.exit_code == ExitCode.OK
    assert said.stdout.splitlines()[-1] == "smoke: it runs; no verdict at this tier"
    assert "reproduced" not in said.stdout
    assert not Path("reports").exists()


def test_not_reproduced_is_a_result_and_no_failure():
    said = run("BACKWARDS")
    assert said.exit_code == ExitCode.OK
    assert "not reproduced: the method scores -1 [-1, -1] more" in " ".join(said.stdout.split())


def test_an_arm_alone_has_margins_and_no_table():
    said = run("ALONE")
    assert said.exit_code == ExitCode.OK, said.output
    assert "difference" not in said.stdout
    assert "partly: it holds\n" in said.stdout
    assert "\nworst score: 1." in said.stdout
    page = Path("reports/fake-alone-small.html").read_text()
    assert 'aria-label="score, by arm: method"' in page
    assert 'aria-label="third, by arm: method"' in page


def test_report_goes_where_it_is_asked_to(tmp_path):
    assert run("QUICK", "--report", tmp_path / "deep" / "page.html").exit_code == ExitCode.OK
    assert (tmp_path / "deep" / "page.html").exists()
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["claims.fake_claims:QUICK", "--tier", "full"], ExitCode.USAGE, "no tier 'full'; it has smoke, small"),
        (["claims.fake_claims:QUICK", "--study", "x"], ExitCode.USAGE, "no study 'x' at tier small; it has main"),
        (["claims.fake_claims:QUICK", "--seeds", "2"], ExitCode.USAGE, "at least the tier's 3, got 2"),
        (["claims.fake_claims:QUICK", "--workers", "0"], ExitCode.USAGE, "--workers must be at least 1, got 0"),
        (["claims.fake_claims:QUICK", "--timeout", "0"], ExitCode.USAGE, "--timeout must be above 0"),
        (["claims.fake_claims:QUICK", "--timeout", "nan"], ExitCode.USAGE, "--timeout must be above 0"),
        (["claims.fake_claims:QUICK", "--device", "tpu"], ExitCode.USAGE, "must be cpu, cuda or cuda:N, got 'tpu'"),
        (["claims.fake_claims:QUICK", "--device", "cuda:99"], ExitCode.USAGE, "torch sees"),
        (["claims.nowhere:CLAIM"], ExitCode.USAGE, "there is no module 'claims.nowhere'"),
        (["nowhere.at_all"], ExitCode.USAGE, "there is no module 'nowhere.at_all'"),
        (["difgrad"], ExitCode.USAGE, "unknown paper 'difgrad'; the nearest are diffgrad, "),
        (
            ["claims.fake_claims:NOT_A_CLAIM"],
            ExitCode.CLAIM_BROKEN,
            "defines no provenn.claims.Claim named NOT_A_CLAIM",
        ),
        (["claims.broken_module"], ExitCode.CLAIM_BROKEN, "does not import: ZeroDivisionError: division by zero"),
        (["claims.fake_claims:JUDGE_RAISES"], ExitCode.CLAIM_BROKEN, "no metric 'accuracy'"),
        (["claims.fake_claims:QUICK", "--tier", "smoke", "--record"], ExitCode.NOT_RECORDED, "gives no verdict"),
        (["claims.fake_claims:QUICK", "--record"], ExitCode.NOT_RECORDED, "not the claim of a paper in the catalogue"),
    ],
)
def test_what_does_not_exist_is_named(arguments, code, words):
    said = call("run", *arguments)
    assert said.exit_code == code, said.output
    assert words in said.stderr
    assert "Traceback" not in said.output


def test_a_paper_without_a_claim_is_not_built_yet():
    slug = next(card.slug for card in cards() if card.slug not in built())
    said = call("run", slug)
    assert said.exit_code == ExitCode.NOT_BUILT
    assert f"the claim of {slug} is not built yet" in said.stderr


def test_failed_cells_give_no_verdict_and_are_listed():
    said = run("RAISES")
    assert said.exit_code == ExitCode.INCOMPLETE
    assert "FAILED study main, arm raises, seed 1: raised RuntimeError: the reason of it" in said.stdout
    assert "no verdict: 1 of 6 cells are missing; 5 are kept, the same command continues" in said.stderr
    assert "missing:\n  study main, arm raises, seed 1\n" in said.stderr
    assert "reproduced" not in said.output
    assert not Path("reports").exists()


def test_ray_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = run("QUICK", "--ray", "local")
    assert said.exit_code == ExitCode.USAGE
    assert "pip install 'provenn[ray]'" in said.stderr


def test_one_study_gives_no_verdict_until_the_others_are_there():
    part = run("TWO_STUDIES", "--study", "other")
    assert part.exit_code == ExitCode.OK
    assert part.stdout.splitlines()[-1] == "other: done; no verdict, since the other studies lack cells"
    whole = run("TWO_STUDIES", "--study", "main")
    assert "reproduced: the method scores" in whole.stdout
    assert "other score" in whole.stdout


def test_fresh_runs_every_cell_of_the_named_studies_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRACE", str(tmp_path / "trace"))
    run("TWO_STUDIES")
    assert len((tmp_path / "trace").read_text().splitlines()) == 10
    run("TWO_STUDIES", "--study", "other", "--fresh")
    assert len((tmp_path / "trace").read_text().splitlines()) == 14
    run("TWO_STUDIES", "--fresh")
    assert len((tmp_path / "trace").read_text().splitlines()) == 24


def test_user_claims_are_found_in_the_current_folder(tmp_path):
    (tmp_path / "own_claim_of_mine.py").write_text("from claims.fake_claims import QUICK as CLAIM\n")
    said = call("run", "own_claim_of_mine:CLAIM", "--tier", "smoke")
    assert said.exit_code == ExitCode.OK, said.output


class TestRecord:
    """``--record`` writes the section that ships, and refuses what must not ship."""

    @pytest.fixture(autouse=True)
    def paper(self, tmp_path, monkeypatch):
        monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
        self.card = Card(
            slug="fake-paper",
            area="optim",
            title="A <Fake> Paper",
            date="2024-05-06",
            kind="optimizer",
            summary="",
            parts=(Part("provenn.optim.Fake", "optimizer"),),
            claim="It works.",
        )
        monkeypatch.setattr(commands, "find", lambda name: replace(find(name), card=self.card))

    def shipped(self):
        return results.read_results(self.card)["claim"]

    def test_the_summary_ships_beside_other_tiers(self):
        results.write_section(self.card, "peer", {"kept": 1})
        results.write_section(self.card, "claim", {"full": {"kept": 2}, "small": {"replaced": 3}})
        said = run("TUNED", "--record")
        assert said.exit_code == ExitCode.OK, said.output
        shipped = self.shipped()
        assert shipped["full"] == {"kept": 2}
        assert results.read_results(self.card)["peer"] == {"kept": 1}
        small = shipped["small"]
        assert (small["outcome"], small["seeds"]) == ("reproduced", 3)
        assert small["comparisons"][0]["low"] > 0
        assert small["order"] == [{"study": "main", "arms": ["method", "baseline"]}]
        assert small["versions"]["torch"] == torch.__version__
        assert {"fingerprint", "date", "hardware", "device", "wall_seconds", "peak_memory", "curves"} <= set(small)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["QUICK", "--tier", "smoke"], "smoke tier gives no verdict"),
            (["QUICK", "--seeds", "4"], "--seeds is for exploration"),
            (["TWO_STUDIES", "--study", "main"], "needs every study"),
        ],
    )
    def test_refusals_come_before_anything_runs(self, arguments, words):
        said = run(*arguments, "--record")
        assert said.exit_code == ExitCode.NOT_RECORDED
        assert words in said.stderr
        assert said.stdout == ""

    def test_incomplete_evidence_is_not_recorded(self):
        assert run("RAISES", "--record").exit_code == ExitCode.INCOMPLETE
        assert not results.result_path(self.card).exists()

    def test_source_that_changed_meanwhile_is_refused(self, tmp_path, monkeypatch):
        source = tmp_path / "moving.py"
        source.write_text("from claims.fake_claims import QUICK as CLAIM\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        whole = commands.summarise
        monkeypatch.setattr(commands, "summarise", lambda *one: (source.write_text("# changed"), whole(*one))[1])
        said = call("run", "moving:CLAIM", "--record")
        assert said.exit_code == ExitCode.NOT_RECORDED
        assert "source changed while the cells ran" in said.stderr

    def test_cells_of_mixed_conditions_are_refused(self):
        run("TWO_STUDIES", "--study", "other")
        torch.set_num_threads(2)
        environment.cache_clear()
        try:
            said = run("TWO_STUDIES", "--record")
            again = run("TWO_STUDIES", "--record", "--fresh")
        finally:
            torch.set_num_threads(1)
            environment.cache_clear()
        assert said.exit_code == ExitCode.NOT_RECORDED
        assert "ran under different conditions (threads 2, " in said.stderr
        assert "run with --fresh" in said.stderr
        assert again.exit_code == ExitCode.OK

    def test_the_page_is_made_from_what_ships_where_the_ledger_has_nothing(self, monkeypatch, tmp_path):
        run("TUNED", "--record")
        from_ledger = Path("reports/fake-tuned-small.html").read_text()
        monkeypatch.setenv("PROVENN_DB", str(tmp_path / "empty.sqlite"))
        said = call("report", "claims.fake_claims:TUNED", "--output", "shipped.html")
        assert said.exit_code == ExitCode.OK, said.output
        # What ships keeps no order of margins.
        assert sorted(Path("shipped.html").read_text().splitlines()) == sorted(from_ledger.splitlines())


def test_report_makes_the_page_from_the_ledger():
    run("QUICK")
    page = Path("reports/fake-quick-small.html")
    first = page.read_text()
    page.unlink()
    said = call("report", "claims.fake_claims:QUICK")
    assert said.stdout == "report: reports/fake-quick-small.html\n"
    assert page.read_text() == first


def test_report_of_nothing_names_the_command_to_run():
    said = call("report", "claims.fake_claims:QUICK")
    assert said.exit_code == ExitCode.NOTHING_TO_REPORT
    assert "run it first: provenn run claims.fake_claims:QUICK --tier small" in said.stderr


def test_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    said = run("QUICK", "--report", tmp_path / "file" / "page.html")
    assert said.exit_code == ExitCode.USAGE
    assert "cannot be written" in said.stderr


class TestDisplay:
    KEY = CellKey("main", "method", "{}", 3, False)

    def show(self, display, console):
        with display:
            display.begin(2, 5)
            display.started(self.KEY)
            display.live(Live(self.KEY, 7, 9, {"score": 0.123456}))
            running = console.file.getvalue() if not isinstance(display, LiveDisplay) else self.refreshed(display)
            display.failed(Failed(replace(self.KEY, seed=4), "left no [bold]metric"))
            display.finished(self.KEY, Record({"score": 0.5}, seconds=1.25))
        return running

    @staticmethod
    def refreshed(display):
        display._progress.refresh()
        return display._progress.console.file.getvalue()

    def test_live_shows_arm_seed_progress_and_figure(self):
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        display = display_on(console)
        assert isinstance(display, LiveDisplay)
        running = self.show(display, console)
        assert "main · method · seed 3" in running
        assert "7/9" in running
        assert "score 0.1235" in running
        assert "2/5" in running
        after = console.file.getvalue()
        assert "4/5" in after
        assert "FAILED study main, arm method, seed 4: left no [bold]metric" in after

    def test_plain_is_a_line_for_each_cell_that_ends(self):
        console = Console(file=io.StringIO(), width=40)
        display = display_on(console)
        assert not isinstance(display, LiveDisplay)
        assert self.show(display, console) == "2 of 5 cells were finished before\n"
        _, failed, finished = console.file.getvalue().splitlines()
        assert failed == "FAILED study main, arm method, seed 4: left no [bold]metric"
        assert finished.startswith("[4/5] main · method · seed 3: score 0.5 (1.2 s, about ")
