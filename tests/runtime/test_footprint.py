"""What a session holds as constants, against the graph that onnxruntime writes itself."""

from __future__ import annotations

import math

import onnx
import onnxruntime
import pytest

from cobla_onnx import Plan, compress
from cobla_onnx.plan import Decision
from cobla_onnx.runtime import footprint
from cobla_onnx.runtime.footprint import constants_in_session
from tests.builders import small_network

WEIGHTS = 4


def held(path, folder) -> int:
    """Bytes of floating initializers in the graph after onnxruntime's basic optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "seen.onnx")
    onnxruntime.InferenceSession(path, options)
    found = onnx.load(folder / "seen.onnx").graph.initializer
    return sum(WEIGHTS * math.prod(t.dims) for t in found if t.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("ir_version", [7, 8])
@pytest.mark.parametrize(
    "decisions",
    [
        (Decision("conv2", "channel", 2),),
        (Decision("conv2", "stored", 3), Decision("fc", "stored", 16)),
        (Decision("conv2", "channel", 2), Decision("fc", "stored", 8)),
    ],
)
def test_constants_are_those_of_the_optimised_graph(decisions, ir_version, tmp_path):
    model = small_network()
    model.ir_version = ir_version
    result = compress(model, plan=Plan(decisions), threads=1)
    result.save(tmp_path / "small.onnx")
    sizes = result.report.sizes
    assert sizes.session.after == held(tmp_path / "small.onnx", tmp_path)
    assert sizes.session.before == constants_in_session(model, 1)
    if all(d.scheme == "stored" for d in decisions):
        # Decoded they are what they were, whatever the file has.
        assert sizes.session.after == sizes.session.before
        assert result.report.budget["mem"].after < 0.9 * sizes.session.after
    else:
        assert sizes.session.after < sizes.session.before


def test_what_is_too_large_is_not_measured(monkeypatch):
    monkeypatch.setattr(footprint, "MEASURED", 100)
    assert constants_in_session(small_network(), 1) is None


def test_numbers_of_large_weights_do_not_matter(monkeypatch):
    model = small_network()
    plans = [
        (),
        (Decision("conv2", "channel", 2),),
        (Decision("conv2", "stored", 3), Decision("fc", "stored", 8)),
    ]
    models = [compress(model, plan=Plan(plan), threads=1).model for plan in plans]
    real = [constants_in_session(each, 1) for each in models]
    monkeypatch.setattr(footprint, "LARGE", 64)
    assert [constants_in_session(each, 1) for each in models] == real
    assert len(set(real)) == 2
