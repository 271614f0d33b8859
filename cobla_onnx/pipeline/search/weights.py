"""Choose ranks by the relative errors of the weights alone, without data."""

from __future__ import annotations

from collections.abc import Sequence

from cobla_onnx.allocation import Constraint, WeightError, allocate
from cobla_onnx.pipeline.search.problem import Problem, SearchResult

__all__ = ["search_by_weights"]


def search_by_weights(problem: Problem, constraints: Sequence[Constraint]) -> SearchResult:
    """Minimise the sum of the relative weight errors.

    Raises
    ------
    BudgetError
        If the constraints cannot be met.
    """
    curves = problem.analysis.curves
    return SearchResult(allocate(curves, WeightError(curves), constraints, solver=problem.solver))
