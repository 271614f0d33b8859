"""Levels of weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.storage.coding import INTEGERS, fit_levels, nearest


@given(count=st.sampled_from([4, 8, 16]), size=st.integers(1, 300), seed=st.integers(0, 99))
def test_every_level_is_the_mean_of_what_is_nearest_to_it(count: int, size: int, seed: int) -> None:
    """The condition that no other levels for the same parts are better (Lloyd 1982, eq. 8)."""
    values = np.random.default_rng(seed).normal(size=size)
    levels = fit_levels(values, count)
    assert np.all(np.diff(levels) >= 0)
    codes = nearest(levels, values)
    spread = values.max() - values.min()
    for code in np.unique(codes):
        # A few dozen passes end close to a fixed point, and levels are rounded to float32.
        assert abs(values[codes == code].mean() - levels[code]) <= 0.05 * spread + 1e-6


@given(size=st.integers(1, 2000), seed=st.integers(0, 99))
def test_fitted_levels_are_better_than_even_ones(size: int, seed: int) -> None:
    values = np.random.default_rng(seed).laplace(size=size)
    fitted, even = fit_levels(values, 16), np.linspace(values.min(), values.max(), 16)
    errors = [
        np.square(levels[nearest(levels, values)] - values).sum() for levels in (fitted, even)
    ]
    assert errors[0] <= errors[1] + 1e-9


@given(seed=st.integers(0, 99), count=st.sampled_from([2, 8, 64, 100, 256]))
def test_the_nearest_level_is_found(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    levels, values = np.sort(rng.normal(size=count)), rng.normal(size=50)
    if count == len(INTEGERS):
        levels, values = INTEGERS, 100 * values
    expected = np.abs(values[:, None] - levels).min(axis=1)
    np.testing.assert_allclose(np.abs(values - levels[nearest(levels, values)]), expected)


def test_of_two_levels_as_near_the_lower_one_is_taken() -> None:
    halves = np.concatenate([np.arange(-130, 130, 0.5), [np.inf, -np.inf]]).astype(np.float32)
    found = nearest(INTEGERS, halves)
    np.testing.assert_array_equal(found, nearest(INTEGERS.copy(), halves))
    np.testing.assert_array_equal(nearest(np.arange(3.0), np.array([0.5, 1.5, 1.6])), [0, 1, 2])
