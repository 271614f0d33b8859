"""A prepared model computes what it did, and its layers are where they can be taken."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx.graph.bodies import body_graphs, names_are_unique
from cobla_onnx.graph.functions import OWN_DOMAIN
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.opening import opened
from cobla_onnx.graph.settling import branching, settled
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from tests.bodies import MODELS, SIZE, calls, choice, linear, loop, nested, weight
from tests.builders import random_array, small_network

LAYERS = {
    "If": [
        "choice.else_branch/hidden",
        "choice.else_branch/last",
        "choice.then_branch/hidden",
        "outer",
    ],
    "Loop": ["loop.body/step", "loop.body/conv"],
    "Scan": ["scan.body/input", "scan.body/recurrent", "outer"],
    "nested": [
        "loop.body/step",
        "loop.body/which.else_branch/inner",
        "loop.body/which.then_branch/inner",
    ],
}
LAYERS["nested, constants"] = LAYERS["nested"]


def feeds_of(model: onnx.ModelProto, seed: int = 0) -> Feeds:
    (value,) = model.graph.input
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
    return {value.name: random_array(*sizes, seed=seed)}


def outputs_of(model: onnx.ModelProto, seed: int = 0) -> np.ndarray:
    return run_session(open_session(model, 1), feeds_of(model, seed))["y"]


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_model_computes_what_it_did_and_stores_no_more(name):
    model = MODELS[name]()
    before = model.SerializeToString(deterministic=True)
    found = opened(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found, full_check=True)
    assert names_are_unique(found.graph)
    assert stored_bytes(found) == stored_bytes(model)
    for seed in range(3):
        np.testing.assert_array_equal(outputs_of(found, seed), outputs_of(model, seed))
    assert opened(found).SerializeToString() == found.SerializeToString()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_bodies_are_found_under_the_path_of_their_node(name):
    layers = find_layers(opened(MODELS[name]())).layers
    assert [layer.name for layer in layers] == LAYERS[name]
    assert [layer.in_body for layer in layers] == ["/" in layer.name for layer in layers]


def test_a_weight_that_both_branches_read_is_one_layer_and_a_bias_in_a_branch_is_its_own():
    model = opened(choice())
    layers = {layer.name: layer for layer in find_layers(model).layers}
    assert len(layers["choice.else_branch/last"].uses) == 2
    assert layers["choice.then_branch/hidden"].bias is not None
    turned = read_weight(model, layers["choice.else_branch/hidden"])
    np.testing.assert_array_equal(turned, weight(2).T)


def test_models_without_layers_in_bodies_stay_the_same_object():
    model = small_network()
    assert opened(model) is model
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"])], "b", [], [helper.make_empty_tensor_value_info("n")]
    )
    node = helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)
    assert opened(model) is model


def test_calls_become_layers_and_a_constant_of_the_function_is_shared_by_them():
    apart = find_layers(opened(calls(False))).layers
    assert [(len(layer.uses), layer.source) for layer in apart] == [(1, "v"), (1, "w")]
    model = opened(calls(True))
    assert not model.functions
    (layer,) = find_layers(model).layers
    assert len(layer.uses) == 2
    assert layer.stored_bytes == stored_bytes(model) == 4 * SIZE * SIZE


def test_functions_of_this_package_and_those_without_layers_stay():
    model = calls(False)
    for function, entries in ((model.functions[0], model.graph.node),):
        function.domain = OWN_DOMAIN
        for entry in entries:
            entry.domain = OWN_DOMAIN
    model.opset_import.append(helper.make_opsetid(OWN_DOMAIN, 1))
    assert opened(model) is model
    flat = calls(False)
    del flat.functions[0].node[0]
    flat.functions[0].node[0].input[0] = "data"
    assert opened(flat) is flat


def test_functions_in_bodies_and_functions_that_call_others_are_opened():
    outer = helper.make_function(
        "somebody",
        "Outer",
        ["data"],
        ["result"],
        [helper.make_node("Linear", ["data"], ["result"], domain="somebody")],
        [helper.make_opsetid("", 17), helper.make_opsetid("somebody", 1)],
    )
    model = choice()
    model.functions.extend([linear(True), outer])
    model.opset_import.append(helper.make_opsetid("somebody", 1))
    call = model.graph.node[2].attribute[0].g.node[-1]
    data = call.input[0]
    call.CopyFrom(helper.make_node("Outer", [data], ["out"], "call", domain="somebody"))
    found = opened(model)
    assert not found.functions
    np.testing.assert_array_equal(outputs_of(found), outputs_of(model))
    assert len(find_layers(found).layers) == 5


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_in_place_of_its_if_computes_the_same(taken):
    model = opened(choice())
    (output,) = branching(model)
    alone = settled(model, {output: taken})
    onnx.checker.check_model(alone, full_check=True)
    assert not list(body_graphs(alone.graph.node))
    same = []
    for seed in range(6):
        if (feeds_of(model, seed)["x"].sum() > 0) == taken:
            np.testing.assert_array_equal(outputs_of(alone, seed), outputs_of(model, seed))
            same.append(seed)
    assert same
    names = {layer.name for layer in find_layers(model).layers}
    # The layer that both branches share is called after the first of its nodes.
    names.add("choice.then_branch/last")
    assert {layer.name for layer in find_layers(alone).layers} < names


def test_what_is_no_if_of_the_main_graph_is_not_settled():
    assert branching(opened(loop())) == {}
    assert branching(opened(nested())) == {}
