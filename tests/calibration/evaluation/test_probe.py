"""Losses, the probe, sensitivities and the refit, on a small network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.allocation import Budget
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.evaluation.targets import one_hot
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import find_layers, read_bias, read_weight
from cobla_onnx.graph.subgraph import expose, prefix
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.pipeline.search import sensitivity as sensitivity_module
from cobla_onnx.pipeline.search.point_losses import PointLosses
from cobla_onnx.pipeline.search.refit import ChosenLayer, refit_layers
from cobla_onnx.pipeline.search.sensitivity import Response, Sensitivity
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import random_array, small_network


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def samples(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Smooth images, so that some directions carry more than others."""
    coarse = np.repeat(np.repeat(random_array(count, 3, 4, 4, seed=seed), 3, 2), 3, 3)
    return {"x": coarse + 0.1 * random_array(count, 3, 12, 12, seed=seed + 1)}


@given(st.integers(0, 1000), st.integers(2, 6))
def test_divergences_against_their_definition(seed, classes):
    before, after = random_array(4, classes, seed=seed), random_array(4, classes, seed=seed + 1)
    p, q = softmax(before), softmax(after)
    expected = (p * np.log(p / q)).sum(axis=1)
    for kind, a, b in (("logits", before, after), ("probabilities", p, q)):
        found = sample_losses({"y": kind}, {"y": a}, {"y": b})
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert sample_losses({"y": kind}, {"y": a}, {"y": a}) == pytest.approx(0, abs=1e-9)
    crossed = sample_losses({"y": "ce-logits"}, {"y": one_hot(before, None)}, {"y": after})
    np.testing.assert_allclose(crossed, -np.log(q[np.arange(4), p.argmax(1)]), rtol=1e-3)


def test_squared_errors_are_relative_and_outputs_are_summed():
    before = {"a": random_array(6, 3, 5), "b": random_array(6, 2) * 1000}
    after = {"a": before["a"] * 1.1, "b": before["b"] * 0.9}
    kinds = {"a": "mse", "b": "mse"}
    assert sample_losses(kinds, before, after).mean() == pytest.approx(0.02, rel=1e-4)
    broken = {**after, "a": after["a"] * np.nan}
    assert np.isinf(sample_losses(kinds, before, broken)).all()


def test_exposed_weights_and_prefixes_compute_the_same():
    model = small_network()
    layers = find_layers(model).layers
    exposed = expose(model, layers, as_inputs=True)
    feeds = samples(3)
    weights = {}
    for layer, weight, bias in zip(layers, exposed.weights, exposed.biases, strict=True):
        weights[weight] = read_weight(model, layer)
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            weights[bias] = read_bias(model, layer)
    assert [layer.bias for layer in layers] == ["b1", None, "b3"]
    expected = run_session(open_session(model, 1, ["r1"]), feeds)
    found = run_session(open_session(exposed.model, 1), {**feeds, **weights})
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    part = prefix(model, ["r1", "x"])
    assert [node.name for node in part.graph.node] == ["conv1", "relu1"]
    assert {t.name for t in part.graph.initializer} == {"w1", "b1"}
    found = run_session(open_session(part, 1), feeds)
    assert list(found) == ["r1"]
    np.testing.assert_array_equal(found["r1"], expected["r1"])


def test_a_prefix_of_an_old_model_lists_the_weights_that_it_has():
    model = small_network()
    model.ir_version = 3
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in model.graph.initializer
    )
    part = prefix(model, ["r1"])
    assert [value.name for value in part.graph.input] == ["x", "w1", "b1"]
    run_session(open_session(part, 1), samples(2))


