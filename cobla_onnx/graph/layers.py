"""Find the nodes whose constant weight can be compressed; give a reason for every other node."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx

from cobla_onnx.graph.bodies import all_nodes, names_are_unique
from cobla_onnx.graph.index import (
    INTEGERS,
    SCALED_INTEGERS,
    GraphIndex,
    Origin,
    all_inputs,
    attributes,
    node_label,
)
from cobla_onnx.graph.inventory import Inventory, Layer, Reason, Refusal, Skipped, Use
from cobla_onnx.graph.operators.base import (
    OPERATORS,
    WeightOperator,
    operator_of,
    operators_of_node,
)
from cobla_onnx.graph.protos import FLOAT_TYPES, STORED_TYPES
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.graph.tied import Steps, tied
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
    "outputs_of",
    "read_bias",
    "read_weight",
]

# Other operators that hold weights, which a reader of the report may look for.
REPORTED = {
    "DeformConv",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
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
    """Find every node of a registered operator whose weight is constant.

    Nodes that read the same stored weight in the same way are one layer. So are those that read a
    stored matrix in several ways, where these go together (`cobla_onnx.graph.tied`). Those in
    bodies are layers in a model that was prepared for it, see `opening.opened`.

    Returns
    -------
    Inventory
        Layers in the order of their first node, and the nodes not taken with a reason.
    """
    graph = GraphIndex(model)
    readers = _readers(graph, names_are_unique(model.graph))
    skipped = list(readers.skipped)
    skipped.extend(
        (len(graph.nodes), Skipped(node_label(node, 0), node.op_type, Reason.SUBGRAPH))
        for function in model.functions
        for node in function.node
        if _is_reported(node) and not _is_incidental(node)
    )
    layers: list[Layer] = []
    for layer in _candidates(graph, readers):
        problem = _problem(graph, layer)
        if problem is None:
            layers.append(layer)
        else:
            for each in layer.readings or (layer,):
                item = Skipped(each.name, each.op, *problem, layer.params)
                skipped.append((each.uses[0].place, item))
    skipped.sort(key=lambda entry: entry[0])
    return Inventory(tuple(layers), tuple(item for _, item in skipped))


class _Readers(NamedTuple):
    """Nodes that read weights: those that read the same one in the same way, and others.

    Attributes
    ----------
    groups : list of lists of (int, int, Origin)
        Of each node its index, which input the weight is, and where that comes from.
    skipped : list of (int, Skipped)
        Of each node its place.
    """

    groups: list[list[tuple[int, int, Origin]]]
    skipped: list[tuple[int, Skipped]]


def _readers(graph: GraphIndex, unique: bool) -> _Readers:
    """Go through all nodes; those in bodies count where all names are `unique`."""
    skipped: list[tuple[int, Skipped]] = []
    groups: dict[tuple[Any, ...], list[tuple[int, int, Origin]]] = defaultdict(list)
    for index in sorted(range(len(graph.nodes)), key=graph.place):
        node, label, place = graph.nodes[index], graph.labels[index], graph.place(index)
        if not _is_reported(node):
            continue
        if graph.holders[index] is not None and not unique:
            if not _is_incidental(node):
                skipped.append((place, Skipped(label, node.op_type, Reason.SUBGRAPH)))
            continue
        operators = operators_of_node(node)
        if not operators:
            skipped.append((place, Skipped(label, node.op_type, Reason.OPERATOR, node.domain)))
        for operator in operators:
            found = _weight_operand(graph, node, operator)
            if operator.incidental and not _is_floating_matrix(found):
                continue
            if isinstance(found, tuple):
                position, origin = found
                how = (origin.source, origin.steps, origin.type, node.op_type, position)
                key = (*how, *operator.reading(node).items())
                groups[key].append((index, position, origin))
            else:
                skipped.append((place, replace(found, name=_name(node, label, operator))))
    return _Readers(list(groups.values()), skipped)


def _candidates(graph: GraphIndex, readers: _Readers) -> list[Layer]:
    """Make layers of nodes that read the same weight, whether or not they can be replaced."""
    taken: set[str] = set()
    found: list[tuple[Layer, str, Steps]] = []
    for members in readers.groups:
        layer = _layer(graph, members, taken)
        found.append((layer, operator_of(layer).kind, members[0][2].steps))
    return tied(found, {name: tuple(tensor.dims) for name, tensor in graph.stored.items()})


def outputs_of(model: onnx.ModelProto, layer: Layer) -> list[str]:
    """All tensors that a layer's nodes make: a recurrent one gives out several."""
    nodes = all_nodes(model.graph)
    return [name for use in layer.uses for name in nodes[use.node].output if name]


def _is_reported(node: onnx.NodeProto) -> bool:
    return node.op_type in REPORTED or node.op_type in OPERATORS


def _is_incidental(node: onnx.NodeProto) -> bool:
    return any(operator.incidental for operator in operators_of_node(node))


def _is_floating_matrix(found: tuple[int, Origin] | Skipped) -> bool:
    if isinstance(found, Skipped):
        return False
    return len(found[1].shape) > 1 and found[1].type in STORED_TYPES


