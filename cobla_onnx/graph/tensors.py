"""Tensors of a model: where they are stored, their size in bytes, their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.external import external_bytes, is_external
from cobla_onnx.graph.protos import is_standard
from cobla_onnx.text import quoted

__all__ = [
    "HeldTensor",
    "all_tensors",
    "constant_value",
    "is_given_by_calls",
    "subgraphs",
    "tensor_array",
]


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that a model stores.

    Attributes
    ----------
    tensor : onnx.TensorProto
    label : str
        Where it is, for messages.
    main : bool
        Whether it is an initializer of the main graph.
    """

    tensor: onnx.TensorProto
    label: str
    main: bool = False


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node carries as attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the dense tensor of a Constant node, or None where it holds something else.

    So it does in a function to whose calls the tensor is given, see `is_given_by_calls`.
    """
    if node.op_type != "Constant" or not is_standard(node):
        return None
    for attribute in node.attribute:
        if attribute.name == "value" and not attribute.ref_attr_name:
            value: onnx.TensorProto = attribute.t
            return value
    return None


def is_given_by_calls(node: onnx.NodeProto) -> bool:
    """Whether a Constant node of a function stands for a tensor that its calls have."""
    return (
        node.op_type == "Constant"
        and is_standard(node)
        and any(a.name == "value" and a.ref_attr_name for a in node.attribute)
    )


def all_tensors(model: onnx.ModelProto) -> Iterator[HeldTensor]:
    """Yield every tensor of a model: initializers and attributes, at any depth."""
    graphs = [model.graph]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    node_lists: list[Iterable[onnx.NodeProto]] = [f.node for f in model.functions]
    main = True
    while graphs or node_lists:
        if graphs:
            graph = graphs.pop(0)
            for tensor in graph.initializer:
                yield HeldTensor(tensor, f"initializer {quoted(tensor.name)}", main)
            for sparse in graph.sparse_initializer:
                label = f"sparse initializer {quoted(sparse.values.name)}"
                yield HeldTensor(sparse.values, label)
                yield HeldTensor(sparse.indices, f"indices of {label}")
            main = False
            node_lists.append(graph.node)
        for node in node_lists.pop():
            for attribute in node.attribute:
                label = f"node {quoted(node.name or node.op_type)}: {quoted(attribute.name)}"
                if attribute.HasField("t"):
                    yield HeldTensor(attribute.t, label)
                for tensor in attribute.tensors:
                    yield HeldTensor(tensor, label)
                if attribute.HasField("sparse_tensor"):
                    yield HeldTensor(attribute.sparse_tensor.values, label)
                    yield HeldTensor(attribute.sparse_tensor.indices, label)
            graphs.extend(subgraphs(node))


def tensor_array(tensor: onnx.TensorProto, label: str) -> NDArray[Any]:
    """Return a tensor's values; of external data a read-only map, which takes no memory.

    Parameters
    ----------
    label : str
        What the tensor is, for the message.

    Raises
    ------
    ModelError
        If the data does not fit the declared shape, or cannot be read.
    """
    try:
        if not is_external(tensor):
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        data = external_bytes(tensor, label)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if dtype.itemsize * math.prod(tensor.dims) == data.nbytes:
            return data.view(dtype).reshape(tensor.dims)
        # Types narrower than a byte are packed.
        packed = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims)
        packed.raw_data = data.tobytes()
        return np.asarray(onnx.numpy_helper.to_array(packed))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{label}: its data does not fit its shape {list(tensor.dims)}; "
            "the file is damaged, export or download it again"
        ) from error
