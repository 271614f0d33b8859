"""Budgets of time through the whole path, with a stopwatch that counts MACs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cobla_onnx import Budget, compress, sweep
from cobla_onnx.errors import BudgetError, CoblaError, UsageError
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes, node_macs
from cobla_onnx.latency.profile import Conditions, Profile
from cobla_onnx.latency.timing import compare, interleaved
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.open_session import open_session as open_kept
from cobla_onnx.pipeline.search.latency import LatencySearch
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.runtime.providers import current_provider, execution_provider
from cobla_onnx.runtime.session import open_session
from tests.latency.fakes import FakeStopwatch


@pytest.fixture
def whole(demo_model) -> int:
    """MACs of the demo model."""
    model = load_model(demo_model)
    return sum(node_macs(model, infer_shapes(model, fixed_input_shapes(model, {})))[0].values())


@pytest.fixture
def watch(monkeypatch, whole):
    """Give `compress` a fake stopwatch, and the function that sets it up."""
    made = []

    def set_up(**options):
        def make(threads):
            made.append(FakeStopwatch(threads, whole=whole, **options))
            return made[-1]

        monkeypatch.setattr("cobla_onnx.pipeline.open_session.Stopwatch", make)
        return made

    return set_up


def test_times_in_8_bits_are_of_the_nodes_that_options_leave_to_them(demo_model):
    """A profile of another run had told the time with all nodes in 8 bits."""

    class Counted:
        calls = 0

        def times(self, models, feeds, **_):
            self.calls += 1
            return np.ones((3, len(models)))

    model, watch = load_model(demo_model), Counted()
    profile = Profile(Conditions.here(1, "CPU"))
    search = LatencySearch(model, {}, profile, watch)
    for number, excluded in enumerate([(), ("hidden",), ("hidden",)]):
        with open_kept(demo_model, Settings(exclude=excluded, threads=1)) as session:
            for eight_bits in (False, True):
                search.under(session.analysis, Plan(()), eight_bits)
        # In floating point nothing is left out, and nothing is timed twice.
        assert watch.calls == (2, 3, 3)[number]


@pytest.mark.parametrize("efficiency", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("limit", [0.7, 0.5])
def test_the_measured_time_meets_the_budget(demo_model, watch, efficiency, limit):
    watch(efficiency=efficiency)
    result = compress(demo_model, Budget(latency=limit), solver="milp")
    time = result.report.latency
    assert time.ratio <= limit
    assert time.ratio > 0.9 * limit
    assert result.report.budget["latency"].reached == time.ratio
    assert result.report.budget["latency"].limit == limit
    assert len(time.layers) <= 10
    assert not any("noise" in note for note in result.report.notes)
    # What the table promised is off by the efficiency, and that was corrected.
    saved = 1 - time.predicted_ratio
    assert 1 - time.ratio == pytest.approx(efficiency * saved, rel=0.05)


@pytest.mark.parametrize("bend", [0.6, 2.5])
@pytest.mark.parametrize("limit", [0.8, 0.6, 0.4])
def test_savings_that_do_not_grow_with_those_of_the_table(demo_model, watch, bend, limit):
    """What one plan saved says little about the next: they have to close in on the limit."""
    watch(bend=bend)
    time = compress(demo_model, Budget(latency=limit), solver="milp").report.latency
    assert 0.95 * limit < time.ratio <= limit


def test_time_is_one_more_constraint_beside_memory_and_macs(demo_model, watch):
    watch()
    budget = Budget(mem=0.5, mac=0.9, latency=0.6)
    report = compress(demo_model, budget, solver="slsqp").report
    assert set(report.solver.multipliers) == {"mem", "mac", "latency"}
    assert all(use.reached <= use.limit for use in report.budget.values())
    assert not [note for note in report.notes if "SLSQP" in note]
    assert report.solver.gap < 0.02


@pytest.mark.slow
def test_with_data_the_same_budget_is_met(demo_model, watch):
    watch(efficiency=0.9)
    calibration = demo_model.with_name("digits_calibration.npz")
    report = compress(demo_model, Budget(latency=0.6), data=calibration, samples=40).report
    assert report.solver.objective == "output"
    assert report.latency.ratio <= 0.6


def test_a_sweep_promises_times_only_where_time_is_limited(demo_model, watch):
    watch()
    timed, small = sweep(demo_model, [Budget(latency=0.6), Budget(mem=0.8)], solver="milp").points
    assert timed.report.latency.predicted_ratio is not None
    assert small.report.latency.predicted_ratio is None


def test_what_cannot_be_met_is_refused_with_the_best(demo_model, watch):
    watch(efficiency=0.3)
    with pytest.raises(BudgetError, match=r"fastest of \d plans takes 0\.\d+") as caught:
        compress(demo_model, Budget(latency=0.4), solver="milp")
    least = caught.value.least["latency"]
    assert "rank_multiple=1" in str(caught.value)
    watch(efficiency=0.3)
    assert compress(demo_model, Budget(latency=least), solver="milp").report.latency.ratio <= least


def test_a_table_that_promises_too_little_does_not_refuse(demo_model, watch):
    """The model gains more than its layers: their sum never reaches the budget."""
    watch(efficiency=1.6)
    report = compress(demo_model, Budget(latency=0.15), solver="milp", rank_multiple=4).report
    assert report.latency.predicted_ratio > 0.3
    assert report.latency.ratio <= 0.15


class Slow(FakeStopwatch):
    """Adds to every whole model after the first comparisons, as a busy machine would."""

    extra = 0.0
    after = 0

    def times(self, models, feeds, **options):
        times = super().times(models, feeds, **options)
        if len(models) == 2 and feeds is not None and self.calls > self.after:
            times[:, 1] *= 1 + self.extra
        return times


@pytest.mark.parametrize(("extra", "refused"), [(0.02, False), (0.2, True)])
def test_the_result_is_timed_again(demo_model, monkeypatch, whole, extra, refused):
    def make(threads):
        stopwatch = Slow(threads, whole=whole)
        stopwatch.extra = extra
        # From the confirmation on: the searches before it are undisturbed.
        monkeypatch.setattr(
            "cobla_onnx.pipeline.search.latency.LatencySearch.confirm",
            lambda self, model, limit: (
                setattr(stopwatch, "after", 0),
                confirm(self, model, limit),
            )[1],
        )
        stopwatch.after = 10**9
        return stopwatch

    from cobla_onnx.pipeline.search.latency import LatencySearch

    confirm = LatencySearch.confirm
    monkeypatch.setattr("cobla_onnx.pipeline.open_session.Stopwatch", make)
    if refused:
        with pytest.raises(BudgetError, match="may be busy"):
            compress(demo_model, Budget(latency=0.6), solver="milp")
    else:
        report = compress(demo_model, Budget(latency=0.6), solver="milp").report
        met = report.latency.ratio <= 0.6
        assert met or any("within the noise" in note for note in report.notes)


def test_the_same_profile_gives_the_same_plan_and_bytes(demo_model, watch, tmp_path):
    path = tmp_path / "profile.json"
    made = watch(efficiency=0.85, noise=0.2, drift=0.01)
    first = compress(demo_model, Budget(latency=0.6), solver="milp", profile=path)
    kept = path.read_text()
    second = compress(demo_model, Budget(latency=0.6), solver="milp", profile=path)
    assert second.plan == first.plan
    assert second.model.SerializeToString() == first.model.SerializeToString()
    assert path.read_text() == kept
    # The result alone was timed again.
    assert made[1].measured <= 4
    assert json.loads(kept)["conditions"]["threads"] == made[0].threads


def test_the_rank_grid_holds_for_the_plan(demo_model, watch):
    for options in ({"solver": "milp"}, {"solver": "slsqp"}):
        plan = compress(demo_model, Budget(mac=0.5), rank_multiple=12, **options).plan
        ranks = [d.rank for d in plan.decisions if d.rank is not None]
        assert ranks
        assert all(rank % 12 == 0 for rank in ranks)


@pytest.mark.slow
def test_the_grid_holds_for_the_loss_objective(demo_model):
    calibration = demo_model.with_name("digits_calibration.npz")
    result = compress(
        demo_model,
        Budget(mac=0.5),
        data=calibration,
        samples=40,
        objective="loss",
        rank_multiple=8,
        refit=False,
    )
    ranks = [d.rank for d in result.plan.decisions if d.rank is not None]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


def test_a_plan_by_hand_may_leave_the_grid_and_is_held_to_the_time(demo_model, watch):
    watch()
    plan = Plan((Decision("stage1/conv1", "channel", 5), Decision("stage1/conv2", "channel", 7)))
    report = compress(demo_model, Budget(latency=0.8), plan=plan).report
    assert report.latency.ratio <= 0.8
    with pytest.raises(BudgetError, match=r"latency=0\.3"):
        compress(demo_model, Budget(latency=0.3), plan=plan)


def test_an_unchanged_model_takes_its_own_time(demo_model, watch):
    watch()
    report = compress(demo_model, Budget(latency=1.0)).report
    assert report.unchanged
    assert report.latency.ratio == 1.0
    assert compress(demo_model, Budget(mem=0.9)).report.latency is None


def test_unknown_providers_are_named_with_those_there_are(demo_model):
    with pytest.raises(UsageError, match=r"it has .*CPUExecutionProvider"):
        compress(demo_model, Budget(mem=0.5), provider="quantum")
    report = compress(demo_model, Budget(mem=0.5), provider="cpu").report
    assert report.provider == "CPUExecutionProvider"


def test_a_profile_without_times_to_take_is_an_error(demo_model, tmp_path):
    with pytest.raises(UsageError, match="profile: is of times"):
        compress(demo_model, Budget(mem=0.5), profile=tmp_path / "p.json")


def test_rounds_go_back_and_forth_and_end_by_the_clock():
    order, now = [], [0.0]
    calm = {"switches": lambda: 0}

    def run(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    times = interleaved(
        [run("a", 1.0), run("b", 2.0)], seconds=9.5, least=2, most=100, clock=lambda: now[0], **calm
    )
    assert times.tolist() == [[1.0, 2.0]] * 4
    assert order[4:] == list("abbaabba")
    assert (
        len(interleaved([run("a", 1.0)], seconds=0, least=3, most=9, clock=lambda: now[0], **calm))
        == 3
    )
    assert (
        len(interleaved([run("a", 0.0)], seconds=9, least=3, most=5, clock=lambda: now[0], **calm))
        == 5
    )


def test_interrupted_runs_are_not_counted_if_there_are_others():
    now, switches, number = [0.0], [0], [0]

    def run():
        number[0] += 1
        late = number[0] % 3 == 0
        now[0] += 5.0 if late else 1.0
        switches[0] += late

    options = {"clock": lambda: now[0], "switches": lambda: switches[0]}
    times = interleaved([run], seconds=20, least=4, most=100, **options)[:, 0]
    assert np.nanmedian(times) == np.nanmax(times) == 1.0
    assert np.isnan(times).sum() == (len(times) + 2) // 3
    now[0] = 0.0

    def always_late():
        now[0] += 5.0
        switches[0] += 1

    times = interleaved([always_late], seconds=20, least=3, most=100, **options)
    assert times[:, 0].tolist() == [5.0] * 8, "twice the time, and then all are counted"


def test_comparisons_are_of_medians_with_an_interval():
    generator = np.random.default_rng(0)
    speed = 1 + generator.random((101, 1))
    found = compare(
        np.hstack([2e-3 * speed, 1e-3 * speed * (1 + 0.01 * generator.random((101, 1)))])
    )
    assert found.ratio == pytest.approx(found.after[0] / found.before[0])
    assert found.low <= found.ratio <= found.high
    assert 0.49 < found.low < found.high < 0.52
    assert found.before[1] < found.before[0] < found.before[2]
    assert found.repeats == 101


@pytest.mark.slow
def test_a_real_model_becomes_faster(assets):
    """Generous bounds: the machine may be busy."""
    path = assets / "models" / "squeezenet1.1_fp32.onnx"
    result = compress(path, Budget(latency=0.7), threads=1)
    assert 0.3 < result.report.latency.ratio < 0.8


def provider_here(_):
    """Name the provider on which a unit of work would open its sessions."""
    return current_provider()


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}])
def test_units_of_work_open_their_sessions_on_the_same_provider(monkeypatch, options):
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider", "OtherProvider"]
    )
    with open_pool(**options) as pool:
        with execution_provider("OtherProvider"):
            assert list(pool.map(provider_here, range(5))) == ["OtherProvider"] * 5
        assert list(pool.map(provider_here, range(2))) == ["CPUExecutionProvider"] * 2


def test_a_provider_that_does_not_start_is_an_error(demo_model, monkeypatch):
    """onnxruntime itself goes on with the CPU."""
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider", "OtherProvider"]
    )
    with execution_provider("OtherProvider"), pytest.raises(CoblaError, match="OtherProvider"):
        open_session(load_model(demo_model), 1)
