"""Models with recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from tests.builders import model_of, random_array

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def low_rank(*shape: int, rank: int, seed: int) -> np.ndarray:
    """A weight of a few large singular values and many small ones, whose products have size 1."""
    rows = int(np.prod(shape[:-1]))
    left, right = random_array(rows, rank, seed=seed), random_array(rank, shape[-1], seed=seed + 1)
    noise = 0.1 * random_array(rows, shape[-1], seed=seed + 2)
    whole = (left @ right / np.sqrt(rank) + noise) / np.sqrt(shape[-1])
    return np.asarray(whole.reshape(shape), np.float32)


def recurrent_weights(
    op: str, inputs: int, hidden: int, directions: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Weights of a node, and its bias, by the names of ONNX."""
    rows = GATES[op] * hidden
    return {
        "W": low_rank(directions, rows, inputs, rank=4, seed=seed),
        "R": random_array(directions, rows, hidden, seed=seed + 7) / np.float32(np.sqrt(hidden)),
        "B": random_array(directions, 2 * rows, seed=seed + 8) / np.float32(4),
    }


def sequence_model(
    op: str = "LSTM",
    inputs: int = 24,
    hidden: int = 16,
    directions: int = 2,
    classes: int = 5,
    outputs: tuple[str, ...] = ("steps",),
    **values: Any,
) -> onnx.ModelProto:
    """Two recurrent layers between products, batch first; classes of each step, or of the last."""
    direction = "bidirectional" if directions == 2 else "forward"
    wide = directions * hidden
    first = recurrent_weights(op, inputs, hidden, directions, seed=1)
    second = recurrent_weights(op, wide, hidden, 1, seed=40)
    weights = {f"{name}1": array for name, array in first.items()}
    weights |= {f"{name}2": array for name, array in second.items()}
    weights["before"] = low_rank(inputs, inputs, rank=6, seed=70)
    weights["after"] = random_array(hidden, classes, seed=80)
    weights["flat"] = np.array([0, 0, -1], np.int64)
    makes = ["steps2"] if outputs == ("steps",) else ["", "last"]
    nodes = [
        helper.make_node("MatMul", ["x", "before"], ["b"], "before"),
        helper.make_node("Transpose", ["b"], ["s"], "turn", perm=[1, 0, 2]),
        helper.make_node(
            op, ["s", "W1", "R1", "B1"], ["steps1"], "first",
            hidden_size=hidden, direction=direction, **values,
        ),
        helper.make_node("Transpose", ["steps1"], ["t"], "turn1", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "flat"], ["f"], "flatten"),
        helper.make_node(op, ["f", "W2", "R2", "B2"], makes, "second", hidden_size=hidden),
    ]  # fmt: skip
    if outputs == ("steps",):
        nodes.append(helper.make_node("Transpose", ["steps2"], ["u"], "back", perm=[2, 0, 1, 3]))
        shape = [0, 0, -1]
    else:
        nodes.append(helper.make_node("Transpose", ["last"], ["u"], "back", perm=[1, 0, 2]))
        shape = [0, -1]
    weights["joined"] = np.array(shape, np.int64)
    nodes += [
        helper.make_node("Reshape", ["u", "joined"], ["j"], "join"),
        helper.make_node("MatMul", ["j", "after"], ["y"], "after"),
    ]
    return model_of(nodes, weights, {"x": ["batch", 12, inputs]}, ["y"])
