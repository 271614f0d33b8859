"""At full rank every scheme reproduces its node, at the cost that it states."""

from __future__ import annotations

import math

import numpy as np
import onnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes, node_macs
from cobla_onnx.runtime.session import open_session
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import model_of, random_array


def assert_exact(model: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance=2e-5) -> None:
    """Rewrite at full rank under every scheme; outputs and costs must agree."""
    onnx.checker.check_model(model, full_check=True)
    (expected,) = open_session(model, 1).run(None, feeds)
    (layer,) = find_layers(model).layers
    weight = read_weight(model, layer)
    shapes = infer_shapes(model, {name: value.shape for name, value in feeds.items()})
    for scheme in schemes_for(layer):
        full_rank = min(scheme.matrix_shape()[1:])
        np.testing.assert_array_equal(scheme.weight(scheme.matrix(weight)), weight)
        replacement = make_replacement(layer, scheme, factorize(scheme.matrix(weight), full_rank))
        result = rewrite(model, [replacement])
        onnx.checker.check_model(result, full_check=True)
        (actual,) = open_session(result, 1).run(None, feeds)
        scale = max(float(np.abs(expected).max(initial=0)), 1e-6)
        np.testing.assert_allclose(actual, expected, atol=tolerance * scale, err_msg=scheme.name)
        np.testing.assert_allclose(
            replacement.dense(), weight, atol=tolerance * float(np.abs(weight).max())
        )
        size = sum(array.size for array in replacement.arrays.values())
        assert size == full_rank * scheme.params_per_rank()
        # The costs that the scheme states are those of the nodes that it makes.
        after = infer_shapes(result, {name: value.shape for name, value in feeds.items()})
        macs, unknown = node_macs(result, after)
        assert not unknown
        per_rank = scheme.macs_per_rank(layer.uses[0], shapes)
        assert sum(macs.values()) == full_rank * per_rank, scheme.name


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    inputs = group * draw(st.integers(2 if group > 1 else 1, 3))
    outputs = group * draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 4)) for _ in range(axes)]
    strides = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilations = [draw(st.integers(1, 2)) for _ in range(axes)]
    size = [draw(st.integers(d * (k - 1) + 1, 11)) for k, d in zip(kernel, dilations, strict=True)]
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
    attributes["group"] = group
    padding = draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "pads":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * axes)]
    elif padding != "none":
        attributes["auto_pad"] = padding
    if padding.startswith("SAME"):
        # onnxruntime itself refuses dilation with SAME padding in some versions.
        attributes["dilations"] = [1] * axes
    for name in list(attributes):
        if draw(st.integers(0, 5)) == 0 and name in ("strides", "dilations", "kernel_shape"):
            del attributes[name]
    bias = draw(st.booleans())
    return inputs, outputs, kernel, size, group, attributes, bias


