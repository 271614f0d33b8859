"""Which rows of a table are stored better, and where they lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.best_rows import best_count, best_of, place_type, places


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_no_other_row_weighs_more(numbers, data):
    weights = np.array(numbers, np.float64)
    count = data.draw(st.integers(0, len(numbers)))
    best = best_of(weights, count)
    assert (len(best), len(set(best.tolist()))) == (count, count)
    assert (np.diff(best) > 0).all()
    others = np.setdiff1d(np.arange(len(numbers)), best)
    if count and len(others):
        assert weights[best].min() >= weights[others].max()
    stored = np.append(-1, best)
    found = stored[places(best, len(numbers)).astype(np.int64)]
    np.testing.assert_array_equal(found[best], best)
    assert (found[others] == -1).all()


@pytest.mark.parametrize(
    ("count", "dtype"), [(0, "uint8"), (255, "uint8"), (256, "uint16"), (1 << 16, "uint32")]
)
def test_places_fit_their_type(count, dtype):
    assert place_type(count) == np.dtype(dtype)


def test_their_number_follows_from_the_shape():
    assert [best_count(shape) for shape in ((30522, 384), (31, 384), (64, 63))] == [953, 0, 0]
