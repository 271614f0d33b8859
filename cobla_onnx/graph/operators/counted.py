"""MACs of operators whose weights are left as they are: quantised ones, and those of a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.operators.base import Shape, elements
from cobla_onnx.graph.protos import plain_domain

__all__ = ["is_counted", "macs_of_other"]

MICROSOFT = "com.microsoft"
# Matrix products of input 0 with another one, by domain and type.
PRODUCTS = {
    ("", "MatMulInteger"),
    ("", "QLinearMatMul"),
    *(
        (MICROSOFT, name)
        for name in (
            "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "MatMulIntegerToFloat",
            "MatMulNBits", "QGemm",
        )
    ),
}  # fmt: skip
# Convolutions of input 0, and which input is the kernel.
CONVOLUTIONS = {
    ("", "ConvInteger"): 1,
    ("", "QLinearConv"): 3,
    (MICROSOFT, "FusedConv"): 1,
    (MICROSOFT, "QLinearConv"): 3,
}
RECURRENT = (MICROSOFT, "DynamicQuantizeLSTM")


def is_counted(node: onnx.NodeProto) -> bool:
    """Whether `macs_of_other` knows the operator of a node."""
    key = _key(node)
    return key in PRODUCTS or key in CONVOLUTIONS or key == RECURRENT


def macs_of_other(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """MACs of a node that `is_counted`; None if its shapes are not known."""
    key, values = _key(node), attributes(node)
    data, output = _shape(node.input, 0, shapes), _shape(node.output, 0, shapes)
    if not data:
        return None
    if key in CONVOLUTIONS:
        kernel = _shape(node.input, CONVOLUTIONS[key], shapes)
        return elements(output, kernel[1:] if kernel else None)
    if key == RECURRENT:
        directions = 2 if values.get("direction") == b"bidirectional" else 1
        hidden = values.get("hidden_size", 0)
        size = None if data[-1] is None else data[-1] + hidden
        return elements(data[:2], (4 * directions * hidden, size))
    turned = values.get("transA", 0) and len(data) > 1
    # With batches that are turned, too, axes stand in another order.
    inner = None if values.get("transBatchA") else data[-2 if turned else -1]
    return elements(output, (inner,))


def _shape(names: Sequence[str], place: int, shapes: Mapping[str, Shape]) -> Shape | None:
    return shapes.get(names[place]) if place < len(names) else None


def _key(node: onnx.NodeProto) -> tuple[str, str]:
    return plain_domain(node.domain), node.op_type
