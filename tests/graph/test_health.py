"""Weights that are not finite are found wherever they are stored."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cobla_onnx.graph.health import unhealthy_weight
from cobla_onnx.graph.opening import opened
from tests.bodies import choice
from tests.builders import model_of, random_array, small_network


def broken(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.ravel()[-1] = value
    return array


def product(weight: np.ndarray) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("Add", ["h", "mask"], ["y"], "masked"),
    ]
    mask = np.array([0, -np.inf], np.float32)
    return model_of(nodes, {"mask": mask, "w": weight}, {"x": ["N", 3]}, ["y"])


def test_what_is_finite_is_healthy_and_infinity_in_a_mask_is_meant():
    assert not unhealthy_weight(small_network())
    assert not unhealthy_weight(product(random_array(3, 2)))


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_a_weight_is_named_with_its_node(kind, value, what):
    model = product(random_array(3, 2))
    values = broken(random_array(3, 2), value).ravel().tolist()
    weight = helper.make_tensor("w", getattr(onnx.TensorProto, kind), [3, 2], values)
    model.graph.initializer[1].CopyFrom(weight)
    assert unhealthy_weight(model) == f"weight 'w' of node 'product' holds {what}"


def test_nan_comes_before_infinity_and_what_nobody_reads_does_not_count():
    model = product(broken(random_array(3, 2), np.inf))
    model.graph.initializer.append(numpy_helper.from_array(np.full(3, np.nan, "f4"), "unread"))
    assert unhealthy_weight(model) == "weight 'w' of node 'product' holds infinity"
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(2, np.nan, "f4"), "mask"))
    assert unhealthy_weight(model) == "weight 'mask' of node 'masked' holds NaN"


def test_very_large_numbers_come_last_and_are_meant_in_a_mask():
    model = product(broken(random_array(3, 2), -3e38))
    large = "weight 'w' of node 'product' holds numbers up to 3e+38"
    assert unhealthy_weight(model) == large
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(2, -3e38, "f4"), "mask"))
    assert unhealthy_weight(model) == large
    model = product(random_array(3, 2))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(2, -3e38, "f4"), "mask"))
    assert not unhealthy_weight(model)


def test_weights_in_bodies_and_constants_are_found():
    model = choice()
    branches = {a.name: a.g for node in model.graph.node for a in node.attribute if a.HasField("g")}
    constant = branches["then_branch"].node[0].attribute[0].t
    constant.CopyFrom(numpy_helper.from_array(np.full(16, np.inf, "f4")))
    found = "weight 'bias' of node 'choice.then_branch/hidden' holds infinity"
    assert unhealthy_weight(model) == found
    own = branches["then_branch"].initializer[0]
    own.CopyFrom(numpy_helper.from_array(np.full((16, 16), np.nan, "f4"), own.name))
    # One branch defines a name that the other one has, too, before the model is prepared.
    label = "of node 'choice.then_branch/hidden' holds NaN"
    assert unhealthy_weight(opened(model)).endswith(label)
