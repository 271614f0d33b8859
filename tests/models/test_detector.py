"""The repository's own detector: pixels and scores in one output, and its boxes stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.runtime.session import open_session, run_session
from tests.conftest import ROOT

DETECTOR = ROOT / "models" / "shapes_detector.onnx"


@pytest.fixture
def quality(tools):
    return tools("field_quality")


@pytest.fixture
def draw(tools):
    return tools("field_shapes").draw_scenes


def outputs(model, images: np.ndarray) -> np.ndarray:
    (found,) = run_session(open_session(model, 2), {"image": images}).values()
    return found


def test_it_finds_shapes_that_it_was_not_trained_on(quality, draw):
    scenes = draw(60, 11)
    found = outputs(onnx.load(DETECTOR), scenes.images)
    assert found.shape == (60, 8, 180)
    truth = [
        (boxes[known >= 0].astype(np.float64), known[known >= 0])
        for boxes, known in zip(scenes.boxes, scenes.labels, strict=True)
    ]
    # Measured on 500 pictures: 0.99.
    assert quality.f1_of_detections([quality.detections(x) for x in found], truth) > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.8, 0.4])
def test_boxes_stay_where_they_were(quality, draw, budget):
    result = compress(DETECTOR, Budget(mem=budget), data={"image": draw(64, 12).images})
    images = draw(60, 13).images
    before, after = (outputs(model, images) for model in (onnx.load(DETECTOR), result.model))
    assert quality.boxes(before, after)["f1"] >= 0.95
