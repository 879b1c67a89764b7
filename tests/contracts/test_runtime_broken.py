"""Each check of the suite of runtimes catches a runtime that is broken in that way."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from contracts.pipeline import Pipeline, WorkerError
from torch import nn

from provenn.contracts import BadInput, ContractError, RuntimeCase, _processes, check_runtime
from provenn.contracts._processes import Attempt, Leftovers, cleaned_up, wait_until


@pytest.fixture(autouse=True)
def _little_grace(monkeypatch):
    """What is broken here stays broken; there is no need to wait for it long."""
    monkeypatch.setattr(_processes, "GRACE", 0.5)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def inputs(generator):
    return (torch.randn(5, 3, generator=generator),)


def step(pipeline, given):
    return pipeline.step(*given)


def plain_step(module, given):
    module.zero_grad()
    output = module(*given)
    (output.square().sum() / 2).backward()
    return output, {name: parameter.grad for name, parameter in module.named_parameters()}


class Rounds(Pipeline):
    def ask(self, index, task, values):
        found = super().ask(index, task, values)
        return found if task == "backward" else found + 1e-4


class LagsBehind(Pipeline):
    last = None

    def step(self, given):
        found = super().step(given)
        shown, self.last = found if self.last is None else self.last, found
        return shown


class ForgetsTheBias(Pipeline):
    def step(self, given):
        output, gradients = super().step(given)
        return output, {name: gradient for name, gradient in gradients.items() if name != "1.bias"}


class AveragesTheLoss(Pipeline):
    def step(self, given):
        output, gradients = super().step(given)
        return output, {name: gradient / len(given) for name, gradient in gradients.items()}


class Accumulates(Pipeline):
    def step(self, given):
        output, gradients = super().step(given)
        self.sums = {name: gradient + getattr(self, "sums", {}).get(name, 0) for name, gradient in gradients.items()}
        return output, self.sums


class Drifts(Pipeline):
    calls = 0

    def step(self, given):
        self.calls += 1
        output, gradients = super().step(given)
        return output + 1e-7 * self.calls, gradients


class NeverCloses(Pipeline):
    def close(self):
        pass


class ClosesButOne(Pipeline):
    def close(self):
        self.processes.pop()
        super().close()


class LeavesZombies(Pipeline):
    def close(self):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, 9)


class LeavesAPort(Pipeline):
    def __init__(self, module, timeout=1.0):
        self.listener = socket.create_server(("127.0.0.1", 0))
        super().__init__(module, timeout)


class LeavesAThread(Pipeline):
    def __init__(self, module, timeout=1.0):
        super().__init__(module, timeout)
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()


class ClosesOnce(Pipeline):
    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
            process.close()


class PassesErrorsOn(Pipeline):
    """The traceback is lost."""

    def ask(self, index, task, values):
        try:
            return super().ask(index, task, values)
        except WorkerError as error:
            raise WorkerError(str(error).strip().split("\n")[-1]) from None


class SaysThatItFailed(Pipeline):
    def ask(self, index, task, values):
        try:
            return super().ask(index, task, values)
        except WorkerError:
            raise WorkerError(f"worker stage-{index} failed") from None


class HidesErrors(Pipeline):
    def step(self, given):
        try:
            return super().step(given)
        except (WorkerError, TimeoutError):
            return given, {}


class DoesNotCloseAfterErrors(Pipeline):
    failed = False

    def step(self, given):
        self.failed = True
        found = super().step(given)
        self.failed = False
        return found

    def close(self):
        if not self.failed:
            super().close()


class WaitsForAnswers(Pipeline):
    """Waits for the answer alone: neither a death nor the time ends it."""

    def ask(self, index, task, values):
        self.connections[index].send((task, values))
        return self.connections[index].recv()[1]


class WaitsLong(Pipeline):
    def __init__(self, module, timeout=1.0):
        super().__init__(module, 20 * timeout)


class GivesUpWithoutAWord(Pipeline):
    def step(self, given):
        try:
            return super().step(given)
        except TimeoutError:
            raise WorkerError("a worker is gone") from None


class NamesNobody(Pipeline):
    def ask(self, index, task, values):
        try:
            return super().ask(index, task, values)
        except WorkerError:
            raise WorkerError("a worker died") from None


class BlamesTheWorkerAsked(Pipeline):
    def ask(self, index, task, values):
        try:
            return super().ask(index, task, values)
        except WorkerError:
            raise WorkerError(f"worker stage-{index} died") from None


class NoticesNoDeath(Pipeline):
    """Waits for the answer and the time alone."""

    def ask(self, index, task, values):
        self.connections[index].send((task, values))
        if not self.connections[index].poll(self.timeout):
            raise TimeoutError(f"worker {self.processes[index].name} did not answer within {self.timeout:g} s")
        return self.connections[index].recv()[1]


GOOD = RuntimeCase(
    "contracts.broken.own_checks",
    Pipeline,
    network,
    inputs,
    step=step,
    plain_step=plain_step,
    workers=Pipeline.workers,
    faulty=lambda stage: Pipeline(nn.Sequential(nn.Linear(3, 4), stage)),
    timeout=1.0,
    bad_input=(BadInput("timeout", lambda: Pipeline(network(), timeout=0)),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(make, **options):
    faulty = {"faulty": lambda stage: make(nn.Sequential(nn.Linear(3, 4), stage))}
    return replace(GOOD, **{"make": make, "label": make.__name__, **faulty, **options})


BROKEN = {
    "forward": [broken(Rounds), broken(LagsBehind)],
    "backward": [
        broken(Rounds),
        broken(ForgetsTheBias),
        broken(AveragesTheLoss),
        broken(Accumulates),
        broken(Pipeline, plain_step=lambda module, given: (module(*given), {}), label="no gradients"),
    ],
    "repeat": [broken(Drifts)],
    "close": [
        broken(NeverCloses),
        broken(ClosesButOne),
        broken(LeavesZombies),
        broken(LeavesAPort),
        broken(LeavesAThread),
        broken(ClosesOnce),
        broken(Pipeline, workers=lambda pipeline: {}, label="no workers found"),
    ],
    "stage_raises": [
        broken(PassesErrorsOn),
        broken(SaysThatItFailed),
        broken(HidesErrors),
        broken(DoesNotCloseAfterErrors),
        broken(Pipeline, faulty=None, label="no faulty"),
        broken(Pipeline, faulty=lambda stage: Pipeline(network()), label="a sound one"),
    ],
    "stage_hangs": [
        broken(WaitsForAnswers),
        broken(WaitsLong),
        broken(HidesErrors),
        broken(GivesUpWithoutAWord),
        broken(DoesNotCloseAfterErrors),
        broken(Pipeline, faulty=lambda stage: Pipeline(network()), label="a sound one"),
    ],
    "worker_killed": [
        broken(NamesNobody),
        broken(BlamesTheWorkerAsked),
        broken(WaitsForAnswers),
        broken(NoticesNoDeath),
        broken(HidesErrors),
        broken(DoesNotCloseAfterErrors),
        broken(Pipeline, workers=None, label="no workers"),
    ],
}


class InThisProcess:
    """A runtime without workers, which autograd passes through."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x):
        return torch.cat([self.module(part) for part in x.split(2)])


