"""Sort the nodes of a graph topologically, and restore their original order afterwards.

The ONNX standard wants each node after those whose outputs it reads. onnxruntime does not
insist on that in the main graph, so that files are about that do not have it; in sub-graphs
and functions it does. Nodes are moved within their list: nothing that they hold is copied.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import onnx

from cobla_onnx.graph.tensors import subgraphs

__all__ = ["Order", "captured_names", "is_sorted", "restore_order", "sort_nodes"]

Order = Mapping[str, int]
"""Places of nodes in a file by the first output of each; empty if they were sorted."""


def sort_nodes(graph: onnx.GraphProto) -> Order:
    """Sort the nodes of a graph in place, if they are not: the first that is ready comes first.

    Nodes that wait for their own outputs come last, in the order they had.

    Returns
    -------
    mapping of str to int
        What `restore_order` needs; empty if the nodes stay as they are.
    """
    if is_sorted(graph):
        return {}
    order = {_key(node): place for place, node in enumerate(graph.node)}
    _arrange(graph, _sorted(_needed(graph.node)))
    return order


def is_sorted(graph: onnx.GraphProto) -> bool:
    """Whether each node stands after those whose outputs it reads."""
    needed = _needed(graph.node)
    return all(maker < place for place, makers in enumerate(needed) for maker in makers)


def restore_order(graph: onnx.GraphProto, order: Order) -> None:
    """Put nodes in the order they had, in place.

    Nodes that are new stand before the next one, as they come, that is not.
    """
    if not order:
        return
    places = []
    place = len(order)
    for node in reversed(graph.node):
        place = order.get(_key(node), place)
        places.append(place)
    places.reverse()
    _arrange(graph, sorted(range(len(places)), key=places.__getitem__))


def captured_names(graph: onnx.GraphProto) -> set[str]:
    """Names that a sub-graph reads from the graphs around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own.update(item.values.name for item in graph.sparse_initializer)
    read = {value.name for value in graph.output}
    for node in graph.node:
        own.update(node.output)
        read.update(_read(node))
    return read - own


def _read(node: onnx.NodeProto) -> set[str]:
    return set(node.input).union(*map(captured_names, subgraphs(node)))


def _key(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "")


def _needed(nodes: Sequence[onnx.NodeProto]) -> list[set[int]]:
    """For each node the places of those that make what it reads."""
    producer: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in node.output:
            producer.setdefault(name, place)
    producer.pop("", None)
    return [{producer[name] for name in _read(node) if name in producer} for node in nodes]


def _sorted(needed: Sequence[set[int]]) -> list[int]:
    """Kahn's algorithm (1962); of the nodes that are ready always the first."""
    readers: list[list[int]] = [[] for _ in needed]
    for place, makers in enumerate(needed):
        for maker in makers:
            readers[maker].append(place)
    waiting = [len(makers) for makers in needed]
    ready = [place for place, count in enumerate(waiting) if not count]
    found = []
    while ready:
        place = heapq.heappop(ready)
        found.append(place)
        for reader in readers[place]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return found + [place for place, count in enumerate(waiting) if count]


def _arrange(graph: onnx.GraphProto, places: Sequence[int]) -> None:
    """Move the node at ``places[i]`` to place i."""
    wanted = {place: number for number, place in enumerate(places)}
    numbers = iter(range(len(places)))
    # list.sort, which protobuf uses, asks for the key of each item once, in their order.
    graph.node.sort(key=lambda _: wanted[next(numbers)])
