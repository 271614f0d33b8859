"""On how many samples layers are measured."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.sensitivity import (
    LEAST_SAMPLES,
    MANY,
    PASSES,
    PROBE_SAMPLES,
    SHAPED,
    TARGETS,
    affordable_samples,
)
from tests.builders import small_network
from tests.pipeline.search.test_network_loss import evidence_for


@given(layers=st.integers(MANY + 1, 2000), samples=st.integers(2, 100_000))
def test_samples_of_deep_models_cost_no_more_than_the_passes_that_are_stated(
    layers: int, samples: int
) -> None:
    found = affordable_samples(layers, samples)
    assert LEAST_SAMPLES <= found <= PROBE_SAMPLES
    points = SHAPED * len(TARGETS) + layers - SHAPED
    if found > LEAST_SAMPLES:
        assert found * points / 2 <= PASSES * samples
    if found < PROBE_SAMPLES:
        assert (found + 1) * points / 2 > PASSES * samples


def test_a_model_of_few_layers_is_not_measured_by_cost(monkeypatch) -> None:
    """Until it counts as one of many."""
    module = "cobla_onnx.pipeline.search.evidence"
    few = evidence_for(small_network(), 40)
    monkeypatch.setattr(f"{module}.affordable_samples", lambda layers, samples: 5)
    before = few.probe_samples
    monkeypatch.setattr(f"{module}.MANY", 2)
    many: Evidence = evidence_for(small_network(), 40)
    assert len(many.probe_samples) == 5
    assert len(before) > 5
    assert np.isin(many.probe_samples, many.dataset.calibration).all()
