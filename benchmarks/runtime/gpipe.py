"""GPipe against torch's own schedule: gradients, steps by turns, bubbles of fixed costs, and memory of a stage."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from benchmarks.timing import alternate
from provenn.claims.runtime._gpipe_networks import FixedCost, mixer
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.pipelines.links import Parcel
from provenn.core.pipelines.progress import Progress
from provenn.core.pipelines.workers import Handler, WorkerPool
from provenn.runtime import GPipe, optimal_partition, pipeline_report
from provenn.runtime._gpipe_stage import Call, Stage

BATCH, CHUNKS, STAGES, WIDTH, ROUNDS = 64, 8, 2, 128, 5


def measure() -> dict[str, Any]:
    """Compare gradients and the time of a step, then measure bubbles, memory and growth."""
    torch.manual_seed(0)
    module = mixer(8, WIDTH)
    x, y = torch.randn(BATCH, 64), torch.randint(0, 10, (BATCH,))
    plain, theirs = copy.deepcopy(module), copy.deepcopy(module)
    wanted = _gradients(plain, x, y)
    ours = GPipe(module, [5, 5], CHUNKS, checkpoint="never", backend="process")
    peer = WorkerPool(_serve_peer, [(theirs[:5], theirs[5:])[stage] for stage in range(STAGES)], 300.0, threads=1)
    try:
        found, of_peer = _gradients(ours, x, y), _peer_step(peer, x, y, gradients=True)
        difference = _largest_difference(found, of_peer)
        to_plain = _largest_difference(found, wanted)
        times = alternate(
            {
                "ours": lambda: _gradients(ours, x, y),
                "peer": lambda: _peer_step(peer, x, y, gradients=False),
            },
            rounds=ROUNDS,
        )
    finally:
        ours.close()
        peer.close()
    return {
        "peer": "torch.distributed.pipelining.ScheduleGPipe, two processes over gloo",
        "agrees": difference <= 1e-6 and to_plain <= 1e-6,
        "largest_difference": difference,
        "largest_difference_to_one_process": to_plain,
        "speed_ratio": times["peer"] / times["ours"],
        "bubbles": _bubbles(),
        "stage_memory": _memory(),
        "growth": _growth(),
        "not_compared": "torchgpipe, which needs CUDA devices and is no longer released",
    }


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return [one.grad for one in model.parameters() if one.grad is not None]


def _largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def _serve_peer(index: int, layers: nn.Sequential, progress: Progress) -> Handler:
    """Set up torch's own pipeline in a worker, and return what takes a step of it."""
    stage = PipelineStage(layers, index, STAGES, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, CHUNKS, loss_fn=nn.functional.cross_entropy)

    def step(request: tuple[Tensor, Tensor, bool]) -> list[Tensor]:
        x, y, gradients = request
        layers.zero_grad()
        with progress.task(index, "forward", 0):
            if index == 0:
                schedule.step(x)
            else:
                schedule.step(target=y)
        return [one.grad for one in layers.parameters() if one.grad is not None] if gradients else []

    return step


def _peer_step(pool: WorkerPool, x: Tensor, y: Tensor, gradients: bool) -> list[Tensor]:
    return [one for answer in pool.ask([(x, y, gradients)] * STAGES) for one in answer]


def _bubbles(seconds: float = 0.2, repeats: int = 3) -> dict[str, Any]:
    """Measure stages of a fixed cost, really run: the share of idle time over (K − 1)/(M + K − 1).

    The median of the repeats, and the least: a busy machine wakes sleepers late, which widens bubbles and never narrows
    them.
    """
    found: dict[str, Any] = {}
    for backend in ("thread", "process"):
        for k, m in ((2, 4), (4, 8)):
            layers = nn.Sequential(*(FixedCost(seconds) for _ in range(k)))
            pipe = GPipe(layers, [1] * k, m, checkpoint="never", backend=backend)
            timelines = []
            for _ in range(repeats + 1):
                pipe(torch.ones(m, 4)).sum().backward()
                timelines.append(pipe.timeline())
            pipe.close()
            theory, bubbles = timelines[0].theory, [one.bubble for one in timelines[1:]]
            found[f"{backend}, K={k}, M={m}"] = {
                "theory": theory,
                "median over theory": statistics.median(bubbles) / theory,
                "least over theory": min(bubbles) / theory,
            }
    return found


def _memory(n: int = 16, k: int = 4, samples: int = 64, width: int = 64) -> dict[str, Any]:
    """Measure the most activations that one stage holds, in outputs of a layer for the whole mini-batch.

    Every layer keeps one tensor, the output of its tanh: a plain network holds n, a stage without recomputation n/K,
    and one with it 1 for its inputs and (n/K)/M for the micro-batch at hand; each beside its input and, for one
    micro-batch, three tensors that come and go.
    """
    found = {"plain, n=16": _peak(n, samples, width, 1, 0)}
    for m in (1, 4, 8, 32):
        found[f"stage of n/K=4, M={m}, recomputed"] = _peak(n // k, samples, width, m, m)
    found["stage of n/K=4, M=8, kept"] = _peak(n // k, samples, width, 8, 0)
    return found


def _peak(layers: int, samples: int, width: int, m: int, checkpointed: int) -> float:
    stage = Stage(0, nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))), 1)
    stage.layers.requires_grad_(False)  # the gradients of parameters are no activations
    call, x = Call(0, m, checkpointed, 0, grad=True), torch.ones(samples, width)
    with TensorMemory() as memory:
        for i, part in enumerate(x.chunk(m)):
            stage.forward(call, i, Parcel((part.clone(),), (True,)))
        for i in reversed(range(m)):
            if i < checkpointed:
                stage.recompute(call, i, False)
            stage.backward(call, i, [torch.ones(samples // m, width)])
    return memory.peak / (samples * width * 4)


def _growth() -> dict[str, float]:
    few, many = (_seconds(lambda m=m: pipeline_report([1.0] * 16, m, 8)) for m in (64, 512))
    short, long = (_seconds(lambda n=n: optimal_partition([1.0] * n, 8)) for n in (100, 400))
    return {"simulated micro-batches ×8, time ×": many / few, "layers to cut ×4, time ×": long / short}


def _seconds(function: Any) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
