"""Other answers than the allocation's own: near problems, all samples, no data at all."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import ttest_rel

from cobla_onnx import Budget, Plan, compress, sweep
from cobla_onnx.allocation import Choice, OutputError, WeightError, allocate
from cobla_onnx.allocation.objective import masks_of
from cobla_onnx.calibration.data.dataset import Dataset, input_specs
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import Analysis, analyse
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.search.crossfit import CrossFit
from cobla_onnx.pipeline.search.neighbours import neighbours
from cobla_onnx.pipeline.search.rivals import Rivals
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.shrinkage import FLOOR
from cobla_onnx.variants.registry import require_family
from tests.builders import model_of, random_array, small_network
from tests.cli.test_command import ROOT, run_here
from tests.pipeline.search.test_network_loss import evidence_for
from tests.pipeline.test_compress import TEST, logits_of

DATA = ROOT / "models" / "digits_calibration.npz"


@cache
def analysed() -> Analysis:
    # No fixture: hypothesis would write all of it into its messages.
    return analyse(small_network(), input_shapes={"x": (1, 3, 12, 12)})


@settings(max_examples=30)
@given(st.floats(0.1, 0.95), st.sampled_from(["mem", "mac", "both"]))
def test_answers_to_near_problems_keep_the_limits(fraction, kind):
    analysis = analysed()
    budget = {
        "mem": Budget(mem=fraction),
        "mac": Budget(mac=fraction),
        "both": Budget(mem=fraction, mac=0.9 * fraction),
    }[kind]
    constraints = analysis.constraints(budget)
    losses = OutputError([[c.errors for c in x.curves] for x in analysis.curves])
    own = allocate(analysis.curves, losses, constraints, solver="milp")
    found = dict(neighbours(analysis, losses, constraints, own))
    assert found or kind == "both"
    for other in found.values():
        for constraint in constraints:
            cost = constraint.cost(analysis.curves, other.choices)
            assert cost <= constraint.limit
            assert other.certificate.reached[constraint.name] == cost
        value = losses.value(masks_of(analysis.curves, other.choices))
        assert other.certificate.value == pytest.approx(value)
        # No choices within the limits have less.
        assert value >= own.certificate.lower_bound * (1 - 1e-9)


def test_the_ranks_of_another_grid_are_on_it(demo_model):
    analysis = analyse(onnx.load(demo_model), input_shapes={"image": (1, 1, 16, 16)})
    constraints = analysis.constraints(Budget(mem=0.5))
    losses = WeightError(analysis.curves)
    own = allocate(analysis.curves, losses, constraints, solver="milp")
    found = dict(neighbours(analysis, losses, constraints, own))
    (other,) = [each for origin, each in found.items() if "multiples" in origin]
    assert all(c is None or c.level % 4 == 0 for c in other.choices)
    assert any(c is not None for c in other.choices)


def test_bits_alone_are_an_answer_beside_ranks_with_bits():
    """Where the plan has no ranks there is nothing to leave out."""
    settings = Settings(precision="auto", threads=1)
    with open_session(small_network(), settings, comparing=True) as session:
        analysis = session.analysis
    constraints = analysis.constraints(Budget(mem=0.15))
    losses = WeightError(analysis.curves)
    own = allocate(analysis.curves, losses, constraints, solver="milp")

    def ranks_of(choices):
        pairs = zip(analysis.curves, choices, strict=True)
        schemes = [layer.curves[c.curve].scheme for layer, c in pairs if c is not None]
        return [scheme for scheme in schemes if require_family(scheme).level != "bits"]

    # Ranks first for whichever layer has them, so that it does not depend on what pays.
    number, curve = next(
        (i, k)
        for i, layer in enumerate(analysis.curves)
        for k, curve in enumerate(layer.curves)
        if require_family(curve.scheme).level != "bits"
    )
    level = int(analysis.curves[number].curves[curve].levels[0])
    choices = list(own.choices)
    choices[number] = Choice(curve, level)
    assert ranks_of(choices)
    mixed = replace(own, choices=tuple(choices))
    found = dict(neighbours(analysis, losses, constraints, mixed))["bits alone"]
    assert not ranks_of(found.choices)
    assert any(choice is not None for choice in found.choices)
    assert all(c.cost(analysis.curves, found.choices) <= c.limit for c in constraints)
    assert "bits alone" not in dict(neighbours(analysis, losses, constraints, found))


def test_every_half_is_judged_under_the_factors_of_the_other():
    """Against factors that are made by hand from each half."""
    model = small_network()
    evidence = evidence_for(model, 30)
    finisher, dataset = evidence.finisher(), evidence.dataset
    layers = evidence.analysis.layers
    constraints = evidence.analysis.constraints(Budget(mem=0.5))
    curves = evidence.analysis.curves
    chosen = allocate(curves, WeightError(curves), constraints, solver="milp").choices
    plan = evidence.analysis.plan(chosen)
    found = CrossFit(finisher).losses(plan)
    made = dataset.calibration
    assert len(found) == len(made) + len(dataset.selection)
    halves = made[::2], made[1::2]
    begin = len(dataset.selection)
    held_back = finisher.judge.followed.losses(finisher.weights(plan))
    np.testing.assert_allclose(found[:begin], held_back, rtol=1e-6)
    # The second half's moments are those of all samples less the first half's, with the number of
    # independent vectors of the first.
    for half, other, tolerance in ((*halves, 0.05), (*halves[::-1], 1e-6)):
        seen = Seen(model, layers, lambda other=other: dataset.batches(other, 8))
        weights = finisher.weights(plan, FactorsFromData(seen).approximate)
        losses = finisher.judge.on(half).losses(weights)
        np.testing.assert_allclose(found[begin : begin + len(half)], losses, rtol=tolerance)
        begin += len(half)
    assert begin == len(found)


def test_an_answer_gives_way_only_to_what_all_samples_prefer():
    """One that truncates less is preferred; one that truncates more is not even looked at."""
    evidence = evidence_for(small_network(), 40)
    analysis = evidence.analysis
    own, better, worse = (
        allocate(
            analysis.curves,
            WeightError(analysis.curves),
            analysis.constraints(Budget(mem=fraction)),
            solver="milp",
        )
        for fraction in (0.4, 0.8, 0.2)
    )
    finisher = evidence.finisher()
    rivals = Rivals(finisher, CrossFit(finisher))
    settled = rivals.settle(own, [("worse", worse), ("better", better), ("same", own)])
    assert settled.allocation.choices == better.choices
    (rival,) = settled.rivals
    assert rival.taken
    assert rival.origin == "better"
    assert rival.gain > rival.standard_error > 0
    assert rival.samples == 40
    assert len(settled.losses) == 3
    assert "but another (better)" in settled.allocation.certificate.notes[-1]
    settled = rivals.settle(better, [("worse", worse), ("own", own)])
    assert settled.allocation is better
    assert settled.rivals == ()


def test_an_answer_that_loses_next_to_nothing_has_no_rivals(monkeypatch):
    evidence = evidence_for(small_network(), 40)
    curves, constraints = evidence.analysis.curves, evidence.analysis.constraints(Budget(mem=0.8))
    own = allocate(curves, WeightError(curves), constraints, solver="milp")
    finisher = evidence.finisher()
    rivals = Rivals(finisher, CrossFit(finisher))
    asked = []

    def others():
        asked.append("others")
        yield "own", own

    assert rivals.settle(own, others()).losses
    assert asked == ["others"]
    loss = float(finisher.held_back(evidence.analysis.plan(own.choices)).mean())
    monkeypatch.setattr("cobla_onnx.pipeline.search.rivals.NEGLIGIBLE", 1.01 * loss)
    settled = rivals.settle(own, others())
    assert settled == (own, (), (pytest.approx(loss),))
    assert asked == ["others"]


def test_a_rival_that_overflows_has_no_number_in_the_report(monkeypatch):
    before = Rivals.settle

    def settle(self, own, others):
        found = before(self, own, others)
        return found._replace(losses=(*found.losses, np.inf))

    monkeypatch.setattr(Rivals, "settle", settle)
    data = {"x": random_array(30, 3, 12, 12)}
    report = compress(small_network(), Budget(mem=0.5), data=data, threads=1).report
    assert report.calibration is not None
    assert report.calibration.candidates[-1] is None
    assert json.loads(report.to_json())["calibration"]["candidates"][-1] is None


def test_a_comparison_ends_where_the_other_plan_falls_behind():
    evidence = evidence_for(small_network(), 40)
    analysis = evidence.analysis
    better, worse = (
        analysis.plan(
            allocate(
                analysis.curves,
                WeightError(analysis.curves),
                analysis.constraints(Budget(mem=fraction)),
                solver="milp",
            ).choices
        )
        for fraction in (0.8, 0.2)
    )
    crossfit = CrossFit(evidence.finisher())
    behind, ahead = crossfit.gain(better, worse), crossfit.gain(worse, better)
    assert behind.mean < 0 < ahead.mean
    assert behind.samples == len(evidence.dataset.selection)
    assert ahead.samples == 40


def misleading(count: int = 40) -> tuple[onnx.ModelProto, np.ndarray]:
    """A dense network, and samples of which those held back live where no other does.

    Its weights keep most in the directions of those held back.
    """
    width = 48
    scale = np.where(np.arange(width) < 12, 4.0, 0.2).astype(np.float32)
    weights = {"w": scale * random_array(width, width, seed=1), "b": random_array(width, seed=2)}
    nodes = [onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], "dense", transB=1)]
    model = model_of(nodes, weights, {"x": ["N", width]}, ["y"])
    rows = random_array(count, width, seed=5)
    dataset = Dataset("test", ({"x": row[None]} for row in rows), input_specs(model))
    rows[list(dataset.calibration), :12] = 0
    rows[list(dataset.selection), 12:] = 0
    return model, rows


def test_with_data_is_never_worse_than_without_on_the_held_back_samples(tmp_path, monkeypatch):
    # Else the few samples would be drawn towards no data from the first.
    monkeypatch.setattr(
        "cobla_onnx.variants.low_rank.shrinkage.shrinkage",
        lambda second, prior, effective, mean: np.full(len(second), FLOOR),
    )
    model, rows = misleading()
    onnx.save(model, tmp_path / "m.onnx")
    with_data = compress(tmp_path / "m.onnx", Budget(mem=0.5), data={"x": rows}, batch=4)
    without = compress(tmp_path / "m.onnx", Budget(mem=0.5))
    calibration = with_data.report.calibration
    (rival,) = [r for r in calibration.rivals if r.origin == "weights alone"]
    assert rival.taken
    assert rival.gain > 0
    assert with_data.plan == replace(without.plan, factors="weights")
    assert calibration.refitted == 0
    assert calibration.loss == calibration.loss_before_refit
    kept = [t.raw_data for t in without.model.graph.initializer]
    assert [t.raw_data for t in with_data.model.graph.initializer] == kept
    assert any("weights themselves" in note for note in with_data.report.notes)


def test_a_plan_remembers_that_its_factors_are_of_the_weights(demo_model, tmp_path):
    plan = replace(compress(demo_model, Budget(mem=0.5)).plan, factors="weights")
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "p.json")
    found = []
    for name, data in (("a.onnx", ["--data", DATA, "--samples", 60]), ("b.onnx", [])):
        done = run_here(demo_model, tmp_path / name, "--plan-in", tmp_path / "p.json", "-q", *data)
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]


@pytest.mark.slow
def test_no_result_is_dominated_by_another_beyond_the_noise(demo_model, tmp_path):
    """Over a grid of budgets, in memory, MACs and loss on images that no decision saw."""
    budgets = [Budget(**{kind: f}) for f in (0.25, 0.5) for kind in ("mem", "mac")]
    found = sweep(demo_model, budgets, data=DATA, samples=150, out_dir=tmp_path)
    images = np.load(TEST)["image"]
    expected = log_softmax(logits_of(demo_model, images).astype(np.float64), axis=1)
    points = []
    for point in found.points:
        actual = log_softmax(logits_of(point.file, images).astype(np.float64), axis=1)
        points.append((point, (np.exp(expected) * (expected - actual)).sum(axis=1)))
    for point, losses in points:
        for other, fewer in points:
            if other is not point and other.mem <= point.mem and other.mac <= point.mac:
                by_chance = ttest_rel(losses, fewer, alternative="greater").pvalue
                assert by_chance > 0.01, (point.budget, other.budget)


def test_probes_of_one_model_share_its_weights():
    # Each held a copy of all weights: of a model of 100 MB half a gigabyte, beside the model.
    model, layers, data = small_network(), analysed().layers, random_array(24, 3, 12, 12)
    dataset = Dataset("test", ({"x": row[None]} for row in data), input_specs(model))
    judge = Judge(model, layers, dataset, 8, "mse", 1)
    loss = judge.measures
    others = [judge.on(dataset.calibration), judge.singly(dataset.selection, model, loss)]
    for name, array in judge.selection.feeds({}).items():
        assert all(probe.feeds({})[name] is array for probe in others)
    spread = judge.spread_on(dataset.calibration, Pool())
    own = SpreadProbe(Pool(), model, layers, judge.batches(dataset.calibration), loss)
    assert spread.original() == own.original()
    candidate = (1, [(0.5 * judge.whole[1][0], None)])
    assert list(spread.mean_losses([candidate])) == list(own.mean_losses([candidate]))
