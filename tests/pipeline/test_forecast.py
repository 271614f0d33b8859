"""What storage in fewer bits would predict: told where ranks lose visibly, and without a run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.pipeline.forecast import VISIBLE, forecast_note
from cobla_onnx.report.model import Report
from tests.builders import random_array
from tests.pipeline.test_session import WIDTH, three_products


@cache
def report(mem: float, precision: str = "keep", data: bool = True, **options: Any) -> Report:
    given = {"data": {"x": random_array(30, WIDTH, seed=9)}} if data else {}
    budget = Budget(mem=mem)
    return compress(
        three_products(), budget, precision=precision, threads=1, **given, **options
    ).report


def test_a_visible_loss_is_told_with_what_bits_predict():
    keep, auto = report(0.3), report(0.3, "auto")
    assert keep.calibration.quality.drop > VISIBLE[keep.calibration.quality.measure]
    told = keep.forecast
    assert told is not None
    assert forecast_note(told) in keep.notes
    assert told.predicted <= 0.5 * told.ranks_alone
    assert told.ranks_alone <= keep.solver.value * 1.001
    # Said of a loss, it is what the run with bits says, up to points that only that one measures.
    assert auto.solver.value / 3 <= told.predicted <= 3 * auto.solver.value
    # What was promised holds on samples that were held back.
    assert auto.calibration.loss < keep.calibration.loss
    assert keep.to_dict()["forecast"] == {
        "predicted": told.predicted,
        "ranks_alone": told.ranks_alone,
    }


@pytest.mark.parametrize(
    "quiet",
    [
        {"mem": 1.0},
        {"mem": 0.3, "precision": "auto"},
        {"mem": 0.3, "data": False},
        {"mem": 0.3, "objective": "weights"},
    ],
)
def test_nothing_is_told_otherwise(quiet):
    found = report(**quiet)
    assert found.forecast is None
    assert not any("--precision auto" in note for note in found.notes)


def test_the_samples_are_not_run_for_it(monkeypatch):
    from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
    from cobla_onnx.pipeline import finish

    def refuse(*given):
        raise AssertionError("a sample was run")

    ask = finish.forecast

    def watched(session, solution):
        with monkeypatch.context() as patch:
            patch.setattr(SpreadProbe, "mean_losses", refuse)
            patch.setattr(SpreadProbe, "original", refuse)
            patch.setattr(type(session.evidence.judge), "on", refuse)
            return ask(session, solution)

    monkeypatch.setattr(finish, "forecast", watched)
    again = report.__wrapped__(0.3)
    assert again.forecast == report(0.3).forecast
