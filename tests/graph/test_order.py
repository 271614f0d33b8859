"""Nodes that are not sorted: sorted for the work, written in the order they came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.model_file import load_in_order
from cobla_onnx.graph.order import captured_names, restore_order, sort_nodes
from cobla_onnx.runtime.session import open_session
from tests.builders import FLOAT, model_of, random_array, small_network

NETWORK = small_network()
SORTED = compress(NETWORK, Budget(mem=0.5))


def shuffled(model: onnx.ModelProto, places: list[int]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(model.graph.node[place] for place in places)
    return result


def branching() -> onnx.ModelProto:
    """A branch of an If reads a tensor of the main graph."""
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["h"], [f"{name}_out"], f"{name}_node")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)],
        )
        for name, op in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("ReduceMax", ["x"], ["m"], "most", keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"], "positive"),
        helper.make_node("If", ["c"], ["i"], "if", **branches),
        helper.make_node("MatMul", ["i", "w2"], ["y"], "second"),
    ]
    weights = {
        "w1": random_array(16, 32),
        "w2": random_array(32, 16),
        "zero": np.zeros((), np.float32),
    }
    return model_of(nodes, weights, {"x": ["N", 16]}, ["y"])


@given(st.permutations(range(len(NETWORK.graph.node))))
@settings(max_examples=12, deadline=None)
def test_shuffled_nodes_give_the_same_plan_and_keep_their_order(places: list[int]) -> None:
    model = shuffled(NETWORK, places)
    before = model.SerializeToString(deterministic=True)
    result = compress(model, Budget(mem=0.5))
    assert result.plan.decisions == SORTED.plan.decisions
    assert model.SerializeToString(deterministic=True) == before
    kept = [node.name for node in model.graph.node]
    names = [node.name for node in result.model.graph.node]
    assert [name for name in names if name in kept] == kept
    for number, name in enumerate(names):
        # A first factor stands just before the node that it was taken from.
        if name not in kept:
            assert name.startswith(names[number + 1])
    known = {node.name: node for node in SORTED.model.graph.node}
    assert all(known[node.name] == node for node in result.model.graph.node)


@given(st.permutations(range(len(branching().graph.node))))
def test_sorting_sees_what_sub_graphs_read_and_restoring_undoes_it(places: list[int]) -> None:
    model = shuffled(branching(), places)
    before = model.SerializeToString(deterministic=True)
    order = sort_nodes(model.graph)
    names = [node.name for node in model.graph.node]
    assert names.index("first") < names.index("if") < names.index("second")
    assert not sort_nodes(model.graph)
    restore_order(model.graph, order)
    assert model.SerializeToString(deterministic=True) == before


def test_an_unsorted_file_is_compressed_and_opens_as_it_is_written(tmp_path: Path) -> None:
    model = shuffled(branching(), [4, 3, 2, 1, 0])
    source, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    source.write_bytes(model.SerializeToString())
    open_session(model, 1)
    compress(source, Budget(mem=0.6)).save(out)
    written = onnx.load(out)
    kept = [node.name for node in written.graph.node if not node.name.endswith("first_factor")]
    assert kept == ["second", "if", "positive", "most", "first"]
    assert len(written.graph.node) > len(kept)
    open_session(written, 1)
    unchanged = compress(source, Budget(mem=1.0))
    unchanged.save(out, external_data="always")
    assert [node.name for node in onnx.load(out).graph.node] == kept
    assert [node.name for node in unchanged.model.graph.node] == kept


def test_sorted_nodes_stay(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(NETWORK.SerializeToString())
    model, order = load_in_order(path)
    assert not order
    assert model == NETWORK


def test_unsorted_nodes_of_a_sub_graph_are_refused_as_onnxruntime_does() -> None:
    model = branching()
    branch = next(a.g for a in model.graph.node[3].attribute if a.name == "then_branch")
    branch.node.insert(0, helper.make_node("Abs", ["then_branch_out"], ["a"], "late"))
    branch.output[0].name = "a"
    with pytest.raises(ModelError, match="makes only later, which onnxruntime takes in the main"):
        compress(model, Budget(mem=0.6))


def test_captured_names_are_those_that_a_sub_graph_does_not_make() -> None:
    graph = branching().graph.node[3].attribute[0].g
    assert captured_names(graph) == {"h"}
    graph.input.append(helper.make_tensor_value_info("h", FLOAT, None))
    assert captured_names(graph) == set()
