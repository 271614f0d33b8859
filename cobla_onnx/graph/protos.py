"""Read and copy protobuf messages, in old and new versions of protobuf, and nodes and models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx
from google.protobuf.message import Message

__all__ = [
    "FLOAT_TYPES",
    "OVERRIDABLE_FROM",
    "STORED_TYPES",
    "copied_node",
    "copy_fields",
    "given_inputs",
    "is_repeated",
    "is_standard",
    "opset_of",
    "plain_domain",
    "unlist_weights",
]

OVERRIDABLE_FROM = 4
"""IR version from which on a run may be given another weight where it is listed as an input."""

FLOAT_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
"""Types in which nodes compute; onnxruntime on a CPU has no bfloat16, which must be cast."""

STORED_TYPES = FLOAT_TYPES | {onnx.TensorProto.BFLOAT16}
"""Floating types that a tensor may have."""


def is_repeated(field: Any) -> bool:
    """Whether a field holds a list; versions before 6.31 have a label instead."""
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == field.LABEL_REPEATED)


def copy_fields(source: Message, target: Message, leave_out: Collection[str]) -> None:
    """Set the fields of `target` as they are set in `source`, but for those left out."""
    for field, value in source.ListFields():
        if field.name in leave_out:
            continue
        if is_repeated(field):
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def copied_node(node: onnx.NodeProto) -> onnx.NodeProto:
    """Return a copy of a node, which can be changed."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    return result


def given_inputs(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """Return the inputs that a run has to be given, by name.

    Before IR version 4 weights are listed as inputs, too.
    """
    stored = {tensor.name for tensor in graph.initializer}
    return {value.name: value for value in graph.input if value.name not in stored}


def unlist_weights(graph: onnx.GraphProto) -> None:
    """Take weights out of the graph's inputs, so that nobody can give others in a run.

    From IR version 4 on onnxruntime takes those that are listed for changeable: it neither folds
    them nor brings them into the layout in which it computes, and warns of each.
    """
    inputs = given_inputs(graph).values()
    del graph.input[:]
    graph.input.extend(inputs)


def plain_domain(domain: str) -> str:
    """Return a domain by one name: that of ONNX's own operators has two."""
    return "" if domain == "ai.onnx" else domain


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node is one of ONNX's own operators."""
    return not plain_domain(node.domain)


def opset_of(model: onnx.ModelProto) -> int:
    """Return a model's version of ONNX's own operators."""
    return next((o.version for o in model.opset_import if not plain_domain(o.domain)), 1)
