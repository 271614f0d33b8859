"""Which axis of an output holds its features."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.calibration.evaluation.slices import Slices


def axis_of(values: np.ndarray) -> int | None:
    slices = Slices(values.dtype)
    slices.add(values)
    return slices.feature_axis()


def test_columns_of_a_map_are_no_features():
    """Pages with an empty margin: by its columns, all of the loss would lie there."""
    page = np.zeros((6, 1, 20, 30), np.float32)
    rng = np.random.default_rng(0)
    page[..., 5:25] = rng.uniform(size=(6, 1, 20, 20))
    page[..., :5] = 1e-4 * rng.uniform(size=(6, 1, 20, 5))
    assert axis_of(page) is None


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 6, 40), 1), ((8, 40, 6), 2), ((8, 6, 9, 9), 1), ((8, 6), 1)]
)
@given(seed=st.integers(0, 20))
def test_features_of_different_size_are_found(shape, axis, seed):
    values = np.random.default_rng(seed).normal(size=shape)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    scale = np.geomspace(1e-3, 100, shape[axis]).reshape(sizes)
    assert axis_of(values * scale) == axis


@given(split=st.integers(1, 7), seed=st.integers(0, 20))
def test_sums_do_not_depend_on_the_batches(split, seed):
    values = np.random.default_rng(seed).normal(size=(8, 3, 5)) + 2.0
    whole, parts = Slices(values.dtype), Slices(values.dtype)
    whole.add(values, values * 1.1)
    for part in np.split(values, [split]):
        parts.add(part, part * 1.1)
    np.testing.assert_allclose(whole.scale(1), parts.scale(1))
    np.testing.assert_allclose(whole.relative_errors(1), parts.relative_errors(1))


@pytest.mark.parametrize("shapes", [[(4, 6, 8), (4, 6), (4, 6, 8)], [(4, 6), (4,), (4, 6)]])
def test_outputs_of_another_number_of_axes_have_no_features(shapes):
    """As elements of a sequence may be."""
    slices = Slices(np.dtype(np.float32))
    for shape in shapes:
        slices.add(np.ones(shape, np.float32))
    assert slices.feature_axis() is None
    assert slices.whole.count == sum(map(np.prod, shapes))
