"""What a report names and leaves alone: outputs that tensors stand for, biases of infinity."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress
from tests.builders import model_of, random_array

DATA = {"x": random_array(40, 16, seed=9)}


def network(bias: np.ndarray, last: str) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], "fc1"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2", "b"], ["scores"], "fc2"),
        helper.make_node(last, ["scores"], ["answer"], "last"),
    ]
    weights = {"w1": random_array(16, 32), "w2": random_array(32, 10, seed=1), "b": bias}
    model = model_of(nodes, weights, {"x": ["N", 16]}, ["answer"])
    if last == "ArgMax":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def test_quality_is_of_the_output_and_not_of_the_tensor_before_it() -> None:
    result = compress(network(np.zeros(10, np.float32), "ArgMax"), Budget(mem=0.7), data=DATA)
    assert result.report.calibration is not None
    assert result.report.calibration.quality.output == "answer"


def test_a_bias_of_minus_infinity_is_left_as_it_is() -> None:
    bias = np.zeros(10, np.float32)
    bias[3] = -np.inf
    result = compress(network(bias, "Identity"), Budget(mem=0.7), data=DATA)
    assert result.report.budget["mem"].reached <= 0.7
    stored = {t.name: t for t in result.model.graph.initializer}
    np.testing.assert_array_equal(np.frombuffer(stored["b"].raw_data, np.float32), bias)
