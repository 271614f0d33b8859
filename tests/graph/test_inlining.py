"""Calls that rely on the defaults of a function's attributes mean the same once it is opened."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx import Budget, compress
from cobla_onnx.graph.inlining import inlined
from cobla_onnx.graph.opening import opened
from cobla_onnx.graph.opset import lifted
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import random_array

SIZE = 24


def scaled(name: str, nodes: list[onnx.NodeProto], slope: float) -> onnx.FunctionProto:
    """Return a function whose LeakyRelu has a slope by default."""
    leaky = helper.make_node("LeakyRelu", ["m"], ["o"])
    attribute = leaky.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT)
    attribute.ref_attr_name = "slope"
    inputs = ["a", "w"] if nodes else ["m"]
    opsets = [helper.make_opsetid("", 17)]
    default = helper.make_attribute("slope", slope)
    return helper.make_function("own", name, inputs, ["o"], [*nodes, leaky], opsets, [], [default])


def model_with(calls: list[onnx.NodeProto], functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        calls,
        "test",
        [value("x", TensorProto.FLOAT, [2, SIZE]), value("c", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [2, SIZE])],
        [numpy_helper.from_array(random_array(SIZE, SIZE), "w")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=9)


def call(name: str, inputs: list[str], output: str, **given: float) -> onnx.NodeProto:
    return helper.make_node(name, inputs, [output], domain="own", **given)


def twice() -> onnx.ModelProto:
    function = scaled("Linear", [helper.make_node("MatMul", ["a", "w"], ["m"])], 0.9)
    calls = [call("Linear", ["x", "w"], "h"), call("Linear", ["h", "w"], "y", slope=0.2)]
    return model_with(calls, [function])


def nested() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["a", "w"], ["m"]), call("Leaky", ["m"], "o")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    linear = helper.make_function("own", "Linear", ["a", "w"], ["o"], nodes, imports)
    return model_with([call("Linear", ["x", "w"], "y")], [scaled("Leaky", [], 0.9), linear])


def in_a_branch() -> onnx.ModelProto:
    function = scaled("Linear", [helper.make_node("MatMul", ["a", "w"], ["m"])], 0.9)
    branches = [
        helper.make_graph(
            [call("Linear", ["x", "w"], name)],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, SIZE])],
        )
        for name in ("t", "e")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    return model_with([node], [function])


MODELS = pytest.mark.parametrize("make", [twice, nested, in_a_branch])


def run(model: onnx.ModelProto) -> np.ndarray:
    feeds = {"x": random_array(2, SIZE, seed=1), "c": np.array(True)}
    return run_session(open_session(model, 1), feeds)["y"]


@MODELS
def test_opened_functions_keep_the_defaults(make):
    model = make()
    before = model.SerializeToString()
    expected = run(model)
    found = opened(model)
    assert "Linear" not in {function.name for function in found.functions}
    assert model.SerializeToString() == before
    assert np.array_equal(run(found), expected)
    assert np.array_equal(run(inlined(make())), expected)
    assert np.allclose(run(lifted(make(), 18)), expected, atol=1e-6)


@MODELS
def test_compressed_models_keep_the_defaults(make):
    model = make()
    result = compress(model, Budget(mem=0.6), threads=1, precision=(8,))
    expected = run(model)
    error = np.linalg.norm(run(result.model) - expected) / np.linalg.norm(expected)
    assert error < 0.02
