"""A small decoder whose table is also its output layer."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.builders import model_of, random_array
from tests.lookups import few_directions

VOCABULARY, WIDTH, LENGTH = 160, 32, 6
# How the output layer reads the table: through a node, by Gemm's transB, or as a transposed copy.
HEADS = ("transpose", "gemm", "copy")


def decoder(head: str = "transpose", **options: int) -> onnx.ModelProto:
    """Tokens, a layer that mixes them with those before, and the likelihood of the next one."""
    table = few_directions(VOCABULARY, WIDTH, 6, seed=1) / 2
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], "tokens"),
        helper.make_node("MatMul", ["before", "a"], ["b"], "mix"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], "hidden"),
        helper.make_node("Relu", ["c"], ["d"], "relu"),
        helper.make_node("MatMul", ["d", "w2"], ["e"], "back"),
        helper.make_node("Add", ["a", "e"], ["h"], "sum"),
    ]
    weights = {
        "table": table,
        "before": np.tril(np.ones((1, LENGTH, LENGTH), np.float32)) / LENGTH,
        "w1": few_directions(WIDTH, 2 * WIDTH, 6, seed=7) / 2,
        "w2": few_directions(2 * WIDTH, WIDTH, 6, seed=9) / 2,
    }
    if head == "gemm":
        weights |= {
            "flat": np.array([-1, WIDTH], np.int64),
            "wide": np.array([-1, LENGTH, VOCABULARY], np.int64),
            "shift": random_array(VOCABULARY, seed=11),
        }
        nodes += [
            helper.make_node("Reshape", ["h", "flat"], ["rows"], "flatten"),
            helper.make_node(
                "Gemm", ["rows", "table", "shift"], ["scores"], "logits", transB=1, alpha=0.5
            ),
            helper.make_node("Reshape", ["scores", "wide"], ["y"], "unflatten"),
        ]
    elif head == "copy":
        weights["copy"] = np.ascontiguousarray(table.T)
        nodes.append(helper.make_node("MatMul", ["h", "copy"], ["y"], "logits"))
    else:
        nodes.insert(0, helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["h", "turned"], ["y"], "logits"))
    model = model_of(nodes, weights, {"ids": ["N", LENGTH]}, ["y"], **options)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def sentences(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Few tokens are frequent."""
    drawn = np.random.default_rng(seed).zipf(1.5, (count, LENGTH))
    return {"ids": (drawn % VOCABULARY).astype(np.int64)}
