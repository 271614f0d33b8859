"""Rewrite the experimental operators of ONNX 1.0 to 1.4 in terms of current ones.

They have no schema any more, so onnx's version converter stops at them; old exporters
wrote them (Core ML's ImageScaler, Crop and Affine in style transfer networks).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from cobla_onnx.graph.layers import attributes

__all__ = ["replace_legacy"]


def replace_legacy(model: onnx.ModelProto) -> None:
    """Replace ImageScaler, Crop, Affine and ScaledTanh, in place."""
    graph = model.graph
    if not any(node.op_type in REPLACEMENTS and not node.domain for node in graph.node):
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type in REPLACEMENTS and not node.domain:
            nodes.extend(REPLACEMENTS[node.op_type](graph, node))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _constant(graph: onnx.GraphProto, node: onnx.NodeProto, part: str, values: object) -> str:
    name = f"{node.output[0]}/{part}"
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return name


def _scaled(
    graph: onnx.GraphProto, node: onnx.NodeProto, x: str, scale: float, bias: object
) -> list[onnx.NodeProto]:
    """Y = scale x + bias."""
    product = f"{node.output[0]}/scaled"
    factor = _constant(graph, node, "scale", np.float32(scale))
    offset = _constant(graph, node, "bias", np.asarray(bias, dtype=np.float32))
    return [
        onnx.helper.make_node("Mul", [x, factor], [product]),
        onnx.helper.make_node("Add", [product, offset], [node.output[0]], node.name),
    ]


def _image_scaler(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    values = attributes(node)
    bias = np.reshape(values["bias"], (1, -1, 1, 1))
    return _scaled(graph, node, node.input[0], values.get("scale", 1.0), bias)


def _affine(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    values = attributes(node)
    scale, bias = values.get("alpha", 1.0), values.get("beta", 0.0)
    return _scaled(graph, node, node.input[0], scale, bias)


def _scaled_tanh(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Y = alpha tanh(beta x)."""
    values, inner, outer = attributes(node), f"{node.output[0]}/inner", f"{node.output[0]}/tanh"
    alpha = _constant(graph, node, "alpha", np.float32(values.get("alpha", 1.0)))
    beta = _constant(graph, node, "beta", np.float32(values.get("beta", 1.0)))
    return [
        onnx.helper.make_node("Mul", [node.input[0], beta], [inner]),
        onnx.helper.make_node("Tanh", [inner], [outer]),
        onnx.helper.make_node("Mul", [outer, alpha], [node.output[0]], node.name),
    ]


def _crop(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Border is left, top, right, bottom; scale, if given, the size (height, width) kept.

    Sliced by attributes, as opset 1 to 9 do; the version converter makes inputs of them.
    """
    values = attributes(node)
    left, top, right, bottom = values.get("border", [0, 0, 0, 0])
    if "scale" in values:
        ends = [top + values["scale"][0], left + values["scale"][1]]
    else:
        ends = [-bottom or np.iinfo(np.int32).max, -right or np.iinfo(np.int32).max]
    return [
        onnx.helper.make_node(
            "Slice",
            node.input[:1],
            node.output[:1],
            node.name,
            axes=[2, 3],
            starts=[top, left],
            ends=[int(end) for end in ends],
        )
    ]


REPLACEMENTS: dict[str, Callable[[onnx.GraphProto, onnx.NodeProto], list[onnx.NodeProto]]] = {
    "ImageScaler": _image_scaler,
    "Affine": _affine,
    "ScaledTanh": _scaled_tanh,
    "Crop": _crop,
}
