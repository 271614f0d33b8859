"""Small models with embeddings."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.builders import model_of, random_array

ROWS, WIDTH, LENGTH, CLASSES = 96, 64, 7, 5


def lookup_model(
    table: np.ndarray,
    shape: list[int | str],
    *,
    opset: int = 17,
    ir_version: int = 8,
    kind: int = TensorProto.INT64,
    **attributes: int,
) -> onnx.ModelProto:
    """One lookup: `table` by `ids`, which gives `y`."""
    node = helper.make_node("Gather", ["table", "ids"], ["y"], "embedding", **attributes)
    model = model_of([node], {"table": table}, {"ids": shape}, ["y"], opset=opset)
    model.ir_version = ir_version
    model.graph.input[0].type.tensor_type.elem_type = kind
    floating = helper.np_dtype_to_tensor_dtype(table.dtype)
    sizes = [*shape, *table.shape[1:]]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", floating, sizes))
    return model


def few_directions(rows: int, width: int, rank: int, seed: int) -> np.ndarray:
    """A matrix of a few large singular values."""
    large = random_array(rows, rank, seed=seed) @ random_array(rank, width, seed=seed + 1)
    noise = 0.3 * random_array(rows, width, seed=seed + 2)
    return np.asarray((large / np.sqrt(rank) + noise).astype(np.float32))


def text_model() -> onnx.ModelProto:
    """Tokens and positions, a normalisation, a layer and the mean over the sentence."""
    nodes = [
        helper.make_node("Gather", ["tokens", "ids"], ["a"], "tokens"),
        helper.make_node("Gather", ["positions", "places"], ["b"], "positions"),
        helper.make_node("Add", ["a", "b"], ["c"], "sum"),
        helper.make_node("LayerNormalization", ["c", "scale", "shift"], ["d"], "norm"),
        helper.make_node("MatMul", ["d", "w1"], ["e"], "hidden"),
        helper.make_node("Relu", ["e"], ["f"], "relu"),
        helper.make_node("ReduceMean", ["f"], ["g"], "mean", axes=[1], keepdims=0),
        helper.make_node("MatMul", ["g", "w2"], ["y"], "classes"),
    ]
    weights = {
        "tokens": few_directions(ROWS, WIDTH, 6, seed=1),
        "positions": few_directions(LENGTH, WIDTH, 2, seed=5) / 4,
        "scale": np.ones(WIDTH, np.float32),
        "shift": np.zeros(WIDTH, np.float32),
        "w1": few_directions(WIDTH, 32, 8, seed=9),
        "w2": few_directions(32, CLASSES, 3, seed=13),
        "places": np.arange(LENGTH, dtype=np.int64)[None],
    }
    model = model_of(nodes, weights, {"ids": ["N", LENGTH]}, ["y"])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def texts(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Sentences in which few tokens are frequent and many are not there."""
    drawn = np.random.default_rng(seed).zipf(1.4, (count, LENGTH))
    return {"ids": (drawn % (ROWS // 2)).astype(np.int64)}
