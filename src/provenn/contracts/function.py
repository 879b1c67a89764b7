"""The suite of plain functions and classes: the common checks alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from provenn.contracts.case import FunctionCase
from provenn.contracts.suite import check_part


def exercise(case: FunctionCase) -> Callable[[], object]:
    """Return the case's call."""
    return case.call


CHECKS: dict[str, Callable[[FunctionCase], None]] = {}


def check_function(case_or_call: FunctionCase | Callable[[], object], **options: Any) -> None:
    """Hold a plain function or class to the common checks.

    Args:
        case_or_call: A case, or what uses the part once; then ``part="dotted.name"`` comes with the options.
        **options: Fields of :class:`~provenn.contracts.FunctionCase`.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(FunctionCase, case_or_call, options)
