"""The factorisation is the best one, at any rank and shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.low_rank import svd as module
from cobla_onnx.variants.low_rank.svd import (
    factorize,
    gram_matrices,
    leading_vectors,
    singular_values,
)
from cobla_onnx.variants.low_rank.tridiagonal import reduced
from tests.builders import random_array


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.data())
def test_error_is_that_of_the_best_approximation(groups, rows, columns, data):
    stack = random_array(groups, rows, columns, seed=rows * 13 + columns)
    rank = data.draw(st.integers(1, min(rows, columns)))
    factors = factorize(stack, rank)
    assert factors.left.shape == (groups, rows, rank)
    assert factors.right.shape == (groups, rank, columns)
    error = np.linalg.norm(stack - factors.left @ factors.right)
    values = np.linalg.svd(stack.astype(np.float64), compute_uv=False)
    assert error == pytest.approx(np.linalg.norm(values[:, rank:]), abs=1e-6)
    np.testing.assert_allclose(factors.singular_values, values[:, :rank], atol=1e-6)
    found = singular_values(reduced(gram_matrices(stack)))
    np.testing.assert_allclose(found, np.linalg.norm(values, axis=0), atol=1e-6)


def test_a_kept_basis_makes_the_same_factors():
    stack = random_array(2, 9, 7)
    basis = leading_vectors(reduced(gram_matrices(stack)), 5)
    kept, alone = factorize(stack, 3, basis), factorize(stack, 3)
    for name in ("left", "singular_values", "right"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(alone, name))


def test_chunks_make_no_difference(monkeypatch):
    stack = random_array(1, 5, 90)
    whole = gram_matrices(stack)
    monkeypatch.setattr(module, "CHUNK", 35)
    np.testing.assert_allclose(gram_matrices(stack), whole, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_zero_and_rank_deficient_matrices(rank):
    zero = np.zeros((1, 5, 7), np.float32)
    factors = factorize(zero, rank)
    assert not (factors.left @ factors.right).any()
    single = np.outer(np.arange(5.0), np.ones(7))[None]
    factors = factorize(single, rank)
    np.testing.assert_allclose(factors.left @ factors.right, single, atol=1e-12)
    assert np.isfinite(factors.left).all()
    assert np.isfinite(factors.right).all()


def test_signs_do_not_depend_on_the_sign_of_the_matrix_basis():
    stack = random_array(1, 6, 9)
    first, second = factorize(stack, 4), factorize(stack.copy(order="F"), 4)
    np.testing.assert_allclose(first.left, second.left, atol=1e-10)
