"""Find the nodes whose constant weight can be factorised; give a reason for every other node."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from cobla_onnx.graph.check.geometry import check_geometry
from cobla_onnx.graph.index import (
    INTEGERS,
    SCALED_INTEGERS,
    GraphIndex,
    Origin,
    all_inputs,
    attributes,
    node_label,
)
from cobla_onnx.graph.inventory import Inventory, Layer, Reason, Skipped, Use
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.graph.tensors import subgraphs, tensor_array
from cobla_onnx.graph.weights import read_bias, read_weight
from cobla_onnx.text import quoted

__all__ = [
    "Inventory",
    "Layer",
    "Reason",
    "Skipped",
    "Use",
    "all_inputs",
    "attributes",
    "find_layers",
    "node_label",
    "read_bias",
    "read_weight",
]

FACTORISABLE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")
# Operators that hold weights of their own, which a reader of the report may look for.
REPORTED = {
    *FACTORISABLE,
    "DeformConv",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "LSTM",
    "GRU",
    "RNN",
    "FusedConv",
    "FusedMatMul",
    "FusedGemm",
    "MatMulNBits",
    "QGemm",
    "Attention",
    "LinearClassifier",
    "LinearRegressor",
    "SVMClassifier",
    "SVMRegressor",
    "TreeEnsemble",
    "TreeEnsembleClassifier",
    "TreeEnsembleRegressor",
}
# Types in which nodes compute; onnxruntime on a CPU has no bfloat16, which must be cast.
FLOAT_TYPES = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
}
STORED_TYPES = {*FLOAT_TYPES, onnx.TensorProto.BFLOAT16}
# What makes a weight that is not stored as it is read, and what that means.
MADE_BY = {
    "DequantizeLinear": Reason.QUANTISED,
    "DynamicQuantizeLinear": Reason.QUANTISED,
    SCALED_INTEGERS: Reason.QUANTISED,
    "ConstantOfShape": Reason.FILLED,
    "sparse": Reason.SPARSE,
}
# A tensor over 2 GB cannot be a field of a model, and its factors could be as large.
LARGEST = 2**31 - 1


def find_layers(model: onnx.ModelProto) -> Inventory:
    """Find every Conv, Gemm and MatMul whose weight is constant.

    Nodes that read the same stored weight in the same way are one layer.

    Returns
    -------
    Inventory
        Layers in the order of their first node, and the nodes not taken with a reason.
    """
    graph = GraphIndex(model)
    skipped: list[tuple[int, Skipped]] = []
    groups: dict[tuple[Any, ...], list[tuple[int, int, Origin]]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        skipped.extend((index, item) for item in _inside(node, index))
        if node.op_type not in REPORTED:
            continue
        found = _weight_operand(graph, node)
        if isinstance(found, tuple):
            position, origin = found
            key = (origin.source, origin.steps, origin.type, node.op_type, position)
            groups[(*key, *_reading(node).items())].append((index, position, origin))
        else:
            skipped.append((index, replace(found, name=node_label(node, index))))
    skipped.extend(
        (len(graph.nodes), Skipped(node_label(node, 0), node.op_type, Reason.SUBGRAPH))
        for function in model.functions
        for node in function.node
        if node.op_type in REPORTED
    )
    layers: list[Layer] = []
    taken: set[str] = set()
    for members in groups.values():
        layer = _layer(graph, members, taken)
        problem = _problem(graph, layer, members)
        if problem is None:
            layers.append(layer)
        else:
            reason, detail = problem
            item = Skipped(layer.name, layer.op, reason, detail, layer.params)
            skipped.append((layer.uses[0].node, item))
    skipped.sort(key=lambda entry: entry[0])
    return Inventory(tuple(layers), tuple(item for _, item in skipped))


def _inside(node: onnx.NodeProto, index: int) -> Iterable[Skipped]:
    stack = list(subgraphs(node))
    while stack:
        for inner in (graph := stack.pop()).node:
            if inner.op_type in REPORTED:
                name = f"{node_label(node, index)}/{inner.name or inner.op_type}"
                yield Skipped(name, inner.op_type, Reason.SUBGRAPH, graph.name)
            stack.extend(subgraphs(inner))


def _weight_operand(graph: GraphIndex, node: onnx.NodeProto) -> tuple[int, Origin] | Skipped:
    """Which operand is the stored weight, or why none is."""
    op = node.op_type
    if op not in FACTORISABLE or node.domain not in ("", "ai.onnx"):
        return Skipped("", op, Reason.OPERATOR, node.domain)
    positions = (1,) if op in CONVOLUTIONS else (0, 1)
    origins = [(p, graph.origin(node.input[p])) for p in positions if p < len(node.input)]
    constant = [(p, origin) for p, origin in origins if not isinstance(origin, str)]
    if len(constant) == 2:
        return Skipped("", op, Reason.BOTH_CONSTANT)
    if constant:
        return constant[0]
    for _, maker in origins:
        if maker in MADE_BY:
            return Skipped("", op, MADE_BY[str(maker)], str(maker))
    return Skipped("", op, Reason.NOT_CONSTANT)


def _reading(node: onnx.NodeProto) -> dict[str, int]:
    values = attributes(node)
    if node.op_type in CONVOLUTIONS:
        return {"group": values.get("group", 1)}
    if node.op_type == "Gemm":
        return {"transA": values.get("transA", 0), "transB": values.get("transB", 0)}
    return {}


def _layer(graph: GraphIndex, members: list[tuple[int, int, Origin]], taken: set[str]) -> Layer:
    first, position, origin = members[0]
    node = graph.nodes[first]
    name = node_label(node, first)
    if name in taken:
        name = f"{name}_{first}"
    taken.add(name)
    uses = tuple(
        Use(
            index,
            graph.nodes[index].input[1 - position],
            graph.nodes[index].output[0],
            member.chain,
        )
        for index, _, member in members
    )
    return Layer(
        name=name,
        op=node.op_type,
        source=origin.source,
        weight_input=position,
        shape=origin.shape,
        stored_type=origin.tensor.data_type,
        type=origin.type,
        stored_bytes=tensor_bytes(origin.tensor),
        uses=uses,
        attributes=_reading(node),
        bias=_own_bias(graph, members),
    )


def _own_bias(graph: GraphIndex, members: list[tuple[int, int, Origin]]) -> str | None:
    """Name of the bias of a layer's only node, if the layer may change it."""
    index, position, origin = members[0]
    node = graph.nodes[index]
    if len(members) > 1 or len(node.input) < 3 or node.op_type == "MatMul":
        return None
    name = node.input[2]
    tensor = graph.stored.get(name)
    if (
        tensor is None
        or tensor.data_type != origin.type
        or name in graph.kept
        or graph.readers[name] != [index]
    ):
        return None
    values = attributes(node)
    if values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0:
        return None
    shape = origin.shape
    # A bias that rules a class out, by minus infinity, can only stay as it is.
    if not np.isfinite(tensor_array(tensor, f"bias {quoted(name)}")).all():
        return None
    if len(shape) < 2 or list(node.input).count(name) > 1:
        return None
    if node.op_type == "Conv":
        outputs = shape[0]
    elif node.op_type == "ConvTranspose":
        outputs = shape[1] * values.get("group", 1)
    else:
        right = position == 1
        transposed = values.get("transB" if right else "transA", 0)
        if not right:
            # A bias along the last axis is one number for each output only on that side.
            return None
        outputs = shape[0] if transposed else shape[1]
    one_each = tensor.dims and math.prod(tensor.dims) == tensor.dims[-1] == outputs
    return name if one_each else None


