"""Read the weight of a layer in the orientation in which its node uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.health import EXPORT_AGAIN
from cobla_onnx.graph.index import GraphIndex, Origin, attributes
from cobla_onnx.graph.inventory import Layer
from cobla_onnx.graph.tensors import constant_value, tensor_array
from cobla_onnx.text import quoted

__all__ = ["read_bias", "read_weight"]


def read_weight(model: onnx.ModelProto, layer: Layer) -> NDArray[Any]:
    """Return the weight as the nodes of the layer read it, shape ``layer.shape``.

    Raises
    ------
    ModelError
        If the stored data does not fit the declared shape, or is not finite.
    """
    array = _read(model, layer, layer.source)
    if layer.readings:
        return array.astype(onnx.helper.tensor_dtype_to_np_dtype(layer.type), copy=False)
    for index in layer.uses[0].chain:
        node = model.graph.node[index]
        if node.op_type == "Transpose":
            array = np.transpose(array, attributes(node).get("perm"))
        elif node.op_type == "Cast":
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(attributes(node)["to"]))
        elif node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
            array = array.reshape(_after(model, index).shape)
        elif node.op_type == "Concat":
            _, bounds = _after(model, index).steps[-1]
            pairs = zip(bounds[::2], bounds[1::2], strict=True)
            array = np.concatenate([array[begin:end] for begin, end in pairs])
    return array


def _after(model: onnx.ModelProto, index: int) -> Origin:
    """What became of a weight after one node of its chain."""
    found = GraphIndex(model).origin(model.graph.node[index].output[0])
    assert not isinstance(found, str), "the walk that found the layer followed this node"
    return found


def read_bias(model: onnx.ModelProto, layer: Layer) -> NDArray[Any] | None:
    """Return the layer's own bias as it is stored, or None if it has none.

    Raises
    ------
    ModelError
        If the stored data does not fit the declared shape, or is not finite.
    """
    return None if layer.bias is None else _read(model, layer, layer.bias)


def _read(model: onnx.ModelProto, layer: Layer, name: str) -> NDArray[Any]:
    graph = model.graph
    tensor = next((t for t in graph.initializer if t.name == name), None)
    if tensor is None:
        tensor = constant_value(next(n for n in graph.node if name in n.output))
        assert tensor is not None
    array = tensor_array(tensor, f"weight {quoted(name)} of node {quoted(layer.name)}")
    if not np.isfinite(array).all():
        raise ModelError(
            f"weight {quoted(name)} of node {quoted(layer.name)} holds NaN or infinity; "
            f"{EXPORT_AGAIN}"
        )
    return array
