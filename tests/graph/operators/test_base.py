"""What every operator says of itself, against what onnxruntime gives for its nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.graph.inventory import Layer, Refusal
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.macs import infer_shapes
from cobla_onnx.graph.operators.base import (
    OPERATORS,
    elements,
    operator_names,
    operator_of,
    operators_of_node,
    register,
)
from cobla_onnx.graph.operators.convolution import Convolution
from cobla_onnx.graph.operators.patches import ReadPatch
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array
from tests.graph.operators.cases import Case, convolutions, products, transposed_convolutions

KINDS = {
    "convolution": convolutions(),
    "transposed convolution": transposed_convolutions(),
    "product": products(),
}
of_each_kind = pytest.mark.parametrize("kind", KINDS)


def model_for(case: Case, weight: np.ndarray) -> onnx.ModelProto:
    return model_of([case.node], {"w": weight}, {"x": list(case.data)}, ["y"])


def computed(case: Case) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What onnxruntime makes of data and weight."""
    inputs: dict[str, list[int | str]] = {name: list(s) for name, s in case.shapes.items()}
    session = open_session(model_of([case.node], {}, inputs, ["y"]), 1)
    return lambda data, weight: np.asarray(run_session(session, {"x": data, "w": weight})["y"])


def layer_of(model: onnx.ModelProto) -> Layer | None:
    """The layer; None where there is none."""
    return next(iter(find_layers(model).layers), None)


def patch_for(model: onnx.ModelProto, layer: Layer) -> ReadPatch:
    found = operator_of(layer).patch(model.graph.node[0], layer, layer.uses[0])
    assert not isinstance(found, Refusal)
    return found


@of_each_kind
@settings(max_examples=25)
@given(st.data())
def test_each_mac_adds_a_one_to_the_output_for_data_and_weights_of_ones(kind, draws):
    case = draws.draw(KINDS[kind])
    ones = {name: np.ones(shape, np.float32) for name, shape in case.shapes.items()}
    model = model_for(case, ones["w"])
    (operator,) = operators_of_node(case.node)
    macs = operator.macs(case.node, infer_shapes(model, {}))
    total = int(computed(case)(ones["x"], ones["w"]).sum())
    # What lies beyond an edge is multiplied, and does not show.
    assert macs == total or (case.cropped and macs is not None and macs > total)
    assert operator.macs(case.node, {}) is None


@settings(max_examples=60)
@given(st.one_of(convolutions(), products()))
def test_macs_are_those_of_the_vectors(case):
    """Also where a convolution reads past an edge."""
    weight = np.ones(case.weight, np.float32)
    model = model_for(case, weight)
    layer = layer_of(model)
    if layer is None:
        return
    patch = patch_for(model, layer)
    outputs = layer.params // (patch.groups * patch.size)
    vectors = patch.groups * patch.positions(np.ones(case.data, np.float32))
    operator = operator_of(layer)
    assert operator.macs(case.node, infer_shapes(model, {})) == vectors * patch.size * outputs


@of_each_kind
@settings(max_examples=40)
@given(st.data())
def test_a_weight_changes_one_output_along_the_axis_of_the_outputs(kind, draws):
    case = draws.draw(KINDS[kind])
    weight = random_array(*case.weight, seed=1)
    model = model_for(case, weight)
    layer = layer_of(model)
    found = None if layer is None else operator_of(layer).output_axis(layer)
    if found is None:
        return
    data = random_array(*case.data, seed=2)
    run = computed(case)
    before = run(data, weight)
    assert before.shape[found.axis] == found.size
    seen = set()
    for place in np.ndindex(*case.weight):
        changed = weight.copy()
        changed[place] += 1
        others = tuple(i for i in range(before.ndim) if i != found.axis % before.ndim)
        moved = np.flatnonzero((run(data, changed) != before).any(axis=others))
        # A weight that only ever meets what is past an edge changes nothing.
        assert len(moved) <= 1
        seen.update(moved.tolist())
    assert case.cropped or seen == set(range(found.size))


@of_each_kind
@settings(max_examples=25)
@given(st.data())
def test_chosen_vectors_and_phases_are_those_of_all(kind, draws):
    case = draws.draw(KINDS[kind])
    model = model_for(case, random_array(*case.weight))
    layer = layer_of(model)
    if layer is None:
        return
    patch, data = patch_for(model, layer), random_array(*case.data, seed=3)
    every = np.concatenate(list(patch.vectors(data)), axis=2)
    assert every.shape == (patch.groups, patch.size, patch.positions(data))
    assert (patch.parts is None) == (patch.phases(data) is None)
    some = np.arange(every.shape[2])[::3]
    np.testing.assert_array_equal(
        np.concatenate(list(patch.vectors(data, some)), axis=2), every[:, :, some]
    )
    phases, parts = patch.phases(data), patch.parts
    if phases is None or parts is None:
        return
    np.testing.assert_array_equal(patch.phases(data, some), phases[some])
    assert sorted(np.concatenate(parts).tolist()) == list(range(patch.size))
    for vector, phase in zip(every[0].T, phases, strict=True):
        assert set(np.flatnonzero(vector).tolist()) <= set(parts[phase].tolist())


def test_an_operator_is_found_by_type_and_domain():
    assert operators_of_node(helper.make_node("Conv", ["x", "w"], ["y"])) == OPERATORS["Conv"]
    own = helper.make_node("Conv", ["x", "w"], ["y"], domain="ai.onnx")
    assert operators_of_node(own) == OPERATORS["Conv"]
    other = helper.make_node("Conv", ["x", "w"], ["y"], domain="somebody.own")
    assert operators_of_node(other) == ()
    assert operators_of_node(helper.make_node("Relu", ["x"], ["y"])) == ()


def test_an_input_of_a_type_belongs_to_one_operator():
    before = dict(OPERATORS)
    with pytest.raises(ValueError, match="Conv is registered already"):
        register(Convolution())
    assert before == OPERATORS


def test_operators_have_kinds_of_their_own_and_are_listed():
    every = {operator for operators in OPERATORS.values() for operator in operators}
    assert len({operator.kind for operator in every}) == len(every)
    assert operator_names() == "Conv, ConvTranspose, Gemm, MatMul, Gather, LSTM, GRU and RNN"


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 9) | st.none())))
def test_elements_of_shapes(shapes):
    sizes = [size for shape in shapes for size in shape]
    expected = None if None in sizes else int(np.prod(sizes, dtype=object))
    assert elements(*shapes) == expected
    assert elements(*shapes, None) is None
