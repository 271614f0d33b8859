"""Decoding by onnxruntime and by the reference implementation."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx.variants.storage.coding import INTEGERS, Coded
from cobla_onnx.variants.storage.decoding import (
    DOMAIN,
    decoder,
    decoder_inputs,
    decoder_nodes,
)
from cobla_onnx.variants.storage.packing import filling, pack

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


def coded_weight(bits: int, outputs: int = 5) -> Coded:
    """Of a convolution; with 8 outputs its elements fill all bytes, with 5 they do not."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (1, outputs, 27)).astype(np.uint8)
    levels = INTEGERS if bits == 8 else np.sort(rng.normal(size=1 << bits)).astype(np.float32)
    return Coded(codes, levels, rng.uniform(0.1, 2.0, (1, outputs)).astype(np.float32))


def network(coded: Coded, opset: int, function: bool) -> onnx.ModelProto:
    """A convolution whose weight is decoded."""
    bits, outputs, count = coded.bits, coded.codes.shape[1], coded.codes.size
    shape, scale = (outputs, 3, 3, 3), coded.scales.reshape(outputs, 1, 1, 1)
    cut = filling(count, bits) > 0
    arrays: list[np.ndarray] = [
        *pack(coded.codes, bits),
        coded.levels,
        scale,
        np.array(shape, np.int64),
        *[np.array([count], np.int64)] * cut,
    ]
    if bits == 8:
        arrays = [(coded.codes.astype(np.int16) - 128).astype(np.int8).reshape(shape), scale]
    made, parts = decoder(bits, opset, cut=cut), decoder_inputs(bits, cut=cut)
    names = [f"w/{name}" for name in parts]
    if function:
        nodes = [helper.make_node(made.name, names, ["w"], domain=DOMAIN)]
    else:
        by_name = dict(zip(parts, names, strict=True))
        nodes = decoder_nodes(bits, opset, by_name, "w", lambda name: f"w/{name}", count)
    nodes.append(helper.make_node("Conv", ["x", "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "decoded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, outputs, 4, 4])],
        [numpy_helper.from_array(a, name) for a, name in zip(arrays, names, strict=True)],
    )
    imports = [helper.make_opsetid("", opset)]
    if function:
        imports.append(helper.make_opsetid(DOMAIN, 1))
    functions = [made] if function else []
    return helper.make_model(
        graph, opset_imports=imports, functions=functions, ir_version=8 if function else 6
    )


@pytest.mark.parametrize("outputs", [5, 8])
@pytest.mark.parametrize(
    ("bits", "opset", "function"),
    [
        *itertools.product((2, 3, 4, 5, 6, 8), (13,), (True, False)),
        *itertools.product((2, 3, 4, 5, 6, 8), (7, 8, 9), (False,)),
        (6, 10, False),
        (3, 17, True),
        (6, 21, True),
    ],
)
def test_the_decoded_weight_is_the_one_that_is_stated(
    bits: int, opset: int, function: bool, outputs: int
) -> None:
    coded = coded_weight(bits, outputs)
    model = network(coded, opset, function)
    onnx.checker.check_model(model, full_check=True)
    stated = onnx.ModelProto()
    stated.CopyFrom(model)
    weight = coded.dense().reshape(outputs, 3, 3, 3)
    del stated.graph.node[:-1], stated.graph.initializer[:], stated.functions[:]
    del stated.opset_import[1:]
    stated.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        found, expected = (
            ort.InferenceSession(
                each.SerializeToString(), options, providers=["CPUExecutionProvider"]
            ).run(None, {"x": x})[0]
            for each in (model, stated)
        )
        np.testing.assert_array_equal(found, expected)
    if opset >= 13:
        (found,) = ReferenceEvaluator(model).run(None, {"x": x})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "opset", "function"),
    [(6, 13, True), (6, 13, False), *itertools.product((2, 3, 6), (7, 9), (False,))],
)
def test_nothing_is_left_of_the_decoder_once_the_model_is_open(
    tmp_path, bits: int, opset: int, function: bool
) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "open.onnx")
    options.log_severity_level = 3
    model = network(coded_weight(bits), opset, function)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "open.onnx").graph.node}
    assert left <= {"Conv", "ReorderInput", "ReorderOutput"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_what_nodes_give_while_a_model_opens_is_little(bits: int) -> None:
    # onnxruntime holds it until all nodes are folded: 34 to 67 bytes for each number once.
    coded = coded_weight(bits, 4096)
    model = network(coded, 13, function=False)
    del model.graph.node[-1], model.graph.output[:]
    given = [name for node in model.graph.node for name in node.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in given)
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[0]
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    held = session.run(None, {"x": np.zeros((2, 3, 6, 6), np.float32)})
    assert sum(array.nbytes for array in held) < 30 * coded.codes.size
