"""Matrices that a model stores once more, transposed, as tied weights are by some exporters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cobla_onnx.graph.io.model_file import copy_without_initializers, unique_name
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.protos import STORED_TYPES
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.text import quoted

__all__ = ["transposed_copies", "transposed_on_the_way"]

# Least numbers of a matrix: no smaller one is worth a node.
SMALLEST = 256
# Rows and columns by which pairs are found before they are compared, and bytes compared at a time.
CORNER, CHUNK = 16, 1 << 24


def transposed_copies(model: onnx.ModelProto, held: Collection[str]) -> dict[str, str]:
    """Find the matrices that are the transpose of another one, by name, each with the other.

    Of a pair a table of lookups is the other one: rows cannot be looked up in its transpose.

    Parameters
    ----------
    held : collection of str
        Names of initializers that stay.

    Raises
    ------
    ModelError
        If data is damaged or cannot be read.
    """
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    matrices = [
        tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2
        and tensor.dims[0] != tensor.dims[1]
        and tensor.dims[0] * tensor.dims[1] >= SMALLEST
        and tensor.data_type in STORED_TYPES
        and tensor.name not in held
    ]
    shapes = {(tensor.data_type, *tensor.dims) for tensor in matrices}
    alike = [t for t in matrices if (t.data_type, *reversed(t.dims)) in shapes]
    by_corner: dict[tuple[Any, ...], list[onnx.TensorProto]] = {}
    found: dict[str, str] = {}
    for tensor in sorted(alike, key=lambda t: t.name not in looked_up):
        corner = _bits(tensor)[:CORNER, :CORNER]
        key = (tensor.data_type, *tensor.dims, corner.tobytes())
        first = next((t for t in by_corner.get(key, ()) if _is_transpose(t, tensor)), None)
        if first is not None and tensor.name not in looked_up:
            found[tensor.name] = first.name
            continue
        turned = (tensor.data_type, *reversed(tensor.dims), corner.T.tobytes())
        by_corner.setdefault(turned, []).append(tensor)
    return found


def _bits(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return the numbers of a matrix as integers, so that equal bytes are equal."""
    array = tensor_array(tensor, f"initializer {quoted(tensor.name)}")
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _is_transpose(left: onnx.TensorProto, right: onnx.TensorProto) -> bool:
    """Compare a matrix with the transpose of another, chunk by chunk."""
    one, other = _bits(left), _bits(right)
    step = max(1, CHUNK // (one.shape[1] * one.dtype.itemsize))
    return all(
        np.array_equal(one[start : start + step], other[:, start : start + step].T)
        for start in range(0, len(one), step)
    )


def transposed_on_the_way(
    model: onnx.ModelProto, copies: Mapping[str, str]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Compute matrices from those that they are the transpose of, where both become one layer.

    Returns
    -------
    ModelProto
        The very object that was given, if there is nothing to do.
    dict of str to str
        Those of the copies that are gone.
    """
    if not copies:
        return model, {}
    tied = {
        layer.source for layer in find_layers(_computed(model, copies)).layers if layer.readings
    }
    kept = {name: first for name, first in copies.items() if first in tied}
    return (_computed(model, kept) if kept else model), kept


def _computed(model: onnx.ModelProto, copies: Mapping[str, str]) -> onnx.ModelProto:
    result = copy_without_initializers(model, copies)
    names = {node.name for node in result.graph.node}
    nodes = [
        helper.make_node(
            "Transpose", [first], [name], unique_name(f"{name}_transposed", names), perm=[1, 0]
        )
        for name, first in copies.items()
    ]
    nodes.extend(result.graph.node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result
