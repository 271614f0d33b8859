"""One reduction gives eigenvalues and leading eigenvectors, as numpy does from the matrix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.low_rank import tridiagonal as module
from cobla_onnx.variants.low_rank.tridiagonal import eigenvalues, leading_eigenvectors, reduced
from tests.builders import random_array


def symmetric(groups: int, size: int, rank: int, seed: int) -> np.ndarray:
    """Gram matrices of a given rank."""
    half = random_array(groups, size, rank, seed=seed).astype(np.float64)
    return np.asarray(half @ half.swapaxes(1, 2))


@given(
    groups=st.integers(1, 3),
    size=st.integers(1, 20),
    rank=st.integers(1, 25),
    exponent=st.sampled_from([-250, -40, 0, 40, 250]),
    panel=st.sampled_from([1, 3, 512]),
    data=st.data(),
)
def test_values_and_vectors_are_those_of_the_matrix(groups, size, rank, exponent, panel, data):
    count = data.draw(st.integers(1, size))
    scale = 10.0**exponent
    matrices = symmetric(groups, size, rank, seed=size + 31 * rank) * scale
    form = reduced(matrices.copy())
    expected = np.linalg.eigvalsh(matrices / scale)
    near = 1e-13 * size * max(float(expected.max()), 1.0)
    np.testing.assert_allclose(eigenvalues(form) / scale, expected, atol=near)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "PANEL", panel)
        for group, matrix in enumerate(matrices / scale):
            values, vectors = leading_eigenvectors(form, group, count)
            assert vectors.shape == (size, count)
            np.testing.assert_allclose(values / scale, expected[group, ::-1][:count], atol=near)
            np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-12)
            np.testing.assert_allclose(matrix @ vectors, vectors * (values / scale), atol=near)


def test_a_matrix_of_zeros_has_any_directions():
    form = reduced(np.zeros((1, 4, 4)))
    values, vectors = leading_eigenvectors(form, 0, 3)
    assert not eigenvalues(form).any()
    assert not values.any()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("panel", [7, 512])
def test_a_vector_does_not_depend_on_how_many_are_asked_for(monkeypatch, panel):
    monkeypatch.setattr(module, "PANEL", panel)
    form = reduced(symmetric(1, 60, 80, seed=3))
    all_values, all_vectors = leading_eigenvectors(form, 0, 60)
    for count in (1, 6, 7, 8, 33, 59):
        values, vectors = leading_eigenvectors(form, 0, count)
        np.testing.assert_array_equal(values, all_values[:count])
        np.testing.assert_array_equal(vectors, all_vectors[:, :count])


def test_threads_share_a_form_that_may_be_read_only():
    form = reduced(symmetric(1, 90, 120, seed=4))
    for array in vars(form).values():
        array.flags.writeable = False
    expected = leading_eigenvectors(form, 0, 20)[1]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: leading_eigenvectors(form, 0, 20)[1], range(40)):
            np.testing.assert_array_equal(found, expected)
