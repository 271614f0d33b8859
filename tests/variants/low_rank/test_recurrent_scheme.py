"""Recurrent nodes whose weights are replaced give what they gave."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.graph.layers import Layer, find_layers, read_weight
from cobla_onnx.graph.macs import infer_shapes, layer_macs, node_macs
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.coded_factors.family import CodedFactorsFamily
from cobla_onnx.variants.low_rank.matricisation import layout_of, schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from cobla_onnx.variants.low_rank.recurrent_scheme import RecurrentScheme
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.storage.family import StorageFamily
from tests.builders import model_of, random_array
from tests.recurrent_models import GATES, recurrent_weights

STORAGE = StorageFamily()


@st.composite
def recurrent_nodes(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A node with some of its optional inputs, and data for it."""
    op = draw(st.sampled_from(list(GATES)))
    inputs, hidden, steps, samples = (draw(st.integers(1, 6)) for _ in range(4))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    directions = 2 if direction == "bidirectional" else 1
    weights = recurrent_weights(op, inputs, hidden, directions, seed=draw(st.integers(0, 99)))
    names = ["x", "W", "R", "B" if draw(st.booleans()) else "", "", "", "", ""]
    feeds = {"x": random_array(steps, samples, inputs, seed=1)}
    if draw(st.booleans()):
        names[4] = "lengths"
        lengths = draw(st.lists(st.integers(1, steps), min_size=samples, max_size=samples))
        weights["lengths"] = np.array(lengths, np.int32)
    if draw(st.booleans()):
        names[5] = "h0"
        feeds["h0"] = random_array(directions, samples, hidden, seed=2)
    values: dict[str, object] = {"direction": direction, "hidden_size": hidden}
    if op == "LSTM":
        if draw(st.booleans()):
            names[6] = "c0"
            feeds["c0"] = random_array(directions, samples, hidden, seed=3)
        if draw(st.booleans()):
            names[7], weights["P"] = "P", random_array(directions, 3 * hidden, seed=4)
    if op == "GRU":
        values["linear_before_reset"] = draw(st.integers(0, 1))
    if draw(st.booleans()):
        values["clip"] = 0.7
    while not names[-1]:
        names.pop()
    outputs = draw(st.sampled_from([["y"], ["y", "h"], ["", "h"]]))
    node = helper.make_node(op, names, outputs, "rnn", **values)
    used = {name: array for name, array in weights.items() if name in names}
    inputs_of = {name: list(array.shape) for name, array in feeds.items()}
    return model_of([node], used, inputs_of, [name for name in outputs if name]), feeds


def at_full_rank(model: onnx.ModelProto, layer: Layer) -> Replacement:
    (scheme,) = schemes_for(layer)
    weight = scheme.matrix(read_weight(model, layer))
    return make_replacement(layer, scheme, factorize(weight, min(weight.shape[1:])))


def in_bits(model: onnx.ModelProto, layer: Layer, bits: int) -> Replacement:
    (form,) = STORAGE.forms(layer)
    made = STORAGE.from_weights(layer, form, bits, read_weight(model, layer), None)
    return STORAGE.replace(layer, form, made)


