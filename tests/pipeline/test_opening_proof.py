"""A model whose functions were opened wrongly is refused before anything is written."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.errors import VerificationError
from cobla_onnx.graph import inlining
from cobla_onnx.pipeline.opening_proof import prove_opening
from tests.builders import random_array, small_network
from tests.graph.test_inlining import twice

SAMPLES = [{"x": random_array(2, 24, seed=seed), "c": np.array(True)} for seed in range(24)]


@pytest.mark.parametrize("data", [None, SAMPLES])
def test_what_the_opened_model_computes_is_compared_with_the_file(monkeypatch, data):
    monkeypatch.setattr(inlining, "_state_defaults", lambda model: None)
    with pytest.raises(VerificationError, match=r"'y' is another once .* opened"):
        compress(twice(), Budget(mem=0.6), threads=1, precision=(8,), data=data)


def test_what_differs_from_run_to_run_tells_nothing():
    model = small_network()
    node = model.graph.node.add(
        op_type="RandomNormalLike", input=[model.graph.output[0].name], output=["noise"]
    )
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[1].name = node.output[0]
    prove_opening(model, model, {"x": (1, 3, 12, 12)}, None, 0, 1)