def _name(node: onnx.NodeProto, label: str, operator: WeightOperator) -> str:
    """Name of a layer: that of its node and, where this holds several weights, of the input."""
    if len(operators_of_node(node)) == 1:
        return label
    schema = onnx.defs.get_schema(node.op_type, domain=operator.domain)
    return f"{label}/{schema.inputs[operator.weight_inputs[0]].name}"


def _weight_operand(
    graph: GraphIndex, node: onnx.NodeProto, operator: WeightOperator
) -> tuple[int, Origin] | Skipped:
    """Which operand is the stored weight, or why none is."""
    op = node.op_type
    positions = (p for p in operator.weight_inputs if p < len(node.input))
    origins = [(p, graph.origin(node.input[p])) for p in positions]
    constant = [(p, origin) for p, origin in origins if not isinstance(origin, str)]
    if len(constant) == 2:
        return Skipped("", op, Reason.BOTH_CONSTANT)
    if constant:
        return constant[0]
    for _, maker in origins:
        if maker in MADE_BY:
            return Skipped("", op, MADE_BY[str(maker)], str(maker))
    return Skipped("", op, Reason.NOT_CONSTANT)


def _layer(graph: GraphIndex, members: list[tuple[int, int, Origin]], taken: set[str]) -> Layer:
    first, position, origin = members[0]
    node = graph.nodes[first]
    operator = next(o for o in operators_of_node(node) if position in o.weight_inputs)
    name = _name(node, graph.labels[first], operator)
    if name in taken:
        name = f"{name}_{first}"
    taken.add(name)
    uses = tuple(
        Use(
            index,
            graph.nodes[index].input[0 if position else 1],
            next(name for name in graph.nodes[index].output if name),
            member.chain,
            graph.holders[index],
        )
        for index, _, member in members
    )
    for index, _, member in members:
        label = f"node {quoted(graph.labels[index])}"
        operator.check(graph.nodes[index], member.shape, label)
    layer = Layer(
        name=name,
        op=node.op_type,
        source=origin.source,
        weight_input=position,
        shape=origin.shape,
        stored_type=origin.tensor.data_type,
        type=origin.type,
        stored_bytes=tensor_bytes(origin.tensor),
        uses=uses,
        attributes=operator.reading(node),
    )
    return replace(layer, bias=_own_bias(graph, layer))


def _own_bias(graph: GraphIndex, layer: Layer) -> str | None:
    """Name of the bias of a layer's only node, if the layer may change it."""
    index = layer.uses[0].node
    node = graph.nodes[index]
    if len(layer.uses) > 1 or len(node.input) < 3:
        return None
    name = node.input[2]
    tensor = graph.stored.get(name)
    if (
        tensor is None
        or tensor.data_type != layer.type
        or name in graph.kept
        or name in graph.inside
        or graph.readers[name] != [index]
        or list(node.input).count(name) > 1
    ):
        return None
    operator = operator_of(layer)
    if len(layer.shape) < 2 or not operator.adds_bias(node):
        return None
    # A bias that rules a class out, by minus infinity, can only stay as it is.
    if not np.isfinite(tensor_array(tensor, f"bias {quoted(name)}")).all():
        return None
    outputs = operator.output_axis(layer)
    one_each = tensor.dims and math.prod(tensor.dims) == tensor.dims[-1]
    return name if outputs is not None and one_each and tensor.dims[-1] == outputs.size else None


def _problem(graph: GraphIndex, layer: Layer) -> Refusal | None:
    """Why a layer cannot be compressed."""
    if layer.type in FLOAT_TYPES and layer.stored_type in INTEGERS:
        return Refusal(Reason.QUANTISED, onnx.TensorProto.DataType.Name(layer.stored_type))
    if layer.type not in FLOAT_TYPES or layer.stored_type not in STORED_TYPES:
        return Refusal(Reason.TYPE, onnx.TensorProto.DataType.Name(layer.stored_type))
    if len(layer.shape) < 2:
        return Refusal(Reason.NOT_A_MATRIX, f"shape {list(layer.shape)}")
    if layer.params <= 0:
        return Refusal(Reason.EMPTY, f"shape {list(layer.shape)}")
    if layer.stored_bytes > LARGEST:
        return Refusal(Reason.TOO_LARGE, f"{layer.stored_bytes} bytes")
    chain = [graph.holders[index] for use in layer.uses for index in use.chain]
    if layer.source in graph.inside or any(holder is not None for holder in chain):
        return Refusal(Reason.SUBGRAPH)
    return operator_of(layer).refusal(layer, None) or _other_reader(graph, layer)


def _other_reader(graph: GraphIndex, layer: Layer) -> Refusal | None:
    """Find what reads a weight beside the layer's nodes, or reads it twice."""
    nodes = [use.node for use in layer.uses]
    between = dict.fromkeys(index for use in layer.uses for index in use.chain)
    for tensor in (layer.source, *(graph.nodes[index].output[0] for index in between)):
        if tensor in graph.kept:
            return Refusal(Reason.SHARED, graph.kept[tensor])
        for reader in graph.readers[tensor]:
            if reader not in between and reader not in nodes:
                return Refusal(Reason.SHARED, graph.labels[reader])
    for use in layer.uses:
        inputs = list(graph.nodes[use.node].input)
        if inputs.count(inputs[layer.reading(use).weight_input]) > 1:
            return Refusal(Reason.SHARED, "read twice by one node")
    return None
