"""MACs of operators whose weights are left as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cobla_onnx import compare
from cobla_onnx.graph.macs import infer_shapes, node_macs
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


BATCH, LENGTH, WIDTH, PAST = 2, 7, 12, 3
# Queries with keys, and their weights with values.
ATTENDED = 2 * BATCH * LENGTH * WIDTH


@pytest.mark.parametrize(
    ("node", "shapes", "keys"),
    [
        (NODE("Attention", ["q", "k", "v"], ["y"]), {"k": (BATCH, 5, WIDTH)}, 5),
        (
            NODE("Attention", ["q", "k", "v", "", "p", "pv"], ["y"]),
            {"k": (BATCH, 5, WIDTH), "p": (BATCH, 3, PAST, 4)},
            5 + PAST,
        ),
        (
            NODE("Attention", ["q", "k", "v"], ["y"]),
            # Fewer heads for keys than for queries.
            {"q": (BATCH, 3, LENGTH, 4), "k": (BATCH, 1, 5, 4), "y": (BATCH, 3, LENGTH, 4)},
            5,
        ),
        (NODE("MultiHeadAttention", ["q", "k", "v"], ["y"], **MICROSOFT), {"k": (BATCH, 5, 12)}, 5),
        (
            NODE("MultiHeadAttention", ["q", "k"], ["y"], **MICROSOFT),
            {"k": (BATCH, 5, 3, 2, 4)},
            5,
        ),
        (
            NODE("MultiHeadAttention", ["q"], ["y"], **MICROSOFT),
            {"q": (BATCH, LENGTH, 3, 3, 4)},
            LENGTH,
        ),
    ],
)
def test_attention_counts_as_its_products_do(node, shapes, keys):
    known = {"q": (BATCH, LENGTH, WIDTH), "y": (BATCH, LENGTH, WIDTH), **shapes}
    assert counted(node, **known) == ({0: ATTENDED * keys}, [])
    missing = dict(known)
    del missing["y"]
    assert counted(node, **missing) == ({}, ["it"])


@pytest.mark.parametrize("kind", ["Attention", "QAttention"])
@pytest.mark.parametrize("past", [0, PAST])
def test_attention_with_its_projection(kind, past):
    place = {"Attention": 4, "QAttention": 8}[kind]
    inputs = ["x", "w", *[""] * (place - 2), "p"] if past else ["x", "w"]
    node = NODE(kind, inputs, ["y"], num_heads=3, **MICROSOFT)
    shapes = {"x": (BATCH, LENGTH, 10), "w": (10, 3 * WIDTH), "p": (2, BATCH, 3, PAST, 4)}
    projected = BATCH * LENGTH * 10 * 3 * WIDTH
    assert counted(node, **shapes) == ({0: projected + ATTENDED * (LENGTH + past)}, [])
    if past:
        del shapes["p"]
        assert counted(node, **shapes) == ({}, ["it"])


def test_attention_with_fewer_values_than_queries():
    node = NODE("Attention", ["x", "w"], ["y"], qkv_hidden_sizes=[12, 12, 6], **MICROSOFT)
    found = counted(node, x=(BATCH, LENGTH, 10), w=(10, 30))
    assert found == ({0: BATCH * LENGTH * (10 * 30 + LENGTH * (12 + 6))}, [])


def test_attention_in_one_node_has_the_macs_of_its_body():
    """That of the opset, which onnx writes out."""
    node = NODE("Attention", ["Q", "K", "V"], ["Y"], q_num_heads=3, kv_num_heads=3)
    lengths = {"Q": LENGTH, "K": 5, "V": 5}
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (BATCH, length, WIDTH))
        for name, length in lengths.items()
    ]
    schema = onnx.defs.get_schema("Attention", 23)
    kinds = [end.type.SerializeToString() for end in ends]
    written = schema.get_context_dependent_function(node.SerializeToString(), kinds)
    body = onnx.FunctionProto.FromString(written)
    result = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(body.node, "body", ends, [result])
    model = onnx.helper.make_model(graph, opset_imports=body.opset_import)
    shapes = infer_shapes(model, {end.name: (BATCH, lengths[end.name], WIDTH) for end in ends})
    found, unknown = node_macs(model, shapes)
    assert not unknown
    whole = counted(node, Q=(BATCH, LENGTH, WIDTH), K=(BATCH, 5, WIDTH), Y=(BATCH, LENGTH, WIDTH))
    assert sum(found.values()) == sum(whole[0].values()) == ATTENDED * 5


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
