"""From an output back to the tensors that can be compared number by number."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from cobla_onnx.calibration.evaluation.tracing import Tracing, without_repetition
from cobla_onnx.graph.layers import find_layers
from tests.builders import random_array

NODE, INFO = helper.make_node, helper.make_tensor_value_info
KINDS = {TensorProto.FLOAT: "tensor(float)", TensorProto.INT64: "tensor(int64)"}


def traced(nodes: list[onnx.NodeProto], outputs: dict[str, int]) -> tuple[Tracing, dict]:
    """Trace the outputs of two layers, of which `l` are the results, and what follows them."""
    layers = [
        NODE("MatMul", ["x", "w1"], ["a"], "fc1"),
        NODE("Relu", ["a"], ["b"], "relu"),
        NODE("MatMul", ["b", "w2"], ["l"], "fc2"),
    ]
    weights = {"w1": random_array(16, 16, seed=1), "w2": random_array(16, 8, seed=2)}
    graph = helper.make_graph(
        [*layers, *nodes],
        "test",
        [INFO("x", TensorProto.FLOAT, ["n", 16])],
        [INFO(name, kind, None) for name, kind in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    examples = [{"x": random_array(1, 16, seed=seed)} for seed in range(3)]
    declared = {name: KINDS[kind] for name, kind in outputs.items()}
    search = Tracing(model, find_layers(model).layers, examples, declared, 1)
    return search, search.settled(list(outputs))


def test_an_output_that_can_be_measured_is_its_own_source():
    search, sources = traced([], {"l": TensorProto.FLOAT})
    assert sources == {"l": ["l"]}
    assert search.measurable("l")
    assert not search.measurable("x")


def test_an_output_behind_argmax_is_traced_to_the_tensor_before():
    nodes = [
        NODE("Softmax", ["l"], ["p"], "soft", axis=1),
        NODE("ArgMax", ["p"], ["best"], "best", axis=1),
        NODE("Cast", ["best"], ["y"], "cast", to=TensorProto.FLOAT),
    ]
    search, sources = traced(nodes, {"best": TensorProto.INT64, "y": TensorProto.FLOAT})
    assert sources == {"best": ["p"], "y": ["p"]}
    # It is of floating type, but changes in steps.
    assert "y" in search.depends
    assert "y" not in search.smooth
    assert search.kept_by("p") == {"l"}


def test_a_floating_result_that_changes_in_steps_is_not_a_source():
    search, sources = traced([NODE("Round", ["l"], ["y"], "round")], {"y": TensorProto.FLOAT})
    assert search.types["y"] == TensorProto.FLOAT
    assert sources == {"y": ["l"]}


def test_a_shape_that_depends_on_the_data_is_not_measured():
    """Compress keeps as many classes as are above nothing."""
    nodes = [
        NODE("Flatten", ["l"], ["flat"], "flat", axis=0),
        NODE("Relu", ["flat"], ["above"], "above"),
        NODE("Cast", ["above"], ["kept"], "kept", to=TensorProto.BOOL),
        NODE("Compress", ["flat", "row"], ["y"], "compress", axis=1),
    ]
    nodes.insert(3, NODE("Flatten", ["kept"], ["unused"], "unused", axis=0))
    nodes.insert(4, NODE("Squeeze", ["kept"], ["row"], "squeeze"))
    search, sources = traced(nodes, {"y": TensorProto.FLOAT})
    assert search.varies("y")
    assert not search.varies("flat")
    assert "flat" in sources["y"]
    assert "y" not in sources["y"]


def test_what_another_source_carries_already_is_left_out():
    nodes = [
        NODE("Softmax", ["l"], ["p"], "soft", axis=1),
        NODE("ArgMax", ["l"], ["best"], "best", axis=1),
    ]
    outputs = {"p": TensorProto.FLOAT, "best": TensorProto.INT64}
    search, sources = traced(nodes, outputs)
    assert sources == {"p": ["p"], "best": ["l"]}
    assert without_repetition(search, list(outputs), sources) == {"p"}
    # Without the first output, nothing else carries it.
    assert without_repetition(search, ["best"], {"best": ["l"]}) == {"l"}


def test_what_is_computed_from_another_source_is_left_out():
    nodes = [
        NODE("Abs", ["l"], ["size"], "abs"),
        NODE("ArgMax", ["size"], ["largest"], "largest", axis=1),
        NODE("ArgMax", ["l"], ["best"], "best", axis=1),
    ]
    outputs = {"largest": TensorProto.INT64, "best": TensorProto.INT64}
    search, sources = traced(nodes, outputs)
    assert sources == {"largest": ["size"], "best": ["l"]}
    assert without_repetition(search, list(outputs), sources) == {"l"}


def test_without_layers_the_inputs_take_their_place():
    node = NODE("ArgMax", ["x"], ["y"], "best", axis=1)
    graph = helper.make_graph(
        [node], "test", [INFO("x", 1, ["n", 4])], [INFO("y", TensorProto.INT64, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    example = {"x": np.ones((1, 4), np.float32)}
    search = Tracing(model, [], [example], {"y": "tensor(int64)"}, 1)
    assert search.settled(["y"]) == {"y": ["x"]}
