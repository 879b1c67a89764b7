"""What each kind of part promises: one public conformance suite a kind, as scikit-learn's ``check_estimator``.

``check_optimizer(MyOptimizer)`` runs every check and raises one :class:`ContractError` that lists all failures;
:func:`checks_of` gives the checks of a case one by one, for a test runner. Cases load no torch; the suites do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from provenn.contracts.case import (
    BadInput,
    Case,
    CompressorCase,
    EstimatorCase,
    Form,
    FunctionCase,
    LossCase,
    Minimum,
    ModuleCase,
    OptimizerCase,
    ProbeCase,
    Symmetry,
)
from provenn.contracts.cases_results import (
    AttackCase,
    Expectation,
    KnownProblem,
    RefusedProblem,
    RuntimeCase,
    SamplerCase,
    SolverCase,
)
from provenn.contracts.cases_training import InitCase, Moment, SearcherCase, TrainerCase
from provenn.contracts.suite import ContractError, checks_of, exclusions_of

if TYPE_CHECKING:
    from provenn.contracts.attack import check_attack
    from provenn.contracts.compressor import check_compressor
    from provenn.contracts.estimator import check_estimator
    from provenn.contracts.function import check_function
    from provenn.contracts.init import check_init
    from provenn.contracts.loss import check_loss
    from provenn.contracts.module import check_module
    from provenn.contracts.optimizer import check_optimizer
    from provenn.contracts.probe import check_probe
    from provenn.contracts.runtime import check_runtime
    from provenn.contracts.sampler import check_sampler
    from provenn.contracts.searcher import check_searcher
    from provenn.contracts.solver import check_solver
    from provenn.contracts.trainer import check_trainer

__all__ = [
    "AttackCase",
    "BadInput",
    "Case",
    "CompressorCase",
    "ContractError",
    "EstimatorCase",
    "Expectation",
    "Form",
    "FunctionCase",
    "InitCase",
    "KnownProblem",
    "LossCase",
    "Minimum",
    "ModuleCase",
    "Moment",
    "OptimizerCase",
    "ProbeCase",
    "RefusedProblem",
    "RuntimeCase",
    "SamplerCase",
    "SearcherCase",
    "SolverCase",
    "Symmetry",
    "TrainerCase",
    "check_attack",
    "check_compressor",
    "check_estimator",
    "check_function",
    "check_init",
    "check_loss",
    "check_module",
    "check_optimizer",
    "check_probe",
    "check_runtime",
    "check_sampler",
    "check_searcher",
    "check_solver",
    "check_trainer",
    "checks_of",
    "exclusions_of",
]


def __getattr__(name: str) -> Any:
    kind = name.removeprefix("check_")
    if name not in __all__ or kind == name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{kind}"), name)
