"""Measured times of a model, its layers and a result."""

from __future__ import annotations

import pytest

from cobla_onnx import Budget
from cobla_onnx.errors import BudgetError
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.pipeline.branches import Followed
from cobla_onnx.pipeline.build_report import latency_report
from cobla_onnx.pipeline.model_times import ModelTimes, open_profile
from cobla_onnx.pipeline.session import Session
from cobla_onnx.pipeline.timed import solve_in_time
from cobla_onnx.runtime.context import RunContext
from tests.latency.fakes import FakeStopwatch
from tests.pipeline.test_session import MACS, three_products


@pytest.fixture
def times(tmp_path) -> ModelTimes:
    model = three_products()
    profile = open_profile(tmp_path / "p.json", 1)
    stopwatch = FakeStopwatch(whole=MACS, efficiency=0.2, overhead=20.0)
    return ModelTimes.of(
        model, analyse(model, macs_needed=True), profile, stopwatch, 0, RunContext()
    )


def test_the_prediction_is_reported_as_it_is_given(times):
    plan = times.analysis.plan([None] * 3)
    for predicted in (None, 0.7):
        report, notes = times.report(times.search.model, plan, 0.9, predicted)
        assert (report.predicted_ratio, report.ratio, notes) == (predicted, 1.0, ())
    measured = times.search.unchanged()
    assert latency_report(measured, 0.5, [("a", 2_000_000, 1)], 1).layers[0].before_ms == 2.0


def test_what_was_measured_is_kept_where_the_budget_is_refused(times, tmp_path):
    """Whole models save a fifth of what their layers promise."""
    analysis = times.table()
    settings = Settings(solver="milp", objective="weights", measure_latency=True)
    model = times.search.model
    followed = Followed(model, model)
    session = Session(model, model, followed, analysis, settings, RunContext(), times=times)
    before = (tmp_path / "p.json").read_text()
    with pytest.raises(BudgetError, match="fastest of"):
        solve_in_time(session, Budget(latency=0.5))
    assert len((tmp_path / "p.json").read_text()) > len(before)
    kept = open_profile(tmp_path / "p.json", 1)
    assert kept.to_json() == times.search.profile.to_json()
