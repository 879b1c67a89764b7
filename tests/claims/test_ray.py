"""Cells as tasks of a Ray cluster of this machine's own, from the command line."""

from __future__ import annotations

import pytest
from claims.running import go, result

from provenn.claims.errors import ExitCode

pytest.importorskip("ray", reason="provenn[ray] is not installed")

# A cluster takes several seconds to start, and most tests here start one.
pytestmark = pytest.mark.slow


def test_same_figures_as_in_this_process(provenn, tmp_path):
    ledger = str(tmp_path / "ray.sqlite")
    said = provenn("run", "claims.fake_claims:TUNED", "--ray", "local", "--workers", "2", PROVENN_DB=ledger)
    assert said.returncode == ExitCode.OK, said.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROVENN_DB", ledger)
        there = go("TUNED")  # runs nothing: all is in that ledger
    assert {one.environment["threads"] for one in there.finished.values()} == {1}
    assert result(there) == result(go("TUNED"))


@pytest.mark.parametrize(
    ("name", "timeout", "cause"),
    [
        ("DIES", 120, "study main, arm dies, seed 1: Ray task was lost: WorkerCrashedError"),
        ("RAISES", 120, "study main, arm raises, seed 1: raised RuntimeError: the reason of it"),
        ("HANGS", 30, "study main, arm hangs, seed 1: Ray task hung: no event for 30 s, cancelled"),
    ],
)
def test_a_failed_task_is_named_and_the_others_go_on(provenn, name, timeout, cause):
    said = provenn("run", f"claims.fake_claims:{name}", "--ray", "local", "--timeout", str(timeout))
    assert said.returncode == ExitCode.INCOMPLETE
    assert cause in said.stdout
    assert "1 of 6 cells are missing; 5 are kept" in said.stderr


def test_no_cluster_at_the_address(provenn):
    said = provenn("run", "claims.fake_claims:QUICK", "--ray", "127.0.0.1:9")
    assert said.returncode == ExitCode.WORKER_START
    assert "Ray at '127.0.0.1:9' does not answer" in said.stderr
