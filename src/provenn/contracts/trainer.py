"""The suite of trainers: seeds, progress, and training that goes on after an interruption as if there had been none."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.contracts.cases_training import TrainerCase
from provenn.contracts.suite import ContractError, check_part, expect
from provenn.contracts.watch import generator, mapped, same, seeded, tensors_in


class _InterruptionError(Exception):
    """Raised where a trainer reports its progress."""


@dataclass(frozen=True)
class _Run:
    """A finished training: its history, what was trained, what was reported, and the model that was handed in."""

    history: Sequence[Any]
    trained: Any
    reports: list[Any]
    model: Any


def _model(case: TrainerCase) -> nn.Module | None:
    with seeded(0):
        return None if case.model is None else case.model()


def _values(trained: Any) -> Any:
    return dict(trained.state_dict()) if isinstance(trained, nn.Module) else trained


def _train(
    case: TrainerCase,
    *,
    seed: int = 0,
    outside: int = 0,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    on_report: Callable[[], object] = lambda: None,
) -> _Run:
    """Train from the start, or from the checkpoint; ``outside`` seeds torch's global generator.

    Raises:
        _InterruptionError: ``stop_after`` rounds were reported.
    """
    model = _model(case)
    if model is not None:
        model.to(device, dtype)
    data = mapped(case.data(generator(1)), lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))
    reports: list[Any] = []

    def progress(record: Any) -> None:
        reports.append(record)
        on_report()
        if len(reports) == stop_after:
            raise _InterruptionError

    with seeded(outside):
        trainer = case.make(model, seed)
        result = case.fit(trainer, data, checkpoint, progress)
    return _Run(copy.deepcopy(case.history(result)), _values(case.trained(trainer, result)), reports, model)


def exercise(case: TrainerCase) -> Callable[[], object]:
    """Return a call that builds the trainer and trains."""
    model, data = _model(case), case.data(generator(1))
    return lambda: case.fit(case.make(model, 0), data, None, lambda record: None)


def _expect_equal(one: _Run, other: _Run, between: str) -> None:
    if not same(one.history, other.history):
        raise ContractError(f"the histories of {between} differ{_where(one.history, other.history)}")
    expect(same(one.trained, other.trained), f"what was trained differs between {between}, though the histories agree")


def _where(one: Sequence[Any], other: Sequence[Any]) -> str:
    if len(one) != len(other):
        return f": {len(one)} and {len(other)} records"
    first = next(index for index, pair in enumerate(zip(one, other, strict=True)) if not same(*pair))
    return f" from round {first + 1}: {one[first]} and {other[first]}"


def check_history(case: TrainerCase) -> None:
    """The result has a history with one record a round, and something that was trained."""
    run = _train(case)
    sequence = isinstance(run.history, Sequence) and not isinstance(run.history, str)
    expect(sequence, f"the history is a {type(run.history).__name__}, which is no sequence")
    expect(len(run.history) == case.rounds, f"the history has {len(run.history)} records of {case.rounds} rounds")
    expect(tensors_in(run.trained), "there are no tensors in what was trained")
    expect(all(t.isfinite().all() for t in tensors_in(run.trained)), "what was trained is not finite")


def check_seed(case: TrainerCase) -> None:
    """The same seed gives the same history and the same weights bit by bit, whatever torch's global seed."""
    run = _train(case, outside=1)
    _expect_equal(run, _train(case, outside=1), "two runs with one seed")
    _expect_equal(run, _train(case, outside=2), "two runs that differ in torch's global seed")


def check_random(case: TrainerCase) -> None:
    """Another seed gives another history."""
    expect(not same(_train(case, seed=0).history, _train(case, seed=1).history), "two seeds gave the same history")


