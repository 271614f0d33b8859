"""One tensor in few bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.variants.storage.coding import INTEGERS
from cobla_onnx.variants.storage.tensor import coded_tensor, half_tensor, tensor_bytes
from cobla_onnx.variants.writing import Writing
from tests.builders import model_of, random_array, small_network


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    axis=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_scales_are_stored_once_along_axes_without_them(
    bits: int, shape: list[int], axis: int, seed: int
) -> None:
    rng, axis = np.random.default_rng(seed), axis % len(shape)
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    levels = INTEGERS if bits == 8 else np.sort(rng.normal(size=1 << bits)).astype(np.float32)
    along = [size if k == axis else 1 for k, size in enumerate(shape)]
    scales = rng.uniform(0.5, 2, along).astype(np.float32)
    tensor = coded_tensor(codes, levels, np.broadcast_to(scales, shape))
    np.testing.assert_array_equal(tensor.values, levels[codes] * scales)
    assert tensor.arrays["scale"].size == scales.size
    for storage in ("auto", "qdq"):
        written = tensor.written(Writing(storage, 21, 10))
        np.testing.assert_array_equal(written.values, tensor.values)
    layer = find_layers(small_network()).layers[0]
    wider = tensor.with_parts(layer, {"scale": 2 * tensor.arrays["scale"]})
    np.testing.assert_array_equal(wider.values, levels[codes] * (2 * scales))
    stated = tensor_bytes(codes.size, scales.size, codes.ndim, bits)
    assert sum(array.nbytes for array in tensor.arrays.values()) <= stated


def test_what_overflows_half_precision_is_refused_by_name() -> None:
    weight = random_array(4, 4)
    weight[0, 0] = 1e6
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "big")
    model: onnx.ModelProto = model_of([node], {"w": weight}, {"x": [2, 4]}, ["y"])
    (layer,) = find_layers(model).layers
    with pytest.raises(ModelError, match="'big': its weight overflows float16"):
        half_tensor(layer, weight, "its weight")
