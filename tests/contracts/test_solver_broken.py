"""Each check of the suite of solvers catches a solver that is broken in that way."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.sparse
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import Tensor

from provenn.contracts import BadInput, ContractError, KnownProblem, RefusedProblem, SolverCase, check_solver
from provenn.contracts.solver import _arrays
from provenn.contracts.watch import differences


@dataclass
class Problem:
    matrix: Tensor
    right: Tensor


@dataclass(frozen=True)
class Certificate:
    residual: float
    residuals: tuple


@dataclass(frozen=True)
class Solution:
    x: Tensor
    certificate: Certificate
    converged: bool


class NotPositiveDefiniteError(ValueError):
    pass


class Descent:
    """A correct little solver of positive definite systems, to be broken below: steepest descent."""

    def __init__(self, max_iter=500, tol=1e-9):
        if max_iter < 0:
            raise ValueError(f"max_iter must be >= 0, got {max_iter}")
        self.max_iter, self.tol = max_iter, tol

    def solve(self, problem):
        matrix, right = problem.matrix, problem.right
        x, residuals = self.start(right), []
        for _ in range(self.max_iter):
            residual = right - matrix @ x
            residuals.append(float(residual.norm()))
            if residuals[-1] <= self.tol * float(right.norm()):
                break
            x = x + self.step(residual, residual @ (matrix @ residual)) * residual
        last = float((right - matrix @ x).norm())
        return Solution(x, self.certify(last, residuals), self.has_converged(last, right))

    def start(self, right):
        return torch.zeros_like(right)

    def step(self, residual, curvature):
        if curvature <= 0:
            raise NotPositiveDefiniteError(f"the matrix is not positive definite: rᵀAr = {curvature:g}")
        return residual @ residual / curvature

    def certify(self, last, residuals):
        return Certificate(last, tuple(residuals))

    def has_converged(self, last, right):
        return last <= self.tol * float(right.norm())


def certificate(problem, solution):
    """Row by row, from problem and answer alone."""
    rows = [b - sum(a * v for a, v in zip(row, solution.x.tolist(), strict=True)) for row, b in entries(problem)]
    return {"residual": sum(value**2 for value in rows) ** 0.5}


def entries(problem):
    return zip(problem.matrix.tolist(), problem.right.tolist(), strict=True)


def system():
    return Problem(torch.tensor([[4.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([1.0, 2.0]).double())


def zero_right_hand_side():
    return replace(system(), right=torch.zeros(2, dtype=torch.float64))


class StopsShort(Descent):
    def __init__(self, max_iter=500, tol=1e-2):
        super().__init__(max_iter, tol)


class DividesByZero(Descent):
    def has_converged(self, last, right):
        return last / float(right.norm()) <= self.tol


class StartsAtOnes(Descent):
    """Without a right-hand side it never looks at the residual."""

    def start(self, right):
        return torch.ones_like(right) if right.norm() == 0 else torch.zeros_like(right)

    def solve(self, problem):
        self.max_iter = 0 if problem.right.norm() == 0 else self.max_iter
        return super().solve(problem)


class CertifiesByRecurrence(Descent):
    """The residual before the last step."""

    def certify(self, last, residuals):
        return Certificate(residuals[0], tuple(residuals))


class CertifiesZero(Descent):
    def certify(self, last, residuals):
        return Certificate(0.0, tuple(residuals))


class CertifiesSquares(Descent):
    def certify(self, last, residuals):
        return Certificate(last**2 if last > 1e-6 else last, tuple(residuals))


class CertifiesNothing(Descent):
    def certify(self, last, residuals):
        return None


class NeverConverges(Descent):
    def has_converged(self, last, right):
        return False


class StrictlyBelow(Descent):
    def has_converged(self, last, right):
        return last < self.tol * float(right.norm())


class AlwaysConverges(Descent):
    def has_converged(self, last, right):
        return True


class TakesAnyMatrix(Descent):
    def step(self, residual, curvature):
        return 1 / (1 + curvature.abs())


class RaisesInOtherWords(Descent):
    def step(self, residual, curvature):
        if curvature <= 0:
            raise NotPositiveDefiniteError("math domain error")
        return super().step(residual, curvature)


class RaisesAnotherError(Descent):
    def step(self, residual, curvature):
        if curvature <= 0:
            raise ZeroDivisionError("not positive definite")
        return super().step(residual, curvature)


class WorksInPlace(Descent):
    def solve(self, problem):
        solution = super().solve(problem)
        problem.right -= problem.matrix @ solution.x
        return solution


class ScalesTheMatrix(Descent):
    def solve(self, problem):
        size = problem.matrix.abs().max().clone()
        problem.matrix /= size
        solution = super().solve(replace(problem, right=problem.right / size))
        problem.matrix *= size * (1 + 1e-12)
        return solution


class StartsAnywhere(Descent):
    def start(self, right):
        return torch.randn_like(right) if right.norm() else right


class StartsWarm(Descent):
    def solve(self, problem):
        solution = super().solve(problem)
        self.last = solution.x + 1
        return solution

    def start(self, right):
        return self.last if hasattr(self, "last") else super().start(right)


GOOD = SolverCase(
    "contracts.broken.own_checks",
    Descent,
    known=(
        KnownProblem("two equations", system, lambda: torch.tensor([1 / 11, 7 / 11])),
        KnownProblem("a zero right-hand side", zero_right_hand_side, lambda: [0.0, 0.0]),
    ),
    refused=(
        RefusedProblem(
            "an indefinite matrix",
            lambda: replace(system(), matrix=-system().matrix),
            "positive definite",
            NotPositiveDefiniteError,
        ),
    ),
    certificate=certificate,
    early_stop={"max_iter": 2},
    bad_input=(BadInput("max_iter", lambda: Descent(max_iter=-1)),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(make, **options):
    return replace(GOOD, **{"make": make, "label": make.__name__, **options})


WRONG = KnownProblem("a wrong answer", system, lambda: torch.tensor([1 / 11, 6 / 11]))
BROKEN = {
    "known_answers": [
        broken(StopsShort),
        broken(StartsAtOnes),
        broken(DividesByZero),
        broken(Descent, known=(*GOOD.known, WRONG), label="wrong"),
        broken(Descent, known=(), label="nothing known"),
    ],
    "certificate": [
        broken(CertifiesByRecurrence),
        broken(CertifiesNothing),
        broken(StopsShort, certificate=lambda problem, solution: {"residual": 0.0}, label="off by little"),
        broken(Descent, certificate=lambda problem, solution: {}, label="nothing recomputed"),
        broken(Descent, certificate=lambda problem, solution: {"gap": 0.0}, label="a missing field"),
    ],
    "converged": [broken(NeverConverges), broken(StrictlyBelow)],
    "early_stop": [
        broken(AlwaysConverges),
        broken(CertifiesZero),
        broken(CertifiesSquares),
        broken(Descent, early_stop={}, label="none"),
        broken(Descent, early_stop={"max_iter": 400}, label="late"),
    ],
    "refused": [
        broken(TakesAnyMatrix),
        broken(RaisesInOtherWords),
        broken(RaisesAnotherError),
        broken(Descent, refused=(), label="nothing refused"),
    ],
    "problem_untouched": [broken(WorksInPlace), broken(ScalesTheMatrix)],
    "deterministic": [broken(StartsAnywhere), broken(StartsWarm)],
}


@pytest.mark.parametrize("check", good_runs(GOOD))
def test_good_solver_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_solvers_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_solver():
    assert set(BROKEN) == own_checks("solver")


def test_check_solver_lists_failures():
    with pytest.raises(ContractError, match="'converged'"):
        check_solver(broken(NeverConverges))


def holder():
    class Holder:
        pass

    held = Holder()
    held.dense = torch.ones(2)
    held.sparse = torch.eye(3).to_sparse()
    held.compressed = scipy.sparse.eye(3, format="csr")
    held.listed = [{"array": np.ones(2)}]
    return held


def add_to_sparse(held):
    held.sparse = held.sparse * 2


def add_to_compressed(held):
    held.compressed.data += 1


def add_to_listed(held):
    held.listed[0]["array"] += 1


@pytest.mark.parametrize("change", [add_to_sparse, add_to_compressed, add_to_listed])
def test_changes_are_seen_wherever_a_problem_keeps_its_numbers(change):
    held = holder()
    before = copy.deepcopy(_arrays(held, "problem"))
    assert not differences(before, _arrays(held, "problem"))
    change(held)
    assert differences(before, _arrays(held, "problem"))
