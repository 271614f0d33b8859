"""Rules of products, convolutions, pooling and normalisations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.autodiff.differences import check, check_linear, distinct, normal

node = helper.make_node


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (3, 4)),
        ((5, 2, 3), (3, 4)),
        ((5, 2, 3), (5, 3, 4)),
        ((2, 1, 2, 3), (5, 3, 4)),
        ((2, 3), (5, 3, 4)),
        ((3,), (3, 4)),
        ((2, 3), (3,)),
        ((3,), (3,)),
        ((3,), (5, 3, 4)),
        ((5, 2, 3), (3,)),
    ],
    ids=str,
)
def test_matmul(shapes):
    inputs = {"a": normal(*shapes[0]), "b": normal(*shapes[1], seed=1)}
    check(node("MatMul", ["a", "b"], ["y"]), inputs)


@pytest.mark.parametrize("turned_a", [0, 1])
@pytest.mark.parametrize("turned_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (4,), (2, 1), (2, 4)])
def test_gemm(turned_a, turned_b, bias):
    inputs = {
        "a": normal(*((3, 2) if turned_a else (2, 3))),
        "b": normal(*((4, 3) if turned_b else (3, 4)), seed=1),
    }
    if bias is not None:
        inputs["c"] = normal(*bias, seed=2)
    gemm = node("Gemm", list(inputs), ["y"], transA=turned_a, transB=turned_b, alpha=0.7, beta=1.3)
    check(gemm, inputs)


@st.composite
def windows(draw, padded=True):
    axes = draw(st.integers(1, 3))
    values = {
        "kernel_shape": [draw(st.integers(1, 3)) for _ in range(axes)],
        "strides": [draw(st.integers(1, 3)) for _ in range(axes)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(axes)],
    }
    sizes = [draw(st.integers(5, 6)) if axes < 3 else 5 for _ in range(axes)]
    if padded:
        values["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * axes)]
    return sizes, values


@given(windows(), st.sampled_from([(1, 2, 3), (1, 4, 1), (2, 2, 4), (3, 3, 3), (2, 4, 2)]))
@settings(max_examples=25)
def test_conv(window, channels):
    sizes, values = window
    group, inputs, outputs = channels
    batch = 2 if len(sizes) < 3 else 1
    arrays = {
        "x": normal(batch, inputs, *sizes),
        "w": normal(outputs, inputs // group, *values["kernel_shape"], seed=1),
        "b": normal(outputs, seed=2),
    }
    check_linear(node("Conv", list(arrays), ["y"], group=group, **values), arrays)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_conv_with_automatic_padding(mode, stride, kernel):
    arrays = {"x": normal(1, 2, 7), "w": normal(2, 2, kernel, seed=1)}
    check_linear(node("Conv", list(arrays), ["y"], auto_pad=mode, strides=[stride]), arrays)


@pytest.mark.parametrize("channels", [32, 40])
def test_conv_of_many_channels(channels):
    arrays = {"x": normal(1, channels, 3, 3), "w": normal(2, channels, 3, 3, seed=1)}
    check_linear(node("Conv", list(arrays), ["y"], pads=[1, 1, 1, 1]), arrays)


@given(windows(), st.sampled_from([(1, 2, 3), (2, 2, 4), (3, 3, 3)]), st.data())
@settings(max_examples=20)
def test_conv_transpose(window, channels, data):
    sizes, values = window
    group, inputs, outputs = channels
    sizes = [3 for _ in sizes]
    reach = [(k - 1) * d for k, d in zip(values["kernel_shape"], values["dilations"], strict=True)]
    values["pads"] = [min(p, r // 2) for p, r in zip(values["pads"], [*reach, *reach], strict=True)]
    values["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in values["strides"]]
    arrays = {
        "x": normal(1, inputs, *sizes),
        "w": normal(inputs, outputs // group, *values["kernel_shape"], seed=1),
    }
    if group == 1:
        arrays["b"] = normal(outputs, seed=2)
    check_linear(node("ConvTranspose", list(arrays), ["y"], group=group, **values), arrays)


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


def test_batch_normalization():
    arrays = {"x": normal(2, 3, 4), "scale": normal(3, seed=1), "bias": normal(3, seed=2)}
    arrays |= {"mean": normal(3, seed=3), "variance": np.abs(normal(3, seed=4)) + 0.5}
    check(node("BatchNormalization", list(arrays), ["y"], epsilon=0.01), arrays)


def test_instance_normalization():
    arrays = {"x": normal(2, 3, 4, 2), "scale": normal(3, seed=1), "bias": normal(3, seed=2)}
    check(node("InstanceNormalization", list(arrays), ["y"]), arrays)


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization(axis):
    shape = (2, 3, 4)[axis:]
    arrays = {"x": normal(2, 3, 4), "scale": normal(*shape), "bias": normal(*shape, seed=2)}
    check(node("LayerNormalization", list(arrays), ["y"], axis=axis), arrays)


def test_lp_normalization():
    check(node("LpNormalization", ["x"], ["y"], p=2, axis=1), {"x": normal(2, 4)})
    # The reference's norm for p = 1 is a sum without absolute values.
    check_linear(node("LpNormalization", ["x"], ["y"], p=1), {"x": normal(2, 4)}, step=0.003)
