"""Codes of few bits in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.variants.storage.packing import PLANES, pack, packed_bytes, unpack


@given(bits=st.sampled_from(sorted(PLANES)), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_codes_come_back_from_as_many_bytes_as_stated(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    planes = pack(codes, bits)
    assert sum(plane.nbytes for plane in planes) == packed_bytes(count, bits)
    np.testing.assert_array_equal(unpack(planes, bits, count), codes)


@pytest.mark.parametrize("bits", PLANES)
def test_planes_have_all_bits_of_a_code(bits: int) -> None:
    assert sum(PLANES[bits]) == bits
    assert all(8 % width == 0 for width in PLANES[bits])
