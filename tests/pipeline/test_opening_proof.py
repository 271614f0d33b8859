"""A model whose functions were opened wrongly is refused before anything is written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.errors import VerificationError
from cobla_onnx.graph import inlining
from cobla_onnx.graph.duplicates import Deduplicated
from cobla_onnx.pipeline import open_session as opening
from cobla_onnx.pipeline.opening_proof import prove_opening
from tests.builders import model_of, random_array, small_network
from tests.graph.test_inlining import twice

SAMPLES = [{"x": random_array(2, 24, seed=seed), "c": np.array(True)} for seed in range(24)]


@pytest.mark.parametrize("data", [None, SAMPLES])
def test_what_the_opened_model_computes_is_compared_with_the_file(monkeypatch, data):
    monkeypatch.setattr(inlining, "_state_defaults", lambda model: None)
    with pytest.raises(VerificationError, match=r"'y' is another once .* opened"):
        compress(twice(), Budget(mem=0.6), threads=1, precision=(8,), data=data)


def test_constants_that_are_stored_once_are_compared_with_the_file(monkeypatch):
    def wrong(model: onnx.ModelProto) -> Deduplicated:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        weight = changed.graph.initializer[0]
        twice = 2 * onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(twice, weight.name))
        return Deduplicated(changed, 1, twice.nbytes)

    monkeypatch.setattr(opening, "deduplicated", wrong)
    for mem in (0.6, 1.0):
        with pytest.raises(VerificationError, match=r"stored once; .* deduplicate=False"):
            compress(small_network(), Budget(mem=mem), threads=1)


def test_what_differs_from_run_to_run_tells_nothing():
    model = small_network()
    node = model.graph.node.add(
        op_type="RandomNormalLike", input=[model.graph.output[0].name], output=["noise"]
    )
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[1].name = node.output[0]
    prove_opening(model, model, {"x": (1, 3, 12, 12)}, None, 0, 1)


@pytest.mark.parametrize(
    ("kind", "less", "more"),
    [(np.float16, 4e-3, 0.1), (np.float32, 2e-5, 1e-3), (np.float64, 1e-11, 1e-6)],
)
def test_sums_in_another_order_may_differ_by_as_much_as_their_type_rounds(kind, less, more):
    def scaled(factor: float) -> onnx.ModelProto:
        made = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        node = onnx.helper.make_node("Mul", ["x", "factor"], ["y"])
        return model_of(
            [node], {"factor": np.array(factor, kind)}, {"x": [64]}, ["y"], elem_type=made
        )

    prove_opening(scaled(1.0), scaled(1.0 + less), {"x": (64,)}, None, 0, 1)
    with pytest.raises(VerificationError):
        prove_opening(scaled(1.0), scaled(1.0 + more), {"x": (64,)}, None, 0, 1)
