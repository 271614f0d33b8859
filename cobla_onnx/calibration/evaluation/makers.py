"""Find the operator that produces an output, and the axis of its softmax."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from cobla_onnx.graph.protos import opset_of

__all__ = ["Made", "made_by"]

# Operators that keep all values, at the same places.
THROUGH = frozenset({"Identity", "Cast", "Dropout"})
# Operators that keep all values, at places that depend on the shapes.
RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
# Most nodes that are followed back.
DEPTH = 16


@dataclass(frozen=True)
class Made:
    """The operator that produces an output.

    Attributes
    ----------
    op : str
    axis : int or None
        Axis of a softmax, as seen in the output and as written, so possibly negative; None if
        it depends on shapes.
    """

    op: str
    axis: int | None = None


def made_by(model: onnx.ModelProto) -> dict[str, Made]:
    """Return the operator that produces each output, before any that only move values."""
    producer = {name: node for node in model.graph.node for name in node.output}
    version = opset_of(model)
    found = {}
    for output in model.graph.output:
        made = _trace(output.name, producer, version)
        if made is not None:
            found[output.name] = made
    return found


def _trace(name: str, producer: dict[str, onnx.NodeProto], version: int) -> Made | None:
    """Follow a tensor back to its operator, undoing transposes on the way."""
    orders: list[list[int]] = []
    known = True
    for _ in range(DEPTH):
        node = producer.get(name)
        if node is None or not node.input:
            return None
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
            known = known and bool(order)
            orders.append(order)
        elif node.op_type in RESHAPING:
            known = False
        elif node.op_type not in THROUGH:
            break
        name = node.input[0]
    else:
        return None
    if node.op_type not in ("Softmax", "LogSoftmax"):
        return Made(node.op_type)
    axis: int | None = next((a.i for a in node.attribute if a.name == "axis"), None)
    if axis is None:
        # Before opset 13, all axes starting with axis 1 were flattened to one row.
        axis = -1 if version >= 13 else 1
    if not known:
        return Made(node.op_type)
    for order in reversed(orders):
        axis = order.index(axis % len(order))
    return Made(node.op_type, axis)
