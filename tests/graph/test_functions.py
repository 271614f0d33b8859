"""Functions as onnxscript and PyTorch's exporter write them: layers behind their calls."""

from __future__ import annotations

import importlib

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.functions import with_open_functions
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.opening import opened
from cobla_onnx.runtime.session import open_session, run_session
from tests.bodies import SIZE, calls, linear, model_with, weight
from tests.builders import random_array, small_network


def scripted() -> onnx.ModelProto:
    """Nested functions, one of them also called in a branch; weights are given to the calls."""
    network = importlib.import_module("tests.scripted").network
    model = network.to_model_proto()
    arrays = {"w": weight(1), "v": weight(2), "u": weight(4), "b": random_array(SIZE, seed=3)}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    kept = [value for value in model.graph.input if value.name not in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def test_layers_of_a_script_are_found_in_all_calls_and_branches():
    model = scripted()
    prepared = opened(model)
    assert not prepared.functions
    layers = find_layers(prepared).layers
    assert {layer.source: layer.in_body for layer in layers} == {"w": False, "v": True, "u": True}
    for seed in range(6):
        feeds = {"x": random_array(4, SIZE, seed=seed)}
        first, second = (run_session(open_session(m, 1), feeds) for m in (model, prepared))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    result = compress(model, Budget(mem=0.9), threads=1)
    assert {d.layer for d in result.plan.decisions} == {layer.name for layer in layers}
    assert any(d.scheme for d in result.plan.decisions)


def test_functions_of_another_operator_set_stay_and_the_others_are_opened():
    model = calls(False)
    old = linear(True)
    old.name = "Old"
    old.opset_import[0].version = 13
    model.functions.append(old)
    model.graph.node[1].CopyFrom(
        onnx.helper.make_node("Old", ["a"], ["y"], "second", domain="somebody")
    )
    found = opened(model)
    assert [function.name for function in found.functions] == ["Old"]
    inventory = find_layers(found)
    assert [layer.source for layer in inventory.layers] == ["v"]
    assert [item.reason for item in inventory.skipped] == [Reason.SUBGRAPH]
    feeds = {"x": random_array(2, SIZE)}
    first, second = (run_session(open_session(m, 1), feeds) for m in (model, found))
    np.testing.assert_array_equal(first["y"], second["y"])


def test_what_a_function_of_another_operator_set_calls_stays_with_it():
    model = calls(False)
    imports = [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("somebody", 1)]
    inner = onnx.helper.make_node("Linear", ["a", "weight"], ["b"], domain="somebody")
    old = onnx.helper.make_function("somebody", "Old", ["a", "weight"], ["b"], [inner], imports)
    model.functions.append(old)
    model.graph.node[1].op_type = "Old"
    found = opened(model)
    assert {function.name for function in found.functions} == {"Linear", "Old"}
    result = compress(model, Budget(mem=1.0), threads=1)
    feeds = {"x": random_array(2, SIZE)}
    first, second = (run_session(open_session(m, 1), feeds) for m in (model, result.model))
    np.testing.assert_array_equal(first["y"], second["y"])


def test_functions_that_onnx_cannot_open_are_named(monkeypatch):
    def fail(*_):
        raise RuntimeError("no schema")

    monkeypatch.setattr(onnx.inliner, "inline_selected_functions", fail)
    with pytest.raises(ModelError, match=r"the model: functions 'Linear': .*no schema.*without f"):
        compress(calls(False), Budget(mem=0.5), threads=1)


def test_only_functions_that_hold_layers_are_opened():
    assert with_open_functions(small_network()).functions == []
    model = calls(True)
    other = onnx.helper.make_function(
        "somebody",
        "Double",
        ["a"],
        ["b"],
        [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
        [onnx.helper.make_opsetid("", 17)],
    )
    model.functions.append(other)
    model.graph.node[1].output[0] = "before"
    model.graph.node.append(
        onnx.helper.make_node("Double", ["before"], ["y"], "double", domain="somebody")
    )
    found = with_open_functions(model)
    assert [function.name for function in found.functions] == ["Double"]
    assert [node.op_type for node in found.graph.node if node.op_type != "Constant"] == [
        "MatMul",
        "Relu",
        "MatMul",
        "Relu",
        "Double",
    ]


def given_by_calls(op: str, inputs: list[str]) -> onnx.FunctionProto:
    """A function of one node, whose weight is an attribute of the calls."""
    constant = onnx.helper.make_node("Constant", [], ["weight"])
    constant.attribute.add(name="value", ref_attr_name="W", type=onnx.AttributeProto.TENSOR)
    return onnx.helper.make_function(
        "somebody",
        f"{op}Given",
        ["data"],
        ["result"],
        [constant, onnx.helper.make_node(op, inputs, ["result"])],
        [onnx.helper.make_opsetid("", 17)],
        ["W"],
    )


def test_weights_may_be_attributes_of_the_calls():
    functions = [
        given_by_calls("Gather", ["weight", "data"]),
        given_by_calls("MatMul", ["data", "weight"]),
        # No layers.
        given_by_calls("Add", ["data", "weight"]),
    ]
    table, first, bias, last = weight(1, 40, SIZE), weight(2), random_array(SIZE), weight(3)
    arrays = {"GatherGiven": table, "MatMulGiven": first, "AddGiven": bias}
    given = {
        name: {"domain": "somebody", "W": numpy_helper.from_array(array)}
        for name, array in arrays.items()
    }
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["ids"], "cast", to=onnx.TensorProto.INT64),
        onnx.helper.make_node("GatherGiven", ["ids"], ["rows"], "gather", **given["GatherGiven"]),
        onnx.helper.make_node("ReduceMean", ["rows"], ["a"], "mean", axes=[1], keepdims=0),
        onnx.helper.make_node("MatMulGiven", ["a"], ["b"], "first", **given["MatMulGiven"]),
        onnx.helper.make_node("AddGiven", ["b"], ["c"], "bias", **given["AddGiven"]),
        onnx.helper.make_node("MatMul", ["c", "last"], ["y"], "last"),
    ]
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, SIZE])
    model = model_with(nodes, [value], {"last": last}, functions)
    found = opened(model)
    assert [function.name for function in found.functions] == ["AddGiven"]
    shapes = [layer.shape for layer in find_layers(found).layers]
    assert shapes == [table.shape, first.shape, last.shape]
    result = compress(model, Budget(mem=0.6), threads=1)
    assert result.report.verification is not None
    assert result.report.verification.rewrite_max_error < 1e-5
