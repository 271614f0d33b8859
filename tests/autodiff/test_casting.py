"""What is done to a model before it is differentiated, and what is known of it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx.autodiff.casting import cast_model, cast_tensor
from cobla_onnx.autodiff.constants import known_values
from cobla_onnx.graph.legacy import replace_legacy
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array, small_network

node = helper.make_node


@pytest.mark.parametrize("element_type", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_a_cast_model_computes_the_same_in_its_type(element_type):
    model, cast = small_network(), small_network()
    cast_model(cast, element_type)
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    assert {t.data_type for t in cast.graph.initializer} == {element_type}
    x = random_array(2, 3, 12, 12)
    del model.opset_import[1:], cast.opset_import[1:]
    # onnxruntime has no convolution in double precision.
    (before,) = ReferenceEvaluator(model).run(None, {"x": x})
    (after,) = ReferenceEvaluator(cast).run(None, {"x": x.astype(dtype)})
    assert after.dtype == dtype
    np.testing.assert_allclose(after, before, rtol=2e-2, atol=2e-2)


def test_integers_are_not_cast():
    tensor = numpy_helper.from_array(np.arange(3), "n")
    assert cast_tensor(tensor, TensorProto.DOUBLE) == tensor


def test_sizes_computed_from_shapes_are_known_and_data_is_not():
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "one"], ["size"], axis=0),
        node("Mul", ["size", "two"], ["double"]),
        node("Relu", ["x"], ["y"]),
    ]
    weights = {"one": np.array(1), "two": np.array(2)}
    model = model_of(nodes, weights, {"x": [5, 7]}, ["y"])
    found = known_values(model, {"x": (5, 7), "size": (), "double": ()})
    assert found["double"] == 14
    assert "y" not in found


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        (node("ImageScaler", ["x"], ["y"], scale=2.0, bias=[1.0, -1.0]), lambda x: (
            2 * x + np.array([1, -1]).reshape(1, 2, 1, 1))),
        (node("Affine", ["x"], ["y"], alpha=3.0, beta=0.5), lambda x: 3 * x + 0.5),
        (node("ScaledTanh", ["x"], ["y"], alpha=2.0, beta=0.5), lambda x: 2 * np.tanh(x / 2)),
        (node("Crop", ["x"], ["y"], border=[1, 2, 0, 1]), lambda x: x[:, :, 2:-1, 1:]),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)  # fmt: skip
def test_operators_of_old_exporters_compute_what_they_meant(old, expected):
    x = random_array(2, 2, 6, 5)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [old], "g", [value("x", 1, x.shape)], [value("y", 1, expected(x).shape)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=4)
    replace_legacy(model)
    assert {n.op_type for n in model.graph.node}.isdisjoint({old.op_type})
    current = onnx.version_converter.convert_version(model, 17)
    (found,) = run_session(open_session(current, 1), {"x": x}).values()
    np.testing.assert_allclose(found, expected(x), rtol=1e-5, atol=1e-6)
