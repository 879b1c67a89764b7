"""What happens when a stage raises, hangs or is killed: an error that names it in time, and nothing left behind."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from runtime.pipeline_networks import RELEASED, Hang, Raise, inputs, network
from torch import nn

from provenn.contracts._processes import Leftovers, wait_until
from provenn.runtime import GPipe
from provenn.runtime.gpipe import StageError

LONG = 25.0  # far beyond the time-outs here, and less than what a hanging stage sleeps
X = torch.ones(6, 3)
# The first backward pass of a process imports much, for longer than the time-outs here.
(torch.ones((), requires_grad=True) * 2).backward()


def three_stages(middle, **options):
    layers = nn.Sequential(nn.Linear(3, 3), middle, nn.Linear(3, 3))
    return GPipe(layers, [1, 1, 1], **{"chunks": 3, "timeout": 3.0, "checkpoint": "always", **options})


def run(pipe):
    pipe(X).sum().backward()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
def test_a_stage_that_raises_is_named_with_its_traceback(backend, where):
    leftovers = Leftovers()
    pipe = three_stages(Raise(where), backend=backend)
    with pytest.raises(StageError, match=r"^stage 1 raised ValueError: broken on purpose") as caught:
        run(pipe)
    assert caught.value.stage == 1
    caught.match("broken on purpose")
    cause = caught.value.__cause__
    if backend == "process":
        assert "in breaks" in str(cause) or "in backward" in str(cause)
    else:
        assert isinstance(cause, ValueError)
        frames = []
        trace = cause.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert frames[-1] == ("breaks" if where == "forward" else "backward")
    assert not leftovers.after_grace()


@pytest.mark.parametrize("backend", ["serial", "thread"])
def test_a_pipeline_in_one_process_works_on_after_an_error(backend):
    middle = Raise("forward")
    pipe = three_stages(middle, backend=backend)
    with pytest.raises(StageError):
        run(pipe)
    assert all(not worker.stage._kept for worker in pipe._engine._workers)
    middle.where = "nowhere"
    middle.forward = lambda x: x * 1
    run(pipe)
    assert pipe.state_dict()["0.weight"].shape == (3, 3)
    assert all(one.grad is not None for one in pipe.parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_stage_that_hangs_is_named_in_time(backend, where):
    RELEASED.clear()
    leftovers = Leftovers()
    pipe = three_stages(Hang(where), backend=backend, checkpoint="never")
    start = time.monotonic()
    with pytest.raises(StageError, match=rf"^stage 1 hangs in {where} of micro-batch \d: .*3 s \(time-out\)"):
        run(pipe)
    assert time.monotonic() - start < LONG
    if backend == "process":
        assert not leftovers.after_grace()
    else:  # the others' threads are gone at once; that one is a daemon
        left = [thread for thread in threading.enumerate() if thread.name.startswith("stage ")]
        assert [thread.name for thread in left] == ["stage 1"]
        assert left[0].daemon
        with pytest.raises(StageError, match="stage 1 still hangs"):
            pipe(X)
        RELEASED.set()
        left[0].join(LONG)
        assert not leftovers.after_grace()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_killed_worker_is_named_in_a_step_and_between_steps(stage):
    leftovers = Leftovers()
    for between in (True, False):
        pipe = three_stages(nn.Tanh() if between else Hang("backward"), backend="process", timeout=20.0)
        y = pipe(X)
        if between:
            y.sum().backward()
            os.kill(pipe.workers[f"stage {stage}"], signal.SIGKILL)
        else:
            pids = pipe.workers
            threading.Timer(1.0, os.kill, (pids[f"stage {stage}"], signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(StageError, match=rf"^stage {stage} \(process \d+\) was killed by signal 9"):
            run(pipe) if between else y.sum().backward()
        assert time.monotonic() - start < 19.0
        assert pipe.workers == {}
        with pytest.raises(RuntimeError, match=rf"no workers: stage {stage} "):
            pipe(X)
        pipe.close()
        assert not leftovers.after_grace()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_worker_that_stops_outside_of_its_tasks_is_named(stage):
    leftovers = Leftovers()
    pipe = three_stages(nn.Tanh(), backend="process")
    x = torch.ones(30_000, 3)  # more than a pipe holds: who sends it must not hang
    pipe(x).sum().backward()
    os.kill(pipe.workers[f"stage {stage}"], signal.SIGSTOP)
    with pytest.raises(StageError, match=rf"^stage {stage} takes up no task: .* 3 s \(time-out\)"):
        pipe(x)
    assert pipe.workers == {}
    assert not leftovers.after_grace()


def test_workers_end_with_their_pipeline_and_with_close():
    leftovers = Leftovers()
    pipe = GPipe(network(), [2, 3], chunks=2, backend="process")
    pipe(*inputs(torch.Generator().manual_seed(0)))
    assert list(pipe.workers) == ["stage 0", "stage 1"]
    assert all(psutil.pid_exists(pid) for pid in pipe.workers.values())
    del pipe
    gc.collect()
    assert not leftovers.after_grace()
    pipe = GPipe(network(), [2, 3], chunks=2, backend="process")
    pipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipe(*inputs(torch.Generator().manual_seed(0)))


SCRIPT = """
import os, sys, time
import torch
from torch import nn
from provenn.runtime import GPipe

if __name__ == "__main__":
    pipe = GPipe(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [1, 1], chunks=2, backend="process")
    pipe(torch.ones(4, 2)).sum().backward()
    print(*pipe.workers.values(), flush=True)
    if sys.argv[1] == "wait":
        time.sleep(100)
"""


@pytest.mark.parametrize("how", ["wait", "leave"])
def test_workers_end_when_their_parent_does(how, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if how == "wait":
        parent.kill()
    parent.wait(30)
    parent.stdout.close()
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 20)


def test_workers_listen_on_the_loopback_interface_alone():
    pipe = GPipe(network(), [2, 3], chunks=2, backend="process")
    pipe(*inputs(torch.Generator().manual_seed(0)))
    listening = [
        one.laddr.ip
        for pid in pipe.workers.values()
        for one in psutil.Process(pid).net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    ]
    pipe.close()
    assert all(ip.startswith("127.") or ip == "::1" for ip in listening)
    assert socket.gethostname()
