"""Ranks by the errors of the weights alone."""

from __future__ import annotations

import itertools

import pytest

from cobla_onnx import Budget
from cobla_onnx.errors import BudgetError
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.pipeline.search.problem import Problem
from cobla_onnx.pipeline.search.weights import search_by_weights
from tests.builders import small_network


def test_more_memory_never_loses_more():
    analysis = analyse(small_network())
    problem = Problem(analysis, "milp", "weights")
    found = []
    for mem in (0.3, 0.5, 0.8):
        (limit,) = constraints = analysis.constraints(Budget(mem=mem))
        result = search_by_weights(problem, constraints)
        assert limit.cost(analysis.curves, result.allocation.choices) <= limit.limit
        assert result.plan(analysis) == analysis.plan(result.allocation.choices)
        assert (result.history, result.rivals, result.predicted) == ((), (), None)
        found.append(result.allocation.certificate.value)
    assert all(less >= more for less, more in itertools.pairwise(found))
    with pytest.raises(BudgetError):
        search_by_weights(problem, analysis.constraints(Budget(mem=1e-4)))
