"""MACs of operators whose weights are left as they are, or that have none.

Those are quantised ones, those of a runtime, and attention in one node.
"""

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
# Attention, and which input has the keys of the past, if any: of queries and keys (inputs 0 and 1),
# and of data from which a weight (input 1) makes queries, keys and values.
ATTENTION = {("", "Attention"): 4, (MICROSOFT, "MultiHeadAttention"): 6}
PROJECTED_ATTENTION = {(MICROSOFT, "Attention"): 4, (MICROSOFT, "QAttention"): 8}
KINDS = (PRODUCTS, CONVOLUTIONS, {RECURRENT}, ATTENTION, PROJECTED_ATTENTION)


def is_counted(node: onnx.NodeProto) -> bool:
    """Whether `macs_of_other` knows the operator of a node."""
    return any(_key(node) in kind for kind in KINDS)


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
    if key in ATTENTION:
        return _attention(node, data, ATTENTION[key], shapes)
    if key in PROJECTED_ATTENTION:
        return _projected_attention(node, data, PROJECTED_ATTENTION[key], shapes)
    turned = values.get("transA", 0) and len(data) > 1
    # With batches that are turned, too, axes stand in another order.
    inner = None if values.get("transBatchA") else data[-2 if turned else -1]
    return elements(output, (inner,))


def _attention(
    node: onnx.NodeProto, queries: Shape, past: int, shapes: Mapping[str, Shape]
) -> int | None:
    """MACs of queries with keys, and of what that weighs with values."""
    asked = elements(queries)
    if len(node.input) > 1 and node.input[1]:
        keys = _shape(node.input, 1, shapes)
        # In five axes, keys and values of a head lie side by side, and positions are the second.
        length = None if keys is None else keys[1 if len(keys) == 5 else -2]
    else:
        # All three lie side by side.
        asked, length = None if asked is None else asked // 3, queries[1]
    made = elements(_shape(node.output, 0, shapes))
    both = None if asked is None or made is None else asked + made
    return elements((both, _with_past(node, length, past, shapes)))


def _projected_attention(
    node: onnx.NodeProto, data: Shape, past: int, shapes: Mapping[str, Shape]
) -> int | None:
    weight = _shape(node.input, 1, shapes)
    if not weight or weight[-1] is None:
        return None
    third = weight[-1] // 3
    asked, _, made = attributes(node).get("qkv_hidden_sizes") or (third, third, third)
    projected = elements(data, weight[-1:])
    length = _with_past(node, data[-2], past, shapes)
    attended = elements(data[:-1], (asked + made, length))
    return None if projected is None or attended is None else projected + attended


def _with_past(
    node: onnx.NodeProto, length: int | None, past: int, shapes: Mapping[str, Shape]
) -> int | None:
    """Positions that are attended to, with those of the past."""
    if past >= len(node.input) or not node.input[past]:
        return length
    before = _shape(node.input, past, shapes)
    if length is None or not before or before[-2] is None:
        return None
    return length + before[-2]


def _shape(names: Sequence[str], place: int, shapes: Mapping[str, Shape]) -> Shape | None:
    return shapes.get(names[place]) if place < len(names) else None


def _key(node: onnx.NodeProto) -> tuple[str, str]:
    return plain_domain(node.domain), node.op_type
