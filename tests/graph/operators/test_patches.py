"""Patches of convolutions: a weight times its patches is the convolution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.graph.operators.convolution import ConvPatch
from cobla_onnx.graph.operators.gather import LookupPatch
from cobla_onnx.graph.operators.patches import cut
from cobla_onnx.graph.operators.product import ProductPatch
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pads", [(0, 1, 2, 0), "SAME_LOWER"])
def test_a_weight_times_patches_is_the_convolution(group, stride, pads):
    weight, x = random_array(4, 4 // group, 3, 2, seed=1), random_array(2, 4, 7, 6)
    how = {"pads": list(pads)} if isinstance(pads, tuple) else {"auto_pad": pads}
    conv = helper.make_node("Conv", ["x", "w"], ["y"], group=group, strides=[stride] * 2, **how)
    model = model_of([conv], {"w": weight}, {"x": [2, 4, 7, 6]}, ["y"])
    expected = run_session(open_session(model, 1), {"x": x})["y"]
    patch = ConvPatch("x", group, 4 // group, (3, 2), (stride,) * 2, (1, 1), pads)
    vectors = np.concatenate(list(patch.vectors(x)), axis=2)
    assert vectors.shape == (group, patch.size, patch.positions(x))
    rows = weight.reshape(group, 4 // group, -1)
    found = np.einsum("gos,gsp->gop", rows, vectors).reshape(4, 2, *expected.shape[2:])
    np.testing.assert_allclose(found.swapaxes(0, 1), expected, rtol=1e-4, atol=1e-5)
    outputs = patch.outputs(expected)
    np.testing.assert_allclose(outputs, np.einsum("gos,gsp->gop", rows, vectors), atol=1e-5)
    chosen = np.flatnonzero(np.arange(patch.positions(x)) % 3 != 1)
    np.testing.assert_array_equal(patch.outputs(expected, chosen), outputs[:, :, chosen])


@pytest.mark.parametrize(
    ("patch", "shape"),
    [
        (ProductPatch("x", False, (), 5, False), (2, 3, 7)),
        (ProductPatch("x", False, (), 5, True), (2, 3, 7)),
        (ProductPatch("x", False, (3,), 5, False), (2, 3, 4, 7)),
        (LookupPatch("x", 9), (2, 3, 7)),
        (ConvPatch("x", 2, 3, (1,), (1,), (1,), (0, 0)), (2, 8, 6)),
    ],
)
def test_outputs_of_chosen_positions_are_some_of_all(patch, shape):
    output = random_array(*shape)
    every = patch.outputs(output)
    chosen = np.arange(0, every.shape[2], 2)
    np.testing.assert_array_equal(patch.outputs(output, chosen), every[:, :, chosen])


@given(st.integers(0, 100), st.integers(1, 1 << 23), st.integers(1, 7))
def test_parts_cover_all_once_in_multiples(count, size, each):
    parts = [range(count)[part] for part in cut(count, size, each)]
    assert [item for part in parts for item in part] == list(range(count))
    assert all(len(part) % each == 0 for part in parts[:-1])
