"""Numbers in few bits learn: they are rounded in each step, and their derivatives are not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.graph.layers import find_layers
from cobla_onnx.variants.low_rank.matricisation import layout_of
from cobla_onnx.variants.storage.rounding import round_weight
from cobla_onnx.variants.storage.stored import DecodedWeight, coded_weight, half_weight
from cobla_onnx.variants.storage.tensor import LEVEL
from tests.builders import model_of, random_array


def stored(bits: int, seed: int = 0):
    """A weight of 6 outputs in few bits."""
    weight = random_array(9, 6, seed=seed)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    (layer,) = find_layers(model_of([node], {"w": weight}, {"x": ["N", 9]}, ["y"])).layers
    if bits == 16:
        return half_weight(layer, weight, None)
    return coded_weight(layer, round_weight(layout_of(layer).rows_of(weight), None, bits), None)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16])
def test_what_learns_is_at_first_what_is_stored(bits):
    made = stored(bits)
    again = made.with_parts(made.learnable, None)
    assert {n: a.tobytes() for n, a in again.arrays.items()} == {
        n: a.tobytes() for n, a in made.arrays.items()
    }
    assert np.array_equal(made.as_read(made.learnable)["weight"], made.dense())
    decoded = made.decoded()
    assert isinstance(decoded, DecodedWeight)
    assert np.array_equal(decoded.dense(), made.dense())
    assert {made.read_from(part) for part in made.learnable} == set(decoded.arrays)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(0, 99), st.floats(0.01, 1))
def test_what_is_read_is_what_would_be_stored(bits, seed, change):
    made = stored(bits)
    rng = np.random.default_rng(seed)
    parts = {
        part: (array * (1 + change * rng.standard_normal(array.shape))).astype(np.float32)
        for part, array in made.learnable.items()
    }
    found = made.with_parts(parts, None)
    np.testing.assert_array_equal(found.dense(), made.as_read(parts)["weight"])
    # No other level is nearer to what has been learned.
    levels = np.unique(made.learnable[LEVEL])
    codes = found.dense() / parts["scale"]
    apart = np.abs(codes - parts[LEVEL])
    assert (apart <= np.abs(levels[:, None, None] - parts[LEVEL]).min(axis=0) + 1e-4).all()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_scales_have_true_derivatives_and_numbers_those_without_rounding(bits, seed):
    made = stored(bits)
    rng = np.random.default_rng(seed)
    parts = {part: np.asarray(array, np.float32) for part, array in made.learnable.items()}
    slope = rng.standard_normal(made.dense().shape)
    found = made.pulled_back(parts, {"weight": slope})
    assert {part: array.shape for part, array in found.items()} == {
        part: array.shape for part, array in parts.items()
    }
    np.testing.assert_allclose(found[LEVEL], slope * parts["scale"])
    step = rng.standard_normal(parts["scale"].shape).astype(np.float32)
    above, below = (
        float((slope * made.as_read({**parts, "scale": parts["scale"] + s * step})["weight"]).sum())
        for s in (1, -1)
    )
    expected = float((found["scale"] * step).sum())
    assert (above - below) / 2 == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_numbers_of_which_none_learns_stay():
    made = stored(4)
    assert made.as_read({}) == {}
    assert made.pulled_back({}, {}) == {}
    same = made.with_parts({}, None)
    assert np.array_equal(same.dense(), made.dense())
    half = stored(16)
    assert half.with_parts({}, None).tensor is half.tensor
