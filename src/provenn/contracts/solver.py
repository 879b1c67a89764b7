"""The suite of solvers: known answers, certificates recomputed, and refusals that name the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from provenn.contracts._reports import expect_close
from provenn.contracts.cases_results import RefusedProblem, SolverCase
from provenn.contracts.suite import ContractError, check_part, expect
from provenn.contracts.watch import differences, plain_signatures, same, seeded


def _solve(case: SolverCase, problem: Any, *, outside: int = 0, **overrides: Any) -> Any:
    """Solve with torch's global generator seeded by ``outside``."""
    with seeded(outside):
        return case.solve(case.make(**overrides), problem)


def exercise(case: SolverCase) -> Callable[[], object]:
    """Return a call that solves the first known problem."""
    problem = case.known[0].problem()
    return lambda: case.solve(case.make(), problem)


def check_known_answers(case: SolverCase) -> None:
    """Problems with known answers, degenerate ones too, are solved to the stated tolerance."""
    expect(case.known, "the case knows no answer")
    for known in case.known:
        answer = case.answer(_solve(case, known.problem()))
        expect_close(known.name, _plain(answer), _plain(known.answer()), known.tolerance)


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _expect_certificate(case: SolverCase, name: str, problem: Any, solution: Any) -> None:
    """Expect every field that can be recomputed in the certificate, with the value found here."""
    wanted = case.certificate(problem, solution)
    expect(wanted, "the case recomputes no field of the certificate")
    certificate = case.read_certificate(solution)
    for field, value in wanted.items():
        expect(hasattr(certificate, field), f"{name}: the certificate has no {field!r}")
        expect_close(f"{name}: {field}", _plain(getattr(certificate, field)), _plain(value), case.tolerance)


def check_certificate(case: SolverCase) -> None:
    """The certificate says of every known problem's solution what is found here from problem and answer alone."""
    for known in case.known:
        problem = known.problem()
        _expect_certificate(case, known.name, problem, _solve(case, problem))


def check_converged(case: SolverCase) -> None:
    """Every known problem counts as solved."""
    missed = [known.name for known in case.known if not case.converged(_solve(case, known.problem()))]
    expect(not missed, f"{', '.join(missed)} did not converge")


def check_early_stop(case: SolverCase) -> None:
    """Stopped early, the solver says so, and the certificate tells how far it got."""
    expect(case.early_stop, "the case has no early_stop; exclude this check with a reason if it never stops early")
    known = case.known[0]
    problem = known.problem()
    solution = _solve(case, problem, **case.early_stop)
    _expect_certificate(case, known.name, problem, solution)
    expect(not case.converged(solution), f"with {dict(case.early_stop)} {known.name} counts as converged")


def check_refused(case: SolverCase) -> None:
    """Problems without an answer are refused by the named error, in words that say what is wrong with them."""
    expect(case.refused, "the case refuses no problem; exclude this check with a reason if every one has an answer")
    for refused in case.refused:
        _check_refused(case, refused)


def _check_refused(case: SolverCase, refused: RefusedProblem) -> None:
    try:
        with plain_signatures():
            solution = _solve(case, refused.problem())
    except Exception as error:
        seen = f"{refused.name} raised {type(error).__name__}: {error}"
        expect(isinstance(error, refused.error), f"{seen}; wanted {refused.error.__name__}")
        said = re.search(re.escape(refused.words), str(error), re.IGNORECASE)
        expect(said, f"{seen}; it does not say {refused.words!r}")
    else:
        raise ContractError(f"{refused.name} was answered by {str(solution)[:200]}")


def check_problem_untouched(case: SolverCase) -> None:
    """Every tensor and array of a problem is left as it was given."""
    for known in case.known:
        problem = known.problem()
        before = _arrays(problem, known.name)
        _solve(case, problem)
        after = _arrays(problem, known.name)
        changed = differences(before, {name: after.get(name) for name in before})
        expect(not changed, f"{', '.join(changed)} changed")


def _arrays(value: Any, name: str, depth: int = 0) -> dict[str, Any]:
    """Return copies of the tensors and arrays in an object, by name: containers and attributes are opened."""
    if isinstance(value, Tensor):
        return {name: value.detach().to_dense().clone()}
    if isinstance(value, np.ndarray):
        return {name: value.copy()}
    if isinstance(value, Mapping):
        inside = list(value.items())
    elif isinstance(value, (list, tuple)):
        inside = list(enumerate(value))
    else:
        inside = list(getattr(value, "__dict__", {}).items())
    if depth == 4:
        return {}
    return {key: a for part, item in inside for key, a in _arrays(item, f"{name}.{part}", depth + 1).items()}


def check_deterministic(case: SolverCase) -> None:
    """The same problem gives the same answer bit by bit, whatever torch's global seed; also from the same solver."""
    for known in case.known:
        first = case.answer(_solve(case, known.problem(), outside=1))
        again = case.answer(_solve(case, known.problem(), outside=2))
        expect(same(first, again), f"{known.name}: two solutions differ")
    solver = case.make()
    answers = [case.answer(case.solve(solver, case.known[index].problem())) for index in (0, -1, 0)]
    expect(same(answers[0], answers[2]), f"{case.known[0].name}: the solver's second answer differs from its first")


CHECKS: dict[str, Callable[[SolverCase], None]] = {
    "known_answers": check_known_answers,
    "certificate": check_certificate,
    "converged": check_converged,
    "early_stop": check_early_stop,
    "refused": check_refused,
    "problem_untouched": check_problem_untouched,
    "deterministic": check_deterministic,
}


def check_solver(case_or_make: SolverCase | Callable[..., Any], **options: Any) -> None:
    """Hold a solver to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the solver; then ``known``, ``refused`` and ``certificate`` come with the
            options.
        **options: Fields of :class:`~provenn.contracts.SolverCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(SolverCase, case_or_make, options)
