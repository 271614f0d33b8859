"""Weights that are quantised already are called that, however they are made into numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.layers import Reason, find_layers
from tests.builders import model_of, random_array

INTEGERS = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
WEIGHTS = {
    "q": INTEGERS,
    "u": INTEGERS.view(np.uint8),
    "zero": np.int8(3),
    "scale": np.full((1, 16), 0.01, np.float32),
    "zero_float": np.float32(3),
    "large": random_array(16, 16),
}


def cast(name: str, to: str = "f") -> object:
    return helper.make_node("Cast", [name], [to], to, to=TensorProto.FLOAT)


@pytest.mark.parametrize(
    "nodes",
    [
        [cast("q"), helper.make_node("Mul", ["f", "scale"], ["w"], "mul")],
        [cast("u"), helper.make_node("Mul", ["scale", "f"], ["w"], "mul")],
        [
            cast("q"),
            cast("zero", "z"),
            helper.make_node("Sub", ["f", "z"], ["s"], "sub"),
            helper.make_node("Mul", ["s", "scale"], ["m"], "mul"),
            helper.make_node("Transpose", ["m"], ["w"], "turn"),
        ],
        [
            helper.make_node("Sub", ["q", "zero"], ["s"], "sub"),
            cast("s"),
            helper.make_node("Div", ["f", "scale"], ["w"], "div"),
        ],
        [cast("q", "w")],
    ],
    ids=["mul", "unsigned", "sub mul", "sub first", "cast alone"],
)
def test_integers_made_into_weights_are_quantised(nodes: list[object]) -> None:
    model = model_of(
        [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
        WEIGHTS,
        {"x": ["N", 16]},
        ["y"],
    )
    found = find_layers(model)
    assert not found.layers
    assert [item.reason for item in found.skipped] == [Reason.QUANTISED]
    with pytest.raises(BudgetError, match="compress the model before it is quantised"):
        compress(model, Budget(mem=0.5))


def test_arithmetic_on_other_constants_and_on_data_is_not() -> None:
    for name in ("large", "x"):
        nodes = [
            helper.make_node("Mul", [name, "scale"], ["w"], "mul"),
            helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
        ]
        found = find_layers(model_of(nodes, WEIGHTS, {"x": [16, 16]}, ["y"]))
        assert [item.reason for item in found.skipped] == [Reason.NOT_CONSTANT]


def test_half_precision_that_is_cast_is_a_layer() -> None:
    weights = {"h": random_array(16, 16).astype(np.float16)}
    nodes = [cast("h", "w"), helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    model = model_of(nodes, weights, {"x": ["N", 16]}, ["y"])
    (layer,) = find_layers(model).layers
    assert layer.stored_type == TensorProto.FLOAT16
    result = compress(model, Budget(mem=0.5))
    stored = {t.data_type for t in result.model.graph.initializer}
    assert stored == {TensorProto.FLOAT16}
