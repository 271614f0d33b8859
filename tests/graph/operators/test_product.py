"""Matrix products: which biases are added as they are, and which stacks are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from onnx import helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.operators.product import Product, ProductPatch
from tests.builders import model_of, random_array
from tests.graph.operators.cases import Case, products


@pytest.mark.parametrize(
    ("op_type", "shape", "message"),
    [
        ("Gemm", (4,), r"shape \[4\], a Gemm's has 2 axes;"),
        ("Gemm", (4, 2, 3), r"shape \[4, 2, 3\], a Gemm's has 2 axes;"),
        ("MatMul", (), r"shape \[\], a MatMul's has 1 axes or more;"),
    ],
)
def test_weights_with_other_axes(op_type, shape, message):
    with pytest.raises(ModelError, match=message):
        Product().check(helper.make_node(op_type, ["x", "w"], ["y"]), shape, "the node")


@pytest.mark.parametrize(
    ("values", "owned"),
    [
        ({}, True),
        ({"alpha": 1.0, "beta": 1.0}, True),
        ({"alpha": 0.5}, False),
        ({"beta": 2.0}, False),
    ],
)
def test_a_bias_is_owned_if_it_is_added_as_it_is(values, owned):
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], **values)
    weights = {"w": random_array(6, 5), "b": random_array(5)}
    (layer,) = find_layers(model_of([node], weights, {"x": [2, 6]}, ["y"])).layers
    assert (layer.bias == "b") == owned


def test_a_bias_along_the_other_axis_is_not_owned():
    node = helper.make_node("Gemm", ["w", "x", "b"], ["y"])
    weights = {"w": random_array(5, 6), "b": random_array(5, 1)}
    (layer,) = find_layers(model_of([node], weights, {"x": [6, 5]}, ["y"])).layers
    assert layer.bias is None


@pytest.mark.parametrize(
    ("shapes", "refused"),
    [(None, False), ({"x": (2, 4, 6)}, False), ({"x": (6,)}, True), ({}, True)],
)
def test_a_stack_that_meets_a_vector(shapes, refused):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of([node], {"w": random_array(2, 6, 5)}, {"x": [2, 4, 6]}, ["y"])
    (layer,) = find_layers(model).layers
    found = Product().refusal(layer, shapes)
    assert (None if found is None else found.reason) == (Reason.NOT_A_MATRIX if refused else None)


@pytest.mark.parametrize(("stack", "axis"), [((), (-1, 5)), ((1,), (-1, 5)), ((2,), None)])
def test_a_stack_has_more_outputs_than_an_axis(stack, axis):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weights = {"w": random_array(*stack, 6, 5)}
    (layer,) = find_layers(model_of([node], weights, {"x": [2, 4, 6]}, ["y"])).layers
    assert Product().output_axis(layer) == axis


@settings(max_examples=40)
@given(products())
def test_vectors_by_their_definition(case: Case):
    """Each output is the inner product of one vector with one row or column of the weight."""
    model = model_of([case.node], {"w": random_array(*case.weight)}, {"x": list(case.data)}, ["y"])
    (layer,) = find_layers(model).layers
    patch = Product().patch(case.node, layer, layer.uses[0])
    assert isinstance(patch, ProductPatch)
    data = random_array(*case.data, seed=2)
    found = np.concatenate(list(patch.vectors(data)), axis=2)
    # The vectors lie along the axis of the data over which the product sums.
    flags = layer.attributes
    right = layer.weight_input == 1
    turned = bool(flags.get("transA" if right else "transB"))
    rows = data if right != turned else data.swapaxes(-1, -2)
    listed = {row.tobytes() for row in np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])}
    got = found.transpose(0, 2, 1).reshape(-1, patch.size)
    assert {np.ascontiguousarray(vector).tobytes() for vector in got} == listed
