"""Interpolation, and the table of layers, without a clock."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.allocation import Budget, Choice, Constraint, LayerCurves
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.layers import Reason
from cobla_onnx.latency.layer_times import interpolated, sampled, slowest_layers, time_layers
from cobla_onnx.latency.profile import Conditions, Profile
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.curve import rank_curve
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankGrid, rank_rule
from tests.builders import small_network
from tests.latency.fakes import FakeStopwatch
from tests.tied import decoder

ascending = st.lists(st.integers(1, 400), min_size=1, max_size=60, unique=True).map(sorted)


@given(ascending)
def test_measured_ranks_are_candidates_with_both_ends(ranks):
    known = sampled(np.array(ranks))
    assert known == sorted(set(known))
    assert set(known) <= set(ranks)
    assert {ranks[0], ranks[-1]} <= set(known)
    assert len(known) <= 6


@given(ascending, st.data())
def test_times_never_fall_and_stay_within_what_was_measured(ranks, data):
    grid = np.array(ranks)
    known = sampled(grid)
    size = len(known)
    times = data.draw(st.lists(st.integers(1, 10**9), min_size=size, max_size=size))
    found = interpolated(grid, known, times)
    assert (np.diff(found) >= 0).all()
    assert min(times) - 1 <= found.min()
    assert found.max() <= max(times) + 1


@given(ascending, st.integers(1, 1000), st.integers(0, 10**6))
def test_linear_times_are_found_again(ranks, slope, start):
    grid = np.array(ranks)
    known = sampled(grid)
    found = interpolated(grid, known, [start + slope * rank for rank in known])
    assert np.abs(found - np.maximum(start + slope * grid, 1)).max() <= 1


def timed_curve(ranks, times, full_rank):
    values = np.linspace(1, 0.1, full_rank)
    found = rank_curve("channel", values, np.array(ranks), 10, 10)
    return found.with_cost("latency", np.array(times))


@given(ascending, st.data())
def test_the_path_of_costs_meets_the_candidates_and_never_falls(ranks, data):
    steps = st.lists(st.integers(0, 1000), min_size=len(ranks), max_size=len(ranks))
    times = 1 + np.cumsum(data.draw(steps))
    curve = timed_curve(ranks, times, ranks[-1] + 3)
    constraint = Constraint("latency", 0.5, 10**6, 5 * 10**5, 0)
    path = constraint.path(curve)
    assert path.shape == (ranks[-1] + 4,)
    np.testing.assert_allclose(path[ranks], times)
    assert (np.diff(path) >= -1e-9).all()
    assert path[0] >= 0
    assert [constraint.at(curve, rank) for rank in ranks] == times.tolist()


def test_cost_of_choices_is_that_of_the_table():
    curve = timed_curve([4, 8, 12], [30, 50, 60], 20)
    layers = [
        LayerCurves(name, {"mem": 800, "mac": 800, "latency": time}, (curve,))
        for name, time in (("a", 100), ("b", 90))
    ]
    (latency,) = Budget(latency=0.5).constraints(layers, {"mem": 1600, "mac": 1600, "latency": 250})
    assert (latency.total, latency.limit, latency.fixed) == (250, 125, 60)
    assert latency.cost(layers, [None, None]) == 250
    assert latency.cost(layers, [Choice(0, 8), None]) == 60 + 50 + 90
    assert latency.least(layers) == 60 + 30 + 30
    with pytest.raises(UsageError, match="not timed"):
        Budget(latency=0.5).constraints(layers, {"mem": 1600, "mac": 1600})


@given(st.integers(0, 500), st.sampled_from([1, 3, 4, 8]), st.sampled_from([1, 8, 16]))
def test_grid(most, step, block):
    grid = RankGrid(step, block, 128)
    found = grid.candidates(most)
    expected = [r for r in range(1, most + 1) if r % (block if r < 128 else step) == 0]
    assert found.tolist() == expected
    with_small = RankGrid(step, block, 128, (1, 6)).candidates(most).tolist()
    assert with_small == sorted({*expected, *(r for r in (1, 6) if r <= most)})


def test_rules_follow_the_budgets():
    def rule(multiple, mac=False, latency=False, cpu=True):
        return rank_rule(multiple, mac=mac, latency=latency, block=16, cpu=cpu)

    assert rule("auto") == EVERY_RANK
    assert rule("auto", mac=True).convolution.candidates(40).tolist() == [16, 32]
    assert rule("auto", mac=True).product.candidates(9).tolist() == [4, 8]
    assert rule("auto", latency=True).convolution.candidates(40).tolist() == [1, 4, 8, 16, 32]
    assert rule("auto", latency=True).product.candidates(9).tolist() == [4, 8]
    assert rule("auto", latency=True, cpu=False).convolution.candidates(20).tolist() == [8, 16]
    assert rule(6, mac=True).convolution.candidates(13).tolist() == [6, 12]
    assert rule(1, mac=True).complete


def test_under_a_mac_budget_ranks_must_save_macs():
    rule = rank_rule(1, mac=True, latency=False, block=16)
    assert rule.most(100, 10, pointwise=False) == 9
    assert rule.most(100, 10, pointwise=True) == 8
    assert EVERY_RANK.most(100, 10, pointwise=False) == 10
    assert rank_rule(1, mac=True, latency=True, block=16).most(100, 10, pointwise=True) == 9


def analysed(model, rule=EVERY_RANK):
    return analyse(
        model,
        asked=Asked("auto", rule),
        macs_needed=True,
    )


def timed_layers(model, analysis, profile, stopwatch):
    found = time_layers(model, analysis.variants, analysis.shapes, profile, stopwatch)
    return analysis.with_times(10**6, *found)


def fresh_profile():
    return Profile(Conditions.here(1, "CPUExecutionProvider"))


def test_the_table_is_exact_where_time_is_linear():
    model = small_network()
    profile, stopwatch = fresh_profile(), FakeStopwatch(overhead=0)
    analysis = analysed(model)
    timed = timed_layers(model, analysis, profile, stopwatch)
    assert timed.time_total == 10**6
    for layer in timed.curves:
        assert layer.costs["latency"] == layer.costs["mac"]
        for curve in layer.curves:
            assert np.abs(curve.costs["latency"] - curve.levels * curve.per_level["mac"]).max() <= 1
            assert (curve.costs["latency"] < layer.costs["latency"]).all()
    calls = stopwatch.calls
    again = timed_layers(model, analysis, profile, stopwatch)
    assert stopwatch.calls == calls
    assert [c.costs["latency"].tolist() for la in again.curves for c in la.curves] == [
        c.costs["latency"].tolist() for la in timed.curves for c in la.curves
    ]


class SlowPairs(FakeStopwatch):
    """Two nodes take longer than any one."""

    def nanoseconds(self, model):
        return super().nanoseconds(model) + 10**8 * (len(model.graph.node) == 2)


def test_layers_that_are_not_faster_are_left_out_with_the_reason():
    model = small_network()
    timed = timed_layers(model, analysed(model), fresh_profile(), SlowPairs())
    assert timed.layers == ()
    reasons = {item.name: item for item in timed.skipped}
    assert reasons["conv2"].reason is Reason.NOT_FASTER
    assert "measured" in str(reasons["conv2"])


def test_a_tied_weight_is_left_out_since_no_single_node_shows_its_time():
    model = decoder()
    timed = timed_layers(model, analysed(model), fresh_profile(), FakeStopwatch(overhead=0))
    reasons = {item.name: str(item) for item in timed.skipped}
    assert "read in several ways" in reasons["tokens"]
    assert "hidden" in {layer.name for layer in timed.layers}


def test_slowest_layers_come_first_and_do_not_change_the_table():
    model = small_network()
    profile, stopwatch = fresh_profile(), FakeStopwatch(overhead=0)
    analysis = analysed(model)
    before = timed_layers(model, analysis, profile, stopwatch)
    plan = Plan((Decision("conv2", "channel", 7),))
    found = slowest_layers(
        model, analysis.layers, analysis.shapes, plan, profile, stopwatch, count=2
    )
    assert [name for name, _, _ in found] == ["conv2", "conv1"]
    assert found[0][2] < found[0][1]
    assert found[1][2] == found[1][1]
    after = timed_layers(model, analysis, profile, stopwatch)
    assert [c.costs["latency"].tolist() for la in after.curves for c in la.curves] == [
        c.costs["latency"].tolist() for la in before.curves for c in la.curves
    ]
