"""Cases are found in the tests, compared with the cards, run by ``provenn conform``, and recorded."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from provenn.catalog import results
from provenn.catalog.card import Part, cards
from provenn.catalog.results import module_digest, read_results
from provenn.contracts import FunctionCase, OptimizerCase, collect, commands

PAPER = next(card for card in cards() if card.built)
FILE = """
from made_up_helper import WORD
from provenn.contracts import BadInput, FunctionCase


def refuse():
    raise ValueError("p must be > 0")


CASES = [
    FunctionCase(part, lambda: {use}, bad_input=(BadInput("p", refuse),), label="{label}",
                 excluded={{"docstring": "made up", "public_name": "made up"}})
    for part in {parts}
]
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A made-up tests folder and results folder; write the paper's test file by calling it."""
    tests = tmp_path / "tests"
    monkeypatch.setattr(collect, "TESTS", tests)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tests / PAPER.area
    folder.mkdir(parents=True)
    (tests / "made_up_helper.py").write_text("WORD = 1\n")
    name = f"provenn_cases.{PAPER.area}.test_{PAPER.module_name}"
    monkeypatch.delitem(sys.modules, name, raising=False)

    def write(use="None", label="", parts=None):
        names = [part.name for part in PAPER.parts] if parts is None else parts
        text = FILE.format(use=use, label=label, parts=names)
        (folder / f"test_{PAPER.module_name}.py").write_text(text)

    yield write
    sys.modules.pop(name, None)
    sys.modules.pop("made_up_helper", None)


def conform(*arguments):
    app = typer.Typer()
    app.command()(commands.conform)
    return CliRunner().invoke(app, [PAPER.slug, *arguments])


def test_all_is_well(checkout):
    checkout()
    done = conform()
    assert done.exit_code == 0, done.output
    assert f"✓ {PAPER.parts[0].name} silence" in done.output
    assert "docstring: made up" in done.output
    assert read_results(PAPER) == {}


def test_a_failure_is_shown_and_recorded(checkout):
    checkout(use="print(3)", label="loud")
    done = conform("--record")
    assert done.exit_code == 1
    assert "✗" in done.output
    assert "Nothing is printed" in done.output
    section = read_results(PAPER)["conformance"]
    assert section["digest"] == module_digest(PAPER)
    assert section["versions"]["torch"]
    assert set(section["parts"]) == {part.name for part in PAPER.parts}
    found = section["parts"][PAPER.parts[0].name]
    assert found["checks"] == 3
    assert found["failed"] == ["loud: silence"]
    assert found["excluded"] == {"loud: docstring": "made up", "loud: public_name": "made up"}


def test_recording_again_replaces_what_was_recorded(checkout):
    checkout()
    assert conform("--record").exit_code == 0
    path = results.result_path(PAPER)
    first = path.read_text()
    assert conform("--record").exit_code == 0
    assert path.read_text() == first
    assert json.loads(first)["conformance"]["parts"][PAPER.parts[0].name]["failed"] == []


def test_a_part_without_a_case_is_a_failure(checkout):
    checkout(parts=[])
    done = conform()
    assert done.exit_code == 1
    assert PAPER.parts[0].name in done.output.replace("\n", "")


def test_no_source_checkout(checkout):
    done = conform()
    assert done.exit_code == 1
    assert f"test_{PAPER.module_name}.py" in done.output.replace("\n", "")
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_the_command_loads_no_torch():
    code = "import sys, provenn.contracts.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cases_must_be_cases(tmp_path):
    path = tmp_path / "optim" / "test_made_up.py"
    path.parent.mkdir()
    path.write_text("CASES = (1,)\n")
    with pytest.raises(ValueError, match="CASES"):
        collect.cases_in(path)
    sys.modules.pop("provenn_cases.optim.test_made_up")


def test_a_file_that_fails_is_not_kept(tmp_path):
    path = tmp_path / "optim" / "test_made_up.py"
    path.parent.mkdir()
    path.write_text("raise RuntimeError('early')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="early"):
            collect.cases_in(path)


class TestMismatches:
    @pytest.fixture(autouse=True)
    def _two_papers(self, monkeypatch):
        parts = (Part("provenn.optim.One", "optimizer"), Part("provenn.optim.helper", "class"))
        built = dataclasses.replace(PAPER, parts=parts)
        absent = dataclasses.replace(PAPER, slug="absent", parts=(Part("provenn.optim.Absent", "optimizer"),))
        trained = dataclasses.replace(PAPER, parts=(Part("provenn.agents.Critic", "agent"),))
        monkeypatch.setattr(collect, "cards", lambda: [built, absent, trained])

    def cases(self):
        return [
            OptimizerCase("provenn.optim.One", int),
            FunctionCase("provenn.optim.helper", int),
            FunctionCase("provenn.agents.Critic", int),
        ]

    def test_none(self):
        assert collect.mismatches(self.cases()) == []

    def test_a_case_of_a_part_that_is_not_built_yet_is_fine(self):
        assert collect.mismatches([*self.cases(), OptimizerCase("provenn.optim.Absent", int)]) == []

    def test_missing(self):
        assert collect.mismatches(self.cases()[1:]) == ["provenn.optim.One (optimizer) is built and has no case"]

    def test_unknown(self):
        more = [*self.cases(), FunctionCase("provenn.optim.Other", int)]
        assert collect.mismatches(more) == ["provenn.optim.Other has a case and is in no card"]

    def test_another_kind(self):
        wrong = [FunctionCase("provenn.optim.One", int), *self.cases()[1:]]
        assert collect.mismatches(wrong) == ["provenn.optim.One is of kind optimizer and its case of kind function"]

    def test_equal_names(self):
        twice = [*self.cases(), OptimizerCase("provenn.optim.One", int)]
        assert collect.mismatches(twice) == ["provenn.optim.One names 2 cases; give them labels"]
        told_apart = [*self.cases(), OptimizerCase("provenn.optim.One", int, label="other")]
        assert collect.mismatches(told_apart) == []


def test_what_a_test_file_defines_can_be_pickled(tmp_path):
    path = tmp_path / "optim" / "test_pickled.py"
    path.parent.mkdir()
    path.write_text("class Own:\n    pass\n\n\nCASES = []\n")
    name = "provenn_cases.optim.test_pickled"
    try:
        collect.cases_in(path)
        own = sys.modules[name].Own
        assert isinstance(pickle.loads(pickle.dumps(own())), own)
    finally:
        sys.modules.pop(name, None)
