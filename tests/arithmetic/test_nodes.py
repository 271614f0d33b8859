"""Nodes that look as if they could compute in 8 bits, and those that read what others read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.arithmetic.biases import with_biases
from cobla_onnx.arithmetic.nodes import dynamic_nodes, is_pooled, sole_readers, weighted_nodes
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.arithmetic.quantise import quantised
from cobla_onnx.arithmetic.ranges import calibrated
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array


def near(model: onnx.ModelProto, feeds: dict[str, np.ndarray], places=None) -> dict[str, float]:
    """Largest error of each output in 8 bits, of its largest value."""
    prepared = prepare(model)
    ranges = calibrated(prepared, [feeds], "min-max")
    result = quantised(prepared, ranges, weighted_nodes(model) if places is None else places)
    expected, found = (
        run_session(open_session(m, 1, optimized=True), feeds) for m in (model, result)
    )
    return {
        name: float(np.abs(found[name] - value).max() / np.abs(value).max())
        for name, value in expected.items()
    }


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_a_transposed_convolution_in_groups_has_no_bias_in_eight_bits(group, channels, biased):
    """Its groups share their scales, of which the bias would need one for each channel."""
    read = ["x", "w", "b"] if biased else ["x", "w"]
    node = helper.make_node("ConvTranspose", read, ["y"], group=group)
    weights = {"w": random_array(4, channels, 3)}
    if biased:
        weights["b"] = random_array(group * channels)
    model = model_of([node], weights, {"x": [2, 4, 9]}, ["y"])
    can = group == 1 or channels == 1 or not biased
    assert weighted_nodes(model) == ((0,) if can else ())
    if can:
        assert near(model, {"x": random_array(2, 4, 9)})["y"] < 0.05


def test_what_goes_through_pooling_before_anything_computes_with_it():
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], **pool),
        helper.make_node("Conv", ["c", "v"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["e"]),
        helper.make_node("MaxPool", ["e"], ["y"], **pool),
    ]
    weights = {"w": random_array(4, 3, 1, 1), "v": random_array(4, 4, 1, 1)}
    model = model_of(nodes, weights, {"x": [1, 3, 8, 8]}, ["y"])
    assert is_pooled(model, 0)
    # A Sigmoid computes in floating point.
    assert not is_pooled(model, 3)


def test_a_weight_without_elements_stays():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
        helper.make_node("MatMul", ["x", "u"], ["z"]),
    ]
    empty = np.zeros((6, 0), np.float32)
    weights = {"w": empty, "v": empty.T, "u": random_array(6, 4)}
    model = model_of(nodes, weights, {"x": [5, 6]}, ["y", "z"])
    assert weighted_nodes(model) == (2,)


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 6, 6), (6,)])
def test_products_of_what_is_no_matrix_have_ranges_of_samples(shape):
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(10)]
    weights = {f"w{i}": random_array(6, 4, seed=i) for i in range(10)}
    stacked = helper.make_node("MatMul", ["x", "v"], ["z"])
    weights["v"] = random_array(*shape) * np.linspace(0.1, 3, 6, dtype=np.float32)
    outputs = ["z", *(f"y{i}" for i in range(10))]
    model = model_of([stacked, *nodes], weights, {"x": [3, 5, 6]}, outputs)
    weighted = weighted_nodes(model)
    assert weighted == tuple(range(11))
    assert dynamic_nodes(model, weighted) == tuple(range(1, 11))
    assert near(model, {"x": random_array(3, 5, 6)}, places=(0,))["z"] < 0.05


def product(*more: onnx.NodeProto, outputs: tuple[str, ...] = ()) -> onnx.ModelProto:
    """Return a model that multiplies by w, and what else is given."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"]), *more]
    weights = {"w": random_array(6, 6, seed=1), "b": random_array(6, seed=2) / 1000}
    made = [node.output[0] for node in more]
    return model_of(nodes, weights, {"x": [5, 6]}, ["y", *made, *outputs])


def test_a_weight_that_something_else_reads_stays():
    """It would be rounded for all of them, also where nothing computes in 8 bits."""
    again = helper.make_node("MatMul", ["x", "w"], ["z"])
    assert weighted_nodes(product()) == (0,)
    assert weighted_nodes(product(again)) == (0, 1)
    assert sole_readers(product(again), [1]) == ()
    # A node that options leave as it is reads it, too.
    assert weighted_nodes(product(again), spared={"z"}) == ()
    assert weighted_nodes(product(outputs=("w",))) == ()
    assert weighted_nodes(product(helper.make_node("Neg", ["w"], ["z"]))) == ()
    assert weighted_nodes(product(helper.make_node("MatMul", ["w", "x2"], ["z"]))) == ()
    bodies = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ("then", "else")
    }
    assert weighted_nodes(product(helper.make_node("If", ["c"], ["z"], **bodies))) == ()


def test_a_weight_that_is_read_both_ways_stays():
    """There is one scale for each row, or for each column; onnxruntime mixes them up."""
    turned = helper.make_node("Gemm", ["y", "w"], ["z"], transB=1)
    assert weighted_nodes(product(turned)) == ()
    both = helper.make_node("Gemm", ["y", "w"], ["z"])
    assert weighted_nodes(product(both)) == (0, 1)


@pytest.mark.parametrize("reader", ["node", "output", "another product"])
def test_a_bias_that_something_else_reads_is_rounded_for_its_node_alone(reader):
    others = {
        "node": product(helper.make_node("Neg", ["b"], ["b2"])),
        "output": product(outputs=("b",)),
        "another product": product(helper.make_node("Gemm", ["v", "v", "b"], ["b2"])),
    }
    model = others[reader]
    if reader == "another product":
        model.graph.initializer.append(numpy_helper.from_array(random_array(6, 6) / 1e3, "v"))
    # The input is so large that the bias is less than a unit of the 8-bit sums.
    errors = near(model, {"x": 1e5 * random_array(5, 6)}, places=(0,))
    assert errors["y"] < 0.05
    assert errors["b" if reader == "output" else "b2"] < 1e-6


def test_a_bias_that_is_an_output_is_corrected_in_a_copy():
    model = product(outputs=("b",))
    bias = numpy_helper.to_array(model.graph.initializer[1])
    other = with_biases(model, {0: bias + 1})
    feeds = {"x": random_array(5, 6)}
    before, after = (run_session(open_session(m, 1), feeds) for m in (model, other))
    np.testing.assert_array_equal(after["b"], bias)
    np.testing.assert_allclose(after["y"], before["y"] + 1, rtol=1e-5, atol=1e-5)
