"""The levers of a model, with and without data."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx.allocation import Budget
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.layer_losses import layer_losses
from cobla_onnx.pipeline.levers import levers_of, losses_of
from cobla_onnx.pipeline.open_session import open_session
from tests.builders import random_array, small_network

SAMPLES = {"x": random_array(24, 3, 12, 12, seed=5)}


@pytest.mark.parametrize("data", [None, SAMPLES])
def test_both_has_all_curves_of_the_others_with_their_losses(data):
    settings = Settings(data=data, precision="auto", threads=1)
    with open_session(small_network(), settings, comparing=True) as session:
        constraints = session.analysis.constraints(Budget(mem=1.0))
        losses, samples = losses_of(session, constraints)
        levers = levers_of(session, losses)
    assert (samples > 0) == (data is not None)
    assert {curve.family for layer in levers["bits"].layers for curve in layer.curves} == {
        "storage"
    }
    everything = {id(curve) for layer in levers["both"].layers for curve in layer.curves}
    for name in ("ranks", "bits"):
        lever = levers[name]
        assert lever.layers
        for index, layer in enumerate(lever.layers):
            for number, curve in enumerate(layer.curves):
                assert id(curve) in everything
                found = lever.losses.curve(index, number)
                assert found.shape == curve.errors.shape
                assert (np.diff(found) <= 0).all()


def test_a_model_without_layers_has_no_losses():
    settings = Settings(exclude=["*"], precision="auto")
    with open_session(small_network(), settings, comparing=True) as session:
        assert layer_losses(session).layers == ()
