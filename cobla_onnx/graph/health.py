"""Which stored weight is not finite: the model is to blame then, and not its data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.bodies import all_nodes, body_graphs, placed_nodes
from cobla_onnx.graph.operators.base import operators_of_node
from cobla_onnx.graph.protos import STORED_TYPES
from cobla_onnx.graph.tensors import constant_value, tensor_array
from cobla_onnx.text import quoted

__all__ = ["EXPORT_AGAIN", "blame_weights", "unhealthy_weight"]

EXPORT_AGAIN = "export the model again from a healthy checkpoint"
# Squares of larger numbers leave the range of single precision.
LARGE = 1e19


def unhealthy_weight(model: onnx.ModelProto, of_layers: bool = False) -> str:
    """Say which weight or bias holds NaN, or else infinity, or else very large numbers.

    The latter two count in what a layer reads alone: elsewhere they may be meant, as in a mask.

    Parameters
    ----------
    of_layers : bool
        Whether NaN does so, too.

    Returns
    -------
    str
        Such as ``weight 'w' of node 'fc' holds NaN``; empty if all are healthy.
    """
    readers: dict[str, tuple[onnx.NodeProto, str]] = {}
    for node, label, _ in placed_nodes(model.graph):
        for name in node.input:
            readers.setdefault(name, (node, label))
    infinite = large = ""
    for name, array in _stored(model):
        if name not in readers or not array.size:
            continue
        node, label = readers[name]
        found = f"weight {quoted(name)} of node {quoted(label)} holds"
        with np.errstate(invalid="ignore"):
            most = float(np.abs(array).max())
        if math.isnan(most) and (not of_layers or operators_of_node(node)):
            return f"{found} NaN"
        if not most >= LARGE or not operators_of_node(node):
            continue
        if math.isinf(most):
            infinite = infinite or f"{found} infinity"
        else:
            large = large or f"{found} numbers up to {most:.2g}"
    return infinite or large


def blame_weights(model: onnx.ModelProto, of_layers: bool = False) -> None:
    """Refuse a model whose outputs are not finite, if a weight says why.

    Parameters
    ----------
    of_layers : bool
        As for `unhealthy_weight`.

    Raises
    ------
    ModelError
    """
    cause = unhealthy_weight(model, of_layers)
    if cause:
        raise ModelError(f"{cause}, and its outputs are not finite; {EXPORT_AGAIN}")


def _stored(model: onnx.ModelProto) -> Iterator[tuple[str, NDArray[np.floating]]]:
    graphs = (model.graph, *body_graphs(model.graph.node))
    tensors = [(tensor.name, tensor) for graph in graphs for tensor in graph.initializer]
    for node in all_nodes(model.graph):
        value = constant_value(node)
        if value is not None:
            tensors.append((node.output[0], value))
    for name, tensor in tensors:
        if tensor.data_type in STORED_TYPES:
            yield name, tensor_array(tensor, f"weight {quoted(name)}")
