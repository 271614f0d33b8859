"""Which shapes follow from the data: against what runs of the model show."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx.graph.macs import infer_shapes
from cobla_onnx.graph.varying import varying_tensors
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of

NODE = helper.make_node
CONSTANTS = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "half": np.array(0.5, np.float32),
    "cut": np.array([2]),
}


def single(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    model = model_of(list(nodes), CONSTANTS, {"x": [4, 6]}, [nodes[-1].output[0]], opset=18)
    # Of no type: some are of integers.
    model.graph.output[0].ClearField("type")
    return model


SELECTED = single(
    NODE("Greater", ["x", "half"], ["mask"]),
    NODE("NonZero", ["mask"], ["places"]),
    NODE("Transpose", ["places"], ["turned"]),
    NODE("GatherND", ["x", "turned"], ["y"]),
)
COUNTED = single(
    NODE("Greater", ["x", "half"], ["mask"]),
    NODE("Cast", ["mask"], ["ones"], to=TensorProto.INT64),
    NODE("ReduceSum", ["ones", "one"], ["counts"]),
    NODE("ReduceMax", ["counts", "zero"], ["most"], keepdims=0),
    NODE("TopK", ["x", "most"], ["y", "where"]),
)
# What exporters write for a range: the places of as many ones as an axis is long.
RANGE = single(
    NODE("Shape", ["x"], ["size"]),
    NODE("ConstantOfShape", ["size"], ["ones"], value=helper.make_tensor("", 7, [1], [1])),
    NODE("NonZero", ["ones"], ["y"]),
)
SCATTERED = single(
    NODE("Greater", ["x", "half"], ["mask"]),
    NODE("NonZero", ["mask"], ["places"]),
    NODE("Transpose", ["places"], ["turned"]),
    NODE("GatherND", ["x", "turned"], ["taken"]),
    NODE("Neg", ["taken"], ["turned back"]),
    NODE("ScatterND", ["x", "turned", "turned back"], ["y"]),
)
SHAPED = single(
    NODE("Greater", ["x", "half"], ["mask"]),
    NODE("NonZero", ["mask"], ["places"]),
    NODE("Shape", ["places"], ["y"]),
)


@pytest.mark.parametrize(
    ("model", "certain", "possible"),
    [
        (SELECTED, True, False),
        (COUNTED, False, True),
        (RANGE, False, False),
        (SCATTERED, False, False),
        (SHAPED, False, False),
    ],
    ids=["selected", "counted", "range", "scattered", "shape of it"],
)
def test_shapes_that_follow_from_data(model, certain, possible):
    found = varying_tensors(model, infer_shapes(model, {"x": (4, 6)}))
    assert ("y" in found.certain, "y" in found.possible) == (certain, possible)


def test_the_node_that_makes_it_so_is_named():
    found = varying_tensors(SELECTED)
    assert {found.cause(name) for name in ("places", "turned", "y")} == {1}
    assert found.cause("mask") is None


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([SELECTED, COUNTED, RANGE, SCATTERED, SHAPED]), st.integers(0, 10**6))
def test_no_other_shape_changes_with_the_data(model, seed):
    """What is not found to follow from the data has the same shape for any data."""
    names = list(dict.fromkeys(name for node in model.graph.node for name in node.output))
    session = open_session(model, 1, names)
    generator = np.random.default_rng(seed)
    runs = [
        run_session(session, {"x": generator.uniform(-1, 2, (4, 6)).astype(np.float32)})
        for _ in range(2)
    ]
    found = varying_tensors(model, infer_shapes(model, {"x": (4, 6)}))
    changed = {name for name in names if runs[0][name].shape != runs[1][name].shape}
    assert changed <= found.certain.keys() | found.possible.keys()
