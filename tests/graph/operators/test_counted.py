"""MACs of operators whose weights are left as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cobla_onnx import compare
from cobla_onnx.graph.macs import node_macs
from cobla_onnx.graph.operators.counted import is_counted
from cobla_onnx.pipeline import compare as module
from tests.builders import model_of, random_array

NODE = onnx.helper.make_node
MICROSOFT = {"domain": "com.microsoft"}
SCALE = ["xs", "xz"], ["ws", "wz", "ys", "yz"]

PRODUCTS = [
    NODE("MatMulInteger", ["x", "w"], ["y"]),
    NODE("QLinearMatMul", ["x", *SCALE[0], "w", *SCALE[1]], ["y"]),
    NODE("DynamicQuantizeMatMul", ["x", "w", "ws"], ["y"], **MICROSOFT),
    NODE("MatMulIntegerToFloat", ["x", "w", "xs", "ws"], ["y"], **MICROSOFT),
    NODE("MatMulNBits", ["x", "w", "ws"], ["y"], K=12, N=5, bits=4, block_size=16, **MICROSOFT),
    NODE("QGemm", ["x", *SCALE[0], "w", *SCALE[1]], ["y"], **MICROSOFT),
    NODE("FusedGemm", ["x", "w"], ["y"], **MICROSOFT),
    NODE("FusedMatMul", ["x", "w"], ["y"], **MICROSOFT),
]
CONVOLUTIONS = [
    NODE("ConvInteger", ["x", "w"], ["y"]),
    NODE("QLinearConv", ["x", *SCALE[0], "w", *SCALE[1]], ["y"]),
    NODE("QLinearConv", ["x", *SCALE[0], "w", *SCALE[1]], ["y"], **MICROSOFT),
    NODE("FusedConv", ["x", "w"], ["y"], **MICROSOFT),
]


def counted(node: onnx.NodeProto, **shapes: tuple[int, ...]) -> tuple[dict[int, int], list[str]]:
    node.name = "it"
    graph = onnx.helper.make_graph([node], "one", [], [])
    return node_macs(onnx.helper.make_model(graph), shapes)


@pytest.mark.parametrize("node", PRODUCTS)
def test_a_product_counts_as_it_does_in_floating_point(node):
    assert is_counted(node)
    assert counted(node, x=(3, 12), y=(3, 5)) == ({0: 3 * 5 * 12}, [])
    assert counted(node, x=(2, 3, 12), y=(2, 3, 5)) == ({0: 2 * 3 * 5 * 12}, [])
    assert counted(node, y=(3, 5)) == ({}, ["it"])


@pytest.mark.parametrize(("turned", "shape"), [("A", (12, 3)), ("BatchA", (3, 2, 12))])
def test_a_product_of_turned_data(turned, shape):
    node = NODE("FusedMatMul", ["x", "w"], ["y"], **{f"trans{turned}": 1}, **MICROSOFT)
    expected = ({0: 3 * 5 * 12}, []) if turned == "A" else ({}, ["it"])
    assert counted(node, x=shape, y=(3, 5)) == expected


@pytest.mark.parametrize("node", CONVOLUTIONS)
def test_a_convolution_counts_as_it_does_in_floating_point(node):
    shapes = {"x": (1, 8, 9, 9), "w": (6, 4, 3, 3), "y": (1, 6, 7, 7)}
    assert counted(node, **shapes) == ({0: 6 * 7 * 7 * 4 * 3 * 3}, [])
    assert counted(node, x=(1, 8, 9, 9), y=(1, 6, 7, 7)) == ({}, ["it"])


@pytest.mark.parametrize(("direction", "factor"), [("forward", 1), ("bidirectional", 2)])
def test_an_lstm_in_8_bits(direction, factor):
    node = NODE(
        "DynamicQuantizeLSTM", ["x", "W", "R"], ["y"], hidden_size=7, direction=direction,
        **MICROSOFT,
    )  # fmt: skip
    assert counted(node, x=(5, 2, 3)) == ({0: 5 * 2 * factor * 4 * 7 * (3 + 7)}, [])


def test_a_damaged_node_is_not_known():
    assert counted(NODE("QLinearConv", ["x"], ["y"]), x=(1, 2, 3), y=(1, 2)) == ({}, ["it"])
    assert counted(NODE("MatMulInteger", [], [])) == ({}, ["it"])


def in_8_bits(weight: np.ndarray) -> onnx.ModelProto:
    """The same product in 8 bits, as onnxruntime's dynamic quantisation writes it."""
    scale = np.float32(np.abs(weight).max() / 127)
    nodes = [
        NODE("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        NODE("MatMulInteger", ["q", "w", "z"], ["i"]),
        NODE("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
        NODE("Mul", ["s", "t"], ["u"]),
        NODE("Mul", ["f", "u"], ["y"]),
    ]
    weights = {"w": np.round(weight / scale).astype(np.int8), "t": scale}
    return model_of(nodes, weights, {"x": ["N", 24]}, ["y"])


def test_compare_counts_the_macs_of_a_model_in_8_bits(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.1)
    weight = random_array(24, 10)
    whole = model_of([NODE("MatMul", ["x", "w"], ["y"])], {"w": weight}, {"x": ["N", 24]}, ["y"])
    separate = in_8_bits(weight)
    found = compare(whole, separate, threads=1)
    assert found.first.macs == found.second.macs == 240
    # Of onnxruntime's own operators no shapes are inferred.
    fused = NODE("DynamicQuantizeMatMul", ["x", "w", "t"], ["y"], **MICROSOFT)
    del separate.graph.node[:]
    separate.graph.node.append(fused)
    separate.graph.node.append(NODE("Relu", ["y"], ["z"]))
    separate.graph.output[0].name = "z"
    separate.opset_import.add(domain="com.microsoft", version=1)
    again = compare(separate, separate, threads=1)
    assert again.first.macs == again.second.macs == 240
