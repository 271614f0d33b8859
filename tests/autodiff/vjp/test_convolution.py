"""Rules of convolutions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.autodiff.differences import check_linear, normal
from tests.autodiff.vjp.windows import windows

node = helper.make_node


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
