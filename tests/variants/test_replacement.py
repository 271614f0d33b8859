"""What is stored for a layer: numbers that its type cannot hold, or no processor likes."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.variants.replacement import narrowed
from tests.builders import small_network

LAYER = find_layers(small_network()).layers[0]
TINY = float(np.finfo(np.float32).tiny)


def test_what_is_below_the_normal_numbers_becomes_zero():
    given = np.array([1.0, -1e-40, 1e-44, 0.0, -TINY, 2 * TINY])
    found = narrowed(LAYER, given, np.dtype(np.float32), "it")
    np.testing.assert_array_equal(found, np.array([1.0, 0, 0, 0, -TINY, 2 * TINY], np.float32))
    assert given[1] == -1e-40


def test_half_precision_keeps_its_small_numbers():
    given = np.array([1e-6, -3e-7], np.float64)
    found = narrowed(LAYER, given, np.dtype(np.float16), "it")
    assert found.dtype == np.float16
    assert (found != 0).all()


def test_what_overflows_is_refused():
    with pytest.raises(ModelError, match="its bias overflows float16"):
        narrowed(LAYER, np.array([1e6]), np.dtype(np.float16), "its bias")
