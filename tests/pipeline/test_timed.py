"""Several ways to a latency budget: the one that loses least is taken, whichever it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from cobla_onnx import Budget, compress
from cobla_onnx.allocation.paired import PairedGain
from cobla_onnx.errors import BudgetError, ModelError, UsageError
from cobla_onnx.options import Settings
from cobla_onnx.pipeline import session, timed
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.search import floating
from cobla_onnx.pipeline.search.eight_bits import in_eight_bits
from cobla_onnx.pipeline.timed import solve_in_time
from tests.builders import random_array, small_network
from tests.latency.fakes import FakeStopwatch

# MACs of the small network.
WHOLE = 62208 + 124416 + 240


class Processor(FakeStopwatch):
    """Computes in 8 bits at a speed of its own, and knows layers alone as well as one says.

    Attributes
    ----------
    eight_bits : float
        Time of a model in 8 bits, as a share of that in floating point.
    alone : function
        Changes the time of a layer that is run alone.
    """

    eight_bits = 0.5
    alone = staticmethod(lambda nanoseconds, model: nanoseconds)

    def nanoseconds(self, model):
        found = super().nanoseconds(model)
        if len(model.graph.node) <= 2:
            return self.alone(found, model)
        narrow = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        return found * (self.eight_bits if narrow else 1.0)


@pytest.fixture
def processor(monkeypatch):
    """Give the session this stopwatch, set up by keywords."""

    def set_up(**attributes):
        kind = type("Set", (Processor,), attributes)
        make = lambda threads: kind(threads, whole=WHOLE, overhead=20.0)  # noqa: E731
        monkeypatch.setattr("cobla_onnx.pipeline.open_session.Stopwatch", make)

    return set_up


OPTIONS = {"solver": "milp", "refit": False, "rank_multiple": 1, "threads": 1}


@pytest.fixture
def data():
    return {"x": random_array(24, 3, 12, 12)}


def test_no_arithmetic_is_chosen_for_a_plan(data):
    plan = compress(small_network(), Budget(mem=0.5), threads=1).plan
    options = {"data": data, "arithmetic": "auto", **OPTIONS}
    with pytest.raises(UsageError, match="arithmetic='auto': is chosen with the ranks, which a"):
        compress(small_network(), Budget(latency=0.9), plan=plan, **options)


@pytest.fixture
def eight_bits_take_too_long(monkeypatch):
    """Refuse models in 8 bits when they are finished and timed again."""
    made = session.finish

    def busy(its, solution):
        if solution.eight_bits is not None:
            raise BudgetError("latency=0.45: the result takes 0.6 of the original's time")
        return made(its, solution)

    monkeypatch.setattr(session, "finish", busy)


@pytest.mark.usefixtures("eight_bits_take_too_long")
def test_where_the_finished_model_takes_too_long_the_next_best_is_taken(data, processor):
    processor(eight_bits=0.5)
    options = {"data": data, "arithmetic": "auto", **OPTIONS}
    report = compress(small_network(), Budget(latency=0.45), **options).report
    assert report.arithmetic is None
    assert report.latency.ratio <= 0.45
    (note,) = [note for note in report.notes if note.startswith("not the plan that loses least")]
    assert "takes 0.6 of the original's time" in note


def test_where_eight_bits_are_fast_they_are_taken(data, processor):
    processor(eight_bits=0.5)
    options = {"data": data, **OPTIONS}
    ranks = compress(small_network(), Budget(latency=0.45), **options)
    best = compress(small_network(), Budget(latency=0.45), arithmetic="auto", **options)
    for result in (ranks, best):
        assert result.report.latency.ratio <= 0.45
    assert ranks.report.arithmetic is None
    assert best.report.arithmetic is not None
    assert best.report.calibration.loss < ranks.report.calibration.loss
    assert best.report.latency.layers == ()
    assert best.report.latency.predicted_ratio is None
    note = next(n for n in best.report.notes if "loses least" in n)
    assert "by MACs, then 8 bits" in note


def test_eight_bits_that_are_fast_enough_by_themselves_leave_no_room_for_ranks(data, processor):
    processor(eight_bits=0.5)
    options = {"data": data, **OPTIONS}
    alone = compress(small_network(), Budget(latency=0.55), arithmetic="int8", **options)
    assert all(decision.scheme is None for decision in alone.plan.decisions)
    assert alone.report.latency.ratio <= 0.55


@pytest.fixture
def searched(monkeypatch):
    """Say of each search whether there was anything to search for."""
    found, search = [], session.search_by_data

    def noted(problem, evidence, finisher, constraints):
        found.append(any(each.limit < each.total for each in constraints))
        return search(problem, evidence, finisher, constraints)

    monkeypatch.setattr(session, "search_by_data", noted)
    return found


@pytest.mark.parametrize("at_once", [True, False])
def test_what_loses_much_more_before_refit_is_neither_searched_nor_made(
    data, processor, monkeypatch, searched, at_once
):
    """It is seen at once, or when its first plan that is fast enough was timed."""
    processor(eight_bits=0.5)
    if not at_once:
        monkeypatch.setattr(timed._Attempt, "without_time", lambda its: None)
    options = {"data": data, "arithmetic": "auto", **OPTIONS}
    report = compress(small_network(), Budget(latency=0.55), **options).report
    assert report.arithmetic is not None
    # In 8 bits the whole model is fast enough, and nothing is searched for floating point.
    assert searched == [False]
    note = next(n for n in report.notes if "loses least" in n)
    assert note.count("before refit, which was left out") == 2
    assert note.count(": not timed, loss") == (2 if at_once else 0)


@pytest.mark.usefixtures("eight_bits_take_too_long")
@pytest.mark.parametrize("at_once", [True, False])
def test_what_was_left_out_is_searched_where_the_answer_takes_too_long(
    data, processor, monkeypatch, searched, at_once
):
    """In full: a plan by which a way is left out may be a sketch of what it would choose."""
    processor(eight_bits=0.5)
    if not at_once:
        monkeypatch.setattr(timed._Attempt, "without_time", lambda its: None)
    options = {"data": data, "arithmetic": "auto", **OPTIONS}
    report = compress(small_network(), Budget(latency=0.55), **options).report
    assert report.arithmetic is None
    assert report.latency.ratio <= 0.55
    assert any(layer.rank for layer in report.layers)
    assert True in searched


@pytest.mark.usefixtures("eight_bits_take_too_long")
def test_what_was_left_out_may_take_too_long_as_well(data, processor):
    def nanoseconds(self, model):
        found = Processor.nanoseconds(self, model)
        narrow = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        return found if narrow or len(model.graph.node) <= 2 else 0.7 * WHOLE + 0.3 * found

    processor(eight_bits=0.5, nanoseconds=nanoseconds)
    options = {"data": data, "arithmetic": "auto", **OPTIONS}
    with pytest.raises(BudgetError, match=r"the result takes 0\.6 of the original's time"):
        compress(small_network(), Budget(latency=0.55), **options)


def _with_image(narrow, wide):
    """Change the time by whether the image, which has few channels, is rounded to 8 bits."""

    def nanoseconds(self, model):
        found = Processor.nanoseconds(self, model)
        rounded = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
        return found * (1.0 if not rounded else narrow if "x" in rounded else wide)

    return nanoseconds


@pytest.mark.parametrize(("narrow", "wide", "left"), [(1.3, 1.0, ("conv1",)), (1.0, 1.3, ())])
def test_what_is_faster_in_floating_point_is_left_so(data, processor, narrow, wide, left):
    processor(nanoseconds=_with_image(narrow, wide))
    options = {"data": data, **OPTIONS}
    result = compress(small_network(), Budget(latency=0.6), arithmetic="int8", **options)
    assert result.report.arithmetic.left == left
    # Without ranks, as the fastest of the two is known to meet the budget.
    assert result.report.latency.ratio == pytest.approx(0.5, rel=0.05)
    assert all(decision.scheme is None for decision in result.plan.decisions)


def test_what_was_timed_is_not_left_for_its_loss(data, monkeypatch):
    gain = PairedGain(mean=1.0, standard_error=0.1, samples=9)
    monkeypatch.setattr(floating, "paired_gain", lambda before, after: gain)
    monkeypatch.setattr(floating, "MOST_MACS", 1.0)
    settings = Settings(data=data, arithmetic="int8")
    with open_session(small_network(), settings) as opened:
        made = [
            in_eight_bits(opened.evidence, opened.model, most, head=head).report.left
            for head, most in ((None, None), (0, None), (1, None), (1, 2000))
        ]
    # The last one has no room for a weight in floating point, and leaves nothing.
    assert made == [("conv1", "conv2"), ("conv2", "fc"), ("conv1",), ()]


def test_where_nothing_can_compute_in_eight_bits_ranks_alone_are(data, processor):
    processor(eight_bits=0.5)
    model = small_network()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    half = {"x": data["x"].astype(np.float16)}
    options = {"data": half, **OPTIONS}
    found = compress(model, Budget(latency=0.6), arithmetic="auto", **options).report
    assert found.arithmetic is None
    assert found.latency.ratio <= 0.6
    assert any(note.startswith("nothing computes in 8 bits") for note in found.notes)
    with pytest.raises(ModelError, match=r"give arithmetic='keep'$"):
        compress(model, Budget(latency=0.6), arithmetic="int8", **options)


def test_where_they_are_slow_ranks_alone_are(data, processor):
    processor(eight_bits=1.4)
    options = {"data": data, **OPTIONS}
    found = compress(small_network(), Budget(latency=0.6), arithmetic="auto", **options).report
    assert found.arithmetic is None
    assert found.latency.ratio <= 0.6


def test_no_way_that_is_fast_enough_is_refused_with_the_fastest(data, processor):
    processor(eight_bits=1.4)
    settings = Settings(data=data, arithmetic="int8", measure_latency=True, **OPTIONS)
    session = open_session(
        small_network(), settings, times_needed=True, budgets=[Budget(latency=0.05)]
    )
    with session as opened, pytest.raises(BudgetError, match="fastest of") as caught:
        solve_in_time(opened, Budget(latency=0.05))
    assert 0.05 < caught.value.least["latency"] < 1.4


def _wrong(nanoseconds, model):
    """The factors of the second convolution, alone, take long."""
    second = any(24 in tensor.dims for tensor in model.graph.initializer)
    return nanoseconds * (50 if second and len(model.graph.node) == 2 else 1)


def test_a_table_that_is_wrong_does_not_cost_what_macs_keep(data, processor):
    """The answer loses no more than that of a budget of MACs which takes as long."""
    processor(alone=staticmethod(_wrong))
    options = {"data": data, **OPTIONS}
    timed = compress(small_network(), Budget(latency=0.75), **options).report
    by_macs = compress(small_network(), Budget(mac=0.73), **options).report
    assert timed.latency.ratio <= 0.75
    assert timed.calibration.loss <= 1.02 * by_macs.calibration.loss
    note = next(n for n in timed.notes if "loses least" in n)
    assert note.startswith("ranks were chosen by MACs, as that loses least (by MACs")


def test_a_budget_that_takes_many_measurements_takes_few_searches(data, processor, monkeypatch):
    """The limit is found with sketches, which measure no loss at what they choose."""
    processor(nanoseconds=lambda self, model: Processor.nanoseconds(self, model) ** 0.3)
    calls = {"search": 0, "sketch": 0}

    def counted(kind, name):
        function = getattr(kind, name)

        def call(*args):
            calls[name.split("_")[0]] += 1
            return function(*args)

        monkeypatch.setattr(kind, name, call)

    counted(session, "search_by_data")
    counted(session, "sketch_by_output")
    found = compress(small_network(), Budget(latency=0.7), data=data, **OPTIONS).report
    assert found.latency.ratio <= 0.7
    # Once by the table and once by MACs.
    assert calls["search"] == 2
    assert calls["sketch"] > calls["search"]


def test_where_another_answer_takes_too_long_the_draft_is_taken(data, processor, monkeypatch):
    processor()

    def slow(problem, evidence, finisher, constraints):
        free = [replace(each, limit=each.total) for each in constraints]
        return session.draft_by_data(problem, evidence, free)

    monkeypatch.setattr(session, "search_by_data", slow)
    found = compress(small_network(), Budget(latency=0.7), data=data, **OPTIONS).report
    assert found.latency.ratio <= 0.7
    assert any(layer.rank for layer in found.layers)


def test_a_budget_out_of_reach_takes_no_search(data, processor, monkeypatch):
    processor(nanoseconds=lambda self, model: 1e6 + Processor.nanoseconds(self, model))
    monkeypatch.setattr(session, "search_by_data", lambda *args: pytest.fail("a search"))
    with pytest.raises(BudgetError, match="fastest of") as caught:
        compress(small_network(), Budget(latency=0.5), data=data, **OPTIONS)
    assert 0.8 < caught.value.least["latency"] < 1
