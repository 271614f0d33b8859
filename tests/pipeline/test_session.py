"""A session keeps nothing of a budget: whatever was asked before, the answer is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx import Budget
from cobla_onnx.allocation import Allocation, Choice
from cobla_onnx.allocation.solve import Certificate
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.errors import BudgetError
from cobla_onnx.latency.timing import Comparison
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.search.latency import LatencySearch
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.pipeline.search.ways import Way, fast_enough
from cobla_onnx.pipeline.session import Session
from tests.builders import model_of, random_array
from tests.latency.fakes import FakeStopwatch

WIDTH = 48
MACS = 3 * WIDTH * WIDTH
BUDGETS = (
    Budget(mem=0.7),
    Budget(mem=0.5),
    Budget(latency=0.8),
    Budget(mem=0.8, latency=0.65),
    Budget(mem=0.001),
)


def three_products() -> onnx.ModelProto:
    nodes, weights, last = [], {}, "x"
    for number in range(3):
        name = f"h{number}" if number < 2 else "y"
        nodes.append(onnx.helper.make_node("MatMul", [last, f"w{number}"], [name], f"n{number}"))
        weights[f"w{number}"] = random_array(WIDTH, WIDTH, seed=number) / WIDTH**0.5
        if number < 2:
            nodes.append(onnx.helper.make_node("Relu", [name], [f"r{number}"]))
        last = f"r{number}"
    return model_of(nodes, weights, {"x": ["N", WIDTH]}, ["y"])


@contextmanager
def opened(objective: str | None) -> Iterator[Session]:
    """Open a session with a stopwatch by which only part of the predicted time is saved."""
    chosen = Settings(measure_latency=True, threads=1, solver="milp")
    if objective is not None:
        data = {"x": random_array(30, WIDTH, seed=9)}
        chosen = dataclasses.replace(chosen, data=data, objective=objective)

    def stopwatch(threads: int) -> FakeStopwatch:
        return FakeStopwatch(threads, whole=MACS, efficiency=0.8, overhead=20.0)

    with (
        patch("cobla_onnx.pipeline.open_session.Stopwatch", stopwatch),
        open_session(
            three_products(), chosen, macs_needed=True, times_needed=True, budgets=BUDGETS
        ) as session,
    ):
        yield session


def point(session: Session, budget: Budget) -> dict[str, Any]:
    """All that comes of a budget, without the seconds that it took."""
    try:
        result = session.compress(budget)
    except BudgetError as error:
        return {"error": str(error), "least": error.least}
    history = tuple(dataclasses.replace(step, seconds=0.0) for step in result.history)
    report = dataclasses.replace(result.report, seconds=0.0, history=history)
    model = result.model.SerializeToString(deterministic=True)
    return {"plan": result.plan.to_json(), "model": model, **report.to_dict()}


@cache
def alone(objective: str | None, budget: Budget) -> dict[str, Any]:
    """The point of a session that was asked for nothing else."""
    with opened(objective) as session:
        return point(session, budget)


@pytest.mark.parametrize(
    "objective", [None, "output", pytest.param("loss", marks=pytest.mark.slow)]
)
def test_any_order_of_budgets_gives_the_same_points(objective):
    with opened(objective) as session:

        @settings(max_examples=2, deadline=None, database=None)
        @given(st.permutations(BUDGETS))
        def holds(order: list[Budget]) -> None:
            for budget in order:
                assert point(session, budget) == alone(objective, budget)

        holds()
    timed = alone(objective, Budget(latency=0.8))
    assert timed["latency"]["predicted_ratio"] is not None
    assert alone(objective, Budget(mem=0.7))["latency"]["predicted_ratio"] is None
    assert "error" in alone(objective, Budget(mem=0.001))


def test_a_session_cannot_be_changed():
    with opened("output") as session:
        held = [session, session.context, session.evidence, session.times, session.times.search]
        for each in held:
            assert each is not None
            for entry in dataclasses.fields(each):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(each, entry.name, None)


def answer(rank: int, loss: float) -> SearchResult:
    proof = Certificate("milp", "output", 0.0, 0.0, 0.0, {}, {})
    step = Step("round", rank, loss, None, {}, 0.0)
    return SearchResult(Allocation((Choice(0, rank), None, None), proof), (step,), 30, (loss,))


def test_what_is_told_of_a_latency_budget_is_of_the_round_that_gave_the_answer(monkeypatch):
    """The first plan is fast enough, the second one is not; the search ends with the third."""
    times = {16: 0.7, 20: 0.9}
    rounds = iter([answer(16, 0.3), answer(20, 0.2), answer(20, 0.2)])

    def under(self: LatencySearch, analysis: object, plan: Any, eight_bits: bool) -> Comparison:
        (rank,) = [d.rank for d in plan.decisions if d.rank]
        ratio = times[rank]
        return Comparison((1.0,) * 3, (ratio,) * 3, ratio, ratio, ratio, 9)

    monkeypatch.setattr(LatencySearch, "under", under)
    with opened(None) as session:
        (proxy,) = session.analysis.constraints(Budget(latency=0.8))
        way = Way("a way", session.analysis, proxy, (), lambda constraints: next(rounds))
        tried = session.times.search.tried(way, Budget(latency=0.8))
    found = fast_enough(tried, 0.8)
    assert found is not None
    assert found.result.candidates == (0.3,)
    assert found.allocation.choices[0] == Choice(0, 16)
    assert [step.number for entry in tried for step in entry.result.history] == [16, 20]