@given(convolutions())
@settings(max_examples=150)
def test_convolutions_of_any_geometry(case):
    inputs, outputs, kernel, size, group, attributes, bias = case
    weights = {"w": random_array(outputs, inputs // group, *kernel)}
    if bias:
        weights["b"] = random_array(outputs, seed=1)
    node = helper.make_node("Conv", ["x", *weights], ["y"], "conv", **attributes)
    model = model_of([node], weights, {"x": [2, inputs, *size]}, ["y"])
    shapes = infer_shapes(model, {})
    assume(all(s is not None and s > 0 for s in shapes["y"]))
    assert_exact(model, {"x": random_array(2, inputs, *size, seed=2)})


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from([None, 0.5, -2.0]),
    st.sampled_from([None, 0.0, 3.0]),
    st.sampled_from([None, "row", "scalar", "matrix"]),
    st.sampled_from([9, 13, 17]),
)
@settings(max_examples=120)
def test_gemm_of_any_form(trans_a, trans_b, left, sizes, alpha, beta, bias, opset):
    m, k, n = sizes
    shapes = [(k, m) if trans_a else (m, k), (n, k) if trans_b else (k, n)]
    weights = {"w": random_array(*shapes[0 if left else 1])}
    operands = ["w", "x"] if left else ["x", "w"]
    if bias or opset < 11:
        shape = {"row": (n,), "scalar": (1,), "matrix": (m, n), None: (1,)}[bias]
        weights["c"] = random_array(*shape, seed=3)
        operands.append("c")
    attributes = {"transA": int(trans_a), "transB": int(trans_b)}
    attributes |= {} if alpha is None else {"alpha": alpha}
    attributes |= {} if beta is None else {"beta": beta}
    node = helper.make_node("Gemm", operands, ["y"], "gemm", **attributes)
    x = random_array(*shapes[1 if left else 0], seed=4)
    model = model_of([node], weights, {"x": list(x.shape)}, ["y"], opset=opset)
    assert_exact(model, {"x": x})


@given(
    st.booleans(),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from([(), (3,), (2, 3), "vector"]),
    st.sampled_from([(), (3,), (2, 1)]),
)
@settings(max_examples=100)
def test_matmul_with_the_constant_on_either_side(left, sizes, data_batch, weight_batch):
    m, k, n = sizes
    # Left alone by the analysis: two products would broadcast otherwise than one.
    assume(data_batch != "vector" or not weight_batch)
    weight_shape = (*weight_batch, m, k) if left else (*weight_batch, k, n)
    if data_batch == "vector":
        data_shape = (k,)
    else:
        data_shape = (*data_batch, k, n) if left else (*data_batch, m, k)
    node = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"], "matmul")
    weights = {"w": random_array(*weight_shape)}
    model = model_of([node], weights, {"x": list(data_shape)}, ["y"])
    assert_exact(model, {"x": random_array(*data_shape, seed=4)})


def test_half_precision_is_written_back_as_it_was():
    elem = onnx.TensorProto.FLOAT16
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    weights = {"w": random_array(6, 4, 3, 3, dtype="float16")}
    model = model_of([node], weights, {"x": [1, 4, 7, 7]}, ["y"], elem_type=elem)
    assert_exact(model, {"x": random_array(1, 4, 7, 7, seed=1, dtype="float16")}, 1e-2)


def test_double_precision_keeps_its_precision():
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")
    weights = {"w": random_array(9, 5, dtype="float64")}
    elem = onnx.TensorProto.DOUBLE
    model = model_of([node], weights, {"x": [3, 9]}, ["y"], elem_type=elem)
    assert_exact(model, {"x": random_array(3, 9, seed=1, dtype="float64")}, 1e-12)


def test_scheme_option_restricts_convolutions_only():
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    model = model_of([node], {"w": random_array(6, 4, 3, 3)}, {"x": [1, 4, 7, 7]}, ["y"])
    (layer,) = find_layers(model).layers
    names = {kind: [s.name for s in schemes_for(layer, kind)] for kind in ("auto", "spatial")}
    assert names["auto"] == ["channel", "input", "spatial-hw", "spatial-wh"]
    assert names["spatial"] == ["spatial-hw", "spatial-wh"]
    shapes = infer_shapes(model, fixed_input_shapes(model, {}))
    assert math.prod(s or 0 for s in shapes["y"]) == 6 * 25


@st.composite
def transposed_convolutions(draw):
    axes = draw(st.integers(1, 3))
    inputs, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = {
        name: [draw(st.integers(1, most)) for _ in range(axes)]
        for name, most in (("kernel", 4), ("strides", 3), ("dilations", 2), ("size", 4))
    }
    values = {"strides": sizes["strides"], "dilations": sizes["dilations"]}
    form = draw(st.sampled_from(["none", "pads", "output_padding", "output_shape", "SAME_UPPER"]))
    whole = [
        s * (n - 1) + d * (k - 1) + 1
        for s, n, d, k in zip(
            sizes["strides"], sizes["size"], sizes["dilations"], sizes["kernel"], strict=True
        )
    ]
    if form == "pads":
        values["pads"] = [min(1, (n - 1) // 2) for n in whole] * 2
    elif form == "output_padding":
        values["output_padding"] = [s - 1 for s in sizes["strides"]]
    elif form == "output_shape":
        values["output_shape"] = [max(1, n - 1) for n in whole]
    elif form == "SAME_UPPER":
        assume(all(n >= s for n, s in zip(sizes["kernel"], sizes["strides"], strict=True)))
        values["auto_pad"] = form
    bias = draw(st.booleans())
    weights = {"w": random_array(inputs, outputs, *sizes["kernel"])}
    if bias:
        weights["b"] = random_array(outputs)
    node = helper.make_node("ConvTranspose", ["x", *weights], ["y"], "up", **values)
    return model_of([node], weights, {"x": [2, inputs, *sizes["size"]]}, ["y"])


@given(transposed_convolutions())
@settings(max_examples=60)
def test_transposed_convolutions(model):
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert_exact(model, {"x": random_array(*shape, seed=7)})
