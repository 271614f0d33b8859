"""Digest of a model's content, independent of where its tensors are stored."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx

from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.text import quoted

__all__ = ["model_content"]


def model_content(model: onnx.ModelProto) -> str:
    """Hash a model: its graph, and the values of all its initializers.

    Where a tensor is stored, inside the model or in a file beside it, makes no difference;
    each has its name, type and shape hashed with its values.

    Raises
    ------
    ModelError
        If external data cannot be read.
    """
    state = hashlib.sha256()
    initializers = list(model.graph.initializer)
    rest = copy_without_initializers(model, {tensor.name for tensor in initializers})
    _feed(state, rest.SerializeToString(deterministic=True))
    for tensor in initializers:
        header = (tensor.name, tensor.data_type, tuple(tensor.dims))
        _feed(state, repr(header).encode())
        if tensor.data_type == onnx.TensorProto.STRING:
            _feed(state, tensor.SerializeToString(deterministic=True))
            continue
        array = tensor_array(tensor, f"initializer {quoted(tensor.name)}")
        _feed(state, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _feed(state: hashlib._Hash, data: bytes | memoryview) -> None:
    state.update(f"{len(data)}\n".encode())
    state.update(data)
