"""A lifted model computes the same, whatever stands in the converter's way."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.opset import lifted
from cobla_onnx.graph.protos import opset_of
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array

node = helper.make_node


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (found,) = run_session(open_session(model, 1), {"x": x}).values()
    return found


def model_with(nodes: list[onnx.NodeProto], shape: list[int], **opsets: int) -> onnx.ModelProto:
    """Return a model from x to y of one shape, which nothing infers."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    imports = [helper.make_opsetid(*entry) for entry in opsets.items()]
    graph = helper.make_graph(nodes, "old", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=imports, ir_version=3)


def test_weights_that_are_no_inputs_stay_what_they_were():
    weight, x = random_array(3, 4), random_array(2, 3)
    old = model_of(
        [node("MatMul", ["x", "w"], ["y"])], {"w": weight}, {"x": [2, 3]}, ["y"], opset=9
    )
    old.ir_version = 3
    made = lifted(old, 17)
    assert opset_of(made) == 17
    np.testing.assert_allclose(run(made, x), x @ weight, rtol=1e-6)


def test_weights_that_are_inputs_for_the_format_alone_stay_constants():
    """Changeable ones would be neither folded nor brought into the layout of convolutions."""
    weight, x = random_array(3, 4), random_array(2, 3)
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    old = model_of(nodes, {"w": weight}, {"x": [2, 3]}, ["y"], opset=9, ir_version=3)
    made = lifted(old, 17)
    assert [value.name for value in made.graph.input] == ["x"]
    np.testing.assert_allclose(run(made, x), x @ weight, rtol=1e-6)


def test_weights_that_a_run_may_change_still_may():
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    weights = {"w": random_array(3, 4)}
    old = model_of(nodes, weights, {"x": [2, 3], "w": [3, 4]}, ["y"], opset=9, ir_version=4)
    assert [value.name for value in lifted(old, 17).graph.input] == ["x", "w"]


def test_a_recent_model_is_left_as_it_is():
    model = model_of([node("Relu", ["x"], ["y"])], {}, {"x": [2, 3]}, ["y"], opset=18)
    before = model.SerializeToString()
    assert lifted(model, 17) is model
    assert model.SerializeToString() == before


def test_operators_that_no_opset_has_any_more_are_written_out():
    scaled = node("ImageScaler", ["x"], ["y"], bias=[1.0, 2.0, 3.0], scale=2.0)
    old = model_with([scaled], [1, 3, 2, 2], **{"": 7})
    found = run(lifted(old, 13), np.ones((1, 3, 2, 2), np.float32))
    assert found[0, :, 0, 0].tolist() == [3, 4, 5]


def test_functions_and_the_other_name_of_the_domain_are_known():
    nodes = [node("Twice", ["x"], ["m"], domain="local"), node("Relu", ["m"], ["y"])]
    nodes[1].domain = "ai.onnx"
    model = model_with(nodes, [2, 3], **{"ai.onnx": 9, "local": 1})
    body, own = [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 9)]
    model.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], body, own))
    x = random_array(2, 3)
    np.testing.assert_array_equal(run(lifted(model, 13), x), np.maximum(2 * x, 0))


def test_an_operator_at_which_the_converter_stops_is_named():
    model = model_with([node("Nonesuch", ["x"], ["y"])], [2, 3], **{"": 9})
    with pytest.raises(ModelError, match=r"from opset 9 to 13: .*Nonesuch.*newer opset"):
        lifted(model, 13)
