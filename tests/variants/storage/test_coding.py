"""Levels of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

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
    levels: NDArray[Any] = np.sort(rng.normal(size=count))
    values = rng.normal(size=50)
    if count == len(INTEGERS):
        levels, values = INTEGERS, 100 * values
    expected = np.abs(values[:, None] - levels).min(axis=1)
    np.testing.assert_allclose(np.abs(values - levels[nearest(levels, values)]), expected)


@given(
    count=st.sampled_from([4, 16, 64]),
    different=st.integers(1, 64),
    spread=st.sampled_from([1e-38, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 999),
)
def test_a_table_finds_what_a_search_finds(
    count: int, different: int, spread: float, seed: int
) -> None:
    """Of levels that are the same, or crowded; at middles and beside them, and far away."""
    rng = np.random.default_rng(seed)
    some = (rng.normal(size=different) ** 5 * spread).astype(np.float32)
    levels = np.sort(rng.choice(some, count))
    middles = (levels[1:] + levels[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf)]
    far = np.array([-np.inf, np.inf, -3e38, 3e38, 0.0], np.float32)
    values = np.concatenate([some, middles, *beside, far])
    with np.errstate(over="ignore"):
        found = nearest(levels, values)
    np.testing.assert_array_equal(found, middles.searchsorted(values))


@pytest.mark.parametrize("levels", [INTEGERS, np.arange(4.0)])
def test_what_is_no_number_has_some_level(levels: np.ndarray) -> None:
    found = nearest(levels, np.array([np.nan, 1.0]))
    assert 0 <= found[0] < len(levels)
    assert levels[found[1]] == 1.0


def test_of_two_levels_as_near_the_lower_one_is_taken() -> None:
    halves = np.concatenate([np.arange(-130, 130, 0.5), [np.inf, -np.inf]]).astype(np.float32)
    found = nearest(INTEGERS, halves)
    np.testing.assert_array_equal(found, nearest(INTEGERS.copy(), halves))
    np.testing.assert_array_equal(nearest(np.arange(3.0), np.array([0.5, 1.5, 1.6])), [0, 1, 2])
