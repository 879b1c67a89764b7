"""Workers, links and the board of progress, each by itself."""

import threading
import time

import pytest
import torch
from core.pipelines.pool_servers import TENSORS, does_not_start, obeys, sends

from provenn.contracts._processes import Leftovers
from provenn.core.pipelines.links import Parcel, QueueLinks, Route
from provenn.core.pipelines.progress import LostStageError, Progress, StageError, Watch
from provenn.core.pipelines.workers import WorkerPool


@pytest.fixture
def nothing_left():
    leftovers = Leftovers()
    yield
    assert not leftovers.after_grace()


def test_parcels_between_processes_arrive_as_they_were(nothing_left):
    pool = WorkerPool(sends, [None, None], 30.0, threads=1)
    traffic, (odd, first, second) = pool.ask([None, None])
    pool.close()
    assert odd.is_tuple
    assert odd.needs_grad == tuple(place % 2 == 0 for place in range(len(TENSORS)))
    for found, wanted in zip(odd.tensors, TENSORS, strict=True):
        if wanted is None:
            assert found is None
        else:
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(found, wanted)
    assert [one.tensors[0].tolist() for one in (first, second)] == [[1.0], [2.0, 2.0]]
    assert traffic.parcels == {Route(0, 1, 0): 2, Route(0, 1, 5): 1}
    assert traffic.bytes[Route(0, 1, 0)] == 4 + 8
    assert traffic.bytes[Route(0, 1, 5)] == sum(one.nbytes for one in TENSORS if one is not None)


def test_a_pool_answers_by_worker_and_closes_twice(nothing_left):
    pool = WorkerPool(obeys, ["a", "b"], 30.0, threads=1)
    answers = pool.ask(["x", "y"])
    assert [answer[:2] for answer in answers] == [("a", "x"), ("b", "y")]
    assert {f"stage {index}": answer[2] for index, answer in enumerate(answers)} == pool.pids
    assert [answer[3] for answer in answers] == [1, 1]
    pool.close()
    pool.close()
    assert pool.closed
    assert pool.pids == {}


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        (["x", "raise"], r"^stage 1 raised KeyError: 'no such thing'"),
        (["exit", "x"], r"^stage 0 \(process \d+\) ended with exit code 3"),
        (["hang", "x"], r"^stage 0 hangs in backward of micro-batch 4: no end within 3 s \(time-out\)"),
        (["exit", 0], r"^stage 0 \(process \d+\) ended with exit code 3"),  # worker 1 waits for it, and is not to blame
        ([1, "raise"], r"^stage 1 raised KeyError"),
        ([1, 0], r"nothing happened in any stage for 3 s \(time-out\)"),
    ],
)
def test_who_is_to_blame_is_named_and_all_are_gone(nothing_left, requests, words):
    pool = WorkerPool(obeys, ["a", "b"], 3.0, threads=1)
    with pytest.raises(StageError, match=words):
        pool.ask(requests)
    assert pool.closed


def test_a_worker_that_does_not_start_is_named(nothing_left):
    with pytest.raises(StageError, match=r"^stage 1 raised OSError: no room"):
        WorkerPool(does_not_start, [None, None], 3.0, threads=1)


def test_queues_keep_order_count_and_can_be_cut():
    first, second = Route(0, 1, 0), Route(0, 1, 1)
    links = QueueLinks([first, second])
    for value in (1.0, 2.0):
        links.send(first, Parcel((torch.tensor([value]), None)))
    links.send(second, Parcel((torch.zeros(3),)))
    assert [links.receive(first).tensors[0].item() for _ in range(2)] == [1.0, 2.0]
    assert links.traffic.bytes == {first: 8, second: 12}
    ended = []

    def wait():
        with pytest.raises(LostStageError, match="stage 1 lost stage 0"):
            links.receive(first)
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    links.cut()
    thread.join(20)
    assert ended
    with pytest.raises(LostStageError):  # although there is a parcel
        links.receive(second)


def test_progress_keeps_a_watch_alive_and_blames_who_works():
    progress = Progress(3)
    watch = Watch(progress, 0.3)
    for turn in range(4):
        time.sleep(0.1)
        with progress.task(turn % 3, "forward", turn):
            assert progress.doing(turn % 3) == f"forward of micro-batch {turn}"
        assert watch.left() == pytest.approx(0.3, abs=0.05)
    with progress.task(2, "recompute", 5), progress.task(1, "backward", 7):
        watch.left()
        time.sleep(0.35)
        with pytest.raises(StageError, match=r"^stage 2 hangs in recompute of micro-batch 5: .*stage 1 too") as caught:
            watch.left()
    assert caught.value.stage == 2
    assert progress.doing(1) == ""
