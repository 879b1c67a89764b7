"""``new`` lays out files that pass the linters, say what the card says, and leave the paper not built."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from provenn.catalog import scaffold
from provenn.catalog.card import card, cards
from provenn.catalog.scaffold import lay_out, places
from provenn.catalog.tree import built, public_names

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[str, str], Path]


def test_four_files_where_the_card_says(tmp_path: Path):
    written = lay_out(card("sap-pruning"), tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "src/provenn/compress/sap_pruning.py",
        "src/provenn/claims/compress/sap_pruning.py",
        "tests/compress/test_sap_pruning.py",
        "benchmarks/compress/sap_pruning.py",
    ]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(written)


def test_nothing_is_overwritten(tmp_path: Path):
    one = card("sap-pruning")
    test = tmp_path / places(one)["test"]
    test.parent.mkdir(parents=True)
    test.write_text("mine")
    assert test not in lay_out(one, tmp_path)
    assert test.read_text() == "mine"
    before = {path: path.read_text() for path in tmp_path.rglob("*.py")}
    assert lay_out(one, tmp_path) == []
    assert {path: path.read_text() for path in tmp_path.rglob("*.py")} == before


def test_the_files_say_what_the_card_says(tmp_path: Path):
    one = card("sap-pruning")
    module, claim, test, benchmark = (" ".join(path.read_text().split()) for path in lay_out(one, tmp_path))
    for text in (module, claim, test, benchmark):
        assert one.title in text
    assert f"arXiv {one.arxiv}" in module
    assert one.code in module
    assert " ".join(one.summary.split()) in module
    for part in one.parts:
        assert f"{part.name} ({part.kind})" in module
        assert f"{part.name} ({part.kind})" in test
    assert module.count("Args:") == module.count("Raises:") == len(one.parts)
    assert " ".join(one.claim.split()) in claim
    assert " ".join(one.rule.split()) in claim
    assert " ".join(one.peer.text.split()) in benchmark


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for one in cards():
        lay_out(one, root)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_all_of_them_pass_the_linter(every: Path, command: list[str]):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(ruff, cwd=every, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.filterwarnings("error")
def test_all_of_them_define_nothing(every: Path):
    files = sorted((every / "src").rglob("*.py"))
    assert len(files) == 2 * 194
    for file in files:
        (only,) = ast.parse(file.read_text(encoding="utf-8")).body
        assert isinstance(only, ast.Expr)
        assert isinstance(only.value, ast.Constant)


def test_a_laid_out_paper_is_not_built(fake: Write, tmp_path: Path):
    one = card("made-up")
    for path in lay_out(one, tmp_path / "checkout"):
        if "src" in path.parts:
            fake(str(path.relative_to(tmp_path / "checkout" / "src" / "provenn")), path.read_text())
    assert one.built, "the file is there"
    assert public_names(one.module) == frozenset()
    assert not built(one)


def test_the_checkout_is_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert scaffold.checkout() == ROOT
    monkeypatch.setattr(scaffold, "__file__", str(tmp_path / "a" / "b" / "c" / "scaffold.py"))
    with pytest.raises(FileNotFoundError, match="no source checkout"):
        scaffold.checkout()
