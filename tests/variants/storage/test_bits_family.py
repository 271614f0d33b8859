"""Errors of all numbers of bits, from those of some."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.storage.bits_family import MOST, between
from cobla_onnx.variants.storage.precision import FORMATS


@given(st.dictionaries(st.sampled_from(FORMATS), st.floats(1e-9, 1.0)))
def test_errors_fall_from_1_to_0_and_are_never_above_what_is_known(known: dict[int, float]) -> None:
    errors = between(known)
    assert errors.shape == (MOST + 1,)
    assert errors[0] == 1
    assert errors[MOST] == 0
    assert (np.diff(errors) <= 0).all()
    for bits in known:
        # A format that loses more than one of fewer bits counts as no worse than that one.
        least = min(lost for each, lost in known.items() if each <= bits)
        np.testing.assert_allclose(errors[bits], least, rtol=1e-9)
