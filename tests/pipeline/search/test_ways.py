"""What is fast enough of the plans that were timed."""

from __future__ import annotations

from types import SimpleNamespace

from cobla_onnx.pipeline.search.ways import fast_enough


def found(ratio: float, loss: float):
    return SimpleNamespace(
        measured=SimpleNamespace(ratio=ratio, low=ratio - 0.01),
        allocation=SimpleNamespace(certificate=SimpleNamespace(value=loss)),
    )


def test_of_what_is_fast_enough_the_plan_that_loses_least_is_taken():
    """A slower one may lose more: time does not follow what stands for it."""
    tried = [found(0.30, 2.0), found(0.32, 0.7), found(0.34, 5.3), found(0.36, 0.1)]
    assert fast_enough(tried, 0.35) is tried[1]


def test_of_none_that_is_fast_enough_nothing_is_taken():
    assert fast_enough([found(0.40, 0.1)], 0.35) is None
    assert fast_enough([], 0.35) is None
