"""What each kind of part promises: one public conformance suite a kind, as scikit-learn's ``check_estimator``."""

from provenn.contracts.case import (
    BadInput,
    Case,
    CompressorCase,
    EstimatorCase,
    FunctionCase,
    LossCase,
    Minimum,
    ModuleCase,
    OptimizerCase,
    ProbeCase,
    Symmetry,
)

__all__ = [
    "BadInput",
    "Case",
    "CompressorCase",
    "EstimatorCase",
    "FunctionCase",
    "LossCase",
    "Minimum",
    "ModuleCase",
    "OptimizerCase",
    "ProbeCase",
    "Symmetry",
]
