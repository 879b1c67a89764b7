"""Running cells: the same figures whatever runs them, nothing twice, failures named, the rest kept."""

from __future__ import annotations

import os
import random
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from claims.running import Silent, go, result

from benchmarks.harness_overhead import gaps
from provenn.claims.cells import Done
from provenn.claims.errors import ClaimBrokenError, WorkerStartError
from provenn.claims.harness import judged, run_key
from provenn.claims.ledger import Ledger, Record
from provenn.claims.registry import find
from provenn.claims.workers import Executor, Inline, Workers


class Shuffled(Inline):
    """Takes every cell that can run, and runs them in a random order."""

    def __init__(self, seed):
        super().__init__()
        self._draws = random.Random(seed)

    def idle(self):
        return 100

    def wait(self):
        self._draws.shuffle(self._jobs)
        return super().wait()


def test_same_figures_in_any_order_and_in_any_process(tmp_path):
    torch.set_num_threads(1)
    executors = {
        "one": Workers(1, 1, 60),
        "two": Workers(2, 1, 60),
        "shuffled": Shuffled(0),
        "shuffled again": Shuffled(1),
    }
    results = {name: result(go("TUNED", one, Ledger(str(tmp_path / name)))) for name, one in executors.items()}
    assert results["one"]["comparisons"][0]["difference"] > 0
    assert results["one"]["settings"]["main"] == {"method": {"gain": 2.0}, "baseline": {"gain": 3.0}}
    for one in results.values():
        assert one == results["one"]


def test_global_generators_depend_on_the_seed_and_not_on_the_arm():
    values = {
        (key.arm, key.seed): record.curves["level"][0][1] - (key.arm == "method")
        for key, record in go("QUICK").finished.items()
    }
    assert len({round(value, 9) for value in values.values()}) == 3
    for seed in range(3):
        assert values["method", seed] == pytest.approx(values["baseline", seed])


