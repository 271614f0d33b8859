"""Gains over paired samples, against scipy's test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from cobla_onnx.allocation.paired import paired_gain


@given(st.integers(0, 10_000), st.integers(2, 60), st.floats(-1, 1))
def test_a_gain_in_standard_errors_is_the_statistic_of_the_paired_test(seed, count, shift):
    generator = np.random.default_rng(seed)
    before = generator.exponential(size=count)
    after = before - shift + generator.normal(size=count)
    gain = paired_gain(before, after)
    expected = ttest_rel(before, after)
    assert gain.mean == pytest.approx((before - after).mean())
    assert gain.in_errors == pytest.approx(expected.statistic)


def test_what_cannot_be_told_is_no_gain():
    one, same, worst = np.array([1.0]), np.ones(9), np.full(9, np.inf)
    assert paired_gain(one, one - 0.5).in_errors == 0
    assert paired_gain(one, one - 0.5).mean == 0.5
    assert paired_gain(same, same).in_errors == 0
    assert paired_gain(worst, worst).in_errors == 0
    assert paired_gain(same, worst).in_errors < -100
    assert paired_gain(worst, same).in_errors > 100
    assert paired_gain(same, same - 0.5).in_errors > 100
