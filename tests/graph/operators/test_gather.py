"""Which lookups are layers, and how they read their data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.check.structure import check_structure
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.gather import LookupPatch
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array
from tests.lookups import LENGTH, ROWS, WIDTH, lookup_model, text_model


def test_tables_of_tokens_and_positions_are_layers():
    layers = {layer.name: layer for layer in find_layers(text_model()).layers}
    assert list(layers) == ["tokens", "positions", "hidden", "classes"]
    assert layers["tokens"].shape == (ROWS, WIDTH)
    assert layers["positions"].shape == (LENGTH, WIDTH)
    (use,) = layers["tokens"].uses
    assert (use.data, use.output) == ("ids", "a")
    output = operator_of(layers["tokens"]).output_axis(layers["tokens"])
    assert output == (-1, WIDTH)


def test_two_lookups_in_a_table_are_one_layer():
    nodes = [
        helper.make_node("Gather", ["table", name], [f"{name}_rows"], name)
        for name in ("left", "right")
    ]
    nodes.append(helper.make_node("Add", ["left_rows", "right_rows"], ["y"]))
    inputs: dict[str, list[int | str]] = {"left": [2, 3], "right": [2, 3]}
    model = model_of(nodes, {"table": random_array(8, 6)}, inputs, ["y"])
    (layer,) = find_layers(model).layers
    assert [use.data for use in layer.uses] == ["left", "right"]


def skipped(model: onnx.ModelProto) -> list[tuple[str, Reason]]:
    found = find_layers(model)
    assert not found.layers
    return [(item.name, item.reason) for item in found.skipped]


def test_what_takes_no_rows_of_a_matrix_is_left_with_a_reason():
    for table, axis, reason in (
        (random_array(4, 3, 2), 0, Reason.NOT_A_MATRIX),
        (random_array(1, 6), 0, Reason.NOT_A_MATRIX),
        (random_array(4, 6), 1, Reason.COLUMNS),
        (random_array(4, 6), -1, Reason.COLUMNS),
    ):
        assert skipped(lookup_model(table, [2], axis=axis)) == [("embedding", reason)]
    assert find_layers(lookup_model(random_array(4, 6), [2], axis=-2)).layers


def test_a_table_with_other_readers_is_left():
    model = lookup_model(random_array(8, 6), [2])
    model.graph.output.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, [8, 6]))
    assert skipped(model) == [("embedding", Reason.SHARED)]
    model = lookup_model(random_array(8, 6), [2])
    model.graph.node.append(helper.make_node("Add", ["y", "table"], ["z"], "sum"))
    assert skipped(model) == [("embedding", Reason.SHARED)]


def test_lookups_of_sizes_and_in_activations_are_not_mentioned():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["size"]),
        helper.make_node("Gather", ["sizes", "zero"], ["stored_size"]),
        helper.make_node("Gather", ["x", "zero"], ["row"]),
        helper.make_node("Gather", ["factors", "zero"], ["y"]),
    ]
    weights = {
        "zero": np.zeros(1, np.int64),
        "sizes": np.arange(6).reshape(2, 3),
        "factors": random_array(5),
    }
    found = find_layers(model_of(nodes, weights, {"x": [4, 6]}, ["y"]))
    assert (found.layers, found.skipped) == ((), ())


def test_lookups_inside_of_branches_are_not_mentioned():
    value = numpy_helper.from_array(random_array(4, 6), "inner")
    gather = helper.make_node("Gather", ["inner", "ids"], ["z"])
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 6])
    branch = helper.make_graph([gather], "branch", [], [output], [value])
    chosen = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    model = model_of([chosen], {"ids": np.array([0, 1])}, {"yes": []}, ["y"])
    assert find_layers(model).skipped == ()


def test_an_axis_that_the_table_does_not_have():
    with pytest.raises(ModelError, match=r"along axis 2 of a tensor of shape \[4, 6\]"):
        check_structure(lookup_model(random_array(4, 6), [2], axis=2))


@given(st.lists(st.integers(-7, 6), min_size=1, max_size=9), st.booleans())
def test_vectors_times_the_table_are_the_outputs(numbers, narrow):
    table = random_array(7, 4)
    ids = np.array(numbers, np.int32 if narrow else np.int64)
    kind = TensorProto.INT32 if narrow else TensorProto.INT64
    model = lookup_model(table, [len(ids)], kind=kind)
    output = run_session(open_session(model, 1), {"ids": ids})["y"]
    patch = LookupPatch("ids", 7)
    assert (patch.groups, patch.parts, patch.positions(ids)) == (1, None, len(ids))
    vectors = np.concatenate(list(patch.vectors(ids)), axis=2)
    assert vectors.shape == (1, 7, len(ids))
    np.testing.assert_array_equal(table.T @ vectors[0], patch.outputs(output)[0])
    some = np.arange(len(ids))[::2]
    chosen = np.concatenate(list(patch.vectors(ids, some)), axis=2)
    np.testing.assert_array_equal(chosen, vectors[:, :, some])
