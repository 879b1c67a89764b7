"""The file that an interrupted training goes on from: everything that training changes, and the epochs behind it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch: its index from 0, the optimizer steps taken so far, the mean training loss."""

    index: int
    step: int
    loss: float


class Stateful(Protocol):
    """What has a state to save: a module, an optimizer, a scheduler."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def completed(checkpoint: str | Path | None) -> list[Epoch]:
    """Return the epochs that a checkpoint has behind it; none if there is no such file, or ``None`` is given.

    A trainer whose history is to cover the epochs before an interruption starts it with these.

    Args:
        checkpoint: The file that :func:`~provenn.core.experiment.training.train` was given.

    Raises:
        ValueError: The file cannot be read, or is no checkpoint.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return []
    held = _read(Path(checkpoint))
    if not isinstance(held, dict) or "history" not in held:
        raise ValueError(f"checkpoint {str(checkpoint)!r} must hold a history")
    return [Epoch(*one) for one in held["history"]]


def resume(checkpoint: str | Path | None, stateful: Mapping[str, Stateful]) -> list[Epoch]:
    """Load what a checkpoint holds; without a file, check that one can be written there.

    Args:
        checkpoint: The file; ``None``: nothing is kept.
        stateful: What is loaded, by name.

    Returns:
        The epochs behind it.

    Raises:
        ValueError: The file cannot be read, or is of another kind of run.
        OSError: No file can be written there.
    """
    if checkpoint is None:
        return []
    path = Path(checkpoint)
    if not path.exists():
        _check_writable(path)
        return []
    held = _read(path)
    wanted = {*stateful, "history"}
    if not isinstance(held, dict) or set(held) != wanted:
        found = sorted(map(str, held)) if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"checkpoint {str(path)!r} must hold {sorted(wanted)}, got {found}")
    for name, part in stateful.items():
        try:
            part.load_state_dict(held[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {str(path)!r} does not fit the {name}: {error}") from error
    return [Epoch(*one) for one in held["history"]]


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise ValueError(f"checkpoint {str(path)!r} cannot be read; delete it to start afresh: {error}") from error


def _check_writable(path: Path) -> None:
    """Try the checkpoint's folder before an epoch is spent on what cannot be saved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def save(path: Path, stateful: Mapping[str, Stateful], history: Sequence[Epoch]) -> None:
    """Write a checkpoint; the file is replaced at once, so that an interruption leaves the one before.

    Args:
        path: The file; its folder is made if need be.
        stateful: What is saved, by name.
        history: The epochs behind it.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: part.state_dict() for name, part in stateful.items()}
    held["history"] = [(one.index, one.step, one.loss) for one in history]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
