"""What else reads a tensor, or stands beside it, decides what may go along in 8 bits."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress
from cobla_onnx.arithmetic.nodes import carried_nodes, weighted_nodes
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array

SHAPE = ["N", 8, 8, 8]


def conv(read: str, weight: str, made: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [read, weight, "b"], [made], made)


def loop(read: str) -> onnx.NodeProto:
    """Add a tensor to itself in a body, which alone sees it."""
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, SHAPE)
    nodes = [
        helper.make_node("Add", ["state", read], ["sum"]),
        helper.make_node("Identity", ["goes_on"], ["still"]),
    ]
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
        state,
    ]
    outputs = [
        helper.make_tensor_value_info("still", TensorProto.BOOL, []),
        helper.make_tensor_value_info("sum", TensorProto.FLOAT, SHAPE),
    ]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    return helper.make_node("Loop", ["times", "yes", "x"], ["v"], "loop", body=body)


def network(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    weights = {
        "w": random_array(8, 8, 1, 1, seed=1) / 3,
        "w2": random_array(8, 8, 1, 1, seed=2) / 3,
        "b": random_array(8, seed=3),
        "times": np.array(2),
        "yes": np.array(True),
        "mask": np.where(np.arange(8) < 5, 0, -np.inf).astype(np.float32),
    }
    read = {name for node in nodes for name in node.input}
    weights = {name: array for name, array in weights.items() if name in read}
    model = model_of(nodes, weights, {"x": SHAPE}, outputs)
    for value in model.graph.output:
        shape = helper.make_tensor_type_proto(TensorProto.FLOAT, SHAPE)
        value.type.CopyFrom(shape)
    return model


def errors(model: onnx.ModelProto, **options: object) -> dict[str, float]:
    """Relative error of each output of the model in 8 bits, on samples that it has not seen."""
    data = {"x": random_array(16, 8, 8, 8)}
    result = compress(model, Budget(mac=1.0), data=data, arithmetic="int8", threads=1, **options)
    onnx.checker.check_model(result.model, full_check=True)
    feeds = {"x": random_array(3, 8, 8, 8, seed=9)}
    before, after = (run_session(open_session(m, 1), feeds) for m in (model, result.model))
    return {
        name: float(np.linalg.norm(after[name] - values) / np.linalg.norm(values))
        for name, values in before.items()
    }


RELU = [conv("x", "w", "u"), helper.make_node("Relu", ["u"], ["r"], "relu"), conv("r", "w2", "y")]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        (RELU, ["y", "u"]),
        ([*RELU, loop("u")], ["y", "v"]),
        ([*RELU, loop("r")], ["y", "v"]),
    ],
    ids=["an output stands before it", "a body reads before it", "a body reads it"],
)
def test_a_relu_stays_where_its_input_or_output_is_seen_otherwise(nodes, outputs):
    """The quantiser would give what stands before it its range, and its name."""
    model = network(nodes, outputs)
    assert carried_nodes(model, (0, 2)) == ()
    assert max(errors(model).values()) < 0.03


def test_any_other_relu_goes_along():
    assert carried_nodes(network(RELU, ["y"]), (0, 2)) == (1,)
    assert max(errors(network(RELU, ["y"])).values()) < 0.03


def test_what_is_moved_into_a_body_stays_in_floating_point():
    """Or onnxruntime ends the process, once it has moved DequantizeLinear behind the Transpose."""
    turn = helper.make_node("Transpose", ["u"], ["t"], perm=[0, 1, 3, 2])
    alone = network([conv("x", "w", "u"), turn, loop("t")], ["v"])
    assert weighted_nodes(alone) == ()
    with pytest.raises(ModelError, match="what a body reads once it was moved"):
        errors(alone)
    # A Reshape behind the Transpose, and another convolution that can compute in 8 bits.
    again = helper.make_node("Slice", ["t", "from", "to"], ["s"])
    beside = network(
        [conv("x", "w", "u"), turn, again, loop("s"), conv("x", "w2", "y")], ["v", "y"]
    )
    for name, numbers in (("from", [0, 0, 0, 0]), ("to", [99, 8, 8, 8])):
        beside.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), name))
    assert weighted_nodes(beside) == (4,)
    assert max(errors(beside).values()) < 0.03


def test_what_is_both_an_input_and_an_output_is_read_in_floating_point():
    model = network(RELU, ["y", "x"])
    assert weighted_nodes(model) == (2,)
    found = errors(model)
    assert found["x"] == 0
    assert found["y"] < 0.03


def test_a_mask_is_added_in_floating_point():
    """In a range with -inf, or with numbers as large, nothing is left of all others."""
    nodes = [
        conv("x", "w", "u"),
        helper.make_node("Add", ["u", "mask"], ["masked"]),
        helper.make_node("Relu", ["masked"], ["r"]),
        conv("r", "w2", "y"),
    ]
    model = network(nodes, ["y"])
    for low in (-np.inf, -3e38, -1e9):
        mask = np.where(np.arange(8) < 5, 0, low).astype(np.float32)
        model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(mask, "mask"))
        assert carried_nodes(model, (0, 3)) == ()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert errors(model)["y"] < 0.03


def test_a_bias_with_an_empty_name_is_none():
    nodes = [
        helper.make_node("Gemm", ["x", "w", ""], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2", "b"], ["y"], "second"),
    ]
    weights = {"w": random_array(8, 8, seed=1), "w2": random_array(8, 8, seed=2)}
    weights["b"] = random_array(8, seed=3)
    model = model_of(nodes, weights, {"x": ["N", 8]}, ["y"])
    data = {"x": random_array(16, 8)}
    report = compress(model, Budget(mac=1.0), data=data, arithmetic="int8", threads=1).report
    assert report.arithmetic.nodes == 2
    assert report.calibration.loss < 0.01


def test_inputs_of_other_domains_operators_stay():
    node = helper.make_node("Gemm", ["x", "w", "", "z"], ["y"], "theirs", domain="theirs")
    graph = helper.make_graph([node], "g", [], [])
    assert list(prepare(helper.make_model(graph)).model.graph.node[0].input) == list(node.input)


@pytest.mark.parametrize("other", ["fc_quant", "fc_quant_scales_mul", "fc_MatMul", "q_Add"])
def test_nodes_may_be_called_as_what_is_made(other):
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "q"),
        helper.make_node("Relu", ["h"], ["r"], other),
        helper.make_node("MatMul", ["r", "w2"], ["y"], "fc"),
    ]
    weights = {"w": random_array(8, 8, seed=1), "w2": random_array(8, 8, seed=2)}
    weights["b"] = random_array(8, seed=3)
    model = model_of(nodes, weights, {"x": ["N", 8]}, ["y"])
    data = {"x": random_array(16, 8)}
    made = compress(model, Budget(mac=1.0), data=data, arithmetic="int8", threads=1)
    assert made.report.arithmetic.nodes == 2
    names = [node.name for node in made.model.graph.node if node.name]
    assert len(set(names)) == len(names)
    assert other in names


def test_what_is_excluded_is_not_taken_for_another_node():
    """A Gemm becomes a product with a name after its own, which another node has."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "q"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "q_MatMul"),
    ]
    weights = {"w": random_array(8, 8, seed=1), "w2": random_array(8, 8, seed=2)}
    weights["b"] = random_array(8, seed=3)
    model = model_of(nodes, weights, {"x": ["N", 8]}, ["y"])
    options = {"data": {"x": random_array(16, 8)}, "arithmetic": "int8", "threads": 1}
    made = compress(model, Budget(mac=1.0), exclude=["q_MatMul"], **options)
    assert made.report.arithmetic.nodes == 1
    kinds = {node.name: node.op_type for node in made.model.graph.node}
    assert kinds["q_MatMul"] == "MatMul"
