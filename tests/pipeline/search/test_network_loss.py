"""The network's loss as a function of masks, its gradient, and the search that follows it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from cobla_onnx.allocation import (
    Allocation,
    Budget,
    Choice,
    Constraint,
    Masks,
    OutputError,
    WeightError,
)
from cobla_onnx.allocation.objective import masks_of
from cobla_onnx.allocation.slsqp import Effort
from cobla_onnx.allocation.sqp import Candidate, Scores, allocate_by_loss
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.data.dataset import Dataset, input_specs
from cobla_onnx.calibration.evaluation import gradient_sessions
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.gradients import GradientProbe
from cobla_onnx.calibration.evaluation.measured_model import MeasuredModel
from cobla_onnx.calibration.evaluation.probe import Pair, Probe
from cobla_onnx.calibration.evaluation.temperature import doubts, soften, temperatures
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.pipeline.search.data import search_by_data
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.loss import improve, scores
from cobla_onnx.pipeline.search.network_loss import FORBIDDEN, LossPath, NetworkLoss
from cobla_onnx.pipeline.search.output import search_by_output
from cobla_onnx.pipeline.search.problem import Problem, SearchResult
from cobla_onnx.pipeline.search.rivals import Rivals
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from tests.builders import random_array, small_network
from tests.calibration.evaluation.test_probe import samples

EFFORT = Effort(max_variables=20, rounds=1, iterations=6, tolerance=1e-3, converge=False)


def evidence_for(model: onnx.ModelProto, count: int = 30) -> Evidence:
    data = samples(count)["x"]
    specs = input_specs(model)
    dataset = Dataset("test", ({"x": row[None]} for row in data), specs)
    analysis = analyse(
        model,
        see=lambda layers: Seen(model, layers, lambda: dataset.batches(dataset.calibration, 8)),
    )
    judge = Judge(model, analysis.layers, dataset, 8, "auto", 1)
    return Evidence(model, analysis, judge, MeasuredModel(model, {}))


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return evidence_for(small_network())


def warm_start(
    evidence: Evidence, constraints: Sequence[Constraint]
) -> tuple[SearchResult, OutputError]:
    """The answer for the objective output."""
    finisher = evidence.finisher()
    rivals = Rivals(finisher, evidence.crossfit(finisher))
    return search_by_output(Problem(evidence.analysis, "milp"), evidence, rivals, constraints)


def improved(
    evidence: Evidence,
    constraints: Sequence[Constraint],
    warm: SearchResult,
    separable: OutputError,
) -> SearchResult:
    problem = Problem(evidence.analysis, "milp", "loss")
    finisher = evidence.finisher()
    return improve(problem, evidence, finisher, constraints, warm, separable, EFFORT)


def searched(
    evidence: Evidence, constraints: Sequence[Constraint], *how: str, seconds: float | None = None
) -> SearchResult:
    """The answer by a solver and an objective."""
    problem = Problem(evidence.analysis, *how, seconds=seconds)
    return search_by_data(problem, evidence, evidence.finisher(), constraints)


def mean_loss(evidence: Evidence, allocation: Allocation) -> float:
    return scores(evidence.finisher(), allocation.choices).searched.mean()


def objective_of(evidence: Evidence) -> tuple[NetworkLoss, tuple[Choice | None, ...]]:
    constraints = evidence.analysis.constraints(Budget(mem=0.6))
    warm, separable = warm_start(evidence, constraints)
    curves = evidence.analysis.curves
    objective = NetworkLoss(curves, evidence.path(), evidence.gradients, separable)
    return objective, warm.allocation.choices


def test_binary_masks_are_the_truncated_network(evidence):
    objective, choices = objective_of(evidence)
    assert any(choices)
    weights = objective.weights(masks_of(evidence.analysis.curves, choices))
    for index, choice in enumerate(choices):
        if choice is None:
            assert index not in weights
            continue
        layer = evidence.analysis.layers[index]
        scheme = evidence.analysis.forms[index][choice.curve]
        (expected,) = evidence.from_data.approximate(layer, scheme, [choice.level])
        np.testing.assert_allclose(weights[index][0], expected.weight, atol=1e-5)
        if expected.bias is not None:
            np.testing.assert_allclose(weights[index][1], expected.bias, atol=1e-5)


def test_all_masks_at_one_are_the_original(evidence):
    objective, _ = objective_of(evidence)
    whole = masks_of(evidence.analysis.curves, [None] * len(evidence.analysis.layers))
    assert objective.weights(whole) == {}
    assert objective.value(whole) == pytest.approx(0.0, abs=1e-9)


def test_the_gradient_by_masks_against_differences(evidence):
    """Blocks of fractional masks, of every layer and scheme; steps that float32 can see."""
    objective, _ = objective_of(evidence)
    generator = np.random.default_rng(1)
    curves = evidence.analysis.curves
    schemes = tuple(int(generator.integers(len(layer.curves))) for layer in curves)
    values, edges = [], []
    for layer, scheme in zip(curves, schemes, strict=True):
        full = layer.curves[scheme].most
        cuts = np.unique([0, max(1, full // 3), max(1, 2 * full // 3), full])
        edges.append(cuts)
        values.append(np.repeat(generator.uniform(0.3, 0.9, len(cuts) - 1), np.diff(cuts)))
    masks = Masks(schemes, tuple(values), tuple(edges))
    gradient = objective.gradient(masks)
    for index, cuts in enumerate(edges):
        for begin, end in itertools.pairwise(cuts):
            found = []
            for step in (0.02, -0.02):
                moved = values[index].copy()
                moved[begin:end] += step
                changed = (*values[:index], moved, *values[index + 1 :])
                found.append(objective.value(Masks(schemes, changed, tuple(edges))))
            slope = (found[0] - found[1]) / 0.04
            scale = max(float(np.abs(gradient[index]).max()), 1e-4)
            assert gradient[index][begin:end].sum() == pytest.approx(slope, abs=0.05 * scale)


def test_the_model_is_exact_where_nothing_changes(evidence):
    """Predicted losses of the present ranks add up to what keeping all whole would change."""
    objective, choices = objective_of(evidence)
    curves = evidence.analysis.curves
    model = objective.model(masks_of(curves, choices), 1.0)
    for index, choice in enumerate(choices):
        if choice is None:
            continue
        own = objective.curve(index, choice.curve)[choice.level]
        slope = objective.gradients.gradient(objective.weights(masks_of(curves, choices)))[index]
        weight, bias = objective.path.whole[index]
        (now,) = objective.path.at(index, choice.curve, [choice.level])
        linear = float(np.vdot(slope[0], weight - now[0]))
        if bias is not None and now[1] is not None:
            linear += float(np.vdot(slope[1], bias - now[1]))
        assert model[index][choice.curve][choice.level] == pytest.approx(-linear - own, rel=1e-4)


def test_the_search_is_never_worse_than_its_start_on_the_selection(evidence):
    for mem in (0.7, 0.5):
        constraints = evidence.analysis.constraints(Budget(mem=mem))
        warm, separable = warm_start(evidence, constraints)
        found = improved(evidence, constraints, warm, separable).allocation
        for constraint in constraints:
            assert constraint.cost(evidence.analysis.curves, found.choices) <= constraint.limit
        before, after = (mean_loss(evidence, a) for a in (warm.allocation, found))
        assert after <= before
        assert found.certificate.objective == "loss"
        assert found.certificate.lower_bound is None
        assert found.certificate.reached["mem"] <= constraints[0].limit


def test_the_search_is_the_same_twice():
    found = []
    for _ in range(2):
        evidence = evidence_for(small_network(), 20)
        constraints = evidence.analysis.constraints(Budget(mem=0.6))
        found.append(searched(evidence, constraints, "slsqp", "loss").allocation)
    assert found[0] == found[1]


def test_an_interrupt_keeps_the_best_so_far(evidence, monkeypatch):
    constraints = evidence.analysis.constraints(Budget(mem=0.6))
    warm, separable = warm_start(evidence, constraints)
    calls = []

    def interrupted(self, weights):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, weights)

    original = GradientProbe.gradient
    monkeypatch.setattr(GradientProbe, "gradient", interrupted)
    found = improved(evidence, constraints, warm, separable).allocation
    assert "interrupted" in found.certificate.notes[-1]
    before, after = (mean_loss(evidence, a) for a in (warm.allocation, found))
    assert after <= before


def test_a_time_limit_of_nothing_gives_the_start(evidence):
    constraints = evidence.analysis.constraints(Budget(mem=0.6))
    warm = warm_start(evidence, constraints)[0].allocation
    found = searched(evidence, constraints, "milp", "loss", seconds=0.0).allocation
    assert found.choices == warm.choices
    assert "time limit" in found.certificate.notes[-1]


def candidate(searched, final=(1.0, 1.1, 0.9, 1.0)) -> Candidate:
    return Candidate("one", (None,), 1.0, Scores(np.array(searched), np.array(final)))


def test_a_candidate_has_to_beat_the_noise():
    start = candidate([1.0, 2.0, 3.0, 4.0])
    better = candidate([0.5, 1.4, 2.6, 3.5])
    assert better.beats(start)
    assert not candidate([9.0, 0.1, 0.1, 0.1]).beats(start)
    assert not candidate([0.1, np.inf, 0.1, 0.1]).beats(start)
    assert start.beats(candidate([0.1, np.inf, 0.1, 0.1]))
    assert not start.beats(start)
    assert not candidate([0.5, 1.4, 2.6, 3.5], [2.0, 2.1, 1.9, 2.05]).beats(start)


def test_layers_without_a_gradient_stay_as_they_are(evidence):
    constraints = evidence.analysis.constraints(Budget(mem=0.6))
    warm = warm_start(evidence, constraints)[0].allocation
    objective, _ = objective_of(evidence)
    index = next(i for i, choice in enumerate(warm.choices) if choice is not None)
    objective.fixed = frozenset({index})
    _, candidates = allocate_by_loss(
        evidence.analysis.curves,
        objective,
        constraints,
        warm,
        lambda choices: scores(evidence.finisher(), choices),
        EFFORT,
    )
    knapsacks = [c for c in candidates if "nearest" not in c.origin]
    assert {c.choices[index] for c in knapsacks} == {warm.choices[index]}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_layer_whose_gradient_overflows_stays_as_it_is(evidence, monkeypatch, value):
    objective, choices = objective_of(evidence)
    before = objective.gradients.gradient

    def gradient(weights):
        (weight, bias), *others = before(weights)
        return [(np.full_like(weight, value), bias), *others]

    monkeypatch.setattr(objective.gradients, "gradient", gradient)
    model = objective.model(masks_of(evidence.analysis.curves, choices), 1.0)
    assert all(np.isfinite(curve).all() for curves in model for curve in curves)
    forced = [all((np.abs(curve) == FORBIDDEN).all() for curve in curves) for curves in model]
    assert forced == [True] + [False] * (len(model) - 1)


def blocked_network() -> onnx.ModelProto:
    """The small network with an operator between that has no derivative rule."""
    model = small_network()
    node = model.graph.node[-1]
    name = node.input[0]
    values = onnx.helper.make_node("TopK", [name, "k"], ["sorted", "order"], axis=1)
    node.input[0] = "sorted"
    model.graph.node.insert(len(model.graph.node) - 1, values)
    size = next(t.dims for t in model.graph.initializer if t.name == node.input[1])
    k = np.array([max(size) if len(size) == 2 else 1], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(k, "k"))
    return model


def test_batches_of_too_many_shapes_are_left_out_of_the_gradient(monkeypatch):
    """24 samples in batches of 8 but for the last one, and a graph for one shape alone."""
    monkeypatch.setattr(gradient_sessions, "MOST_SHAPES", 1)
    evidence = evidence_for(small_network(), 26)
    samples = len(evidence.dataset.calibration)
    assert samples % 8
    assert evidence.gradients.left_out == 1
    found = evidence.gradients.gradient({})
    assert all(np.isfinite(weight).all() for weight, _ in found)


def test_layers_without_a_gradient_are_a_note():
    evidence = evidence_for(blocked_network(), 20)
    constraints = evidence.analysis.constraints(Budget(mem=0.6))
    loss = searched(evidence, constraints, "milp", "loss").allocation
    assert "TopK" in "".join(loss.certificate.notes)


def test_batches_that_the_gradient_does_not_see_are_a_note():
    evidence = evidence_for(small_network(), 20)
    evidence.gradients.left_out = 3
    constraints = evidence.analysis.constraints(Budget(mem=0.6))
    notes = searched(evidence, constraints, "milp", "loss").allocation.certificate.notes
    assert any("does not see 3 batches" in note for note in notes)


def test_softened_outputs_are_logits_over_the_temperature():
    model = small_network()
    feeds = samples(4)
    plain = run_session(open_session(model, 1), feeds)
    (name,) = plain
    softened, measures = soften(model, {name: Measure("logits")}, {name: 4.0})
    found = run_session(open_session(softened, 1), feeds)
    (value,) = found.values()
    np.testing.assert_allclose(value, plain[name] / 4.0, rtol=1e-6)
    assert measures == dict.fromkeys(found, Measure("logits"))
    untouched, measures = soften(model, {name: Measure("mse")}, {})
    np.testing.assert_array_equal(run_session(open_session(untouched, 1), feeds)[name], plain[name])
    assert measures == {name: Measure("mse")}


@pytest.mark.parametrize("opset", [7, 13, 18])
def test_softened_probabilities_are_logarithms(opset):
    x = onnx.helper.make_tensor_value_info("x", 1, ["N", 5])
    y = onnx.helper.make_tensor_value_info("y", 1, ["N", 5])
    node = onnx.helper.make_node("Softmax", ["x"], ["y"], axis=1)
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    logits = random_array(3, 5)
    softened, _ = soften(model, {"y": Measure("probabilities")}, {"y": 2.0})
    onnx.checker.check_model(softened, full_check=True)
    (found,) = run_session(open_session(softened, 1), {"x": logits}).values()
    centred = found - found.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        centred, (logits - logits.mean(axis=1, keepdims=True)) / 2, atol=1e-5
    )


def test_the_temperature_rises_where_few_samples_are_in_doubt():
    generator = np.random.default_rng(0)
    doubtful = generator.standard_normal((64, 10))
    sure = doubtful + 12.0 * np.eye(10)[generator.integers(0, 10, 64)]
    sure[0] = 0.0

    def chosen(values: np.ndarray, kind: str = "logits") -> float:
        parts = [doubts(part, kind == "logits", 1)[0] for part in (values[:40], values[40:])]
        measures = {"y": Measure(kind), "z": Measure("mse")}
        return temperatures(measures, {"y": {(1, kind == "logits"): parts}})["y"]

    assert chosen(doubtful) == 1.0
    assert chosen(sure) > 2.0
    certain = np.exp(sure) / np.exp(sure).sum(axis=1, keepdims=True)
    assert chosen(certain, "probabilities") == chosen(sure)
    # However sure, the ladder ends.
    assert chosen(1e4 * sure) == 16.0


@pytest.mark.parametrize("loss", ["kl", "mse", "ce"])
def test_the_gradient_probe_against_differences(loss):
    model = small_network()
    layers = find_layers(model).layers
    data = samples(6)["x"]
    probe = Probe(model, layers, [{"x": data[:4]}, {"x": data[4:]}], loss, 1)
    gradients = GradientProbe(probe, 1)
    assert gradients.blocked == {}
    weights = {
        i: (read_weight(model, layer) * (1 + 0.2 * random_array(*layer.shape, seed=i)), None)
        for i, layer in enumerate(layers)
    }
    found = gradients.gradient(weights)
    for index, (slope, _) in enumerate(found):
        direction = slope / np.linalg.norm(slope)
        length = 0.001 * float(np.linalg.norm(weights[index][0]))
        either = []
        for sign in (1, -1):
            moved = weights[index][0] + sign * length * direction
            either.append(probe.loss({**weights, index: (moved, None)}))
        expected = (either[0] - either[1]) / (2 * length)
        assert float(np.vdot(slope, direction)) == pytest.approx(expected, rel=0.05)


def test_slopes_are_taken_at_levels_that_there_are() -> None:
    """Of bits, nothing lies between two formats; of ranks in bits, few are rounded."""
    model = small_network()
    data = samples(20)["x"]
    dataset = Dataset("test", ({"x": row[None]} for row in data), input_specs(model))
    asked = Asked("auto", EVERY_RANK, (3, 5, 8))
    batches = lambda: dataset.batches(dataset.calibration, 8)  # noqa: E731
    analysis = analyse(model, asked=asked, see=lambda layers: Seen(model, layers, batches))
    judge = Judge(model, analysis.layers, dataset, 8, "auto", 1)
    evidence = Evidence(model, analysis, judge, MeasuredModel(model, {}))
    known: set[tuple[int, int, int]] = set()
    path = evidence.path()

    def noting(layer: int, curve: int, levels: Sequence[int]) -> list[Pair]:
        known.update((layer, curve, level) for level in levels)
        return LossPath.at(path, layer, curve, levels)

    path.at = noting  # type: ignore[method-assign]
    separable = WeightError(analysis.curves)
    objective = NetworkLoss(analysis.curves, path, evidence.gradients, separable)
    objective.model(masks_of(analysis.curves, [None] * len(analysis.layers)), 1.0)
    for index, layer in enumerate(analysis.curves):
        for number, curve in enumerate(layer.curves):
            asked_for = [level for i, k, level in known if (i, k) == (index, number)]
            assert asked_for
            if not curve.nested:
                assert set(asked_for) <= set(curve.levels.tolist())
