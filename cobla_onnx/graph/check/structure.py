"""Check that a model is complete and consistent, before any other library works on it.

onnx's checker passes a group of 0, a false kernel_shape, doubled node names, unknown
opsets and too much data; onnxruntime passes doubled initializers and unsorted graphs.
Here everything is checked that the rest of this package relies on. All sizes are Python
integers, and long chains are walked in loops; the recursion is over nested graphs alone,
whose depth protobuf's parser limits.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import onnx
from google.protobuf.message import Message

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.check.schemas import Schemas
from cobla_onnx.graph.index import all_inputs, node_label
from cobla_onnx.graph.io.external import is_external
from cobla_onnx.graph.operators.base import operators_of_node
from cobla_onnx.graph.protos import is_repeated, plain_domain
from cobla_onnx.graph.sizes import PACKED, tensor_bytes
from cobla_onnx.graph.tensors import HeldTensor, all_tensors, constant_value, subgraphs
from cobla_onnx.text import quoted

__all__ = ["check_structure"]

AGAIN = "the file is damaged, export or download it again"
# Entries for each element of the typed data fields.
FIELDS = {
    "FLOAT": ("float_data", 1),
    "COMPLEX64": ("float_data", 2),
    "DOUBLE": ("double_data", 1),
    "COMPLEX128": ("double_data", 2),
    "INT64": ("int64_data", 1),
    "UINT32": ("uint64_data", 1),
    "UINT64": ("uint64_data", 1),
    "STRING": ("string_data", 1),
}


def check_structure(model: onnx.ModelProto) -> None:
    """Check versions, tensors, names, order and attributes.

    Nodes of the main graph must have been sorted, see `order.sort_nodes`.

    Raises
    ------
    ModelError
        If the model is damaged, or newer than the installed onnx; the message names the
        node or tensor, but not the file.
    """
    _check_text(model)
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"holds no graph with nodes; {AGAIN}")
    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"has IR version {model.ir_version}, onnx {onnx.__version__} knows 1 to "
            f"{onnx.IR_VERSION}; update onnx, or export again"
        )
    _check_opsets(model.opset_import, "the model")
    for held in all_tensors(model):
        _check_tensor(held)
    _check_functions(model.functions)
    calls = {(f.domain, f.name) for f in model.functions}
    _check_graph(model.graph, frozenset(), _Context(Schemas(model.opset_import, calls), ""))
    for function in model.functions:
        label = f"function {quoted(function.name)}"
        _check_opsets(function.opset_import, label)
        context = _Context(
            Schemas(function.opset_import, calls, inside_function=True), f"{label}, "
        )
        names = _unique(function.input, f"{label}: input")
        _check_nodes(function.node, names, {}, context)
        _check_made(function.output, names, context)


def _check_text(model: onnx.ModelProto) -> None:
    """Refuse text that is not UTF-8: protobuf reads it as bytes, and accepts it nowhere."""
    pending: list[Message] = [model]
    while pending:
        message = pending.pop()
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend(value if is_repeated(field) else [value])
            elif field.type == field.TYPE_STRING:
                for text in value if is_repeated(field) else [value]:
                    if not isinstance(text, str):
                        raise ModelError(
                            f"field {field.full_name}: holds text that is not UTF-8; {AGAIN}"
                        )


class _Context:
    """Where a graph is, and the operator sets that its nodes use."""

    def __init__(self, schemas: Schemas, where: str) -> None:
        self.schemas = schemas
        self.where = where

    def node(self, node: onnx.NodeProto, index: int) -> str:
        return f"{self.where}node {quoted(node_label(node, index))}"


def _check_opsets(imports: Iterable[onnx.OperatorSetIdProto], label: str) -> None:
    versions: dict[str, int] = {}
    for entry in imports:
        domain = plain_domain(entry.domain)
        if versions.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f"{label} imports operator set {quoted(domain)} twice; {AGAIN}")
    if not versions:
        raise ModelError(f"{label} imports no operator set; {AGAIN}")
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= versions.get("", 1) <= newest:
        raise ModelError(
            f"{label} uses opset {versions['']}, onnx {onnx.__version__} knows 1 to {newest}; "
            "update onnx, or export again for an older opset"
        )


def _check_tensor(held: HeldTensor) -> None:
    tensor = held.tensor
    shape = list(tensor.dims)
    if tensor.data_type not in onnx.TensorProto.DataType.values() or not tensor.data_type:
        raise ModelError(f"{held.label}: has unknown data type {tensor.data_type}; {AGAIN}")
    if any(size < 0 for size in shape):
        raise ModelError(f"{held.label}: has a negative size in its shape {shape}; {AGAIN}")
    if is_external(tensor):
        return
    count = math.prod(shape)
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if tensor.HasField("raw_data") and kind != "STRING":
        needed, present, unit = tensor_bytes(tensor), len(tensor.raw_data), "bytes"
    else:
        name, each = FIELDS.get(kind, ("int32_data", 1))
        packed = PACKED.get(kind, 1)
        needed, unit = (count * each + packed - 1) // packed, "numbers"
        present = len(getattr(tensor, name))
    if needed != present:
        raise ModelError(
            f"{held.label}: shape {shape} needs {needed} {unit}, the file holds {present}; {AGAIN}"
        )


def _check_functions(functions: Sequence[onnx.FunctionProto]) -> None:
    """Refuse functions defined twice, and those that call themselves, however indirectly."""
    keys = [(f.domain, f.name, f.overload) for f in functions]
    twice = _first_double(keys)
    if twice is not None:
        raise ModelError(f"function {quoted(twice[1])}: is defined twice; {AGAIN}")
    known = {key[:2] for key in keys}
    calls: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for function in functions:
        nodes = list(function.node)
        while nodes:
            node = nodes.pop()
            if (node.domain, node.op_type) in known:
                calls[function.domain, function.name].add((node.domain, node.op_type))
            for graph in subgraphs(node):
                nodes.extend(graph.node)
    left = dict(calls)
    while left:
        free = [key for key, called in left.items() if not called & left.keys()]
        if not free:
            name = min(left)[1]
            raise ModelError(f"function {quoted(name)}: calls itself in a cycle; {AGAIN}")
        for key in free:
            del left[key]


def _first_double(items: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    return next((item for item, count in Counter(items).items() if count > 1), None)


def _unique(names: Iterable[str], what: str) -> set[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ModelError(f"{what} {quoted(name)}: occurs twice; {AGAIN}")
        seen.add(name)
    return seen


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], context: _Context) -> None:
    where = context.where
    inputs = _unique((value.name for value in graph.input), f"{where}graph input")
    sparse = (item.values.name for item in graph.sparse_initializer)
    stored = _unique((*(t.name for t in graph.initializer), *sparse), f"{where}initializer")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    names = inputs | stored
    _check_nodes(graph.node, names, shapes, context, outer)
    _unique((value.name for value in graph.output), f"{where}graph output")
    _check_made((value.name for value in graph.output), names | outer, context)


def _check_made(outputs: Iterable[str], names: Iterable[str], context: _Context) -> None:
    known = set(names)
    for name in outputs:
        if name not in known:
            raise ModelError(f"{context.where}output {quoted(name)}: no node makes it; {AGAIN}")


def _check_nodes(
    nodes: Sequence[onnx.NodeProto],
    names: set[str],
    shapes: dict[str, tuple[int, ...]],
    context: _Context,
    outer: frozenset[str] = frozenset(),
) -> None:
    """Check the nodes of one graph in order.

    Parameters
    ----------
    names : set of str
        Inputs and initializers; the outputs of the nodes are added.
    shapes : dict
        Of stored tensors, by name; those of Constant nodes are added.
    outer : frozenset of str
        What the graph may read from the graphs around it.
    """
    labels: set[str] = set()
    for index, node in enumerate(nodes):
        label = context.node(node, index)
        # onnxruntime refuses this too, but not among Constant nodes, where it occurs.
        if node.name and node.op_type != "Constant":
            if node.name in labels:
                raise ModelError(f"{label}: another node has the same name; {AGAIN}")
            labels.add(node.name)
        context.schemas.check(node, label)
        for name in node.input:
            if name and name not in names and name not in outer:
                raise _unknown_input(nodes, index, name, label)
        for graph in subgraphs(node):
            inner = _Context(context.schemas, f"{label}, ")
            _check_graph(graph, outer | names, inner)
        for name in node.output:
            if name and name in names:
                raise ModelError(f"{label}: makes {quoted(name)}, which exists already; {AGAIN}")
            names.add(name)
        value = constant_value(node)
        if value is not None and node.output:
            shapes[node.output[0]] = tuple(value.dims)
        _check_weight(node, shapes, label)
    names.discard("")


def _check_weight(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
    for operator in operators_of_node(node):
        for position in operator.weight_inputs:
            shape = shapes.get(node.input[position]) if position < len(node.input) else None
            if shape is not None:
                operator.check(node, shape, label)


def _unknown_input(
    nodes: Sequence[onnx.NodeProto], index: int, name: str, label: str
) -> ModelError:
    """Say why an input is not there: missing, made later, or made from the node's own output."""
    producer = {output: i for i, node in enumerate(nodes) for output in node.output if output}
    if name not in producer:
        return ModelError(f"{label}: reads {quoted(name)}, which nothing produces; {AGAIN}")
    pending, seen = [producer[name]], set()
    while pending:
        current = pending.pop()
        if current == index:
            return ModelError(f"{label}: depends on its own output {quoted(name)}; {AGAIN}")
        if current not in seen:
            seen.add(current)
            pending.extend(producer[i] for i in nodes[current].input if i in producer)
    looped = _in_a_cycle(nodes, producer, index, producer[name])
    if looped is not None:
        cause = quoted(node_label(nodes[looped], looped))
        return ModelError(
            f"{label}: waits for node {cause}, which depends on its own output; {AGAIN}"
        )
    later = node_label(nodes[producer[name]], producer[name])
    return ModelError(
        f"{label}: reads {quoted(name)}, which node {quoted(later)} makes only later, "
        "which onnxruntime takes in the main graph alone; sort the nodes, or export again"
    )


def _in_a_cycle(
    nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int], first: int, start: int
) -> int | None:
    """Walk back from a node, through `first` and later ones, until one is met again."""
    current: int | None = start
    seen: set[int] = set()
    while current is not None and current not in seen:
        seen.add(current)
        makers = (producer.get(name, -1) for name in all_inputs(nodes[current]))
        current = next((maker for maker in makers if maker >= first), None)
    return current
