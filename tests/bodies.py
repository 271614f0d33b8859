"""Models with layers in bodies and in functions, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.builders import FLOAT, random_array
from tests.recurrent_models import recurrent_weights

NODE, VALUE = helper.make_node, helper.make_tensor_value_info
SIZE = 16


def weight(seed: int, *shape: int) -> np.ndarray:
    """A weight that keeps the size of what it multiplies."""
    shape = shape or (SIZE, SIZE)
    return random_array(*shape, seed=seed) / np.float32(np.sqrt(shape[0]))


def stored(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def model_with(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
    functions: Sequence[onnx.FunctionProto] = (),
    *,
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        list(inputs),
        [VALUE("y", FLOAT, None)],
        [stored(name, array) for name, array in weights.items()],
    )
    # All of them give out what has the shape of their input.
    graph.output[0].type.CopyFrom(inputs[0].type)
    imports = [helper.make_opsetid("", 17)]
    imports += [helper.make_opsetid(d, 1) for d in dict.fromkeys(f.domain for f in functions)]
    model = helper.make_model(
        graph, opset_imports=imports, functions=list(functions), ir_version=ir_version
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def choice(rows: int | str = 2) -> onnx.ModelProto:
    """An If: own weights, own bias in a Constant; a captured weight, turned; a shared one."""
    then = helper.make_graph(
        [
            NODE("Constant", [], ["bias"], value=stored("", random_array(SIZE, seed=7))),
            NODE("Gemm", ["x", "own", "bias"], ["t"], "hidden"),
            NODE("MatMul", ["t", "shared"], ["out"], "last"),
        ],
        "then",
        [],
        [VALUE("out", FLOAT, None)],
        [stored("own", weight(1))],
    )
    otherwise = helper.make_graph(
        [
            NODE("Transpose", ["captured"], ["t"], perm=[1, 0]),
            NODE("MatMul", ["x", "t"], ["own"], "hidden"),
            NODE("MatMul", ["own", "shared"], ["out"], "last"),
        ],
        "else",
        [],
        [VALUE("out", FLOAT, None)],
    )
    nodes = [
        NODE("ReduceSum", ["x"], ["sum"], keepdims=0),
        NODE("Greater", ["sum", "zero"], ["positive"]),
        NODE("If", ["positive"], ["z"], "choice", then_branch=then, else_branch=otherwise),
        NODE("MatMul", ["z", "outer"], ["y"], "outer"),
    ]
    weights = {"captured": weight(2), "shared": weight(3), "outer": weight(4)}
    weights["zero"] = np.zeros((), np.float32)
    return model_with(nodes, [VALUE("x", FLOAT, [rows, SIZE])], weights)


def loop() -> onnx.ModelProto:
    """A Loop that multiplies its state by a weight, and convolves it on the way."""
    body = helper.make_graph(
        [
            NODE("MatMul", ["state", "w"], ["a"], "step"),
            NODE("Constant", [], ["axes"], value=stored("", np.array([1], np.int64))),
            NODE("Unsqueeze", ["a", "axes"], ["wide"]),
            NODE("Conv", ["wide", "kernel"], ["c"], "conv", pads=[1, 1]),
            NODE("ReduceMean", ["c"], ["mean"], axes=[1], keepdims=0),
            NODE("Tanh", ["mean"], ["next"]),
            NODE("Identity", ["go"], ["on"]),
            NODE("Identity", ["next"], ["each"]),
        ],
        "body",
        [VALUE("i", TensorProto.INT64, []), VALUE("go", TensorProto.BOOL, []),
         VALUE("state", FLOAT, [2, SIZE])],
        [VALUE("on", TensorProto.BOOL, []), VALUE("next", FLOAT, [2, SIZE]),
         VALUE("each", FLOAT, [2, SIZE])],
        [stored("w", weight(1)), stored("kernel", weight(2, SIZE, 1, 3))],
    )  # fmt: skip
    nodes = [
        NODE("Loop", ["count", "", "x"], ["last", "all"], "loop", body=body),
        NODE("ReduceSum", ["all", "first"], ["sum"], keepdims=0),
        NODE("Add", ["sum", "last"], ["y"]),
    ]
    weights = {"count": np.array(3, np.int64), "first": np.array([0], np.int64)}
    return model_with(nodes, [VALUE("x", FLOAT, [2, SIZE])], weights)


def scan() -> onnx.ModelProto:
    """A recurrent layer, written out as a Scan over 5 steps."""
    body = helper.make_graph(
        [
            NODE("MatMul", ["part", "input_weight"], ["a"], "input"),
            NODE("MatMul", ["state", "recurrent"], ["b"], "recurrent"),
            NODE("Add", ["a", "b"], ["c"]),
            NODE("Tanh", ["c"], ["next"]),
            NODE("Identity", ["next"], ["each"]),
        ],
        "body",
        [VALUE("state", FLOAT, [2, SIZE]), VALUE("part", FLOAT, [2, SIZE])],
        [VALUE("next", FLOAT, [2, SIZE]), VALUE("each", FLOAT, [2, SIZE])],
        [stored("recurrent", weight(2))],
    )
    nodes = [
        NODE("Scan", ["zeros", "x"], ["last", "all"], "scan", body=body, num_scan_inputs=1),
        NODE("MatMul", ["all", "outer"], ["y"], "outer"),
    ]
    weights = {"zeros": np.zeros((2, SIZE), np.float32), "input_weight": weight(1)}
    weights["outer"] = weight(3)
    return model_with(nodes, [VALUE("x", FLOAT, [5, 2, SIZE])], weights)


def nested(constant: bool = False) -> onnx.ModelProto:
    """An If in a Loop; a layer of the inner branches and one beside them.

    With `constant`, their weights stand in Constant nodes of the bodies.
    """

    def held(name: str, seed: int) -> list[onnx.NodeProto]:
        value = stored("", weight(seed))
        return [NODE("Constant", [], [name], value=value)] if constant else []

    def branch(seed: int) -> onnx.GraphProto:
        return helper.make_graph(
            [*held("w", seed), NODE("MatMul", ["a", "w"], ["out"], "inner")],
            "branch",
            [],
            [VALUE("out", FLOAT, None)],
            [] if constant else [stored("w", weight(seed))],
        )

    body = helper.make_graph(
        [
            *held("v", 3),
            NODE("MatMul", ["state", "v"], ["a"], "step"),
            NODE("Greater", ["i", "zero"], ["later"]),
            NODE("If", ["later"], ["b"], "which", then_branch=branch(1), else_branch=branch(2)),
            NODE("Tanh", ["b"], ["next"]),
            NODE("Identity", ["go"], ["on"]),
        ],
        "body",
        [VALUE("i", TensorProto.INT64, []), VALUE("go", TensorProto.BOOL, []),
         VALUE("state", FLOAT, [2, SIZE])],
        [VALUE("on", TensorProto.BOOL, []), VALUE("next", FLOAT, [2, SIZE])],
        [stored("zero", np.array(0, np.int64))],
    )  # fmt: skip
    nodes = [NODE("Loop", ["count", "", "x"], ["y"], "loop", body=body)]
    weights = {"count": np.array(3, np.int64)} | ({} if constant else {"v": weight(3)})
    return model_with(nodes, [VALUE("x", FLOAT, [2, SIZE])], weights)


def linear(constant: bool) -> onnx.FunctionProto:
    """A function of a product and a Relu, with its weight given or in a Constant of its own."""
    nodes = [
        NODE("MatMul", ["data", "weight"], ["product"], "product"),
        NODE("Relu", ["product"], ["result"]),
    ]
    if constant:
        nodes.insert(0, NODE("Constant", [], ["weight"], value=stored("", weight(5))))
    given = ["data"] if constant else ["data", "weight"]
    imports = [helper.make_opsetid("", 17)]
    return helper.make_function("somebody", "Linear", given, ["result"], nodes, imports)


def calls(constant: bool) -> onnx.ModelProto:
    """Two calls of one function."""
    first, second = [["x"], ["a"]] if constant else [["x", "v"], ["a", "w"]]
    nodes = [
        NODE("Linear", first, ["a"], "first", domain="somebody"),
        NODE("Linear", second, ["y"], "second", domain="somebody"),
    ]
    weights = {} if constant else {"v": weight(1), "w": weight(2)}
    return model_with(nodes, [VALUE("x", FLOAT, [2, SIZE])], weights, [linear(constant)])


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "If": choice,
    "Loop": loop,
    "Scan": scan,
    "nested": nested,
    "nested, constants": lambda: nested(constant=True),
    "function": lambda: calls(False),
    "function with a constant": lambda: calls(True),
}


def recurrent(op: str = "LSTM") -> onnx.ModelProto:
    """A recurrent node in the branch of positive sums, whose first states are computed there."""
    weights = recurrent_weights(op, SIZE, SIZE, 1)
    states = ["h", "c"] if op == "LSTM" else ["h"]
    then = helper.make_graph(
        [
            NODE("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0),
            NODE("Unsqueeze", ["mean", "own"], ["h"]),
            *([NODE("Neg", ["h"], ["c"])] if op == "LSTM" else []),
            NODE(op, ["x", "W", "R", "B", "", *states], ["steps"], "cell", hidden_size=SIZE),
            NODE("Squeeze", ["steps", "directions"], ["out"]),
        ],
        "then",
        [],
        [VALUE("out", FLOAT, None)],
        [
            stored("B", weights["B"]),
            stored("own", np.array([0])),
            stored("directions", np.array([1])),
        ],
    )  # fmt: skip
    otherwise = helper.make_graph(
        [NODE("Relu", ["x"], ["out"])], "else", [], [VALUE("out", FLOAT, None)]
    )
    nodes = [
        NODE("ReduceSum", ["x"], ["sum"], keepdims=0),
        NODE("Greater", ["sum", "zero"], ["positive"]),
        NODE("If", ["positive"], ["y"], "choice", then_branch=then, else_branch=otherwise),
    ]
    kept = {name: weights[name] for name in "WR"} | {"zero": np.zeros((), np.float32)}
    return model_with(nodes, [VALUE("x", FLOAT, [5, 2, SIZE])], kept)
