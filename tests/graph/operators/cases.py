"""Nodes of all operators, with shapes that onnxruntime takes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from hypothesis import strategies as st
from onnx import helper


@dataclass(frozen=True)
class Case:
    """A node that reads `x` and `w`, the shapes of both, and whether it reads past an edge."""

    node: onnx.NodeProto
    data: tuple[int, ...]
    weight: tuple[int, ...]
    cropped: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": self.data, "w": self.weight}


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    axes = draw(st.integers(1, 2))
    some = {n: draw(st.tuples(*[st.integers(1, 3)] * axes)) for n in ("kernel", "strides")}
    dilations = draw(st.tuples(*[st.integers(1, 2)] * axes))
    group, channels, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    pads = draw(st.sampled_from([0, 1]))
    values = {"strides": some["strides"], "dilations": dilations, "group": group}
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", pads=[pads] * 2 * axes, **values)
    data = (draw(st.integers(1, 2)), group * channels, *[6] * axes)
    return Case(node, data, (group * outputs, channels, *some["kernel"]), pads > 0)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    axes = draw(st.integers(1, 2))
    kernel, strides = (draw(st.tuples(*[st.integers(1, 3)] * axes)) for _ in range(2))
    dilations = draw(st.tuples(*[st.integers(1, 2)] * axes))
    more = [draw(st.integers(0, s - 1)) for s in strides]
    pads = draw(st.sampled_from([0, 1])) if min(kernel) > 1 else 0
    node = helper.make_node(
        "ConvTranspose",
        ["x", "w"],
        ["y"],
        "n",
        pads=[pads] * 2 * axes,
        strides=strides,
        dilations=dilations,
        output_padding=more,
    )
    channels, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    data = (draw(st.integers(1, 2)), channels, *[4] * axes)
    return Case(node, data, (channels, outputs, *kernel), pads > 0)


@st.composite
def products(draw: st.DrawFn) -> Case:
    rows, inner, columns = (draw(st.integers(1, 4)) for _ in range(3))
    right = draw(st.booleans())
    left_shape, right_shape = (rows, inner), (inner, columns)
    names = ["x", "w"] if right else ["w", "x"]
    if draw(st.booleans()):
        flags = {name: draw(st.integers(0, 1)) for name in ("transA", "transB")}
        left_shape = left_shape[:: -1 if flags["transA"] else 1]
        right_shape = right_shape[:: -1 if flags["transB"] else 1]
        node = helper.make_node("Gemm", names, ["y"], "n", **flags)
    else:
        lead = draw(st.sampled_from([((), ()), ((2,), ()), ((3, 2), (2,)), ((2, 1), (3,))]))
        left_shape, right_shape = (*lead[0], *left_shape), (*lead[1], *right_shape)
        node = helper.make_node("MatMul", names, ["y"], "n")
    data, weight = (left_shape, right_shape) if right else (right_shape, left_shape)
    return Case(node, data, weight)