class Setting:
    """A small network with everything that decisions need."""

    def __init__(self) -> None:
        self.model = small_network()
        self.calibration = samples(64)
        self.seen: Seen | None = None

        def see(layers):
            self.seen = Seen(self.model, layers, self.batches)
            return self.seen

        self.analysis = analyse(
            self.model,
            macs_needed=True,
            see=see,
        )
        self.probe = Probe(self.model, self.analysis.layers, self.batches(), "auto", 1)
        self.selection = Probe(self.model, self.analysis.layers, [samples(32, 50)], "auto", 1)

    def batches(self):
        data = self.calibration["x"]
        return ({"x": data[i : i + 16]} for i in range(0, len(data), 16))


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def test_the_probe_tells_what_a_rewritten_model_does(setting):
    index = 1
    layer = setting.analysis.layers[index]
    scheme = setting.analysis.forms[index][0]
    (found,) = FactorsFromData(setting.seen).approximate(layer, scheme, [4])
    loss = setting.probe.losses({index: (found.weight, found.bias)})
    replacement = make_replacement(layer, scheme, found.factors, found.bias)
    changed = rewrite(setting.model, [replacement])
    before = run_session(open_session(setting.model, 1), setting.calibration)
    after = run_session(open_session(changed, 1), setting.calibration)
    expected = sample_losses(setting.probe.measures, before, after)
    np.testing.assert_allclose(loss, expected, rtol=1e-2, atol=1e-5)
    assert setting.probe.loss({}) == pytest.approx(0, abs=1e-9)
    assert setting.probe.samples == 64


def test_the_probe_keeps_what_fits():
    model = small_network()
    layers = find_layers(model).layers
    batches = ({"x": samples(4)["x"]} for _ in range(100))
    probe = Probe(model, layers, batches, "auto", 1, limit=3 * 4 * 3 * 144 * 4)
    assert 4 < probe.samples < 20


