"""Checks of survival data: the error names the argument, and the first bad entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_array
from torch import Tensor


def checked_times(
    T: np.ndarray, event: ArrayLike | None, entry: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return times, events and entries as float64 arrays of one length.

    Raises:
        ValueError: A time is not above 0, an event not 0 or 1, an entry not in [0, T); there is no event; or lengths
            differ.
    """
    T = np.asarray(T, dtype=np.float64)
    event = np.ones_like(T) if event is None else _column("event", event, len(T))
    entry = np.zeros_like(T) if entry is None else _column("entry", entry, len(T))
    _refuse("T", "> 0", T, T > 0)
    _refuse("event", "0 or 1", event, (event == 0) | (event == 1))
    _refuse("entry", "in [0, T)", entry, (entry >= 0) & (entry < T))
    if not event.any():
        raise ValueError("event must be 1 somewhere: all times are censored")
    return T, event, entry


def _column(name: str, given: ArrayLike, length: int) -> np.ndarray:
    column: np.ndarray = check_array(given, ensure_2d=False, dtype=np.float64, input_name=name)
    if column.shape != (length,):
        raise ValueError(f"{name} must have one entry for each of the {length} samples, got shape {column.shape}")
    return column


def _refuse(name: str, wanted: str, values: np.ndarray, good: np.ndarray) -> None:
    if not good.all():
        first = int(np.flatnonzero(~good)[0])
        raise ValueError(f"{name} must be {wanted}, got {values[first]} at sample {first}")


def check_columns(X: np.ndarray, names: Sequence[str]) -> None:
    """Refuse a column without variation, whose coefficient could not be told from the intercept.

    Raises:
        ValueError: There is one; the message names it.
    """
    spread = X.max(axis=0) - X.min(axis=0)
    for name, width in zip(names, spread, strict=True):
        if width == 0:
            raise ValueError(f"X: column {name!r} is constant")


def checked_grid(t: ArrayLike) -> Tensor:
    """Return times to predict for as a tensor of one dimension.

    Raises:
        ValueError: One is not above 0 or not finite.
    """
    times: np.ndarray = np.atleast_1d(np.asarray(t, dtype=np.float64))
    if times.ndim != 1:
        raise ValueError(f"t must be one number or a sequence, got shape {times.shape}")
    _refuse("t", "finite and > 0", times, (times > 0) & np.isfinite(times))
    return torch.from_numpy(times)