class _Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def check_progress(case: TrainerCase) -> None:
    """Progress is reported once after every round, with a record, while the training is under way."""
    with _Operations() as operations:
        seen = [operations.total]
        run = _train(case, on_report=lambda: seen.append(operations.total))
    expect(len(run.reports) == case.rounds, f"{len(run.reports)} reports of {case.rounds} rounds")
    expect(all(record is not None for record in run.reports), "a report has no record")
    idle = [index + 1 for index, (before, after) in enumerate(pairwise(seen)) if before == after]
    expect(not idle, f"nothing was computed between the report before and report {idle}: they come afterwards")


def check_resume(case: TrainerCase) -> None:
    """Interrupted and resumed, it gives the uninterrupted result bit by bit, and repeats no round that was saved."""
    expect(case.rounds >= 3, f"the case has {case.rounds} rounds; 3 are needed")
    whole = _train(case)
    for stop in sorted({1, case.rounds // 2, case.rounds - 1, case.rounds}):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, "checkpoint")
            try:
                _train(case, checkpoint=checkpoint, stop_after=stop)
            except _InterruptionError:
                expect(any(Path(folder).iterdir()), f"after {stop} rounds there is no checkpoint")
            else:
                raise ContractError(f"an error raised in report {stop} did not reach the caller")
            resumed = _train(case, outside=1, checkpoint=checkpoint)
        _expect_equal(resumed, whole, f"a run interrupted after round {stop} and the uninterrupted one")
        expected = case.rounds - stop
        repeated = len(resumed.reports)
        expect(repeated == expected, f"interrupted after round {stop}, it did {repeated} more rounds, not {expected}")


def check_checkpoint_alone(case: TrainerCase) -> None:
    """Training with a checkpoint gives the same as training without one."""
    with tempfile.TemporaryDirectory() as folder:
        _expect_equal(_train(case, checkpoint=Path(folder, "checkpoint")), _train(case), "runs with and without one")


def check_data_untouched(case: TrainerCase) -> None:
    """The data are left as they were given."""
    data = case.data(generator(1))

    def seen() -> list[tuple[Tensor, bool, bool]]:
        return [(t.detach().clone(), t.requires_grad, t.is_leaf and t.grad is not None) for t in tensors_in(data)]

    before = seen()
    with seeded(0):
        case.fit(case.make(_model(case), 0), data, None, lambda record: None)
    expect(same(before, seen()), "a tensor of the data changed")


def check_device_and_dtype(case: TrainerCase) -> None:
    """The model keeps its device and dtype, and so does what is trained: in double precision, and on a GPU if any."""
    expect(case.model is not None, "the case has no model; exclude this check if the trainer makes its own")
    usual = [t.dtype for t in tensors_in(_train(case).trained)]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        run = _train(case, dtype=torch.float64, device=device)
        trained = {f"trained tensor {index}": t for index, t in enumerate(tensors_in(run.trained))}
        handed = {f"{name} of the model": t for name, t in run.model.state_dict().items()}
        away = [name for name, t in {**handed, **trained}.items() if t.device.type != device]
        expect(not away, f"{', '.join(away)} left {device}")
        narrow = [name for name, t in handed.items() if t.is_floating_point() and t.dtype != torch.float64]
        for (name, t), dtype in zip(trained.items(), usual, strict=True):
            narrow += [name] if dtype == torch.float32 and t.dtype != torch.float64 else []
        expect(not narrow, f"given float64, {', '.join(narrow)} are not")


CHECKS: dict[str, Callable[[TrainerCase], None]] = {
    "history": check_history,
    "seed": check_seed,
    "random": check_random,
    "progress": check_progress,
    "resume": check_resume,
    "checkpoint_alone": check_checkpoint_alone,
    "data_untouched": check_data_untouched,
    "device_and_dtype": check_device_and_dtype,
}


def check_trainer(case_or_make: TrainerCase | Callable[[Any, int], Any], **options: Any) -> None:
    """Hold a trainer to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the trainer over a model with a seed; then ``data`` and ``rounds`` come
            with the options.
        **options: Fields of :class:`~provenn.contracts.TrainerCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(TrainerCase, case_or_make, options)
