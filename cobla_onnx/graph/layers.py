"""Find the nodes whose constant weight can be factorised; every other one gets a reason."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.model_file import constant_value, subgraphs, tensor_bytes

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

FACTORISABLE = ("Conv", "Gemm", "MatMul")
# Operators that hold weights of their own, which a reader of the report may look for.
REPORTED = {
    *FACTORISABLE,
    "ConvTranspose",
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
}
FLOAT_TYPES = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
}


class Reason(str, Enum):
    """Why a node is left as it is."""

    OPERATOR = "operator is not factorised"
    NOT_CONSTANT = "weight is not constant"
    BOTH_CONSTANT = "both operands are constant"
    SHARED = "weight has other readers"
    TYPE = "weight type is not supported"
    NOT_A_MATRIX = "weight is not a matrix"
    EMPTY = "weight has no elements"
    DEPTHWISE = "depthwise convolution"
    SUBGRAPH = "inside a sub-graph or function"
    EXCLUDED = "excluded by option"
    TOO_SMALL = "smaller than --min-size"
    NO_GAIN = "two factors would not be smaller"
    BUDGET = "budget is better spent elsewhere"
    MET = "budgets are met as it is"


@dataclass(frozen=True)
class Use:
    """One node that reads the weight of a layer.

    Attributes
    ----------
    node : int
        Index of the node in the graph.
    data : str
        Name of the other operand.
    output : str
        Name of the node's output.
    chain : tuple of int
        Indices of the Identity, Transpose and Cast nodes between the stored tensor and
        the node, in order.
    """

    node: int
    data: str
    output: str
    chain: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A constant weight and the nodes that read it.

    Attributes
    ----------
    name : str
        Name of the first node, or one made of its operator and index.
    op : str
        ``Conv``, ``Gemm`` or ``MatMul``.
    source : str
        Name of the stored tensor: an initializer, or the output of a Constant node.
    weight_input : int
        Which input of the nodes is the weight.
    shape : tuple of int
        Shape of the weight as the nodes read it.
    stored_type, type : int
        TensorProto data types: as stored, and as the nodes read it.
    stored_bytes : int
        Bytes of the stored tensor.
    attributes : dict
        Attributes of the first node that fix how the weight is read (``group``,
        ``transA``, ``transB``), with their defaults filled in.
    uses : tuple of Use
    bias : str or None
        Name of the stored bias, if nobody but this layer's single node reads it and it is
        added as it is: one number for each output channel.
    """

    name: str
    op: str
    source: str
    weight_input: int
    shape: tuple[int, ...]
    stored_type: int
    type: int
    stored_bytes: int
    uses: tuple[Use, ...]
    attributes: dict[str, int] = field(default_factory=dict)
    bias: str | None = None

    @property
    def params(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Skipped:
    """A node that is left as it is, and why; `params` is 0 where the weight is not known."""

    name: str
    op: str
    reason: Reason
    detail: str = ""
    params: int = 0

    def __str__(self) -> str:
        return self.reason.value + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Inventory:
    """What a model holds: layers that can be factorised, and nodes that can not."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def node_label(node: onnx.NodeProto, index: int) -> str:
    """Return a node's name, or a stable one made of its operator and place."""
    return node.name or f"{node.op_type}_{index}"


@dataclass(frozen=True)
class _Origin:
    """Where a constant operand comes from, and how it is turned on its way."""

    source: str
    tensor: onnx.TensorProto
    chain: tuple[int, ...]
    permutation: tuple[int, ...]
    type: int


class _Graph:
    """The main graph, indexed: who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes: Sequence[onnx.NodeProto] = graph.node
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.producer: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.output:
                self.producer[name] = index
            for name in set(all_inputs(node)):
                self.readers[name].append(index)
            value = constant_value(node)
            if value is not None and node.output:
                self.stored.setdefault(node.output[0], value)

    def origin(self, name: str) -> _Origin | None:
        """Follow a tensor back to what is stored, or None if it is computed."""
        chain: list[int] = []
        seen = {name}
        while name not in self.stored:
            index = self.producer.get(name)
            if index is None:
                return None
            node = self.nodes[index]
            if node.op_type not in ("Identity", "Transpose", "Cast") or node.domain:
                return None
            chain.append(index)
            name = node.input[0]
            if name in seen:
                return None
            seen.add(name)
        chain.reverse()
        tensor = self.stored[name]
        permutation = tuple(range(len(tensor.dims)))
        data_type = tensor.data_type
        for index in chain:
            values = attributes(self.nodes[index])
            if self.nodes[index].op_type == "Transpose":
                turn = values.get("perm", range(len(permutation))[::-1])
                if sorted(turn) != list(range(len(permutation))):
                    return None
                permutation = tuple(permutation[axis] for axis in turn)
            elif self.nodes[index].op_type == "Cast":
                data_type = values["to"]
        return _Origin(name, tensor, tuple(chain), permutation, data_type)


def all_inputs(node: onnx.NodeProto) -> Iterable[str]:
    """Yield the names that a node reads, those captured by its sub-graphs included."""
    yield from node.input
    stack = list(subgraphs(node))
    while stack:
        graph = stack.pop()
        for output in graph.output:
            yield output.name
        for inner in graph.node:
            yield from inner.input
            stack.extend(subgraphs(inner))


def find_layers(model: onnx.ModelProto) -> Inventory:
    """Find every Conv, Gemm and MatMul whose weight is constant.

    Nodes that read the same stored weight in the same way are one layer.

    Returns
    -------
    Inventory
        Layers in the order of their first node, and the nodes not taken with a reason.
    """
    graph = _Graph(model)
    skipped: list[tuple[int, Skipped]] = []
    groups: dict[tuple[Any, ...], list[tuple[int, int, _Origin]]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        skipped.extend((index, item) for item in _inside(node, index))
        if node.op_type not in REPORTED:
            continue
        found = _weight_operand(graph, node)
        if isinstance(found, tuple):
            position, origin = found
            key = (origin.source, origin.permutation, origin.type, node.op_type, position)
            groups[(*key, *_reading(node).items())].append((index, position, origin))
        else:
            skipped.append((index, Skipped(node_label(node, index), node.op_type, found)))
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


def _weight_operand(graph: _Graph, node: onnx.NodeProto) -> tuple[int, _Origin] | Reason:
    if node.op_type not in FACTORISABLE or node.domain not in ("", "ai.onnx"):
        return Reason.OPERATOR
    positions = (1,) if node.op_type == "Conv" else (0, 1)
    origins = [(p, graph.origin(node.input[p])) for p in positions if p < len(node.input)]
    constant = [(p, origin) for p, origin in origins if origin is not None]
    if not constant:
        return Reason.NOT_CONSTANT
    if len(constant) == 2:
        return Reason.BOTH_CONSTANT
    return constant[0]


def _reading(node: onnx.NodeProto) -> dict[str, int]:
    values = attributes(node)
    if node.op_type == "Conv":
        return {"group": values.get("group", 1)}
    if node.op_type == "Gemm":
        return {"transA": values.get("transA", 0), "transB": values.get("transB", 0)}
    return {}


def _layer(graph: _Graph, members: list[tuple[int, int, _Origin]], taken: set[str]) -> Layer:
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
        shape=tuple(origin.tensor.dims[axis] for axis in origin.permutation),
        stored_type=origin.tensor.data_type,
        type=origin.type,
        stored_bytes=tensor_bytes(origin.tensor),
        uses=uses,
        attributes=_reading(node),
        bias=_own_bias(graph, members),
    )


def _own_bias(graph: _Graph, members: list[tuple[int, int, _Origin]]) -> str | None:
    """Name of the bias of a layer's only node, if the layer may change it."""
    index, position, origin = members[0]
    node = graph.nodes[index]
    if len(members) > 1 or len(node.input) < 3 or node.op_type not in ("Conv", "Gemm"):
        return None
    name = node.input[2]
    tensor = graph.stored.get(name)
    if tensor is None or name in graph.outputs or graph.readers[name] != [index]:
        return None
    values = attributes(node)
    if values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0:
        return None
    shape = [origin.tensor.dims[axis] for axis in origin.permutation]
    if len(shape) < 2 or tensor.data_type != origin.type or list(node.input).count(name) > 1:
        return None
    if node.op_type == "Conv":
        outputs = shape[0]
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
    graph: _Graph, layer: Layer, members: list[tuple[int, int, _Origin]]
) -> tuple[Reason, str] | None:
    if layer.type not in FLOAT_TYPES or layer.stored_type not in FLOAT_TYPES:
        return Reason.TYPE, onnx.TensorProto.DataType.Name(layer.stored_type)
    if len(layer.shape) < (3 if layer.op == "Conv" else 2):
        return Reason.NOT_A_MATRIX, f"shape {list(layer.shape)}"
    if layer.params <= 0:
        return Reason.EMPTY, f"shape {list(layer.shape)}"
    if layer.op == "Conv":
        group = layer.attributes["group"]
        if group < 1 or layer.shape[0] % group:
            raise ModelError(
                f"node {layer.name!r}: group {group} does not divide its {layer.shape[0]} "
                "output channels; the model is damaged, export it again"
            )
        if group > 1 and layer.shape[1] == 1:
            return Reason.DEPTHWISE, ""
    own = {index for index, _, _ in members}
    own.update(index for _, _, origin in members for index in origin.chain)
    tensors = {layer.source}
    tensors.update(graph.nodes[index].output[0] for index in own - {m[0] for m in members})
    for tensor in tensors:
        if tensor in graph.outputs:
            return Reason.SHARED, "it is an output of the model"
        for reader in graph.readers[tensor]:
            if reader not in own:
                return Reason.SHARED, node_label(graph.nodes[reader], reader)
    for index in {m[0] for m in members}:
        if list(graph.nodes[index].input).count(graph.nodes[index].input[layer.weight_input]) > 1:
            return Reason.SHARED, "read twice by one node"
    return None


def read_weight(model: onnx.ModelProto, layer: Layer) -> NDArray[Any]:
    """Return the weight as the nodes of the layer read it, shape ``layer.shape``.

    Raises
    ------
    ModelError
        If the stored data does not fit the declared shape, or is not finite.
    """
    array = _read(model, layer, layer.source)
    for index in layer.uses[0].chain:
        node = model.graph.node[index]
        if node.op_type == "Transpose":
            array = np.transpose(array, attributes(node).get("perm"))
        elif node.op_type == "Cast":
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(attributes(node)["to"]))
    return array


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
    try:
        array: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"weight {name!r} of node {layer.name!r}: its data does not fit its shape "
            f"{list(tensor.dims)}; the file is damaged, export or download it again"
        ) from error
    if not np.isfinite(array).all():
        raise ModelError(
            f"weight {name!r} of node {layer.name!r} holds NaN or infinity; "
            "export the model again from a healthy checkpoint"
        )
    return array
