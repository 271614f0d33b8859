"""Limits of what stands for the time, from plans that were timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cobla_onnx.allocation import Constraint
from cobla_onnx.pipeline.search.aims import Aims

TOTAL = 10_000


def found(predicted: float, ratio: float):
    return SimpleNamespace(predicted=predicted, measured=SimpleNamespace(ratio=ratio))


def share(tried, limit: float = 0.45, alone: float = 0.52) -> float:
    """What the next plan is predicted to take."""
    proxy = Constraint("mac", 1.0, TOTAL, TOTAL, 0)
    return alone * Aims(proxy, limit, alone).next(tried).limit / TOTAL


def test_the_next_plan_is_between_the_nearest_on_either_side():
    tried = [found(0.30, 0.40), found(0.40, 0.48)]
    assert 0.30 < share(tried) < 0.40


def test_what_is_cheaper_and_slower_does_not_take_the_next_plan_back():
    """Of three plans of 0.42 the dearest loses least: only dearer ones may lose less."""
    tried = [found(0.4476, 0.4159), found(0.4696, 0.4221), found(0.4931, 0.4219)]
    assert 0.4931 < share(tried) < 0.52


@pytest.mark.parametrize("slow", [0.30, 0.40, 0.48])
def test_a_slow_plan_that_is_cheaper_than_a_fast_one_bounds_nothing(slow):
    tried = [found(0.49, 0.42), found(slow, 0.46)]
    assert 0.49 < share(tried) < 0.52


def test_after_one_that_is_close_the_next_plan_is_in_the_middle():
    assert share([found(0.44, 0.449)]) == pytest.approx(0.48, abs=1e-3)
