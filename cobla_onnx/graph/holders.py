"""Bytes of stored weights outside the layers, grouped by the operator that reads them first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import onnx

from cobla_onnx.graph.index import GraphIndex
from cobla_onnx.graph.io.model_file import bytes_in, constant_bytes
from cobla_onnx.graph.sizes import table_bytes, tensor_bytes
from cobla_onnx.graph.tensors import subgraphs

__all__ = ["bytes_elsewhere"]

UNREAD = "nothing"
FUNCTIONS = "functions"


def bytes_elsewhere(model: onnx.ModelProto, layers: Collection[str]) -> dict[str, int]:
    """Bytes of stored weights by the operator that reads them first, those of layers left out.

    Weights inside the sub-graphs of a node are its own, those of model-local functions count
    together. With the layers' they are what `stored_bytes` counts.

    Parameters
    ----------
    model : ModelProto
    layers : collection of str
        Names of the stored tensors that are left out.

    Returns
    -------
    dict of str to int
        Most bytes first; without operators that hold none.
    """
    index = GraphIndex(model)
    held: Counter[str] = Counter()

    def add(name: str, size: int) -> None:
        first = index.readers.get(name, ())
        held[index.nodes[first[0]].op_type if first else UNREAD] += size

    for node in model.graph.node:
        held[node.op_type] += bytes_in(subgraphs(node)) + table_bytes(node)
        size = constant_bytes(node)
        if size and node.output[0] not in layers:
            add(node.output[0], size)
    for tensor in model.graph.initializer:
        if tensor.name not in layers:
            add(tensor.name, tensor_bytes(tensor))
    for sparse in model.graph.sparse_initializer:
        add(sparse.values.name, tensor_bytes(sparse.values) + tensor_bytes(sparse.indices))
    held[FUNCTIONS] += bytes_in((), [function.node for function in model.functions])
    return {name: size for name, size in held.most_common() if size}