REASON = "it has no workers"
LOCAL = RuntimeCase(
    "contracts.broken.own_checks",
    InThisProcess,
    network,
    inputs,
    close=lambda runtime: None,
    bad_input_reason="it has no options",
    excluded={**GOOD.excluded, "stage_raises": REASON, "stage_hangs": REASON, "worker_killed": REASON},
    label="local",
)


@pytest.mark.parametrize("check", good_runs(GOOD, LOCAL))
def test_good_runtime_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_runtimes_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_runtime():
    assert set(BROKEN) == own_checks("runtime")


def test_check_runtime_lists_failures():
    with pytest.raises(ContractError, match="'repeat'"):
        check_runtime(broken(Drifts))


def test_nothing_of_a_broken_runtime_is_left_by_the_suite():
    before = Leftovers()
    assert_caught("close", broken(NeverCloses))
    assert not [found for found in before.now() if found.startswith("process")]


def test_leftovers_are_found_and_killed():
    command = "import socket, time; held = socket.create_server(('127.0.0.1', 0)); time.sleep(60)"
    with cleaned_up() as leftovers:
        assert leftovers.now() == []
        child = subprocess.Popen([sys.executable, "-c", command])
        assert wait_until(lambda: len(leftovers.now()) == 2, 20)
        assert wait_until(lambda: f"process {child.pid} (sleeping)" in leftovers.now(), 20)
        assert any(found.startswith("listening port ") for found in leftovers.now())
    assert child.poll() is not None
    assert leftovers.now() == []


@pytest.fixture
def start_spawner():
    """Return a starter of processes that each start another one when they are told to."""
    command = (
        "import subprocess, sys; sys.stdin.readline(); "
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.readline()"
    )
    started = []

    def start():
        started.append(
            subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                child.kill()
        process.kill()
        process.communicate()


def spawn(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return psutil.Process(int(process.stdout.readline()))


def test_what_a_process_starts_that_was_there_before_is_its_own(start_spawner):
    earlier = start_spawner()
    with cleaned_up() as leftovers:
        child = spawn(earlier)
        assert leftovers.now() == []
        assert leftovers.after_grace() == []
    assert child.is_running()
    assert child.status() != psutil.STATUS_ZOMBIE  # which is what a killed one is until its parent asks for it


def test_what_a_leftover_starts_is_left_over(start_spawner):
    with cleaned_up() as leftovers:
        later = start_spawner()
        child = spawn(later)
        assert {found.split()[1] for found in leftovers.after_grace()} == {str(later.pid), str(child.pid)}


def test_once_nothing_is_left_nobody_looks_again(monkeypatch):
    seen = iter([["process 1 (sleeping)"], [], ["process 2 (zombie)"]])
    leftovers = Leftovers()
    monkeypatch.setattr(leftovers, "now", lambda: next(seen))
    assert leftovers.after_grace() == []


def test_an_attempt_tells_its_error_with_its_causes():
    def call():
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    attempt = Attempt(call)
    assert attempt.ended_within(5)
    assert attempt.words == "ValueError: outer; from KeyError: 'inner'"
    assert "in call" in attempt.report
    assert not Attempt(lambda: time.sleep(0.5)).ended_within(0.01)
