"""Sums of products: taken sample by sample or all at once, they are the same."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx.calibration import sums
from cobla_onnx.calibration.moment import Moment
from cobla_onnx.calibration.sums import MomentSum


def moment_of(chunks: list[np.ndarray], each: int, *, exact: bool) -> Moment:
    total = MomentSum(chunks[0].shape[0], chunks[0].shape[1], exact=exact)
    for chunk in chunks:
        total.add(chunk, each)
    return total.moment()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("size", "each"), [(5, 40), (40, 5), (7, 1)])
def test_products_of_samples_add_up_to_those_of_all(monkeypatch, size, each, exact, groups):
    rng = np.random.default_rng(0)
    shape = groups, size, 3 * each
    chunks = [rng.standard_normal(shape).astype(np.float32) + 1 for _ in range(2)]
    # Of one group all at once, how much samples differ is in single precision.
    close = [1e-9 if exact else 1e-4, 1e-9 if exact and groups == 2 else 1e-4]
    found = []
    for adding in (0.0, np.inf):
        monkeypatch.setattr(sums, "ADDING", adding)
        found.append(moment_of(chunks, each, exact=exact))
    vectors = np.concatenate(chunks, axis=2).astype(np.float64)
    second = vectors @ vectors.swapaxes(1, 2) / vectors.shape[2]
    samples = vectors.reshape(groups, size, 6, each).transpose(2, 0, 1, 3)
    own = samples @ samples.swapaxes(2, 3) / each
    norms = np.square(second).sum(axis=(1, 2))
    variance = np.square(own - second).sum(axis=(0, 2, 3)) / (6 * 5)
    mean = vectors.mean(axis=2)
    normal = np.trace(second, axis1=1, axis2=2) ** 2 + norms
    normal -= 2 * np.square(mean).sum(axis=1) ** 2
    for moment, rtol in zip(found, close, strict=True):
        np.testing.assert_allclose(moment.second, second, rtol=1e-12 if exact else 1e-5)
        np.testing.assert_allclose(moment.mean, mean, rtol=1e-12)
        expected = np.minimum(normal / variance, vectors.shape[2])
        np.testing.assert_allclose(moment.effective, expected, rtol=rtol)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows", [3, 4, 256])
def test_moments_are_symmetric_however_products_are_added(monkeypatch, exact, rows):
    """By sample, by group or all at once: what is below the diagonal is copied in the end."""
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-6}
    monkeypatch.setattr(sums, "ROWS", rows)
    rng = np.random.default_rng(0)
    for adding in (0.0, np.inf):
        monkeypatch.setattr(sums, "ADDING", adding)
        halves = [MomentSum(2, 10, exact=exact), MomentSum(2, 10, exact=exact)]
        vectors = rng.standard_normal((2, 10, 60)).astype(np.float32)
        halves[0].add(vectors[:, :, :40], 20)
        halves[1].add(vectors[:, :, 40:], 20)
        halves[0].merge(halves[1])
        second = halves[0].moment().second
        np.testing.assert_array_equal(second, second.swapaxes(1, 2))
        wide = vectors.astype(np.float64)
        wanted = wide @ wide.swapaxes(1, 2) / 60
        np.testing.assert_allclose(second, wanted, **tolerance)
        # A moment may be asked for more than once, and in between.
        halves[0].add(vectors, 20)
        np.testing.assert_allclose(halves[0].moment().second, wanted, **tolerance)


def test_parts_may_have_their_rows_in_any_order():
    vectors = np.zeros((1, 5, 6), np.float32)
    rng = np.random.default_rng(0)
    parts = [np.array([4, 0, 2]), np.array([3, 1])]
    phases = np.array([0, 1, 0, 1, 1, 0])
    for column, phase in enumerate(phases):
        vectors[0, parts[phase], column] = rng.standard_normal(len(parts[phase]))
    total = MomentSum(1, 5, parts)
    total.add(vectors, 2, phases=phases)
    wanted = vectors[0].astype(np.float64) @ vectors[0].T / 6
    np.testing.assert_allclose(total.moment().second[0], wanted, atol=1e-6)


def test_samples_that_are_all_the_same_are_noticed(monkeypatch):
    one = np.random.default_rng(0).standard_normal((1, 4, 30)).astype(np.float32)
    for adding in (0.0, np.inf):
        monkeypatch.setattr(sums, "ADDING", adding)
        several = moment_of([np.concatenate([one] * 5, axis=2)], 30, exact=False).effective
        alone = moment_of([one], 30, exact=False).effective
        np.testing.assert_allclose(several, alone, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 6])
def test_vectors_in_half_precision_are_added_without_a_warning(groups):
    vectors = np.random.default_rng(0).standard_normal((groups, 4, 60)).astype(np.float16)
    wide = moment_of([vectors.astype(np.float64)], 10, exact=False)
    np.testing.assert_allclose(moment_of([vectors], 10, exact=False).second, wide.second, rtol=1e-5)
