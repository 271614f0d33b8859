"""Which readings of one stored matrix are one layer, and which are refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.subgraph import expose
from cobla_onnx.graph.tied import tied
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array
from tests.tied import VOCABULARY, WIDTH, decoder, sentences


def two(nodes: list[onnx.NodeProto], weight: np.ndarray, **more: np.ndarray) -> onnx.ModelProto:
    size = weight.shape[0]
    return model_of(nodes, {"w": weight, **more}, {"x": [2, size]}, ["y"])


@pytest.mark.parametrize("head", ["transpose", "gemm"])
def test_a_table_and_an_output_layer_are_one(head):
    model = decoder(head)
    found = find_layers(model)
    layer = found.layers[0]
    assert not found.skipped
    assert [each.name for each in found.layers] == ["tokens", "mix", "hidden", "back"]
    assert layer.op == ("Gather+Gemm" if head == "gemm" else "Gather+MatMul")
    assert layer.shape == (VOCABULARY, WIDTH)
    assert layer.bias is None
    assert [each.transposed for each in layer.readings] == [False, head == "transpose"]
    assert [layer.reading(use).name for use in layer.uses] == ["tokens", "logits"]
    assert np.array_equal(read_weight(model, layer), random_table(model))


def random_table(model: onnx.ModelProto) -> np.ndarray:
    return onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "table"))


@pytest.mark.parametrize("head", ["transpose", "gemm"])
def test_another_weight_reaches_all_readings(head):
    model, data = decoder(head), sentences(3)
    (layer, *_) = find_layers(model).layers
    other = random_array(*layer.shape, seed=5)
    exposed = expose(model, [layer], as_inputs=False)
    assert len(exposed.model.graph.node) == len(model.graph.node)
    found = run_session(open_session(exposed.model, 1, (), {exposed.weights[0]: other}), data)
    for tensor in model.graph.initializer:
        if tensor.name == "table":
            tensor.CopyFrom(onnx.numpy_helper.from_array(other, "table"))
    wanted = run_session(open_session(model, 1), data)
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-5, atol=1e-5)


def test_products_that_read_a_matrix_both_ways_are_one():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "there"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "back", transB=1),
    ]
    (layer,) = find_layers(two(nodes, random_array(8, 5))).layers
    assert layer.op == "MatMul+Gemm"
    # Through Transpose, Cast and Identity in any order, and twice transposed.
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["c"], ["t"]),
        helper.make_node("Identity", ["t"], ["i"]),
        helper.make_node("Transpose", ["i"], ["u"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "u"], ["a"], "there"),
        helper.make_node("MatMul", ["a", "i"], ["y"], "back"),
    ]
    model = two(nodes, random_array(8, 5, dtype="float16"))
    (layer,) = find_layers(model).layers
    assert (layer.stored_type, layer.type) == (TensorProto.FLOAT16, TensorProto.FLOAT)
    assert [each.transposed for each in layer.readings] == [False, True]
    assert read_weight(model, layer).dtype == np.float32


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([helper.make_node("Add", ["b", "w"], ["y"], "sum")], Reason.SHARED),
        (
            [
                helper.make_node("Reshape", ["w", "sizes"], ["r"]),
                helper.make_node("MatMul", ["b", "r"], ["y"], "reshaped"),
            ],
            Reason.SHARED,
        ),
        ([helper.make_node("Gather", ["w", "ids"], ["y"], "columns", axis=1)], Reason.COLUMNS),
    ],
    ids=["added", "reshaped", "columns"],
)
def test_other_readers_are_refused_with_a_reason(nodes, reason):
    before = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "there"),
        helper.make_node("Gemm", ["a", "w"], ["b"], "back", transB=1),
    ]
    more = {"sizes": np.array([8, 8], np.int64), "ids": np.array([1], np.int64)}
    found = find_layers(two(before + nodes, random_array(8, 8), **more))
    assert not found.layers
    reasons = {item.name: item.reason for item in found.skipped}
    assert {reasons["there"], reasons["back"]} == {reason}


def test_a_convolution_and_a_product_are_not_one():
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Reshape", ["k", "sizes"], ["w"]),
        helper.make_node("MatMul", ["f", "w"], ["y"], "product"),
    ]
    weights = {"k": random_array(8, 8, 1, 1), "sizes": np.array([8, 8], np.int64)}
    found = find_layers(model_of(nodes, weights, {"x": [1, 8, 4, 4]}, ["y"]))
    assert [(item.name, item.reason) for item in found.skipped] == [
        ("conv", Reason.SHARED),
        ("product", Reason.SHARED),
    ]


def test_layers_alone_come_back_as_they_are():
    layers = find_layers(decoder()).layers[1:]
    entries = [(layer, "product", ()) for layer in layers]
    assert tied(entries, {layer.source: layer.shape for layer in layers}) == list(layers)