def test_finished_cells_do_not_run_again(tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    monkeypatch.setenv("FAKE_TRACE", str(trace))
    first, second = Silent(), Silent()
    before = go("TUNED", display=first)
    after = go("TUNED", display=second)
    assert len(trace.read_text().splitlines()) == 14
    assert second.events == [("begin", 14, 14)]
    assert first.events[0] == ("begin", 0, 14)
    assert after.finished == before.finished


def test_a_cell_that_another_process_stored_meanwhile_does_not_run(tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    monkeypatch.setenv("FAKE_TRACE", str(trace))

    class Interloper(Inline):
        """After its first cell, a second harness runs the whole claim on the same ledger."""

        def wait(self):
            messages = super().wait()
            if isinstance(messages[-1], Done) and not self.intruded:
                self.intruded = True
                go("TUNED")
            return messages

        intruded = False

    ran = go("TUNED", Interloper())
    assert ran.plan.missing(ran.finished) == []
    # The intruder ran all 14, since the first was not stored yet; the first harness ran that one alone.
    assert len(trace.read_text().splitlines()) == 15


def test_an_arm_goes_on_while_another_is_still_tuned():
    class MethodFirst(Executor):
        """Finishes whatever belongs to the method, and the baseline's tuning only at the very end."""

        def __init__(self):
            self.jobs, self.order = [], []

        def idle(self):
            return 100

        def submit(self, job):
            self.jobs.append(job)

        def wait(self):
            job = next((job for job in self.jobs if job.key.arm == "method"), self.jobs[0])
            self.jobs.remove(job)
            self.order.append((job.key.arm, job.key.tuning))
            return [Done(job.key, Record({"validation": 1.0} if job.key.tuning else {"score": 1.0}, environment={}))]

        def close(self):
            pass

    executor = MethodFirst()
    go("TUNED", executor)
    method = [("method", True)] * 4 + [("method", False)] * 3
    assert executor.order == method + [("baseline", True)] * 4 + [("baseline", False)] * 3


def test_more_seeds_add_to_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRACE", str(tmp_path / "trace"))
    go("QUICK")
    ran = go("QUICK", seeds=5)
    assert ran.plan.missing(ran.finished) == []
    assert len((tmp_path / "trace").read_text().splitlines()) == 10


FAILURES = {
    "DIES": r"worker was killed by SIGKILL \(out of memory\?\); it last printed\nlast words",
    "CRASHES": r"worker was killed by SIGSEGV; it last printed\n(.|\n)*in misbehave",
    "EXITS": "worker died with exit code 7",
    "HANGS": "worker hung: no event for 1 s, killed",
    "RAISES": r"raised RuntimeError: the reason of it\n(.|\n)*in misbehave",
    "DIVERGES": "left score = nan",
    "OVERFLOWS": "left score = inf",
    "SILENT": "left no metric",
    "OTHER": "left no metric 'score', only loss",
    "WRONG": "raised TypeError: run must yield Metric, Point, Bar or Progress, got 3.0",
}
TAKE_THE_WORKER_ALONG = ("DIES", "CRASHES", "EXITS", "HANGS")


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_cell_is_named_with_its_cause_and_the_others_go_on(name, tmp_path, monkeypatch):
    executor = Workers(1, 1, 1 if name == "HANGS" else 60) if name in TAKE_THE_WORKER_ALONG else Inline()
    ran = go(name, executor)
    (failure,) = ran.failures
    assert str(failure.key) == f"study main, arm {name.lower()}, seed 1"
    assert re.search(FAILURES[name], failure.cause), failure.cause
    assert len(ran.finished) == 5
    assert ran.plan.missing(ran.finished) == [str(failure.key)]
    # The next run tries the failed cell again, and that alone.
    monkeypatch.setenv("FAKE_MENDED", str(tmp_path))
    monkeypatch.setenv("FAKE_TRACE", str(tmp_path / "trace"))
    again = go(name)
    assert len((tmp_path / "trace").read_text().splitlines()) == 1
    assert again.plan.missing(again.finished) == []


def test_a_setting_that_diverges_in_tuning_is_passed_over():
    ran = go("SOME_DIVERGE")
    assert not ran.failures
    assert result(ran)["settings"]["main"] == {"method": {"gain": 1.0}, "baseline": {"gain": 1.0}}


def test_no_evidence_where_all_settings_diverge():
    ran = go("ALL_DIVERGE")
    assert len(ran.plan.missing(ran.finished)) == 4
    assert all("every setting diverged" in one for one in ran.plan.missing(ran.finished))


def test_much_printing_blocks_nobody():
    ran = go("CHATTER", Workers(1, 1, 20))
    assert not ran.failures
    assert len(ran.finished) == 4


def test_signs_of_life_reach_the_display():
    display = Silent()
    go("SLOW", Workers(1, 1, 60), display=display)
    started = [event for event in display.events if event[0] == "started"]
    assert len(started) == 40
    assert Counter(event[0] for event in display.events)["finished"] == 40


def test_what_hinders_every_cell_stops_the_run(tmp_path, monkeypatch):
    package = tmp_path / "fragile.py"
    package.write_text("import os\nif os.getppid() != int(os.environ['FRAGILE']): raise OSError('only the parent')\n")
    package.write_text(package.read_text() + "from claims.fake_claims import QUICK as CLAIM\n")
    monkeypatch.setenv("FRAGILE", str(os.getppid()))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkerStartError, match="only the parent"):
        go("fragile:CLAIM", Workers(1, 1, 60))


def test_judge_that_raises_is_the_claims_fault():
    ran = go("JUDGE_RAISES")
    with pytest.raises(ClaimBrokenError, match=r"judge of fake-judge-raises raises KeyError: .*no metric 'accuracy'"):
        judged(ran.plan.claim, ran.plan.evidence(ran.finished))


def test_the_record_says_where_the_cell_ran_and_what_it_took():
    ran = go("QUICK", Workers(1, 1, 60))
    for record in ran.finished.values():
        assert record.environment["threads"] == 1
        assert record.environment["device"] == "cpu"
        assert record.environment["versions"]["torch"] == torch.__version__
        assert record.environment["hardware"]["cores"] == os.cpu_count()
        assert record.peak_memory > 50e6  # torch alone is more
        assert record.peak_cuda is None
        assert 0 < record.seconds < 60
        assert record.started.endswith("+00:00")


def test_memory_of_one_cell_is_not_that_of_the_cell_before(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system keeps one mark for the whole process")
    ran = go("HUNGRY", Workers(1, 1, 60))
    peaks = [record.peak_memory for _, record in sorted(ran.finished.items(), key=lambda one: one[1].started)]
    # Seed 0 fills 200 MB, the others nothing.
    assert peaks[0] > max(peaks[1:]) + 100e6


def test_overhead_of_a_cell_is_small():
    """The gap between two cells on one worker is the harness's alone, whatever the machine's cores."""
    ran = go("EMPTY", Workers(1, 1, 60))
    assert len(ran.finished) == 200
    assert statistics.median(gaps(dict(ran.finished))) < 0.05


def test_fingerprint_follows_the_source_and_the_device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "followed.py"
    source.write_text("from claims.fake_claims import QUICK as CLAIM\n")
    found = find("followed:CLAIM")
    first = run_key(found, "small", "cpu")
    assert run_key(found, "small", "cpu") == first
    assert run_key(found, "small", "cuda:0").fingerprint == run_key(found, "small", "cuda:1").fingerprint
    assert run_key(found, "small", "cuda:0").fingerprint != first.fingerprint
    source.write_text(source.read_text() + "# changed\n")
    changed = run_key(found, "small", "cpu").fingerprint
    assert changed != first.fingerprint
    (tmp_path / "_followed_parts.py").write_text("")
    assert find("followed:CLAIM").fingerprint("cpu") != changed
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert find("followed:CLAIM").fingerprint("cpu") != changed
