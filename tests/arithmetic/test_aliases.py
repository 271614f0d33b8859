"""Names that the quantiser would give to what it makes may be those of the model's own tensors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.arithmetic.aliases import Aliases
from cobla_onnx.arithmetic.nodes import dynamic_nodes, weighted_nodes
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.arithmetic.quantise import quantised, quantised_at_run_time
from cobla_onnx.arithmetic.ranges import METHODS, calibrated
from cobla_onnx.graph.bodies import body_graphs
from cobla_onnx.graph.opening import rename_tensors
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array


def convolutions() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "first"),
        helper.make_node("Sigmoid", ["h"], ["m"], "middle"),
        helper.make_node("Mul", ["m", "s"], ["g"], "scaled"),
        helper.make_node("Conv", ["g", "v"], ["y"], "second"),
    ]
    weights = {
        "w": random_array(6, 4, 1, 1, seed=1),
        "b": random_array(6, seed=2),
        "s": random_array(6, 1, 1, seed=3),
        "v": random_array(5, 6, 1, 1, seed=4),
    }
    return model_of(nodes, weights, {"x": [3, 4, 5, 5]}, ["y"])


def products() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("Sigmoid", ["h"], ["m"], "middle"),
        helper.make_node("Mul", ["m", "s"], ["g"], "scaled"),
        helper.make_node("Gemm", ["g", "v", "b"], ["y"], "second"),
    ]
    weights = {
        "w": random_array(4, 6, seed=1),
        "s": random_array(6, seed=3),
        "v": random_array(6, 5, seed=4),
        "b": random_array(5, seed=2),
    }
    return model_of(nodes, weights, {"x": [3, 4]}, ["y"])


def called(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """Return a copy with other names."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    rename_tensors(result.graph, names)
    return result


def samples(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    (value,) = model.graph.input
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return [{value.name: random_array(*shape, seed=seed)} for seed in range(3)]


def in_eight_bits(model: onnx.ModelProto, method: str = "min-max") -> onnx.ModelProto:
    prepared, weighted = prepare(model), weighted_nodes(model)
    found = dynamic_nodes(model, weighted)
    if found:
        return quantised_at_run_time(prepared, found)
    return quantised(prepared, calibrated(prepared, samples(model), method), weighted)


def computed(model: onnx.ModelProto) -> np.ndarray:
    (value,) = model.graph.output
    return run_session(open_session(model, 1), samples(model)[0])[value.name]


def agree(model: onnx.ModelProto, names: dict[str, str], method: str = "min-max") -> None:
    """Whatever tensors are called, the model in 8 bits computes the same, and names stay."""
    other = called(model, names)
    result = in_eight_bits(other, method)
    onnx.checker.check_model(result, full_check=True)
    np.testing.assert_array_equal(computed(result), computed(in_eight_bits(model, method)))
    for values in ("input", "output"):
        kept = [value.name for value in getattr(result.graph, values)]
        assert kept == [value.name for value in getattr(other.graph, values)]
    by_name = {node.name: node for node in result.graph.node}
    assert list(by_name["middle"].output) == list(other.graph.node[1].output)
    assert names.get("s", "s") in by_name["scaled"].input


# Of what the quantisers and calibrators of onnxruntime make.
STATIC = ["w_scale", "w_zero_point", "w_quantized", "b_quantized", "b_quantized_scale", "x_scale"]
STATIC += ["h_QuantizeLinear_Output", "h_DequantizeLinear_Output", "w_DequantizeLinear_Output"]
DYNAMIC = ["w_scale", "x_scale", "x_quantized", "h_output_quantized", "y_MatMul"]
DYNAMIC += ["x_scale_w_scale_mul"]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("own", ["s", "m"])
def test_what_is_made_takes_the_name_of_nothing(name, own):
    agree(convolutions(), {own: name})


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("own", ["s", "m"])
def test_what_is_made_for_each_run_takes_the_name_of_nothing(name, own):
    agree(products(), {own: name})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["h_ReduceMin", "h_ReduceMax", "h_ReduceMin_Reshape"])
def test_nor_does_what_calibration_makes(name, method):
    agree(convolutions(), {"m": name}, method)


ENDINGS = ["_scale", "_zero_point", "_quantized", "_QuantizeLinear_Output", ">", "<", "_MatMul"]


@st.composite
def other_names(draw):
    """Names that begin as those of other tensors do, no two alike."""
    pool = st.lists(st.sampled_from(ENDINGS), max_size=3).map("".join)
    starts = st.sampled_from(["x", "w", "h", "y", "<w>", "v"])
    names = draw(
        st.lists(st.builds(str.__add__, starts, pool), min_size=9, max_size=9, unique=True)
    )
    return dict(zip(["x", "w", "b", "h", "s", "m", "g", "v", "y"], names, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([convolutions, products]), other_names())
def test_no_names_change_what_is_computed(make, names):
    agree(make(), names)


def test_names_are_given_back_in_bodies_too():
    """A body reads a tensor outside, and has one that is called as the quantiser's would be."""
    value = helper.make_tensor_value_info("w_scale", onnx.TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["w_scale"])], "then_branch", [], [value]
    )
    model = convolutions()
    node = helper.make_node("If", ["yes"], ["m"], "middle", then_branch=body, else_branch=body)
    model.graph.node[1].CopyFrom(node)
    yes = model.graph.initializer.add()
    yes.CopyFrom(onnx.numpy_helper.from_array(np.array(True), "yes"))
    result = in_eight_bits(model)
    inner = [list(n.input) for graph in body_graphs(result.graph.node) for n in graph.node]
    assert inner == [["h"], ["h"]]
    assert any(tensor.name == "w_scale_2" for tensor in result.graph.initializer)
    error = np.linalg.norm(computed(result) - computed(model))
    assert error < 0.05 * np.linalg.norm(computed(model))


def test_aliases_are_the_model_again_when_they_are_taken_back():
    model = convolutions()
    before = model.SerializeToString()
    aliases = Aliases.of(model)
    aliases.give(model)
    assert model.graph.node[0].input[1] == "<w>"
    aliases.take_back(model)
    assert model.SerializeToString() == before
