"""Bytes that no factorisation touches, by operator."""

from __future__ import annotations

import numpy as np
from onnx import helper

from cobla_onnx import Budget, compress, inspect
from cobla_onnx.graph.holders import bytes_elsewhere
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers
from tests.builders import model_of, random_array, small_network

node = helper.make_node


def word_model():
    """A table of twice as many bytes as the layers behind it, read in a way that no layer has."""
    nodes = [
        node("Cast", ["x"], ["i"], to=7),
        node("Unsqueeze", ["i", "last"], ["places"]),
        node("GatherND", ["table", "places"], ["e"], name="embedding"),
        node("MatMul", ["e", "w1"], ["a"], name="first"),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    weights = {
        "table": random_array(256, 64),
        "w1": random_array(64, 64, seed=1),
        "w2": random_array(64, 64, seed=2),
        "last": np.array([-1]),
    }
    return model_of(nodes, weights, {"x": ["N", 4]}, ["y"])


def test_all_bytes_are_counted_once():
    for model in (word_model(), small_network()):
        layers = find_layers(model).layers
        held = bytes_elsewhere(model, [layer.source for layer in layers])
        inside = sum(layer.stored_bytes for layer in layers)
        assert sum(held.values()) + inside == stored_bytes(model)
    assert held == {"Conv": 64, "Gemm": 40}
    assert bytes_elsewhere(word_model(), ["w1", "w2"]) == {"GatherND": 4 * 256 * 64, "Unsqueeze": 8}


def test_weights_of_subgraphs_and_constants_belong_to_their_readers():
    constant = helper.make_tensor("c", 1, [8], np.ones(8))
    inner = helper.make_graph(
        [node("Constant", [], ["k"], value=constant), node("Add", ["x", "k"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", 1, None)],
    )
    nodes = [
        node("Constant", [], ["b"], value=constant),
        node("Sub", ["x", "b"], ["s"]),
        node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    model = model_of(nodes, {"flag": np.array(True)}, {"x": ["N", 8]}, ["s"])
    assert bytes_elsewhere(model, []) == {"If": 65, "Sub": 32}
    assert stored_bytes(model) == 97


def test_a_budget_that_means_far_less_of_the_rest_says_so():
    notes = compress(word_model(), Budget(mem=0.8), threads=1).report.notes
    (note,) = [note for note in notes if "GatherND" in note]
    assert "0.4 of those that can be compressed" in note
    assert "65.5k in GatherND" in note
    notes = compress(small_network(), Budget(mem=0.8), threads=1).report.notes
    assert not any("factorised" in note for note in notes)


def test_inspect_says_where_they_are(capsys):
    found = inspect(word_model(), threads=1)
    assert found.elsewhere == {"GatherND": 65536, "Unsqueeze": 8}
    from rich.console import Console

    Console(width=100).print(found)
    assert "no budget reaches 65.5k in GatherND" in capsys.readouterr().out
