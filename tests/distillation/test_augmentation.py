"""Variants of images are images of the same things."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx import Budget, compress
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.errors import UsageError
from tests.builders import random_array, small_network

SMALL = {"x": random_array(100, 3, 12, 12, seed=11)}


def test_what_may_vary_is_read():
    assert Augmentation.of("flip") == Augmentation(True, 0)
    assert Augmentation.of("crop:8") == Augmentation(False, 8)
    assert Augmentation.of("crop:2, flip") == Augmentation(True, 2)


@pytest.mark.parametrize("text", ["", "flip,", "crop", "crop:0", "crop:-1", "turn", "flip,flip"])
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UsageError, match="give flip, crop:N"):
        Augmentation.of(text)


@given(st.integers(0, 9), st.booleans(), st.integers(0, 4), st.booleans())
def test_pixels_come_from_where_they_are_moved_from(seed, flip, crop, last):
    """A ramp along each axis shows for every pixel where it was."""
    height, width = 7, 9
    ramp = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype("f")
    images = np.stack([ramp] * 5)
    if last:
        images = images.transpose(0, 2, 3, 1).copy()
    other = np.arange(5)
    feeds = {"x": images, "other": other}
    made = Augmentation(flip, crop).vary(feeds, np.random.default_rng(seed))
    assert made["other"] is other
    found = made["x"].transpose(0, 3, 1, 2) if last else made["x"]
    assert found.shape == (5, 2, height, width)
    padded = np.pad(ramp, [(0, 0), (crop, crop), (crop, crop)], mode="reflect")
    cuts = [
        padded[:, down : down + height, right : right + width]
        for down in range(2 * crop + 1)
        for right in range(2 * crop + 1)
    ]
    cuts += [cut[:, :, ::-1] for cut in cuts] if flip else []
    for image in found:
        assert any(np.array_equal(image, cut) for cut in cuts)


def test_all_images_of_a_sample_vary_alike():
    image = random_array(6, 3, 8, 8, seed=1)
    made = Augmentation(True, 3).vary({"a": image, "b": 2 * image}, np.random.default_rng(0))
    np.testing.assert_array_equal(made["b"], 2 * made["a"])
    assert not np.array_equal(made["a"], image)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"x": (1, 12, 24)}, "no input is of images"),
        ({"x": (1, 64, 32, 32)}, "no input is of images"),
        ({"a": (1, 3, 8, 8), "b": (1, 3, 9, 8)}, "differ in size"),
        ({"a": (1, 3, 4, 8)}, "4 x 8 pixels cannot be moved by 4"),
    ],
)
def test_inputs_that_cannot_vary_are_refused(shapes, text):
    with pytest.raises(UsageError, match=text):
        Augmentation(True, 4).images(shapes)


def test_a_result_learns_from_variants_and_repeats():
    few = {"x": SMALL["x"][:40]}
    options = {"data": few, "refit": False, "solver": "milp", "distil": 1}
    plain = compress(small_network(), Budget(mem=0.3), threads=1, **options)
    first = compress(small_network(), Budget(mem=0.3), augment="flip,crop:2", threads=1, **options)
    again = compress(small_network(), Budget(mem=0.3), augment="flip,crop:2", threads=2, **options)
    learned, without = (r.report.calibration.distillation for r in (first, plain))
    assert learned.trials[0].loss != without.trials[0].loss
    assert again.report.calibration.distillation.trials == learned.trials
    assert first.model.SerializeToString() == again.model.SerializeToString()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "give distil='auto' too"),
        ({"distil": 1, "labels": [0] * 100}, "labels would not follow the images"),
        ({"distil": 1, "augment": "crop:12"}, "12 x 12 pixels cannot be moved by 12"),
    ],
)
def test_it_is_refused_where_it_would_do_nothing_or_harm(more, text):
    with pytest.raises(UsageError, match=text):
        compress(small_network(), Budget(mem=0.5), data=SMALL, **{"augment": "flip", **more})
