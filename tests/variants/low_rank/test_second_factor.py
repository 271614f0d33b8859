"""Least squares of a layer's outputs on the outputs of a first factor."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.low_rank.second_factor import (
    conditional_energies,
    explained_energy,
    solve,
    through,
)


@given(seed=st.integers(0, 99), rank=st.integers(1, 4), offsets=st.integers(1, 3))
def test_moments_and_solution_are_those_of_samples(seed: int, rank: int, offsets: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, left = rng.normal(size=(200, 5, offsets)), rng.normal(size=(5, rank))
    outputs = rng.normal(size=(200, 3))
    moment = np.einsum("naj,nbk->ajbk", inputs, inputs)
    cross = np.einsum("naj,no->ajo", inputs, outputs).reshape(-1, 3)
    seen = np.einsum("naj,ar->nrj", inputs, left).reshape(200, -1)
    products, its_cross = through(moment, cross, left)
    size = rank * offsets
    np.testing.assert_allclose(products.reshape(size, size), seen.T @ seen, rtol=1e-8, atol=1e-8)
    fitted, residual, *_ = np.linalg.lstsq(seen, outputs, rcond=None)
    found = solve(products, its_cross)
    np.testing.assert_allclose(found.reshape(size, 3), fitted, rtol=1e-5, atol=1e-7)
    explained = explained_energy(products, its_cross)[-1]
    np.testing.assert_allclose(np.square(outputs).sum() - explained, residual.sum(), rtol=1e-6)


@given(seed=st.integers(0, 99), rank=st.integers(1, 5))
def test_what_is_left_of_each_component(seed: int, rank: int) -> None:
    seen = np.random.default_rng(seed).normal(size=(50, rank))
    products = (seen.T @ seen)[:, None, :, None]
    for k, left in enumerate(conditional_energies(products)):
        before = seen[:, :k]
        rest = seen[:, k] - before @ np.linalg.lstsq(before, seen[:, k], rcond=None)[0]
        np.testing.assert_allclose(left, rest @ rest, rtol=1e-7)
