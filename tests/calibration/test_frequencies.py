"""Frequencies of rows: what is counted, and what is assumed of rows that were not read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.calibration.frequencies import RowCounts, count_rows
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.operators.gather import LookupPatch
from tests.lookups import LENGTH, ROWS, text_model, texts

COUNTS = st.lists(st.integers(0, 9), min_size=2, max_size=40)


@given(COUNTS)
def test_frequencies_are_positive_and_in_the_order_of_the_counts(numbers):
    counts = np.array(numbers, np.float64)
    found = RowCounts(counts).frequencies()
    assert found.sum() == pytest.approx(1.0)
    assert (found > 0).all()
    order = np.argsort(counts, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    # Rows that were read alike count alike.
    for count in set(numbers):
        assert np.ptp(found[counts == count]) == 0


def test_rows_that_were_not_read_share_what_was_read_once():
    counts = np.array([50, 30, 1, 1, *[0] * 100], np.float64)
    found = RowCounts(counts).frequencies()
    assert found[4:].sum() == pytest.approx(2 / 82)
    # Without any that was read once, as if there was one.
    found = RowCounts(np.array([50.0, 30.0, 0.0, 0.0, 0.0, 0.0])).frequencies()
    assert found[2:].sum() == pytest.approx(1 / 80)
    # If all rows were read, nothing is left to assume.
    np.testing.assert_allclose(RowCounts(np.array([3.0, 1.0])).frequencies(), [0.75, 0.25])


def test_without_evidence_rows_count_alike():
    for counts in (np.zeros(4), np.array([1.0, 1.0, 0.0, 0.0])):
        np.testing.assert_array_equal(RowCounts(counts).frequencies(), np.full(4, 0.25))


def test_rows_are_counted_over_batches_uses_and_parts_of_the_samples():
    model = text_model()
    data = texts(12)["ids"]
    data[0, 0] = -1
    halves = [{"ids": data[:5]}, {"ids": data[5:]}]
    patches = [LookupPatch("ids", ROWS), LookupPatch("places", LENGTH)]
    found = count_rows(model, patches, lambda: halves)
    expected = np.bincount(data.ravel() % ROWS, minlength=ROWS)
    np.testing.assert_array_equal(found[patches[0]].counts, expected)
    # Positions are the same for all samples of a batch.
    np.testing.assert_array_equal(found[patches[1]].counts, np.full(LENGTH, 2))
    layers = find_layers(model).layers
    seen = Seen(model, layers, lambda: halves)
    part = seen.in_others(layers[:1], lambda: halves[:1])
    rest, counted = seen.without(part).counts(layers[0]), seen.counts(layers[0])
    assert rest is not None
    assert counted is not None
    np.testing.assert_array_equal(counted.counts, expected)
    np.testing.assert_array_equal(
        rest.counts, np.bincount(halves[1]["ids"].ravel(), minlength=ROWS)
    )
    assert seen.counts(layers[2]) is None
    np.testing.assert_array_equal(counted.plus(counted).counts, 2 * expected)
