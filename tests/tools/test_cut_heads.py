"""Cutting heads: with nothing taken from them, a block of attention stays what it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cobla_onnx.runtime.session import open_session
from tests.builders import random_array

BLOCK = "/encoder/layer.0/attention/"
HEADS, WIDTH = 2, 4


def attention() -> onnx.ModelProto:
    """Make a block with the names that transformers gives."""
    size = HEADS * WIDTH
    nodes, stored = [], []

    def node(op: str, inputs: list[str], name: str, **attributes) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_output_0"], name, **attributes))
        return f"{name}_output_0"

    def weight(array: np.ndarray, name: str) -> str:
        stored.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def layer(data: str, path: str, seed: int) -> str:
        w = weight(random_array(size, size, seed=seed), f"{path}.weight")
        b = weight(random_array(size, seed=seed + 9), f"{path}.bias")
        product = node("MatMul", [data, w], f"{BLOCK}{path}/MatMul")
        return node("Add", [product, b], f"{BLOCK}{path}/Add")

    def shaped(data: str, sizes: list[int], name: str) -> str:
        parts = [
            node("Constant", [], f"{name}/{i}", value=numpy_helper.from_array(np.array([value])))
            for i, value in enumerate(sizes)
        ]
        shape = node("Concat", parts, f"{BLOCK}self/{name}/Concat", axis=0)
        return node("Reshape", [data, shape], f"{BLOCK}self/{name}/Reshape")

    heads = []
    for seed, (part, order) in enumerate(
        [("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])]
    ):
        split = shaped(layer("x", f"self/{part}", seed), [0, 0, HEADS, WIDTH], part)
        heads.append(node("Transpose", [split], f"{BLOCK}self/{part}/Transpose", perm=order))
    scores = node("Softmax", [node("MatMul", heads[:2], "scores")], "softmax", axis=-1)
    mixed = node("MatMul", [scores, heads[2]], "mixed")
    mixed = node("Transpose", [mixed], "merged", perm=[0, 2, 1, 3])
    out = layer(shaped(mixed, [0, 0, size], "out"), "output/dense", 3)
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", "t", size])
        for name in ("x", out)
    )
    mask = helper.make_tensor_value_info("attention_mask", onnx.TensorProto.INT64, ["n", "t"])
    graph = helper.make_graph(nodes, "block", [x, mask], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def data(tmp_path):
    """Samples in a file, as the tool reads them."""
    path = tmp_path / "data.npz"
    samples = random_array(6, 5, HEADS * WIDTH, seed=5)
    np.savez(path, x=samples, attention_mask=np.ones((6, 5), np.int64))
    return path


def test_full_heads_give_the_same_outputs_and_smaller_ones_are_smaller(tools, data):
    tool, model = tools("cut_heads"), attention()
    feeds = dict(np.load(data))
    (before,) = open_session(model, 1, optimized=True).run(None, feeds)
    (after,) = open_session(tool.cut(model, data, WIDTH), 1, optimized=True).run(None, feeds)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    small = tool.cut(model, data, 2)
    (cut,) = open_session(small, 1, optimized=True).run(None, feeds)
    assert cut.shape == before.shape
    assert not np.allclose(cut, before, atol=1e-3)
    shapes = {tuple(tensor.dims) for tensor in small.graph.initializer}
    assert shapes == {(8, 4), (4,), (4, 8), (8,)}