def with_weights(model: onnx.ModelProto, replacements: list[Replacement]) -> onnx.ModelProto:
    """The model with the weights that the replacements stand for."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    dense = {r.layer.source: r.dense() for r in replacements}
    for tensor in result.graph.initializer:
        if tensor.name in dense:
            tensor.CopyFrom(onnx.numpy_helper.from_array(dense[tensor.name], tensor.name))
    return result


def assert_same(
    model: onnx.ModelProto, replacements: list[Replacement], feeds: dict[str, np.ndarray]
) -> onnx.ModelProto:
    changed = rewrite(model, replacements)
    onnx.checker.check_model(changed, full_check=True)
    expected = run_session(open_session(with_weights(model, replacements), 1), feeds)
    found = run_session(open_session(changed, 1), feeds)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-4, atol=2e-5, err_msg=name)
    return changed


@settings(max_examples=12, deadline=None)
@given(recurrent_nodes(), st.permutations([0, 1]))
def test_both_weights_are_replaced_in_any_order(made, order):
    model, feeds = made
    read, state = find_layers(model).layers
    np.testing.assert_allclose(
        at_full_rank(model, read).dense(), read_weight(model, read), atol=1e-5
    )
    assert_same(model, [at_full_rank(model, read)], feeds)
    assert_same(model, [in_bits(model, state, 8)], feeds)
    both = [at_full_rank(model, read), in_bits(model, state, 4)]
    assert_same(model, [both[place] for place in order], feeds)
    assert_same(model, [in_bits(model, read, 5), in_bits(model, state, 16)], feeds)


@settings(max_examples=12, deadline=None)
@given(recurrent_nodes())
def test_costs_are_those_of_the_nodes(made):
    model, feeds = made
    read, state = find_layers(model).layers
    shapes = infer_shapes(model, {name: array.shape for name, array in feeds.items()})
    (scheme,) = schemes_for(read)
    assert isinstance(scheme, RecurrentScheme)
    weight = read_weight(model, read)
    np.testing.assert_array_equal(scheme.weight(scheme.matrix(weight)), weight)
    np.testing.assert_array_equal(scheme.weight_of(scheme.rows_of(weight)), weight)
    replacement = at_full_rank(model, read)
    rank = min(scheme.matrix_shape()[1:])
    assert sum(array.size for array in replacement.arrays.values()) == (
        rank * scheme.params_per_rank()
    )
    changed = rewrite(model, [replacement])
    macs, unknown = node_macs(
        changed, infer_shapes(changed, {n: a.shape for n, a in feeds.items()})
    )
    assert not unknown
    its = scheme.macs_per_rank(read.uses[0], shapes)
    assert its is not None
    assert sum(macs.values()) == rank * its + (layer_macs(model.graph.node, state, shapes, {}) or 0)


def test_directions_share_the_first_factor_and_have_rows_of_their_own():
    weights = recurrent_weights("LSTM", 12, 8, 2)
    node = helper.make_node(
        "LSTM", ["x", "W", "R"], ["y"], "rnn", hidden_size=8, direction="bidirectional"
    )
    del weights["B"]
    model = model_of([node], weights, {"x": [5, 2, 12]}, ["y"])
    read, state = find_layers(model).layers
    (scheme,) = schemes_for(read)
    assert scheme.params_per_rank() == 12 + 2 * 32
    factors = factorize(scheme.matrix(weights["W"]), 4)
    first, second = scheme.fold(factors.left, factors.right)
    assert (first.shape, second.shape) == ((12, 4), (2, 32, 4))
    for back, own in zip(scheme.unfold(first, second), (factors.left, factors.right), strict=True):
        np.testing.assert_array_equal(back, own)
    assert schemes_for(state) == ()
    layout = layout_of(state)
    assert isinstance(layout, ProductScheme)
    # A moment for each direction.
    assert layout.rows_of(weights["R"]).shape == (2, 32, 8)


@pytest.mark.parametrize("bits", [2, 8])
def test_factors_in_bits(bits):
    weights = recurrent_weights("GRU", 24, 16, 2)
    node = helper.make_node(
        "GRU", ["x", "W", "R", "B"], ["y"], "rnn", hidden_size=16, direction="bidirectional"
    )
    model = model_of([node], weights, {"x": [5, 2, 24]}, ["y"])
    read, state = find_layers(model).layers
    family = CodedFactorsFamily()
    form = next(form for form in family.forms(read) if form.bits == bits)
    pair = family.replace(read, form, family.from_weights(read, form, 6, weights["W"], None))
    assert_same(model, [pair, in_bits(model, state, bits)], {"x": random_array(5, 2, 24)})


LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


@pytest.mark.parametrize("ir_version", [7, 8])
def test_decoded_weights_are_constants_when_the_model_is_open(ir_version, tmp_path):
    """At all levels of optimisation results agree; from the first on nothing is decoded in runs."""
    weights = recurrent_weights("LSTM", 24, 16, 1)
    node = helper.make_node("LSTM", ["x", "W", "R", "B"], ["y"], "rnn", hidden_size=16)
    model = model_of([node], weights, {"x": [5, 2, 24]}, ["y"], ir_version=ir_version)
    layers = find_layers(model).layers
    changed = rewrite(model, [in_bits(model, layer, 4) for layer in layers])
    feeds, found = {"x": random_array(5, 2, 24)}, []
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 4
        content = changed.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, feeds)[0])
        if level != LEVELS[0]:
            (left,) = onnx.load(tmp_path / "optimised.onnx").graph.node
            assert left.op_type == "LSTM"
    expected = run_session(
        open_session(with_weights(model, [in_bits(model, x, 4) for x in layers]), 1), feeds
    )["y"]
    for result in found:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
