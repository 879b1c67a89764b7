"""Argument checks: one line at the call, and an error that names the argument and the value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is of an abstract number type, NumPy's scalars included; a bool is no number here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check that an argument is a finite number within bounds.

    Args:
        name: The argument's name, as the caller wrote it.
        value: What was given.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.

    Raises:
        TypeError: ``value`` is not a real number: a bool, a string, a tensor.
        ValueError: ``value`` is NaN, infinite or out of bounds.
    """
    if not _is_a(numbers.Real, value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    asked = {
        "> {}": (above, operator.gt),
        "≥ {}": (at_least, operator.ge),
        "< {}": (below, operator.lt),
        "≤ {}": (at_most, operator.le),
    }
    bounds = [(words.format(bound), bound, holds) for words, (bound, holds) in asked.items() if bound is not None]
    if not (_is_finite(value) and all(holds(value, bound) for _, bound, holds in bounds)):
        wanted = " and ".join(words for words, _, _ in bounds)
        raise ValueError(f"{name} must be a finite number {wanted}".rstrip() + f", got {value!r}")


def _is_finite(value: Any) -> bool:
    return bool(-math.inf < value < math.inf)  # unlike math.isfinite for any integer, and where torch.compile traces


def check_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> None:
    """Check that an argument is an integer within bounds.

    Args:
        name: The argument's name, as the caller wrote it.
        value: What was given.
        at_least: Inclusive lower bound.
        at_most: Inclusive upper bound.

    Raises:
        TypeError: ``value`` is not an integer: a bool, 1.0.
        ValueError: ``value`` is out of bounds.
    """
    if not _is_a(numbers.Integral, value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    check_number(name, value, at_least=at_least, at_most=at_most)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that an argument is one of a few values.

    Args:
        name: The argument's name, as the caller wrote it.
        value: What was given.
        choices: The values that are allowed.

    Raises:
        ValueError: It is not; the message lists them.
    """
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_one_kind(name: str, tensors: Iterable[Any]) -> None:
    """Check that tensors are real floating-point, of one type and on one device, so that they make up one vector.

    Args:
        name: The argument's name, as the caller wrote it.
        tensors: What was given; none at all will do.

    Raises:
        TypeError: One is complex or of integers, or they differ in type.
        ValueError: They are on several devices.
    """
    given = list(tensors)
    for tensor in given:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be real floating-point (complex ones are not supported), got {tensor.dtype}")
    dtypes = {tensor.dtype for tensor in given}
    if len(dtypes) > 1:
        raise TypeError(f"{name} must share one type, got {', '.join(sorted(map(str, dtypes)))}")
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        raise ValueError(f"{name} must share one device, got {', '.join(sorted(map(str, devices)))}")
