"""Errors that make up for each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.variants.storage.coding import INTEGERS, NearestLevel
from cobla_onnx.variants.storage.compensation import BLOCK, Compensation
from tests.variants.storage.test_rounding import correlated

SIZES = st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])


@settings(deadline=None, max_examples=30)
@given(
    size=SIZES,
    groups=st.integers(1, 3),
    outputs=st.integers(1, 5),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 999),
)
def test_what_is_lost_becomes_known_while_columns_are_rounded(
    size: int, groups: int, outputs: int, scale: float, seed: int
) -> None:
    """For moments of any size: errors are relative to the energy of an input."""
    rng = np.random.default_rng(seed)
    inputs = Compensation(scale * correlated(rng, groups, size))
    columns = inputs.columns(3.0 * rng.normal(size=(groups, outputs, size)))
    levels = np.sort(rng.normal(size=8)).astype(np.float32)
    codes, lost = inputs.codes(NearestLevel(levels), columns)
    stated = inputs.errors(levels[codes] - columns)
    np.testing.assert_allclose(lost, stated, rtol=2e-4, atol=1e-5 * lost.max())


@settings(deadline=None, max_examples=30)
@given(size=SIZES, groups=st.integers(1, 3), seed=st.integers(0, 999))
def test_no_weight_that_moves_makes_a_row_worse(size: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = Compensation(correlated(rng, groups, size))
    columns = inputs.columns(20.0 * rng.normal(size=(groups, 4, size)))
    start = rng.integers(90, 166, columns.shape).astype(np.uint8)
    moved = inputs.descended(NearestLevel(INTEGERS), start, columns)
    before, after = (inputs.errors(INTEGERS[codes] - columns) for codes in (start, moved))
    assert np.all(after <= before * (1 + 1e-5) + 1e-5)


@given(size=st.integers(1, 9), groups=st.integers(1, 3), seed=st.integers(0, 999))
def test_columns_return_to_their_places(size: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = Compensation(correlated(rng, groups, size))
    codes = rng.integers(0, 256, (groups, 4, size)).astype(np.uint8)
    np.testing.assert_array_equal(inputs.rows(inputs.columns(codes).astype(np.uint8)), codes)


@pytest.mark.parametrize("size", [3, 40])
def test_columns_of_most_energy_come_first(size: int) -> None:
    inputs = Compensation(correlated(np.random.default_rng(0), 2, size))
    assert np.all(np.diff(inputs.energies, axis=0) <= 1e-6)
    np.testing.assert_allclose(inputs.energies.mean(axis=0), 1.0, rtol=1e-5)


def test_its_bytes_are_those_of_its_arrays() -> None:
    inputs = Compensation(correlated(np.random.default_rng(0), 2, 5))
    arrays = [each for each in vars(inputs).values() if each.dtype == np.float32]
    assert inputs.nbytes == sum(each.nbytes for each in arrays) == Compensation.size_of(2, 5)
