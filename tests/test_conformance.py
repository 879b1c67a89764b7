"""Every part of every built paper keeps the contract of its kind: each check of each case is one test."""

import jaxtyping
import pytest

from provenn.contracts import checks_of, exclusions_of
from provenn.contracts.collect import every_case, mismatches

CASES = every_case()


def runs():
    for case in CASES:
        for name, check in checks_of(case).items():
            yield pytest.param(check, id=f"{case.name}-{name}")
        for name, reason in exclusions_of(case).items():
            yield pytest.param(None, id=f"{case.name}-{name}", marks=pytest.mark.skip(reason=f"not promised: {reason}"))


@pytest.fixture
def signatures(request, monkeypatch):
    """Signatures stand aside for scikit-learn's own checks, which hand a constructor values of any type on purpose."""
    if request.node.callspec.id.endswith("-scikit_learn"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("check", list(runs()))
@pytest.mark.usefixtures("signatures")
def test_part_keeps_its_contract(check):
    check()


def test_cards_and_cases_agree():
    found = mismatches(CASES)
    assert not found, "\n".join(found)
