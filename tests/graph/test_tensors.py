"""Tensors wherever a model holds them, counted in bytes, with the facts that their nodes give."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph import protos, sizes
from cobla_onnx.graph.first_axis import first_axes
from cobla_onnx.graph.randomness import random_nodes
from cobla_onnx.graph.tensors import all_tensors, constant_value, subgraphs, tensor_array
from cobla_onnx.graph.words import MOST, known_words
from tests.builders import model_of, random_array

node = helper.make_node


def nested(inner: list[onnx.NodeProto], output: str) -> onnx.NodeProto:
    """Return an If whose branches hold nodes."""
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(inner, "inner", [], [value])
    return node("If", ["flag"], ["y"], "if", then_branch=graph, else_branch=graph)


def constant(array: np.ndarray, name: str) -> onnx.NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def test_tensors_are_found_at_any_depth():
    weights = {"flag": np.array(True), "w": random_array(2, 3)}
    inner = [constant(random_array(4), "c"), node("Identity", ["c"], ["d"])]
    model = model_of([nested(inner, "d")], weights, {}, ["y"])
    held = list(all_tensors(model))
    assert [h.tensor.name for h in held if h.main] == ["flag", "w"]
    assert sorted(h.tensor.name for h in held if not h.main) == ["c", "c"], "one in each branch"
    assert len(list(subgraphs(model.graph.node[0]))) == 2
    np.testing.assert_array_equal(tensor_array(held[1].tensor, "w"), weights["w"])
    assert constant_value(inner[0]).name == "c"
    assert constant_value(inner[1]) is None
    given = node("Constant", [], ["c"])
    given.attribute.add(name="value", ref_attr_name="W", type=onnx.AttributeProto.TENSOR)
    assert constant_value(given) is None, "a function's, whose calls have it"


def test_data_that_does_not_fit_its_shape_is_refused():
    tensor = numpy_helper.from_array(random_array(2, 3), "w")
    tensor.dims[0] = 3
    with pytest.raises(ModelError, match="the weight"):
        tensor_array(tensor, "the weight")


@given(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["float32", "int8", "float64"]))
def test_bytes_follow_from_type_and_shape(shape, dtype):
    array = np.zeros(shape, dtype)
    assert sizes.tensor_bytes(numpy_helper.from_array(array)) == array.nbytes


@given(st.integers(0, 9))
def test_elements_that_share_a_byte_are_rounded_up(count):
    tensor = TensorProto(data_type=TensorProto.INT4, dims=[count])
    assert sizes.tensor_bytes(tensor) == -(-count // 2)


def test_tables_of_trained_operators_are_their_bytes():
    scaler = node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0, 2.0], scale=[1.0])
    assert sizes.table_bytes(scaler) == 12
    assert sizes.table_bytes(node("Conv", ["x", "w"], ["y"], pads=[1, 1])) == 0


def test_fields_are_copied_but_those_left_out():
    source = model_of([node("Relu", ["x"], ["y"])], {}, {"x": [1]}, ["y"]).graph
    source.doc_string = "text"
    target = onnx.GraphProto()
    protos.copy_fields(source, target, ("doc_string",))
    assert target.doc_string == ""
    target.doc_string = "text"
    assert target == source
    repeated = {f.name for f, _ in source.ListFields() if protos.is_repeated(f)}
    assert repeated == {"node", "input", "output"}


def test_random_nodes_are_named_inside_branches_too():
    inner = [node("RandomNormal", [], ["d"], "noise", shape=[1])]
    model = model_of([nested(inner, "d")], {"flag": np.array(True)}, {}, ["y"])
    assert random_nodes(model) == ["'noise' (RandomNormal)"] * 2
    still = model_of([node("Dropout", ["x"], ["y"], "drop")], {}, {"x": [1]}, ["y"])
    assert random_nodes(still) == []
    names = ["x", "ratio", "training"]
    weights = {"ratio": np.float32(0.5), "training": np.array(True)}
    moving = model_of([node("Dropout", names, ["y"], "drop")], weights, {"x": [1]}, ["y"])
    assert random_nodes(moving) == ["'drop' (Dropout)"]


def test_words_are_those_that_nodes_look_up():
    words = [f"word{i}" for i in range(100)]
    encoder = node(
        "LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml",
        keys_strings=words, values_int64s=list(range(100)),
    )  # fmt: skip
    model = helper.make_model(helper.make_graph([encoder], "g", [], []))
    assert known_words(model) == (*words[: MOST - 2], "0", "1")


@pytest.mark.parametrize(
    ("operator", "axis", "meaning"),
    [
        ("Conv", "n", "batch"),
        ("Conv", 1, "batch"),
        ("Relu", "time", "other"),
        ("Relu", "", "unknown"),
    ],
)
def test_the_meaning_of_the_first_axis(operator, axis, meaning):
    names = ["x", "w"] if operator == "Conv" else ["x"]
    weights = {"w": random_array(4, 3, 1, 1)} if operator == "Conv" else {}
    model = model_of([node(operator, names, ["y"])], weights, {"x": [axis, 3, 5, 5]}, ["y"])
    if meaning == "unknown":
        del model.graph.output[:]
    assert first_axes(model) == {"x": meaning}
