"""Helpers: broken parts, each registered against the check that must catch it."""

import pytest

from provenn.contracts import ContractError, checks_of
from provenn.contracts.common import CHECKS as COMMON
from provenn.contracts.suite import table_of

DOCUMENTED_ELSEWHERE = {"docstring": "documented in another project's style"}


def own_checks(kind):
    """The names of a kind's checks beside the common ones."""
    return set(table_of(kind)) - set(COMMON)


def good_runs(*cases):
    """Every check of good parts, one test each."""
    return [pytest.param(run, id=f"{case.name}-{name}") for case in cases for name, run in checks_of(case).items()]


def broken_runs(broken):
    """Every broken part, one test each: ``broken`` maps a check's name to cases that it must catch."""
    return [
        pytest.param(name, case, id=f"{name}-{case.label or position}")
        for name, cases in broken.items()
        for position, case in enumerate(cases)
    ]


def assert_caught(name, case):
    """The check fails, and its message names the part and the check, and says what was promised and seen."""
    with pytest.raises(ContractError) as caught:
        checks_of(case)[name]()
    message = str(caught.value)
    assert case.name in message
    assert repr(name) in message
    promised, _, seen = message.partition(" Seen: ")
    assert len(promised.split("promised: ")[1]) > 10
    assert len(seen) > 10
