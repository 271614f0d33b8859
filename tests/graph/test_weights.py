"""Weights as the nodes read them, whatever stands between."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.weights import read_bias, read_weight
from tests.builders import model_of, random_array, small_network


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_a_weight_behind_other_nodes_is_what_they_make_of_it(order):
    stored = random_array(6, 8, dtype="float64")
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=order),
        helper.make_node("Cast", ["t"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "c"], ["y"], "product"),
    ]
    rows = stored.transpose(order).shape[0]
    model = model_of(nodes, {"w": stored}, {"x": ["N", rows]}, ["y"])
    (layer,) = find_layers(model).layers
    expected = stored.transpose(order).astype(np.float32)
    np.testing.assert_array_equal(read_weight(model, layer), expected)
    assert read_bias(model, layer) is None


def test_biases_are_read_as_stored_and_refused_where_not_finite():
    model = small_network()
    layer = find_layers(model).layers[0]
    np.testing.assert_array_equal(read_bias(model, layer), random_array(16, seed=2))
    broken = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"w": np.full((4, 4), np.nan, np.float32)}, {"x": ["N", 4]}, ["y"],
    )  # fmt: skip
    (layer,) = find_layers(broken).layers
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        read_weight(broken, layer)
