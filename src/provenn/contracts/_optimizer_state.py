"""Checks of what an optimizer keeps: resuming, copies, precision, device, memory, and parameters of odd shapes."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from provenn.contracts._optimizer_problem import Problem, advance, state_tensors, take_steps
from provenn.contracts.case import OptimizerCase
from provenn.contracts.suite import expect
from provenn.contracts.watch import is_device_mismatch, plain_signatures, same, seeded


def _resumed(case: OptimizerCase, carry: Callable[[Problem, Optimizer], tuple[Problem, Optimizer]], what: str) -> None:
    """Compare 4 + 4 steps with a break against 8 steps without one."""
    problem = Problem()
    optimizer = case.make(problem.parameters)
    take_steps(case, problem, optimizer, 4)
    other, resumed = carry(problem, optimizer)
    take_steps(case, problem, optimizer, 4, seed=1)
    take_steps(case, other, resumed, 4, seed=1)
    expect(same(problem.values(), other.values()), f"{what} and the uninterrupted run differ after 4 more steps")


def _rebuilt(case: OptimizerCase, problem: Problem, state: dict[str, Any]) -> tuple[Problem, Optimizer]:
    other = Problem()
    for parameter, value in zip(other.parameters, problem.values(), strict=True):
        parameter.data.copy_(value)
    optimizer = case.make(other.parameters)
    optimizer.load_state_dict(state)
    return other, optimizer


def check_resume(case: OptimizerCase) -> None:
    """A new optimizer that loads the state_dict goes on bit by bit as the old one."""
    _resumed(case, lambda p, o: _rebuilt(case, p, copy.deepcopy(o.state_dict())), "the one with the state_dict")


def check_resume_from_file(case: OptimizerCase) -> None:
    """The state_dict survives torch.save and torch.load (weights only)."""

    def carry(problem: Problem, optimizer: Optimizer) -> tuple[Problem, Optimizer]:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        return _rebuilt(case, problem, torch.load(file, weights_only=True))

    _resumed(case, carry, "the one with the saved state_dict")


def check_copies(case: OptimizerCase) -> None:
    """A deep copy and a pickled copy of parameters and optimizer go on bit by bit as the original."""
    _resumed(case, lambda p, o: copy.deepcopy((p, o)), "the deep copy")
    _resumed(case, lambda p, o: pickle.loads(pickle.dumps((p, o))), "the pickled copy")


def check_state_dtype(case: OptimizerCase) -> None:
    """State is kept in the parameter's precision or better, and bfloat16 parameters stay bfloat16, finite, and move."""
    for dtype in (torch.float64, torch.bfloat16):
        problem = Problem(dtype=dtype)
        for parameter in problem.parameters:
            parameter.data.mul_(0.01)  # small numbers, whose neighbours in bfloat16 are nearer than a usual step
        optimizer = case.make(problem.parameters)
        before = problem.values()
        take_steps(case, problem, optimizer, 3)
        bits = torch.finfo(dtype).bits
        low = [t.dtype for t in state_tensors(optimizer) if t.is_floating_point() and t.dim()]
        low = [found for found in low if torch.finfo(found).bits < bits]
        expect(not low, f"state of {dtype} parameters is kept in {low}")
        for parameter, then in zip(problem.parameters, before, strict=True):
            expect(parameter.dtype == dtype, f"{dtype} parameters became {parameter.dtype}")
            expect(parameter.isfinite().all(), f"{dtype} parameters became not finite")
            expect(not same(parameter.detach(), then), f"{dtype} parameters did not move")


def check_device(case: OptimizerCase) -> None:
    """State is on the parameter's device (the GPU, or torch's meta device where there is none); counters may stay."""
    device = "cuda" if torch.cuda.is_available() else "meta"
    problem = Problem()
    problem.parameters = [nn.Parameter(parameter.detach().to(device)) for parameter in problem.parameters]
    optimizer = case.make(problem.parameters)
    with torch.no_grad():
        for parameter in problem.parameters:
            parameter.grad = torch.ones_like(parameter)
    try:
        with seeded(0):
            if case.closure == "required":
                optimizer.step(problem.closure)
            else:
                optimizer.step()
                optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        # values cannot be read on the meta device: a part that reads them is only checked on a GPU
        expect(not is_device_mismatch(error), f"on {device}: {error}")
        return
    away = [t.device for t in state_tensors(optimizer) if t.dim() and t.device.type != device]
    expect(not away, f"the state of parameters on {device} is on {away}")