@given(
    # Errors of a grid: closer than rounding, two points cannot both be passed through.
    st.lists(
        st.tuples(st.integers(0, 400).map(lambda k: 10.0 ** (-k / 100)), st.floats(1e-7, 10)),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=100)
def test_responses_rise_and_pass_through_rising_points(points):
    response = Response()
    for error, loss in points:
        response.add(error, loss)
    errors = np.geomspace(1e-6, 1, 50)
    losses = response(errors)
    assert (np.diff(losses) >= -1e-12).all()
    assert response(np.zeros(1))[0] == 0
    known, logarithms = response.logarithms()
    np.testing.assert_allclose(response(np.exp(known)), np.exp(logarithms), rtol=1e-6)


def test_a_response_takes_its_shape_from_others():
    known, unknown = Response(), Response()
    for error in sensitivity_module.TARGETS:
        known.add(error, 2 * error**1.5)
    unknown.add(0.05, 3.0)
    unknown.shape_as(sensitivity_module._shape([known, known]))
    errors = np.array([0.02, 0.05, 0.14])
    np.testing.assert_allclose(unknown(errors), 3 * (errors / 0.05) ** 1.5, rtol=1e-9)


def test_a_point_next_to_a_measured_one_is_known():
    response = Response()
    response.add(0.1, 1.0)
    assert response.knows(0.1, 0.0)
    assert not response.knows(0.1001, 0.0)
    for error, known in ((0.12, True), (0.083, True), (0.123, False), (0.081, False)):
        assert response.knows(error, 0.2) is known


def test_of_many_layers_some_are_measured_at_one_point(setting, monkeypatch):
    monkeypatch.setattr(sensitivity_module, "MANY", 2)
    monkeypatch.setattr(sensitivity_module, "SHAPED", 2)
    probe = SpreadProbe(Pool(), setting.model, setting.analysis.layers, setting.batches(), "auto")
    analysis = setting.analysis
    sensitivity = Sensitivity(PointLosses(analysis.variants, analysis.from_data, probe))
    asked = []
    whole = probe.mean_losses

    def counted(wanted):
        kept = [(index, list(pairs)) for index, pairs in wanted]
        asked.extend(len(pairs) for _, pairs in kept)
        return whole(kept)

    monkeypatch.setattr(probe, "mean_losses", counted)
    sensitivity.measure(analysis.constraints(Budget(mem=0.6)))
    count = len(analysis.layers)
    assert count > 2
    assert asked[1:-1] == [1] * (count - 2)
    assert min(asked[0], asked[-1]) > 1
    assert all(len(response.points) == 3 for response in sensitivity.responses[1:-1])


def test_measured_points_are_on_the_curves(setting):
    analysis = setting.analysis
    probe = SpreadProbe(Pool(), setting.model, analysis.layers, setting.batches(), "auto")
    sensitivity = Sensitivity(PointLosses(analysis.variants, analysis.from_data, probe))
    constraints = setting.analysis.constraints(Budget(mem=0.6))
    sensitivity.measure(constraints)
    from cobla_onnx.allocation import allocate

    choices = allocate(setting.analysis.curves, sensitivity.objective(), constraints).choices
    assert any(choice is not None for choice in choices)
    sensitivity.refine(choices)
    assert not sensitivity.refine(choices)
    objective = sensitivity.objective()
    for index, choice in enumerate(choices):
        if choice is None:
            continue
        layer, scheme = (
            setting.analysis.layers[index],
            setting.analysis.forms[index][choice.curve],
        )
        (found,) = FactorsFromData(setting.seen).approximate(layer, scheme, [choice.level])
        measured = setting.probe.loss({index: (found.weight, found.bias)})
        curve = objective.curve(index, choice.curve)
        assert curve[choice.level] <= measured * 1.01 + 1e-8
        assert (np.diff(curve) <= 1e-12).all()
        assert curve[-1] == 0


def test_refit_is_kept_only_where_it_helps(setting):
    chosen = []
    for index, layer in enumerate(setting.analysis.layers[1:], 1):
        scheme = setting.analysis.forms[index][0]
        (found,) = FactorsFromData(setting.seen).approximate(layer, scheme, [4])
        chosen.append(ChosenLayer(index, layer, scheme, 4, found))

    def loss(approximations) -> float:
        return setting.selection.loss(
            {e.index: (a.weight, a.bias) for e, a in zip(chosen, approximations, strict=True)}
        )

    before = loss([entry.approximation for entry in chosen])
    after, kept = refit_layers(setting.model, chosen, setting.batches, setting.selection, threads=1)
    assert loss(after) <= before
    # The first of the two has no approximated layer before it.
    assert after[0] is chosen[0].approximation
    assert kept == (after[1] is not chosen[1].approximation)


def test_refit_of_a_last_layer_is_the_least_squares_answer(setting):
    """With a bias and full rank the refit undoes what a linear map can undo."""
    first, last = setting.analysis.layers[1], setting.analysis.layers[-1]
    scheme = setting.analysis.forms[1][0]
    (poor,) = FactorsFromData(setting.seen).approximate(first, scheme, [6])
    matrix = schemes_for(last)[0]
    (whole,) = FactorsFromData(setting.seen).approximate(last, matrix, [10])
    chosen = [
        ChosenLayer(1, first, scheme, 6, poor),
        ChosenLayer(len(setting.analysis.layers) - 1, last, matrix, 10, whole),
    ]
    own = Probe(setting.model, setting.analysis.layers, setting.batches(), "mse", 1)
    before = own.loss({e.index: (e.approximation.weight, e.approximation.bias) for e in chosen})
    after, kept = refit_layers(setting.model, chosen, setting.batches, own, threads=1)
    assert kept == 1
    refitted = own.loss({e.index: (a.weight, a.bias) for e, a in zip(chosen, after, strict=True)})
    assert refitted < 0.9 * before


def test_wide_layers_refit_their_second_factor(setting, monkeypatch):
    monkeypatch.setattr("cobla_onnx.pipeline.search.refit.WIDE", 5)
    test_refit_of_a_last_layer_is_the_least_squares_answer(setting)
