"""Gemms as onnxruntime's quantiser takes them: with a bias of one number for each channel.

It stores that bias in the scales of the weight, and sets beta to 1 without multiplying by it; of a
bias of another shape it looks for numbers that are not there. So beta is multiplied into the bias,
and one that is the same for all rows is written out as one row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import onnx

from cobla_onnx.arithmetic.nodes import BIAS, reader_counts, tensor_names, units
from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.io.model_file import (
    add_initializers,
    copy_without_initializers,
    unique_name,
)
from cobla_onnx.graph.protos import is_standard
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.text import quoted

__all__ = ["with_plain_gemms"]

FLOAT = onnx.TensorProto.FLOAT


def with_plain_gemms(model: onnx.ModelProto, spared: Collection[str] = ()) -> onnx.ModelProto:
    """Return a model whose Gemms have a beta of 1 and a bias for each channel, where they can.

    A bias that is computed, or is another in each row, stays as it is, and so does beta. It is the
    model itself if there is nothing to do.

    Parameters
    ----------
    spared : collection of str
        Outputs of nodes that stay as they are.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    places = [
        place
        for place, node in enumerate(model.graph.node)
        if _is_to_change(node, stored) and node.output[0] not in spared
    ]
    if not places:
        return model
    result = copy_without_initializers(model, ())
    taken, before = tensor_names(model), set[str]()
    for place in places:
        node = result.graph.node[place]
        if len(node.input) > BIAS and node.input[BIAS]:
            before.add(node.input[BIAS])
            bias = _plain_bias(node, stored, unique_name(node.input[BIAS] + "_plain", taken))
            add_initializers(result, [bias])
            node.input[BIAS] = bias.name
        for attribute in [a for a in node.attribute if a.name == "beta"]:
            node.attribute.remove(attribute)
    _drop_unread(result, before)
    return result


def _is_to_change(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Gemm" or not is_standard(node):
        return False
    weight = stored.get(node.input[1])
    if weight is None or weight.data_type != FLOAT:
        return False
    multiplied = bool(attributes(node).get("beta", 1.0) != 1.0)
    if len(node.input) <= BIAS or not node.input[BIAS]:
        # Without a bias beta means nothing.
        return multiplied
    bias, channels = stored.get(node.input[BIAS]), units(node, stored)
    if bias is None or bias.data_type != FLOAT or math.prod(bias.dims[:-1]) != 1:
        return False
    return multiplied or list(bias.dims) != [channels]


def _plain_bias(
    node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], name: str
) -> onnx.TensorProto:
    """Return beta times the bias, one number for each channel."""
    bias = stored[node.input[BIAS]]
    beta = np.float32(attributes(node).get("beta", 1.0))
    row = tensor_array(bias, f"initializer {quoted(bias.name)}").reshape(-1)
    # With a beta of 0 the bias is not read, whatever is in it.
    with np.errstate(over="ignore", invalid="ignore"):
        row = beta * row if beta else np.zeros_like(row)
    return onnx.numpy_helper.from_array(np.resize(row, units(node, stored)), name)


def _drop_unread(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Remove those of some initializers that nothing reads any more, and inputs of their name."""
    counts = reader_counts(model)
    unread = {name for name in names if not counts[name]}
    for held in (model.graph.initializer, model.graph.input):
        for item in [item for item in held if item.name in unread]:
            held.remove(item)
