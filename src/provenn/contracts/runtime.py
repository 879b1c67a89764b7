"""The suite of runtimes: the numbers of plain execution, and an orderly end whatever fails."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from provenn.contracts import _processes as processes
from provenn.contracts._processes import Attempt, HangingStage, Leftovers, RaisingStage, cleaned_up, wait_until
from provenn.contracts.case import Inputs
from provenn.contracts.cases_results import RuntimeCase
from provenn.contracts.suite import ContractError, check_part, expect
from provenn.contracts.watch import error_between, generator, mapped, same, seeded, tensors_in

STEPS = 3


def _plain(case: RuntimeCase) -> nn.Module:
    with seeded(0):
        return case.plain()


def _inputs(case: RuntimeCase, seed: int = 0) -> Inputs:
    return case.inputs(generator(seed))


def _detached(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor.detach().clone())


def _steps(case: RuntimeCase, seeds: range | tuple[int, ...]) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """Make a runtime, take a step for every seed, and close it."""
    with cleaned_up():
        runtime = case.make(_plain(case))
        try:
            found = []
            for seed in seeds:
                with seeded(0):
                    output, gradients = case.step(runtime, _inputs(case, seed))
                found.append((_detached(tensors_in(output)), _detached(dict(gradients))))
            return found
        finally:
            case.close(runtime)


def _plain_steps(case: RuntimeCase, seeds: range) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    module, found = _plain(case), []
    for seed in seeds:
        with seeded(0):
            output, gradients = case.plain_step(module, _inputs(case, seed))
        found.append((_detached(tensors_in(output)), _detached(dict(gradients))))
    return found


def exercise(case: RuntimeCase) -> Callable[[], object]:
    """Return a call that builds the runtime, takes a step, and closes it."""
    module, inputs = _plain(case), _inputs(case)

    def act() -> None:
        runtime = case.make(module)
        try:
            case.step(runtime, inputs)
        finally:
            case.close(runtime)

    return act


def check_forward(case: RuntimeCase) -> None:
    """Outputs equal those of the plain module, step after step on other inputs."""
    pairs = zip(_steps(case, range(STEPS)), _plain_steps(case, range(STEPS)), strict=True)
    for step, (found, wanted) in enumerate(pairs):
        expect(wanted[0], "the plain module's output holds no tensor")
        error = error_between(found[0], wanted[0])
        expect(error <= case.tolerance, f"in step {step + 1} they differ by {error:.3g}")


def check_backward(case: RuntimeCase) -> None:
    """Gradients equal those of the plain module, under the same names, step after step."""
    pairs = zip(_steps(case, range(STEPS)), _plain_steps(case, range(STEPS)), strict=True)
    for step, (found, wanted) in enumerate(pairs):
        expect(wanted[1], "the plain module has no gradients")
        expect(found[1].keys() == wanted[1].keys(), f"gradients of {sorted(found[1])}, wanted {sorted(wanted[1])}")
        for name, gradient in wanted[1].items():
            error = error_between(found[1][name], gradient)
            expect(error <= case.tolerance, f"in step {step + 1} the gradient of {name} differs by {error:.3g}")


def check_repeat(case: RuntimeCase) -> None:
    """The same inputs give the same numbers bit by bit, whatever was computed between."""
    first, _, again = _steps(case, (0, 1, 0))
    expect(same(first, again), "a second time they differ")


def check_close(case: RuntimeCase) -> None:
    """When it is closed, once or twice, no process, no listening port and no thread is left."""
    with cleaned_up() as leftovers:
        runtime = case.make(_plain(case))
        case.step(runtime, _inputs(case))
        expect(case.workers is None or case.workers(runtime), "the case finds no workers in a running runtime")
        case.close(runtime)
        _expect_nothing_left(leftovers, "after close")
        case.close(runtime)


def _expect_nothing_left(leftovers: Leftovers, when: str) -> None:
    found = leftovers.after_grace()
    expect(not found, f"{when} there is left: {', '.join(found)}")


def _faulty(case: RuntimeCase, stage: nn.Module) -> Any:
    if case.faulty is None:
        raise ContractError("the case has no faulty; exclude this check with a reason if it runs no user's modules")
    return case.faulty(stage)


def _expect_error(attempt: Attempt, seconds: float, what: str) -> None:
    expect(attempt.ended_within(seconds), f"{what}: no error within {seconds:g} s; the step hangs")
    expect(attempt.error is not None, f"{what}: the step ended as if nothing had happened")


def check_stage_raises(case: RuntimeCase) -> None:
    """An error in a stage reaches the caller with its message and its traceback, and leaves nothing behind."""
    with cleaned_up() as leftovers:
        runtime = _faulty(case, RaisingStage())
        attempt = Attempt(lambda: case.step(runtime, _inputs(case)))
        _expect_error(attempt, processes.START + case.timeout, "a stage raised")
        for words in ("the stage failed on purpose", "fails_on_purpose"):
            expect(words in attempt.report, f"{words!r} is not in the error: {attempt.report.strip()[-300:]}")
        case.close(runtime)
        _expect_nothing_left(leftovers, "after a stage raised")


def check_stage_hangs(case: RuntimeCase) -> None:
    """A stage that hangs ends the step in an error that speaks of time, at the time-out, and leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder, cleaned_up() as leftovers:
        runtime, attempt = _hanging(case, Path(folder, "started"))
        _expect_error(attempt, case.timeout + processes.GRACE, "a stage hangs")
        spoken = re.search(r"time|\d ?s\b|second", attempt.words, re.IGNORECASE)
        expect(spoken, f"the error does not speak of time: {attempt.words}")
        case.close(runtime)
        _expect_nothing_left(leftovers, "after a stage hung")