def _problem(
    graph: GraphIndex, layer: Layer, members: list[tuple[int, int, Origin]]
) -> tuple[Reason, str] | None:
    for index, _, _ in members:
        label = f"node {quoted(node_label(graph.nodes[index], index))}"
        check_geometry(graph.nodes[index], layer.shape, label)
    if layer.type in FLOAT_TYPES and layer.stored_type in INTEGERS:
        return Reason.QUANTISED, onnx.TensorProto.DataType.Name(layer.stored_type)
    if layer.type not in FLOAT_TYPES or layer.stored_type not in STORED_TYPES:
        return Reason.TYPE, onnx.TensorProto.DataType.Name(layer.stored_type)
    if len(layer.shape) < (3 if layer.op in CONVOLUTIONS else 2):
        return Reason.NOT_A_MATRIX, f"shape {list(layer.shape)}"
    if layer.params <= 0:
        return Reason.EMPTY, f"shape {list(layer.shape)}"
    if layer.stored_bytes > LARGEST:
        return Reason.TOO_LARGE, f"{layer.stored_bytes} bytes"
    if layer.op in CONVOLUTIONS:
        group = layer.attributes["group"]
        if group > 1 and layer.shape[1] == 1:
            return Reason.DEPTHWISE, ""
        if group > 1 and layer.op == "ConvTranspose":
            return Reason.GROUPED, f"group {group}"
    own = {index for index, _, _ in members}
    own.update(index for _, _, origin in members for index in origin.chain)
    tensors = {layer.source}
    tensors.update(graph.nodes[index].output[0] for index in own - {m[0] for m in members})
    for tensor in tensors:
        if tensor in graph.kept:
            return Reason.SHARED, graph.kept[tensor]
        for reader in graph.readers[tensor]:
            if reader not in own:
                return Reason.SHARED, node_label(graph.nodes[reader], reader)
    for index in {m[0] for m in members}:
        if list(graph.nodes[index].input).count(graph.nodes[index].input[layer.weight_input]) > 1:
            return Reason.SHARED, "read twice by one node"
    return None
