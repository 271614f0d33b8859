"""Rules of convolutions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx.autodiff.vjp import convolution
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


@given(
    windows(),
    st.sampled_from([(1, 2, 3), (1, 4, 1), (1, 9, 2), (2, 2, 4), (2, 6, 2), (3, 3, 3)]),
    st.sampled_from([0, 8, 32]),
)
@settings(max_examples=40)
def test_conv_sample_by_sample(window, channels, narrow):
    """The forms of the weight's gradient that large images have, on small ones."""
    sizes, values = window
    group, inputs, outputs = channels
    arrays = {
        "x": normal(2, inputs, *sizes),
        "w": normal(outputs, inputs // group, *values["kernel_shape"], seed=1),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "POSITIONS", 1)
        patch.setattr(convolution, "NARROW", narrow)
        check_linear(node("Conv", list(arrays), ["y"], group=group, **values), arrays)


@pytest.mark.parametrize(
    ("channels", "size", "stride", "shifted"),
    [(8, 9, 1, "x"), (40, 9, 1, "dy"), (40, 17, 2, "x"), (8, 4, 1, None), (900, 9, 1, None)],
)
def test_what_is_shifted_for_the_gradient_by_a_weight(channels, size, stride, shifted):
    """The side of fewer channels; by the batch where that is small beside the weight."""
    outputs = 900 if channels == 900 else 16
    out = (size - 1) // stride + 1
    g = convolution.Emitter({"x", "dy"}, TensorProto.FLOAT)
    window = convolution.Window((3, 3), (stride, stride), (1, 1), (1, 1))
    shapes = (2, channels, size, size), (2, outputs, out, out)
    convolution.weight_gradient(g, "x", shapes[0], "dy", shapes[1], window)
    padded = [n.input[0] for n in g.nodes if n.op_type == "Pad"]
    in_front = [n for n in g.nodes if n.op_type == "Transpose" and n.attribute[0].ints[0] == 1]
    assert bool(in_front) == (shifted is None)
    if shifted is not None:
        assert padded == [shifted]


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
