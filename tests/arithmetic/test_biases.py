"""Biases take back what 8 bits change on average, node after node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.arithmetic.biases import biased_nodes, corrected_biases, with_biases
from cobla_onnx.arithmetic.nodes import carried_nodes, weighted_nodes
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.arithmetic.quantise import quantised
from cobla_onnx.arithmetic.ranges import calibrated
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array, small_network


def conv_network(seed: int) -> onnx.ModelProto:
    """Two convolutions, one without a bias, a transposed one and a Gemm, channels in each place."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["y1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["y2"], "named"),
        helper.make_node("ConvTranspose", ["y2", "w3", "b3"], ["y3"], strides=[2, 2]),
        helper.make_node("Relu", ["y3"], ["r3"]),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"]),
    ]
    shapes = {
        "w1": (8, 3, 3, 3), "b1": (8,), "w2": (6, 8, 1, 1),
        "w3": (6, 5, 2, 2), "b3": (5,), "w4": (5, 7), "b4": (7,),
    }  # fmt: skip
    weights = {
        name: random_array(*shape, seed=seed % 1000 + number) / np.float32(3)
        for number, (name, shape) in enumerate(shapes.items())
    }
    return model_of(nodes, weights, {"x": ["N", 3, 8, 8]}, ["y"])


def means(model: onnx.ModelProto, outputs: list[str], feeds) -> list[np.ndarray]:
    values = run_session(open_session(model, 1, outputs), feeds)
    found = [values[name].astype(np.float64) for name in outputs]
    return [v.mean(axis=tuple(a for a in range(v.ndim) if a != 1)) for v in found]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0))
def test_channels_have_the_means_that_they_had(seed, cut):
    """Also where ranges are cut, so that much more than rounding is to be taken back."""
    model = conv_network(seed)
    feeds = {"x": random_array(12, 3, 8, 8, seed=seed)}
    prepared, weighted = prepare(model), weighted_nodes(model)
    prepared = replace(prepared, given=frozenset())
    ranges = calibrated(prepared, [{"x": np.float32(cut) * feeds["x"]}], "min-max")
    nodes = (*weighted, *carried_nodes(model, weighted))
    narrow = quantised(prepared, ranges, nodes)
    found = biased_nodes(model, weighted)
    assert found == {0: 1, 3: 1, 7: -1}
    named = {place: prepared.names[place] for place in found}
    parts = [{"x": feeds["x"][:5]}, {"x": feeds["x"][5:]}]
    biases = corrected_biases(model, narrow, found, named, lambda: iter(parts))
    moved = replace(prepare(with_biases(model, biases)), given=frozenset())
    after = quantised(moved, ranges, nodes)
    wanted = means(model, [model.graph.node[place].output[0] for place in found], feeds)
    errors = []
    for result in (narrow, after):
        outputs = {node.name: node.output[0] for node in result.graph.node}
        seen = means(result, [outputs[named[place]] for place in found], feeds)
        errors.append([float(np.abs(a - b).max()) for a, b in zip(wanted, seen, strict=True)])
    before, left = errors
    # What is left is the rounding of biases, and float rounding that moves single codes.
    assert max(left) < 0.1 * max(before)
    again = corrected_biases(model, narrow, found, named, lambda: iter(parts))
    assert all((again[place] == biases[place]).all() for place in found)


def test_a_bias_that_others_read_stays_theirs():
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["y1"]),
        helper.make_node("Conv", ["x", "w", "b"], ["y2"]),
    ]
    weights = {"w": random_array(4, 3, 1, 1), "b": random_array(4, seed=1)}
    model = model_of(nodes, weights, {"x": ["N", 3, 4, 4]}, ["y1", "y2"])
    before = model.SerializeToString()
    one, two = np.full(4, 1, np.float32), np.full(4, 2, np.float32)
    feeds = {"x": np.zeros((1, 3, 4, 4), np.float32)}
    for given_biases in ({0: one}, {0: one, 1: two}):
        result = with_biases(model, given_biases)
        onnx.checker.check_model(result)
        values = run_session(open_session(result, 1), feeds)
        for place, name in enumerate(("y1", "y2")):
            wanted = given_biases.get(place, weights["b"])
            np.testing.assert_array_equal(values[name][0, :, 0, 0], wanted)
    assert model.SerializeToString() == before
    assert {tensor.name for tensor in result.graph.initializer} == {"w", "b", "b_2"}


@pytest.mark.parametrize(
    ("changed", "biased"),
    [
        ({}, True),
        ({"beta": 0.5}, False),
        ({"transB": 1}, True),
        ({"bias": (1,)}, False),
        ({"bias": (1, 6)}, False),
        ({"bias": None}, False),
        ({"bias": "computed"}, False),
    ],
)
def test_what_is_no_stored_bias_of_every_channel_is_left_alone(changed, biased):
    changed = dict(changed)
    bias = changed.pop("bias", (6,))
    inputs = ["x", "w"] if bias is None else ["x", "w", "b"]
    nodes = [helper.make_node("Gemm", inputs, ["y"], **changed)]
    weights = {"w": random_array(*((6, 5) if "transB" in changed else (5, 6)))}
    if bias == "computed":
        nodes.insert(0, helper.make_node("Relu", ["stored"], ["b"]))
        weights["stored"] = random_array(6, seed=1)
    elif bias is not None:
        weights["b"] = random_array(*bias, seed=1)
    model = model_of(nodes, weights, {"x": ["N", 5]}, ["y"])
    place = len(nodes) - 1
    assert biased_nodes(model, [place]) == ({place: -1} if biased else {})


def test_what_is_no_number_takes_nothing_back():
    model = small_network()
    weighted = weighted_nodes(model)
    prepared = prepare(model)
    feeds = {"x": random_array(4, 3, 12, 12)}
    ranges = calibrated(prepared, [feeds], "min-max")
    narrow = quantised(prepared, ranges, (*weighted, *carried_nodes(model, weighted)))
    broken = {"x": feeds["x"].copy()}
    broken["x"][0, 0, 0, 0], broken["x"][1, 0, 0, 0] = np.inf, -np.inf
    found = biased_nodes(model, weighted)
    named = {place: prepared.names[place] for place in found}
    biases = corrected_biases(model, narrow, found, named, lambda: [broken])
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(biases[0], stored["b1"])
    assert np.isfinite(biases[6]).all()
