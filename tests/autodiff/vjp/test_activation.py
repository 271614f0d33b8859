"""Rules of activations and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.autodiff.differences import check, check_linear, distinct, normal

node = helper.make_node

ACTIVATIONS = [
    ("Relu", {}),
    ("LeakyRelu", {"alpha": 0.2}),
    ("LeakyRelu", {"alpha": -0.2}),
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("Erf", {}),
    ("HardSigmoid", {"alpha": 0.4, "beta": 0.44}),
    ("HardSwish", {}),
    ("Softplus", {}),
    ("Softsign", {}),
    ("Mish", {}),
    ("ThresholdedRelu", {"alpha": 0.5}),
    ("Elu", {"alpha": 0.7}),
    ("Selu", {}),
    ("Celu", {"alpha": 0.7}),
    ("Softmax", {"axis": 1}),
    ("Softmax", {}),
    ("LogSoftmax", {"axis": -2}),
    ("Identity", {}),
    ("Exp", {}),
    ("Abs", {}),
    ("Neg", {}),
    ("Sin", {}),
    ("Cos", {}),
    ("Sinh", {}),
    ("Cosh", {}),
    ("Atan", {}),
    ("Asinh", {}),
]


@pytest.mark.parametrize(("operator", "settings"), ACTIVATIONS, ids=str)
def test_elementwise(operator, settings):
    check(node(operator, ["x"], ["y"], **settings), {"x": distinct(2, 5, 9, spacing=0.05)})


@pytest.mark.parametrize("operator", ["Sqrt", "Log", "Reciprocal", "Acosh"])
def test_elementwise_of_positive_numbers(operator):
    check(node(operator, ["x"], ["y"]), {"x": np.abs(normal(3, 4)) + 1.1})


@pytest.mark.parametrize("operator", ["Asin", "Acos", "Atanh", "Tan"])
def test_elementwise_within_one(operator):
    check(node(operator, ["x"], ["y"]), {"x": normal(3, 4).clip(-0.9, 0.9) * 0.9})


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    check(node("Gelu", ["x"], ["y"], approximate=approximate), {"x": normal(3, 4)}, opset=20)


def test_swish():
    check(node("Swish", ["x"], ["y"], alpha=1.5), {"x": normal(3, 4)}, opset=24)


@pytest.mark.parametrize("limits", [(-0.31, 0.42), (None, 0.42), (-0.31, None)])
def test_clip(limits):
    names, constants = ["x"], {}
    for name, value in zip(("low", "high"), limits, strict=True):
        names.append("" if value is None else name)
        if value is not None:
            constants[name] = np.array(value)
    x = {"x": distinct(4, 30)}
    check(node("Clip", names, ["y"]), x, constants=constants)
    check(node("Clip", names, ["y"]), {**x, **constants})


@pytest.mark.parametrize("slope", [(3, 1, 1), (3, 4, 5), (1,)])
def test_p_relu(slope):
    x = distinct(2, 3, 4, 5)
    check(node("PRelu", ["x", "slope"], ["y"]), {"x": x, "slope": normal(*slope)})


SHAPES = st.sampled_from(
    [((2, 3), (2, 3)), ((2, 3), (3,)), ((1,), (2, 3)), ((), (2, 2)), ((4, 1, 3), (2, 1))]
)


@given(SHAPES, st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum"]))
@settings(max_examples=30)
def test_broadcasting(shapes, operator):
    a, b = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    if operator in ("Pow", "Div"):
        a, b = np.abs(a) + 0.5, np.abs(b) + 0.5
    check(node(operator, ["a", "b"], ["y"]), {"a": a, "b": b})


def test_broadcasting_of_a_mean():
    arrays = {"a": normal(2, 3), "b": normal(3, seed=1), "c": normal(2, 1, seed=2)}
    check_linear(node("Mean", list(arrays), ["y"]), arrays)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 0.5, -1.0])
def test_constant_exponents(exponent):
    x = np.abs(normal(2, 3)) + 0.5
    check(node("Pow", ["x", "p"], ["y"]), {"x": x}, constants={"p": np.array(exponent)})


@pytest.mark.parametrize("operator", ["Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_operands(operator, count):
    arrays = {f"x{i}": normal(2, 3, seed=i) for i in range(count)}
    check(node(operator, list(arrays), ["y"]), arrays)


def test_where():
    condition = np.array([[True, False, True]])
    inputs = {"a": normal(2, 3), "b": normal(2, 1, seed=1)}
    check(node("Where", ["c", "a", "b"], ["y"]), inputs, constants={"c": condition})


def test_an_operand_used_twice():
    check(node("Mul", ["x", "x"], ["y"]), {"x": normal(2, 3)})


def test_fan_out_is_summed():
    nodes = [
        node("Sigmoid", ["x"], ["a"]),
        node("Mul", ["a", "x"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("Sub", ["c", "a"], ["d"]),
        node("Mul", ["d", "a"], ["y"]),
    ]
    check(nodes, {"x": normal(2, 3)})


def test_casts_and_dropout():
    nodes = [node("Cast", ["x"], ["a"], to=11), node("Dropout", ["a"], ["y"])]
    check(nodes, {"x": normal(2, 3)})
    nodes = [node("CastLike", ["x", "like"], ["a"]), node("Relu", ["a"], ["y"])]
    check(nodes, {"x": normal(2, 3), "like": np.zeros(1)}, wanted=["x"])


def test_flat_paths_are_cut():
    nodes = [
        node("Round", ["x"], ["r"]),
        node("Cast", ["x"], ["i"], to=7),
        node("Cast", ["i"], ["f"], to=11),
        node("Mul", ["x", "r"], ["a"]),
        node("Add", ["a", "f"], ["y"]),
    ]
    check(nodes, {"x": distinct(3, 4, spacing=0.13)})
