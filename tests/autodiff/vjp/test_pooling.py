"""Rules of pooling, and of the normalisation over neighbouring channels."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.autodiff.differences import check_linear, distinct, normal
from tests.autodiff.vjp.windows import windows

node = helper.make_node


@given(windows(padded=False), st.booleans(), st.data())
@settings(max_examples=25)
def test_max_pool(window, ceil, data):
    sizes, values = window
    values["pads"] = [data.draw(st.integers(0, (k - 1) // 2)) for k in values["kernel_shape"] * 2]
    x = {"x": distinct(2, 2, *sizes)}
    check_linear(node("MaxPool", ["x"], ["y"], ceil_mode=int(ceil), **values), x, step=0.004)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_max_pool_side_by_side(size):
    pool = node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    check_linear(pool, {"x": distinct(2, 3, *size)}, step=0.004)


@given(windows(padded=False), st.booleans(), st.booleans(), st.data())
@settings(max_examples=25)
def test_average_pool(window, ceil, include, data):
    sizes, values = window
    values["pads"] = [data.draw(st.integers(0, (k - 1) // 2)) for k in values["kernel_shape"] * 2]
    del values["dilations"]
    flags = {"ceil_mode": int(ceil), "count_include_pad": int(include)}
    check_linear(node("AveragePool", ["x"], ["y"], **flags, **values), {"x": normal(2, 2, *sizes)})


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pools_with_automatic_padding(operator, mode):
    pool = node(operator, ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 2], auto_pad=mode)
    check_linear(pool, {"x": distinct(1, 2, 6, 5)}, step=0.004)


@pytest.mark.parametrize("operator", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("size", [(4,), (3, 4), (2, 2, 3)])
def test_global_pools(operator, size):
    check_linear(node(operator, ["x"], ["y"]), {"x": distinct(2, 3, *size)}, step=0.004)


def test_a_pool_over_everything():
    pool = node("AveragePool", ["x"], ["y"], kernel_shape=[3, 4])
    check_linear(pool, {"x": normal(2, 3, 3, 4)})


@pytest.mark.parametrize("size", [1, 3, 5])
def test_local_response_normalization(size):
    lrn = node("LRN", ["x"], ["y"], size=size, alpha=0.3, beta=0.7, bias=1.2)
    check_linear(lrn, {"x": normal(2, 6, 2, 3)}, step=0.01)
