"""A graph indexed: who makes and who reads each tensor, and where constants come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from cobla_onnx.graph.tensors import constant_value, subgraphs

__all__ = ["GraphIndex", "Origin", "all_inputs", "attributes", "node_label"]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values; without those that a function is given."""
    return {
        a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name
    }


def node_label(node: onnx.NodeProto, index: int) -> str:
    """Return a node's name, or a stable one made of its operator and place."""
    return node.name or f"{node.op_type}_{index}"


@dataclass(frozen=True)
class Origin:
    """Where a constant operand comes from, and how it is turned on its way."""

    source: str
    tensor: onnx.TensorProto
    chain: tuple[int, ...]
    permutation: tuple[int, ...]
    type: int


class GraphIndex:
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

    def origin(self, name: str) -> Origin | None:
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
        return Origin(name, tensor, tuple(chain), permutation, data_type)


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
