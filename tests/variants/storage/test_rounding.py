"""Rounding under a second moment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.variants.storage.compensation import DAMPING, Compensation, unavoidable
from cobla_onnx.variants.storage.rounding import (
    distortion,
    mean_squares,
    output_error,
    round_weight,
)

BITS = st.sampled_from([2, 3, 4, 5, 6, 8])


def correlated(rng: np.random.Generator, groups: int, size: int) -> np.ndarray:
    """Second moment of inputs of which a few directions have most of the energy."""
    mixed = rng.normal(size=(groups, size, size)) * np.geomspace(3.0, 0.2, size)
    return mixed @ mixed.swapaxes(1, 2) / size


@settings(deadline=None, max_examples=40)
@given(
    bits=BITS,
    groups=st.integers(1, 3),
    outputs=st.integers(1, 6),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_rounding_together_is_no_worse_than_one_by_one(
    bits: int, groups: int, outputs: int, size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, outputs, size)).astype(np.float32)
    second = correlated(rng, groups, size)
    together, alone = round_weight(rows, Compensation(second), bits), round_weight(rows, None, bits)
    # The damping lets it prefer a little less error of the weights.
    slack = 0.002 * np.einsum("gii->", second) / size * output_error(alone, rows, None).sum()
    better = output_error(together, rows, second).sum()
    assert better <= output_error(alone, rows, second).sum() + slack


@given(bits=BITS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_the_stated_error_is_that_of_the_outputs(bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2, 12, 50)) * np.linspace(0.1, 2, 12)[:, None]
    rows = rng.normal(size=(2, 3, 12)).astype(np.float32)
    second = inputs @ inputs.swapaxes(1, 2) / 50
    coded = round_weight(rows, Compensation(second), bits)
    outputs = (coded.dense().astype(np.float64) - rows) @ inputs
    measured = np.square(outputs).mean(axis=2)
    np.testing.assert_allclose(output_error(coded, rows, second), measured, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_more_bits_leave_less(bits: int) -> None:
    rng = np.random.default_rng(0)
    rows, second = rng.normal(size=(1, 16, 64)), correlated(rng, 1, 64)
    errors = [
        output_error(round_weight(rows, Compensation(second), b), rows, second).sum()
        for b in (bits, 3)
    ]
    assert (errors[0] < errors[1]) == (bits > 3)
    # About 6 dB for every bit.
    energy = np.einsum("gos,gst,got->", rows, second, rows)
    assert errors[0] / energy < 0.7 * 4.0**-bits * 2


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rows_of_zeros_and_inputs_of_zeros(bits: int) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 3, 10)).astype(np.float32)
    rows[0, 1] = 0.0
    rows[1] = 0.0
    second = np.zeros((2, 10, 10))
    second[0, :4, :4] = np.eye(4)
    for moment in (second, np.zeros_like(second), None):
        inputs = None if moment is None else Compensation(moment)
        dense = round_weight(rows, inputs, bits).dense()
        assert np.isfinite(dense).all()
        assert not dense[0, 1].any()
        assert not dense[1].any()


def test_few_values_are_kept_exactly() -> None:
    rows = np.random.default_rng(0).choice([-0.5, 0.0, 0.25, 1.0], (1, 4, 9)).astype(np.float32)
    coded = round_weight(rows, None, 2)
    assert coded.bits == 2
    assert float(output_error(coded, rows, None).max()) < 0.2


@settings(deadline=None, max_examples=20)
@given(bits=BITS, seed=st.integers(0, 99))
def test_groups_are_rounded_by_themselves(bits: int, seed: int) -> None:
    """With given levels; those of the layer are fitted to all groups."""
    rng = np.random.default_rng(seed)
    rows, second = rng.normal(size=(1, 3, 12)), correlated(rng, 1, 12)
    one = round_weight(rows, Compensation(second), bits)
    both = round_weight(
        np.repeat(rows, 2, axis=0), Compensation(np.repeat(second, 2, axis=0)), bits
    )
    np.testing.assert_array_equal(both.codes[0], both.codes[1])
    assert one.codes.shape == both.codes[:1].shape


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_known_before_rounding(bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, second = rng.normal(size=(2, 30, 64)), correlated(rng, 2, 64)
    expected = distortion(rows, bits) * (mean_squares(rows) * unavoidable(second)[:, None]).sum()
    found = output_error(round_weight(rows, Compensation(second), bits), rows, second).sum()
    assert found == pytest.approx(expected, rel=0.25)
    # Most of it is made up for: inputs are correlated.
    assert found < 0.7 * output_error(round_weight(rows, None, bits), rows, second).sum()


@given(seed=st.integers(0, 2**31))
def test_what_no_other_input_makes_up_for_follows_from_the_inverse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(2, 12, 40)) * rng.uniform(0.1, 3.0, (2, 12, 1))
    second = vectors @ vectors.swapaxes(1, 2) / 40
    damped = second + DAMPING * (np.einsum("gii->g", second) / 12)[:, None, None] * np.eye(12)
    expected = []
    for matrix in damped:
        order = np.argsort(-np.diag(matrix), kind="stable")
        # The energy of an input given those that come later.
        rest = [matrix[np.ix_(order[j:], order[j:])] for j in range(12)]
        expected.append(sum(1 / np.linalg.inv(its)[0, 0] for its in rest))
    np.testing.assert_allclose(unavoidable(second), expected, rtol=1e-8)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_rows_below_the_normal_numbers_are_zeros(bits: int) -> None:
    """Processors multiply such numbers a hundred times slower."""
    rows = np.random.default_rng(0).normal(size=(1, 6, 20)).astype(np.float32)
    rows[0, 2] *= np.float32(1e-42)
    moment = Compensation(np.eye(20)[None])
    for inputs in (moment, None):
        dense = round_weight(rows, inputs, bits).dense()
        assert not dense[0, 2].any()
        assert np.abs(dense[dense != 0]).min() > np.finfo(np.float32).tiny
        others = [0, 1, 3, 4, 5]
        assert np.abs(dense[0, others] - rows[0, others]).max() < 2.0**-bits * 8
