"""Rank allocation: minimise an objective subject to hard budgets."""

from cobla_onnx.allocation.budget import Budget, Constraint
from cobla_onnx.allocation.objective import (
    Masks,
    Objective,
    OutputError,
    SeparableError,
    WeightError,
)
from cobla_onnx.allocation.problem import Choice, LayerCurves, VariantCurve
from cobla_onnx.allocation.solve import Allocation, Certificate, allocate

__all__ = [
    "Allocation",
    "Budget",
    "Certificate",
    "Choice",
    "Constraint",
    "LayerCurves",
    "Masks",
    "Objective",
    "OutputError",
    "SeparableError",
    "VariantCurve",
    "WeightError",
    "allocate",
]
