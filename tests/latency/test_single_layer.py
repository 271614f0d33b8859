"""Nodes cut out of models compute what they did there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes
from cobla_onnx.latency.single_layer import layer_key, micro_graph
from cobla_onnx.runtime.session import open_session, random_feeds, run_session
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import stand_in
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import model_of, random_array, small_network
from tests.recurrent_models import sequence_model


def several_kinds() -> onnx.ModelProto:
    """A grouped convolution, one with auto_pad, a transposed one, and products."""
    nodes = [
        helper.make_node("Conv", ["x", "grouped", "b"], ["c1"], "grouped", group=2, strides=[2, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "same"], ["c2"], "same", auto_pad="SAME_UPPER"),
        helper.make_node("ConvTranspose", ["c2", "up"], ["c3"], "up", strides=[2, 2]),
        helper.make_node("ReduceMean", ["c3"], ["m"], "mean", axes=[2], keepdims=0),
        helper.make_node("MatMul", ["left", "m"], ["p1"], "left product"),
        helper.make_node("ReduceMean", ["p1"], ["v"], "mean2", axes=[2], keepdims=0),
        helper.make_node("Transpose", ["v"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("Gemm", ["t", "w", "v"], ["y"], "gemm", transA=1, alpha=0.5, beta=2.0),
    ]
    weights = {
        "grouped": random_array(16, 4, 3, 3, seed=1),
        "b": random_array(16, seed=2),
        "same": random_array(12, 16, 3, 3, seed=3) / 12,
        "up": random_array(12, 10, 2, 2, seed=4),
        "left": random_array(14, 10, seed=5),
        "w": random_array(14, 14, seed=6),
    }
    return model_of(nodes, weights, {"x": [1, 8, 12, 12]}, ["y"])


@pytest.mark.parametrize("make", [small_network, several_kinds, sequence_model])
def test_each_node_alone_gives_what_it_gives_in_the_model(make):
    model = make()
    known = fixed_input_shapes(model, {})
    shapes = infer_shapes(model, known)
    layers = find_layers(model).layers
    assert len(layers) >= 3
    uses = [(layer, use) for layer in layers for use in layer.uses]
    tensors = [name for _, use in uses for name in (use.data, use.output)]
    tensors += [name for node in model.graph.node for name in node.output]
    session = open_session(model, 1, list(dict.fromkeys(tensors)))
    feeds = random_feeds(session, known, seed=1)
    values = {**feeds, **run_session(session, feeds)}
    for layer, use in uses:
        assert layer_key(model, layer, use, shapes) is not None
        alone = micro_graph(model, layer, use, shapes)
        onnx.checker.check_model(alone.model)
        inputs = {value.name: values[value.name] for value in alone.model.graph.input}
        (found,) = run_session(open_session(alone.model, 1), inputs).values()
        np.testing.assert_allclose(found, values[use.output], rtol=1e-5, atol=1e-5)
        for scheme in schemes_for(alone.layer):
            (found,) = run_session(open_session(alone.replaced(scheme.name, 2), 1), inputs).values()
            assert found.shape == values[use.output].shape
            assert np.isfinite(found).all()
            expected = stand_in(alone.layer, scheme, 2)
            whole = onnx.ModelProto()
            whole.CopyFrom(alone.model)
            whole.graph.initializer[0].CopyFrom(
                onnx.numpy_helper.from_array(expected.dense(), "weight")
            )
            (dense,) = run_session(open_session(whole, 1), inputs).values()
            np.testing.assert_allclose(found, dense, rtol=1e-3, atol=1e-3)


def test_real_model_nodes_alone(demo_model):
    model = load_model(demo_model)
    shapes = infer_shapes(model, fixed_input_shapes(model, {}))
    for layer in find_layers(model).layers:
        alone = micro_graph(model, layer, layer.uses[0], shapes)
        session = open_session(alone.model, 1, timed=True)
        assert tuple(session.get_inputs()[0].shape) == shapes[layer.uses[0].data]


def test_keys_tell_what_matters_and_no_more():
    model = several_kinds()
    shapes = infer_shapes(model, fixed_input_shapes(model, {}))
    layer = next(x for x in find_layers(model).layers if x.name == "same")
    key = layer_key(model, layer, layer.uses[0], shapes)
    model.graph.node[layer.uses[0].node].name = "renamed"
    assert layer_key(model, layer, layer.uses[0], shapes) == key
    wider = {**shapes, layer.uses[0].data: (1, 16, 5, 20)}
    assert layer_key(model, layer, layer.uses[0], wider) != key
    assert layer_key(model, layer, layer.uses[0], {}) is None
    model.graph.input.append(helper.make_tensor_value_info("same", 1, [12, 16, 3, 3]))
    assert layer_key(model, layer, layer.uses[0], shapes) != key


def test_stand_ins_keep_numbers_in_range():
    """A product of factors neither vanishes nor explodes: no denormal slows the CPU."""
    model = several_kinds()
    for layer in find_layers(model).layers:
        for scheme in schemes_for(layer):
            dense = stand_in(layer, scheme, 2).dense()
            assert dense.dtype == np.float32
            assert 1e-2 < dense.std() < 10
            rewrite(model, [stand_in(layer, scheme, 2)])
