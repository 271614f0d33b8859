"""Factors from moments of any rank: finite, and as good as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.calibration.sums import MomentSum
from cobla_onnx.variants.low_rank.matricisation import ConvScheme
from cobla_onnx.variants.low_rank.shrinkage import FLOOR, shrink
from cobla_onnx.variants.low_rank.weighted_svd import WeightedFactorizer

SCHEMES = (
    ConvScheme("channel", (7, 4, 3, 3), 1, (0, 1)),
    ConvScheme("input", (7, 4, 3, 3), 1, ()),
    ConvScheme("spatial-hw", (7, 4, 3, 3), 1, (0,)),
    ConvScheme("matrix", (40, 12, 1, 1), 1, (0, 1)),
)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from([1, 2, 3, 10, 100]),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_errors_are_those_under_the_drawn_moment(scheme, count, rank, equal, weighted, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(scheme.shape)
    rows = scheme.rows_of(weight)
    size = rows.shape[2]
    vectors = rng.standard_normal((size, min(rank, size))) @ rng.standard_normal(
        (min(rank, size), count)
    )
    vectors = vectors.astype(np.float32)
    if equal:
        vectors[1] = vectors[0]
        vectors[2] = 0
    total = MomentSum(1, size)
    total.add(vectors[None])
    moment = total.moment()
    drawn, shares = shrink(moment.second, moment.effective, moment.mean)
    assert (shares >= FLOOR).all()
    assert (shares <= 1).all()
    full = min(scheme.matrix_shape()[1:])
    importance = np.exp(3 * rng.standard_normal(rows.shape[0] * rows.shape[1]))
    roots = np.sqrt(importance if weighted else np.ones_like(importance)).reshape(rows.shape[:2])
    found = WeightedFactorizer(scheme, weight, drawn, full, importance if weighted else None)
    errors = found.errors(np.arange(full + 1))
    assert (np.diff(errors) <= 1e-9 * found.energy).all()
    silent = not moment.second.any()
    under = np.eye(size)[None] if silent else drawn
    for wanted in {1, full // 2, full}:
        factors = found.factorize(wanted)
        lost = rows - scheme.rows_of(scheme.weight(factors.left @ factors.right))
        assert np.isfinite(lost).all()
        lost *= roots[:, :, None]
        measured = np.einsum("gos,gst,got->", lost, under, lost)
        assert measured == pytest.approx(errors[wanted], rel=1e-6, abs=1e-8 * found.energy)
        if not silent:
            level = np.trace(moment.second[0]) / size
            seen = np.einsum("gos,gst,got->", lost, moment.second, lost)
            both = (1 - shares[0]) * seen + shares[0] * level * np.sum(lost**2)
            assert measured == pytest.approx(both, rel=1e-6, abs=1e-8 * found.energy)


def test_the_prior_vanishes_with_samples_and_is_all_without():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((20, 20)) * np.exp(-np.arange(20) / 3)
    shares = []
    for count in (1, 10, 100, 10000):
        total = MomentSum(1, 20)
        total.add((mixing @ rng.standard_normal((20, count)))[None])
        moment = total.moment()
        shares.append(float(shrink(moment.second, moment.effective, moment.mean)[1][0]))
    assert shares[0] == 1
    assert shares[3] < 0.001
    assert sorted(shares, reverse=True) == shares


def test_repeated_samples_are_worth_one():
    one = np.random.default_rng(0).standard_normal((1, 5, 1))
    total = MomentSum(1, 5)
    total.add(np.repeat(one, 12, axis=2))
    assert total.moment().effective == 0
