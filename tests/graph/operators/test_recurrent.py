"""Both weights of a recurrent node are layers, and how they read their data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.check.structure import check_structure
from cobla_onnx.graph.inventory import Layer, Reason, Refusal
from cobla_onnx.graph.layers import find_layers, outputs_of, read_weight
from cobla_onnx.graph.macs import infer_shapes, layer_macs, node_macs
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.recurrent import RecurrentPatch
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array
from tests.recurrent_models import GATES, recurrent_weights, sequence_model

STEPS, SAMPLES = 5, 3


def one_node(
    op: str, inputs: int, hidden: int, directions: int, outputs: list[str], **values: object
) -> onnx.ModelProto:
    names = ["x", "W", "R", "B"]
    if directions == 2:
        values["direction"] = "bidirectional"
    node = helper.make_node(op, names, outputs, "rnn", hidden_size=hidden, **values)
    weights = recurrent_weights(op, inputs, hidden, directions)
    kept = [name for name in outputs if name]
    return model_of([node], weights, {"x": [STEPS, SAMPLES, inputs]}, kept)


def vectors_of(model: onnx.ModelProto, layer: Layer, data: np.ndarray) -> np.ndarray:
    patch = operator_of(layer).patch(model.graph.node[0], layer, layer.uses[0])
    assert isinstance(patch, RecurrentPatch)
    found = np.concatenate(list(patch.vectors(data)), axis=2)
    assert found.shape == (patch.groups, patch.size, patch.positions(data))
    some = np.arange(patch.positions(data))[::2]
    np.testing.assert_array_equal(
        np.concatenate(list(patch.vectors(data, some)), axis=2), found[:, :, some]
    )
    return found


@pytest.mark.parametrize("op", GATES)
def test_a_node_holds_two_layers(op):
    model = one_node(op, 6, 4, 2, ["y", "h"])
    found = find_layers(model)
    assert found.skipped == ()
    inputs, state = found.layers
    assert (inputs.name, inputs.shape) == ("rnn/W", (2, 4 * GATES[op], 6))
    assert (state.name, state.shape) == ("rnn/R", (2, 4 * GATES[op], 4))
    for layer in found.layers:
        assert layer.bias is None
        assert (layer.uses[0].data, layer.uses[0].output) == ("x", "y")
        assert outputs_of(model, layer) == ["y", "h"]
        assert operator_of(layer).output_axis(layer) is None


@settings(max_examples=20)
@given(st.sampled_from(list(GATES)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))
def test_macs_are_counted_for_each_weight_and_once_for_the_node(op, inputs, hidden, directions):
    model = one_node(op, inputs, hidden, directions, ["y"])
    shapes = infer_shapes(model, {})
    read, state = find_layers(model).layers
    rows = STEPS * SAMPLES * directions * GATES[op] * hidden
    assert layer_macs(model.graph.node, read, shapes, {}) == rows * inputs
    assert layer_macs(model.graph.node, state, shapes, {}) == rows * hidden
    assert node_macs(model, shapes) == ({0: rows * (inputs + hidden)}, [])
    assert (
        layer_macs(model.graph.node, read, {}, {})
        is layer_macs(model.graph.node, state, {}, {})
        is None
    )


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))
def test_vectors_are_what_the_weights_multiply(inputs, hidden, directions):
    """By a node without an activation: y[t] = W x[t] + R y[t - 1] + B."""
    same = ["Affine"] * directions
    ones = [1.0] * directions
    model = one_node(
        "RNN", inputs, hidden, directions, ["y"], activations=same, activation_alpha=ones
    )
    x = random_array(STEPS, SAMPLES, inputs, seed=3)
    y = run_session(open_session(model, 1), {"x": x})["y"]
    read, state = find_layers(model).layers
    its = vectors_of(model, read, x)[0]
    after = vectors_of(model, state, y).reshape(directions, hidden, SAMPLES, STEPS)
    bias = next(t for t in model.graph.initializer if t.name == "B")
    shift = onnx.numpy_helper.to_array(bias).reshape(directions, 2, hidden, 1).sum(axis=1)
    for direction, (w, r) in enumerate(
        zip(read_weight(model, read), read_weight(model, state), strict=True)
    ):
        steps = slice(None, None, -1 if direction else 1)
        # In the order of time for both directions, with the initial state before the others.
        states = after[direction][:, :, steps]
        before = np.concatenate([np.zeros((hidden, SAMPLES, 1)), states[:, :, :-1]], axis=2)
        seen = its.reshape(inputs, SAMPLES, STEPS)[:, :, steps]
        made = w @ seen.reshape(inputs, -1) + r @ before.reshape(hidden, -1) + shift[direction]
        np.testing.assert_allclose(made.reshape(states.shape), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [["y"], ["", "h"]])
def test_samples_may_come_first(outputs):
    """Tensors of the other layout hold the same vectors."""
    plain, turned = (one_node("GRU", 6, 4, 2, outputs, layout=layout) for layout in (0, 1))
    x, states = random_array(STEPS, SAMPLES, 6), random_array(STEPS, 2, SAMPLES, 4)
    order = (2, 0, 1, 3)
    if outputs[0] == "":
        states, order = states[0], (1, 0, 2)
    pairs = zip(find_layers(plain).layers, find_layers(turned).layers, strict=True)
    for (one, other), data, its in zip(
        pairs, (x, states), (x.transpose(1, 0, 2), states.transpose(order)), strict=True
    ):
        np.testing.assert_array_equal(vectors_of(plain, one, data), vectors_of(turned, other, its))


def test_a_node_without_states_says_nothing_of_them():
    model = one_node("LSTM", 6, 4, 1, ["", "", "c"])
    state = find_layers(model).layers[1]
    found = operator_of(state).patch(model.graph.node[0], state, state.uses[0])
    assert found == Refusal(Reason.UNREADABLE, "the node gives out no state")


def test_a_weight_that_is_computed_or_read_elsewhere_is_left_and_the_other_is_not():
    model = one_node("LSTM", 6, 4, 1, ["y"])
    node = model.graph.node[0]
    node.input[1] = "v"
    model.graph.node.insert(0, helper.make_node("Relu", ["W"], ["v"]))
    found = find_layers(model)
    assert [layer.name for layer in found.layers] == ["rnn/R"]
    assert [(s.name, s.reason) for s in found.skipped] == [("rnn/W", Reason.NOT_CONSTANT)]
    # One tensor for both.
    model = one_node("LSTM", 4, 4, 1, ["y"])
    model.graph.node[0].input[2] = "W"
    found = find_layers(model)
    assert found.layers == ()
    assert [s.reason for s in found.skipped] == [Reason.SHARED] * 2


def test_nodes_that_share_a_weight_are_one_layer_of_it():
    model = sequence_model("GRU", inputs=16, hidden=16, directions=1)
    second = next(node for node in model.graph.node if node.name == "second")
    second.input[2] = "R1"
    layers = {layer.name: layer for layer in find_layers(model).layers}
    assert set(layers) == {"before", "first/W", "first/R", "second/W", "after"}
    assert [use.data for use in layers["first/R"].uses] == ["s", "f"]


@pytest.mark.parametrize(
    ("place", "shape"), [("W", (1, 16, 6)), ("W", (2, 12, 6)), ("R", (2, 16, 5)), ("R", (2, 16))]
)
def test_a_weight_of_another_shape(place, shape):
    model = one_node("LSTM", 6, 4, 2, ["y"])
    check_structure(model)
    tensor = next(t for t in model.graph.initializer if t.name == place)
    tensor.CopyFrom(onnx.numpy_helper.from_array(random_array(*shape), place))
    with pytest.raises(ModelError, match="node 'rnn': its weight has shape"):
        check_structure(model)
