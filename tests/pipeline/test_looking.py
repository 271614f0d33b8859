"""The original as data shows it: what is read from which samples, and what is said of it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cobla_onnx.calibration.data.dataset import input_specs
from cobla_onnx.calibration.data.readers import open_data
from cobla_onnx.errors import DataError
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.branches import follow
from cobla_onnx.pipeline.looking import Looking, look_through
from cobla_onnx.runtime.context import RunContext


@pytest.fixture
def samples(demo_model):
    with np.load(demo_model.parent / "digits_calibration.npz") as content:
        return {name: array[:40] for name, array in content.items()}


def looking(model: onnx.ModelProto, samples, **options) -> Looking:
    dataset = open_data(samples, input_specs(model))
    settings = Settings(data=samples, **options)
    return look_through(follow(model, dataset, 1), dataset, settings, RunContext())


def test_layers_are_seen_on_the_calibration_split_alone(demo_model, samples):
    model = onnx.load(demo_model)
    look = looking(model, samples)
    layers = follow(model, look.dataset, 1).inventory.layers
    seen = look(layers)
    calibration = len(look.dataset.calibration)
    assert 0 < calibration < 40
    moment = seen.moment(layers[0])
    # Moments count the positions of all these samples, and of no others.
    assert moment.count % calibration == 0
    assert look.compared.measures


def test_labels_that_do_not_fit_are_refused_before_any_layer_is_read(demo_model, samples):
    labels = np.full(40, 1000)
    look = looking(onnx.load(demo_model), samples, labels=labels, loss="ce")
    with pytest.raises(DataError, match="label"):
        look([])
