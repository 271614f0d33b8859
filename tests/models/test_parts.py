"""Parts that calibration cuts out of real models: each opens, and goes on where the last ended.

Further models are looked for in the folder that COBLA_ONNX_FIELD names, see `tools/field.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store
from cobla_onnx.calibration.evaluation.incremental import OnwardProbe
from cobla_onnx.calibration.evaluation.measured_model import measured_model
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.moments import Taps
from cobla_onnx.graph.layers import Layer, find_layers, read_bias, read_weight
from cobla_onnx.graph.subgraph import expose, prefix
from cobla_onnx.pipeline.analysis import fixed_input_shapes
from cobla_onnx.pipeline.inputs import open_in_order
from cobla_onnx.runtime.session import (
    Feeds,
    open_session,
    random_feeds,
    run_session,
    runnable_feeds,
)
from tests.conftest import ROOT

# Layers of a model at which it is cut, evenly over it.
CUTS = 2


def _models() -> list[object]:
    own = sorted((ROOT / "models").glob("*.onnx"))
    folders = {
        "COBLA_ONNX_ASSETS": Path(
            os.environ.get("COBLA_ONNX_ASSETS", ROOT.parent / "shared"), "models"
        ),
        "COBLA_ONNX_FIELD": Path(os.environ.get("COBLA_ONNX_FIELD", ROOT / "field")),
    }
    found: list[object] = [pytest.param(path, id=path.stem) for path in own]
    for name, folder in folders.items():
        paths = sorted(folder.glob("*.onnx"))
        reason = f"no models in {folder}; set {name}"
        absent = pytest.param(None, id=name, marks=pytest.mark.skip(reason=reason))
        found += [pytest.param(path, id=path.stem) for path in paths] or [absent]
    return found


def _chosen(layers: Sequence[Layer]) -> list[Layer]:
    count = min(CUTS, len(layers))
    return [layers[round(i * (len(layers) - 1) / max(count - 1, 1))] for i in range(count)]


def _opened(path: Path) -> tuple[onnx.ModelProto, list[Layer], Feeds]:
    model, _ = open_in_order(path)
    session = open_session(model, 2, optimized=True)
    shapes = fixed_input_shapes(model, {})
    _, _, unknown = runnable_feeds(session, shapes, 0)
    layers = _chosen(find_layers(model).layers)
    return model, layers, random_feeds(session, shapes, 5, 1, unknown, ("0", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("path", _models())
def test_every_part_of_a_real_model_opens(path, monkeypatch):
    """None goes back to the whole model because onnxruntime does not take it."""
    refused: list[str] = []

    def refuse(model: onnx.ModelProto, part: str, text: str) -> AssertionError:
        refused.append(f"{part}: {text}")
        return AssertionError(refused[-1])

    monkeypatch.setattr("cobla_onnx.runtime.session.part_error", refuse)
    model, layers, feeds = _opened(path)
    reads = [use.data for layer in layers for use in layer.uses]
    # What all layers see.
    seen = Taps(prefix(model, reads), reads, 2).run(feeds)
    # The original and the compressed model side by side, for the refit.
    exposed = expose(model, layers, as_inputs=False)
    weights = {
        n: read_weight(model, layer) for n, layer in zip(exposed.weights, layers, strict=True)
    }
    for name, layer in zip(exposed.biases, layers, strict=True):
        bias = read_bias(model, layer)
        if name is not None and bias is not None:
            weights[name] = bias
    walks = Frontier(model, lambda: [feeds]), Frontier(exposed.model, lambda: [feeds])
    for layer in layers:
        use = layer.uses[0]
        moved = []
        for walk, wanted in zip(walks, (use.output, use.data), strict=True):
            crossing = walk.crossing(use.node)
            (batch,) = walk.batches()
            values = walk.taps([*crossing, wanted], weights, threads=2).run(batch)
            if wanted == use.data:
                size = float(np.abs(seen[wanted].astype(np.float64)).max(initial=0.0))
                np.testing.assert_allclose(values[wanted], seen[wanted], atol=0.01 * size + 1e-6)
            store = Store()
            store.put({name: values[name] for name in crossing})
            moved.append(walk.moved_to(store))
            assert set(next(moved[-1].batches())) == set(crossing)
        walks = moved[0], moved[1]
    # What is compared, from each layer on.
    measured = measured_model(model, layers, [feeds], threads=2).model
    outputs = run_session(open_session(measured, 2, optimized=True), feeds)
    floating = {n: v for n, v in outputs.items() if v.dtype.kind == "f"}
    # Random inputs saturate some outputs: relative to their variance all would be rounding.
    measures = {name: Measure("mse", None, (1.0,)) for name in floating}
    power = sum(float(np.square(v, dtype=np.float64).mean()) for v in floating.values())
    probe = Probe(measured, layers, [feeds], measures, 2)
    onward = OnwardProbe(probe, 2)
    for index, layer in enumerate(layers):
        (losses,) = onward.losses(index, [(read_weight(model, layer), None)], {})
        assert losses.max() <= 1e-4 * power + 1e-9
    assert refused == []