def check_scalar_parameters(case: OptimizerCase) -> None:
    """0-dimensional parameters step."""
    problem = Problem([()])
    before = problem.values()
    take_steps(case, problem, case.make(problem.parameters), 3)
    after = problem.values()
    expect(after[0].shape == () and after[0].isfinite(), f"a 0-dimensional parameter became {after[0]}")
    expect(not same(after, before), "a 0-dimensional parameter did not move")


def check_empty_parameters(case: OptimizerCase) -> None:
    """Parameters without elements do no harm to the others."""
    problem = Problem([(0, 3), (4, 3)])
    before = problem.values()
    take_steps(case, problem, case.make(problem.parameters), 3)
    after = problem.values()
    expect(after[0].shape == (0, 3), f"the empty parameter has the shape {tuple(after[0].shape)}")
    expect(after[1].isfinite().all(), "the parameter beside an empty one is not finite")
    expect(not same(after[1], before[1]), "the parameter beside an empty one did not move")


def check_complex_parameters(case: OptimizerCase) -> None:
    """Complex parameters are refused by an error that says complex, or descend."""
    problem = Problem([(4, 3)], torch.complex128)
    first = problem.value()
    try:
        take_steps(case, problem, case.make(problem.parameters, **case.quadratic), case.quadratic_steps)
    except (RuntimeError, TypeError, ValueError) as error:
        expect("complex" in str(error).lower(), f"it raised {error}, which does not say complex")
        return
    last = problem.value()
    expect(last <= 0.1 * first, f"|z - target|² went from {first:.3g} to {last:.3g} in {case.quadratic_steps} steps")


def check_in_place(case: OptimizerCase) -> None:
    """Steps change the parameters in place, and leave leaves without a graph."""
    problem = Problem()
    optimizer = case.make(problem.parameters)
    places = [parameter.data_ptr() for parameter in problem.parameters]
    with seeded(0):
        loss = optimizer.step(problem.closure)
    watched = None if loss is None else weakref.ref(loss)
    del loss
    expect(watched is None or watched() is None, "the closure's loss, and so its graph, is kept alive")
    take_steps(case, problem, optimizer, 2)
    expect(places == [parameter.data_ptr() for parameter in problem.parameters], "a parameter has a new storage")
    for parameter in problem.parameters:
        expect(parameter.is_leaf and parameter.requires_grad, "a parameter is no leaf that requires a gradient")
    graphs = [t for t in state_tensors(optimizer) if t.requires_grad and not isinstance(t, nn.Parameter)]
    expect(not graphs, f"{len(graphs)} tensors of the state require a gradient")


@contextlib.contextmanager
def _watching_new_objects() -> Iterator[None]:
    """Trace allocations inside, and let the collector see only the objects that are made inside."""
    tracing = tracemalloc.is_tracing()
    gc.freeze()
    if not tracing:
        tracemalloc.start()
    try:
        yield
    finally:
        if not tracing:
            tracemalloc.stop()
        gc.unfreeze()


# torch's profiling hook around every step leaves small objects of its own, ever fewer, through ``torch.ops``
_NOT_THE_PART = tuple(tracemalloc.Filter(False, module.__file__ or "") for module in (tracemalloc, torch._ops))


LONGEST_WATCH = 10
"""Rounds of 200 steps after which what still grows counts as a leak."""


def _traced_bytes() -> int:
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(_NOT_THE_PART).traces)


def check_memory(case: OptimizerCase) -> None:
    """After the warm-up neither tensors nor Python objects grow with the steps."""
    problem = Problem()
    optimizer = case.make(problem.parameters)
    take_steps(case, problem, optimizer, case.warmup_steps)
    sizes, blocks = [], []
    tensors = objects = 0
    # seeded once, since torch keeps a stack trace of every seeding
    with plain_signatures(), seeded(0), _watching_new_objects():
        for turn in range(LONGEST_WATCH):
            advance(case, problem, optimizer, 200)
            gc.collect()
            sizes.append(sum(o.numel() * o.element_size() for o in gc.get_objects() if type(o) is Tensor))
            blocks.append(_traced_bytes())
            if turn < 3:
                continue
            # A leak grows in every round, by 32 bytes a step for a list of floats. Caches fill now and then, and torch
            # frees some objects unseen by the tracing, which forgets them when their place is taken again: fewer a
            # round, the longer it lasts.
            tensors = min(after - before for before, after in pairwise(sizes))
            objects = min(after - before for before, after in pairwise(blocks))
            if tensors <= 0 and objects < 200 * 16:
                break
    expect(tensors <= 0, f"every 200 steps left {tensors} more bytes in tensors")
    expect(objects < 200 * 16, f"every 200 steps left {objects} more bytes in Python objects")
