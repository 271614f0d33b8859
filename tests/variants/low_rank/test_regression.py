"""Refitted factors: least squares on the inputs that a layer gets after compression."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.regression import fitted_rows, refit_second
from cobla_onnx.variants.low_rank.weighted_svd import WeightedFactorizer
from tests.builders import model_of, random_array


def product():
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"w": random_array(6, 5)}, {"x": ["N", 6]}, ["y"],
    )  # fmt: skip
    (layer,) = find_layers(model).layers
    (scheme,) = schemes_for(layer)
    return scheme, read_weight(model, layer)


def refit(scheme, weight, second, cross, rank):
    """Factors of the weight that least squares give, without a ridge."""
    rows = fitted_rows(scheme.rows_of(weight).astype(np.float64), second, cross, 0.0)
    return WeightedFactorizer(scheme, scheme.weight_of(rows), second, rank).factorize(rank)


def dense(scheme, factors):
    return np.asarray(scheme.weight(factors.left @ factors.right), np.float64)


@given(st.integers(0, 100), st.integers(1, 5))
@settings(max_examples=20)
def test_refit_loses_no_more_than_the_truncated_weight(seed, rank):
    scheme, weight = product()
    x = random_array(50, 6, seed=seed, dtype="float64")
    moved = x + 0.3 * random_array(50, 6, seed=seed + 1, dtype="float64")
    y = x @ weight
    second, cross = (moved.T @ moved)[None] / 50, (y.T @ moved)[None] / 50
    factors = refit(scheme, weight, second, cross, rank)
    left, _, right = np.linalg.svd(weight.astype(np.float64))
    s = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    plain = (left[:, :rank] * s[:rank]) @ right[:rank]
    found = np.asarray(dense(scheme, factors), np.float64)
    assert np.linalg.norm(y - moved @ found) <= np.linalg.norm(y - moved @ plain) * (1 + 1e-6)


def test_a_moment_that_rounding_left_indefinite_is_solved_all_the_same():
    moment, rows = np.diag([1.0, 0.5, -0.1])[None], random_array(1, 2, 3, dtype="float64")
    cross = random_array(1, 2, 3, seed=1, dtype="float64")
    pull = 0.01 * 1.4 / 3
    found = fitted_rows(rows, moment, cross, 0.01)
    np.testing.assert_allclose(
        found @ (moment + pull * np.eye(3)), cross + pull * rows, rtol=1e-12, atol=1e-12
    )


def test_at_full_rank_it_is_the_least_squares_solution_and_so_is_the_second_factor():
    scheme, weight = product()
    x = random_array(50, 6, seed=3, dtype="float64")
    y = random_array(50, 5, seed=4, dtype="float64")
    second, cross = (x.T @ x)[None], (y.T @ x)[None]
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    factors = refit(scheme, weight, second, cross, 5)
    np.testing.assert_allclose(dense(scheme, factors), best, rtol=1e-3, atol=1e-4)
    first = factors.left[0] if scheme.inputs_first else factors.right[0].T
    z = x @ first
    again = refit_second(scheme, factors, (z.T @ z)[None], (y.T @ z)[None], 0.0)
    np.testing.assert_allclose(dense(scheme, again), best, rtol=1e-3, atol=1e-4)
    assert np.asarray(dense(scheme, again)) == pytest.approx(dense(scheme, factors), abs=1e-3)
