"""All nodes of a model in one list: those of the main graph, then those of the bodies of nodes.

A body is a graph that a node carries as an attribute, such as a branch of an If. Where no name
is defined twice over all graphs of a model (see `cobla_onnx.graph.opening`), who makes and who
reads a tensor follows from this list alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import onnx

from cobla_onnx.graph.tensors import subgraphs

__all__ = [
    "Placed",
    "all_nodes",
    "body_graphs",
    "defined_names",
    "names_are_unique",
    "node_label",
    "placed_nodes",
]


class Placed(NamedTuple):
    """A node and where it stands.

    Attributes
    ----------
    node : NodeProto
    label : str
        Its name, or one made of its operator and place; in a body, after the name of the node
        that holds it and of the attribute: ``choice.then_branch/hidden``.
    holder : int or None
        Index of the node of the main graph in whose body it is, however deep.
    """

    node: onnx.NodeProto
    label: str
    holder: int | None


def node_label(node: onnx.NodeProto, index: int) -> str:
    """Return a node's name, or a stable one made of its operator and place."""
    return node.name or f"{node.op_type}_{index}"


def placed_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> list[Placed]:
    """List the nodes of a main graph or function by their index, then those of all bodies."""
    found = [Placed(node, node_label(node, i), None) for i, node in enumerate(graph.node)]
    for index in range(len(found)):
        found.extend(_inside(found[index].node, found[index].label, index))
    return found


def _inside(node: onnx.NodeProto, label: str, holder: int) -> Iterator[Placed]:
    for name, graph in _named_bodies(node):
        placed = [
            Placed(inner, f"{label}.{name}/{node_label(inner, index)}", holder)
            for index, inner in enumerate(graph.node)
        ]
        yield from placed
        for inner in placed:
            yield from _inside(inner.node, inner.label, holder)


def _named_bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for number, graph in enumerate(attribute.graphs):
                yield f"{attribute.name}_{number}", graph


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.NodeProto]:
    """List the nodes of a main graph or function, and of all bodies, as `placed_nodes` does."""
    if not any(True for node in graph.node for _ in subgraphs(node)):
        return list(graph.node)
    return [placed.node for placed in placed_nodes(graph)]


def body_graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of nodes, and the bodies of nodes in them."""
    for node in nodes:
        for graph in subgraphs(node):
            yield graph
            yield from body_graphs(graph.node)


def defined_names(graph: onnx.GraphProto) -> list[str]:
    """Names that a graph itself defines, each once: inputs, initializers, outputs of nodes."""
    # Before IR version 4 an initializer is an input, too.
    names = dict.fromkeys(value.name for value in graph.input)
    names.update(dict.fromkeys(tensor.name for tensor in graph.initializer))
    names.update(dict.fromkeys(item.values.name for item in graph.sparse_initializer))
    names.update(dict.fromkeys(name for node in graph.node for name in node.output if name))
    return list(names)


def names_are_unique(graph: onnx.GraphProto) -> bool:
    """Whether no name is defined twice in a graph and all bodies in it."""
    seen: set[str] = set()
    for each in (graph, *body_graphs(graph.node)):
        names = defined_names(each)
        if not seen.isdisjoint(names):
            return False
        seen.update(names)
    return True
