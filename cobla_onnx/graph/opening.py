"""Prepare a model so that layers in bodies and functions can be found and replaced.

Functions that hold layers are opened. Weights of layers in bodies move to the main graph, where
every body can read them, names that several bodies define are made different, and that is all:
the bodies stay, and the model computes what it did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx

from cobla_onnx.graph.bodies import body_graphs, defined_names
from cobla_onnx.graph.functions import with_open_functions
from cobla_onnx.graph.index import GraphIndex, Origin
from cobla_onnx.graph.io.model_file import (
    add_initializers,
    copy_without_initializers,
    is_weight,
    unique_name,
)
from cobla_onnx.graph.operators.base import operators_of_node
from cobla_onnx.graph.protos import copied_node
from cobla_onnx.graph.tensors import subgraphs

__all__ = ["opened", "rename_tensors"]


def opened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its layers where `find_layers` can take them.

    Returns
    -------
    ModelProto
        `model` itself if no body and no function holds a layer, else a copy.
    """
    model = with_open_functions(model)
    if not any(operators_of_node(n) for body in body_graphs(model.graph.node) for n in body.node):
        return model
    result = copy_without_initializers(model, ())
    _make_names_unique(result.graph)
    index = GraphIndex(result)
    tensors, nodes, found = _constants_of_layers(index)
    if not found:
        return model
    _move_initializers(result, tensors)
    _move_nodes(result.graph, index, nodes)
    return result


def _make_names_unique(graph: onnx.GraphProto) -> None:
    """Rename what a body defines under a name that another graph has."""
    seen = set(defined_names(graph))
    used = set(seen).union(*map(defined_names, body_graphs(graph.node)))
    for node in graph.node:
        for body in subgraphs(node):
            _rename_body(body, {}, seen, used)


def _rename_body(
    body: onnx.GraphProto, outer: Mapping[str, str], seen: set[str], used: set[str]
) -> None:
    own = defined_names(body)
    names = {old: new for old, new in outer.items() if old not in own}
    for name in own:
        new = unique_name(name, used) if name in seen else name
        seen.add(new)
        if new != name:
            names[name] = new
    _rename_here(body, names)
    for node in body.node:
        for inner in subgraphs(node):
            _rename_body(inner, names, seen, used)


def _rename_here(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors in a graph, but not in the bodies of its nodes."""
    if not names:
        return
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            value.name = names.get(value.name, value.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for note in graph.quantization_annotation:
        note.tensor_name = names.get(note.tensor_name, note.tensor_name)
    for node in graph.node:
        _rename_node(node, names)


def _rename_node(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    for listed in (node.input, node.output):
        for position, name in enumerate(listed):
            if name in names:
                listed[position] = names[name]


def rename_tensors(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors in a graph and all bodies, in place, whichever of them defines a name."""
    for each in (graph, *body_graphs(graph.node)):
        _rename_here(each, names)


def _constants_of_layers(index: GraphIndex) -> tuple[set[str], set[int], bool]:
    """Initializers and nodes in bodies from which the constants of layers there come.

    Returns
    -------
    tensors : set of str
    nodes : set of int
        Constant nodes, and what stands between a stored weight and its layer.
    found : bool
        Whether there is a layer in a body, though its weight may stand outside already.
    """
    tensors: set[str] = set()
    nodes: set[int] = set()
    found = False
    for reader, node in enumerate(index.nodes):
        if index.holders[reader] is None:
            continue
        operators = operators_of_node(node)
        positions = [p for o in operators for p in o.weight_inputs if p < len(node.input)]
        origins = [index.origin(node.input[p]) for p in positions]
        weights = [o for o in origins if isinstance(o, Origin) and len(o.shape) > 1]
        weights = [o for o in weights if is_weight(o.tensor)]
        if not weights:
            continue
        found = True
        read = [name for name in node.input if name]
        for origin in weights:
            nodes.update(i for i in origin.chain if index.holders[i] is not None)
            read += [origin.source]
            read += [name for i in origin.chain for name in index.nodes[i].input]
        for name in read:
            if name in index.inside and name not in index.kept:
                maker = index.producer.get(name)
                tensors.update([name] if maker is None else [])
                nodes.update([] if maker is None else [maker])
    # What a body hands out itself, it has to make itself.
    return tensors, {i for i in nodes if not index.kept.keys() & set(index.nodes[i].output)}, found


def _move_initializers(model: onnx.ModelProto, names: set[str]) -> None:
    for body in list(body_graphs(model.graph.node)):
        inputs = {value.name for value in body.input}
        moved = [t for t in body.initializer if t.name in names and t.name not in inputs]
        if not moved:
            continue
        add_initializers(model, moved)
        gone = {tensor.name for tensor in moved}
        kept = [tensor for tensor in body.initializer if tensor.name not in gone]
        values = [value for value in body.value_info if value.name not in gone]
        del body.initializer[:], body.value_info[:]
        body.initializer.extend(kept)
        body.value_info.extend(values)


def _move_nodes(graph: onnx.GraphProto, index: GraphIndex, chosen: set[int]) -> None:
    """Move nodes that need nothing but constants before the node in whose body they are."""
    moved: dict[int, list[onnx.NodeProto]] = defaultdict(list)
    gone: set[str] = set()
    for number in sorted(chosen):
        node = copied_node(index.nodes[number])
        node.name = index.labels[number]
        moved[index.place(number)].append(node)
        gone.update(node.output)
    if not gone:
        return
    # Inner bodies first: an outer one is made of copies of its nodes, which hold them.
    for body in reversed(list(body_graphs(graph.node))):
        kept = [node for node in body.node if gone.isdisjoint(node.output)]
        if len(kept) == len(body.node):
            continue
        copies = [copied_node(node) for node in kept]
        values = [value for value in body.value_info if value.name not in gone]
        del body.node[:], body.value_info[:]
        body.node.extend(copies)
        body.value_info.extend(values)
    nodes = []
    for place, node in enumerate(graph.node):
        nodes += _sorted(moved.get(place, []))
        nodes.append(copied_node(node))
    del graph.node[:]
    graph.node.extend(nodes)


def _sorted(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Put nodes of several bodies behind those that they read."""
    made = {name for node in nodes for name in node.output}
    result: list[onnx.NodeProto] = []
    while nodes:
        ready = [node for node in nodes if made.isdisjoint(node.input)]
        made -= {name for node in ready for name in node.output}
        result += ready
        nodes = [node for node in nodes if not any(node is each for each in ready)]
    return result