def _hanging(case: RuntimeCase, started: Path) -> tuple[Any, Attempt]:
    """Return a runtime and its step, which is in a stage that hangs."""
    runtime = _faulty(case, HangingStage(started))
    attempt = Attempt(lambda: case.step(runtime, _inputs(case)))
    reached = wait_until(lambda: started.exists() or attempt.ended_within(0), processes.START)
    expect(reached and started.exists(), f"the case's faulty stage was not reached: {attempt.words or 'no error'}")
    return runtime, attempt


def check_worker_killed(case: RuntimeCase) -> None:
    """A worker that is killed, in a step or between two, ends in an error that names it, in time; nothing is left."""
    if case.workers is None:
        raise ContractError("the case has no workers; exclude this check with a reason if there are none")
    for position in (0, -1):
        with tempfile.TemporaryDirectory() as folder, cleaned_up() as leftovers:
            runtime, attempt = _hanging(case, Path(folder, "started"))
            name = _kill(case, runtime, position)
            _expect_named(case, attempt, f"{name} was killed in a step", name)
            case.close(runtime)
            _expect_nothing_left(leftovers, f"after {name} was killed in a step")
        with cleaned_up() as leftovers:
            runtime = case.make(_plain(case))
            case.step(runtime, _inputs(case))
            name = _kill(case, runtime, position)
            attempt = Attempt(lambda runtime=runtime: case.step(runtime, _inputs(case)))  # type: ignore[misc]
            _expect_named(case, attempt, f"{name} was killed between steps", name)
            case.close(runtime)
            _expect_nothing_left(leftovers, f"after {name} was killed between steps")


def _kill(case: RuntimeCase, runtime: Any, position: int) -> str:
    """Kill a worker without warning, and return its name."""
    workers = case.workers(runtime) if case.workers else {}
    expect(workers, "the case finds no workers in a running runtime")
    name, pid = list(workers.items())[position]
    os.kill(pid, signal.SIGKILL)
    return name


def _expect_named(case: RuntimeCase, attempt: Attempt, what: str, name: str) -> None:
    _expect_error(attempt, case.timeout + processes.GRACE, what)
    named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", attempt.words)
    expect(named, f"{what}: the error does not name it: {attempt.words}")


CHECKS: dict[str, Callable[[RuntimeCase], None]] = {
    "forward": check_forward,
    "backward": check_backward,
    "repeat": check_repeat,
    "close": check_close,
    "stage_raises": check_stage_raises,
    "stage_hangs": check_stage_hangs,
    "worker_killed": check_worker_killed,
}


def check_runtime(case_or_make: RuntimeCase | Callable[[nn.Module], Any], **options: Any) -> None:
    """Hold a runtime to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the runtime over a module; then ``plain`` and ``inputs`` come with the
            options.
        **options: Fields of :class:`~provenn.contracts.RuntimeCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(RuntimeCase, case_or_make, options)
