"""A run may be killed or interrupted at any moment: nothing stored is lost or run again, and nothing lives on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from claims.conftest import PROVENN
from claims.fake_claims import SLOW
from claims.running import go, result

from provenn.claims.errors import ExitCode
from provenn.claims.harness import run_key
from provenn.claims.ledger import CellKey, Ledger
from provenn.claims.plan import Plan
from provenn.claims.registry import find
from provenn.claims.workers import Workers

CELLS = 40
KILLS = 20
COMMAND = [*PROVENN, "run", "claims.fake_claims:SLOW", "--workers", "2"]


def wait_until(holds: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"waited {seconds} s in vain: {what}"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Trace:
    """What the cells of a run wrote as they began: ``pid study arm seed tuning settings``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def lines(self) -> list[str]:
        """Return the lines since the last call of :meth:`forget`."""
        return self._path.read_text().splitlines()[self._read :] if self._path.exists() else []

    def forget(self) -> None:
        self._read += len(self.lines())

    def cells(self) -> list[str]:
        return [line.partition(" ")[2] for line in self.lines()]

    def workers(self) -> set[int]:
        return {int(line.partition(" ")[0]) for line in self.lines()}


@pytest.fixture
def trace(tmp_path, monkeypatch) -> Trace:
    monkeypatch.setenv("FAKE_TRACE", str(tmp_path / "trace"))
    return Trace(tmp_path / "trace")


def recorded() -> set[CellKey]:
    found = find("claims.fake_claims:SLOW")
    with Ledger() as ledger:
        return set(ledger.finished(run_key(found, "small", "cpu")))


def as_traced(key: CellKey) -> str:
    trial = Plan(SLOW, "small").trial(key, "cpu")
    return f"{key.study} {key.arm} {key.seed} {key.tuning} {dict(trial.settings)}"


# Twenty starts of Python and torch, in the parent and in its workers, take more than a minute.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twenty_times_it_ends_with_the_same_figures_bit_for_bit(tmp_path, trace):
    undisturbed = result(go("SLOW", Workers(2, 1, 60), Ledger(str(tmp_path / "undisturbed"))))
    trace.forget()
    draws = random.Random(0)
    mid_run = 0
    for kill in range(KILLS):
        before = {as_traced(key) for key in recorded()}
        process = subprocess.Popen(COMMAND, start_new_session=True, stdout=subprocess.DEVNULL)
        if kill % 4 == 3:  # while it starts
            time.sleep(draws.uniform(0.0, 2.0))
        elif len(before) < CELLS:  # among the cells
            wait_until(lambda process=process: trace.lines() or process.poll() is not None, "a cell begins")
            time.sleep(draws.uniform(0.0, 0.15))
        mid_run += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        workers = trace.workers()
        wait_until(lambda workers=workers: all(gone(pid) for pid in workers), "workers die with their parent", 10)
        assert not before & set(trace.cells()), "a recorded cell ran again"
        assert before <= {as_traced(key) for key in recorded()}, "a recorded cell was lost"
        trace.forget()
    assert mid_run >= KILLS // 2
    assert result(go("SLOW", Workers(2, 1, 60))) == undisturbed
    assert len(recorded()) == CELLS


def started():
    """Start the command with Ctrl-C as a terminal has it: a shell's background jobs, and theirs, ignore it."""
    return subprocess.Popen(
        COMMAND,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# Two whole runs, with the start of Python and torch in each and in its workers.
@pytest.mark.slow
def test_ctrl_c_stops_promptly_and_the_same_command_continues(trace, provenn):
    process = started()
    wait_until(lambda: len(trace.lines()) >= 5, "five cells begin")
    os.killpg(process.pid, signal.SIGINT)
    said, wrong = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    kept = len(recorded())
    assert 0 < kept < CELLS
    assert f"interrupted: {kept} of {CELLS} cells are kept; the same command (without --fresh) continues" in said
    assert "Traceback" not in said + wrong
    wait_until(lambda: all(gone(pid) for pid in trace.workers()), "workers are stopped", 10)
    before = {as_traced(key) for key in recorded()}
    trace.forget()
    again = provenn(*COMMAND[len(PROVENN) :])
    assert again.returncode == ExitCode.OK, again.stderr
    assert f"{kept} of {CELLS} cells were finished before" in again.stdout
    assert len(trace.cells()) == CELLS - kept
    assert not before & set(trace.cells())


def test_ctrl_c_before_anything_ran_is_as_quiet(tmp_path):
    process = started()
    children = psutil.Process(process.pid).children
    wait_until(lambda: children() or process.poll() is not None, "a worker starts")
    os.killpg(process.pid, signal.SIGINT)
    said, wrong = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"interrupted: 0 of {CELLS} cells are kept" in said
    assert "Traceback" not in said + wrong


def test_a_hung_cell_is_killed_with_the_processes_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRACE", str(tmp_path / "child"))
    ran = go("PARENTAL", Workers(1, 1, 1))
    assert [str(failure.key) for failure in ran.failures] == ["study main, arm method, seed 1"]
    wait_until(lambda: gone(int((tmp_path / "child").read_text())), "the cell's child dies", 10)
