"""Index of a graph: the producer and the readers of each tensor, and the source of constants."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from cobla_onnx.graph.bodies import body_graphs, node_label, placed_nodes
from cobla_onnx.graph.protos import is_standard
from cobla_onnx.graph.tensors import constant_value, subgraphs, tensor_array
from cobla_onnx.text import quoted

__all__ = [
    "INTEGERS",
    "SCALED_INTEGERS",
    "GraphIndex",
    "Origin",
    "all_inputs",
    "attributes",
    "inputs_of_bodies",
    "node_label",
]

# Operators between a stored weight and its node that are followed.
PASSED = ("Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze")
# Arithmetic by which graphs write DequantizeLinear out.
SCALING = ("Add", "Sub", "Mul", "Div")
SCALED_INTEGERS = "integers, scaled"
# Types in which weights are quantised.
INTEGERS = {
    value
    for name, value in onnx.TensorProto.DataType.items()
    if name.startswith(("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "FLOAT8", "FLOAT4"))
}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values; without those that a function is given."""
    return {
        a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name
    }


@dataclass(frozen=True)
class Origin:
    """Where a constant operand comes from, and what happens to it on its way.

    Attributes
    ----------
    source : str
        Name of the stored tensor.
    tensor : onnx.TensorProto
    chain : tuple of int
        Indices of the nodes in between, in order.
    steps : tuple
        What those that move elements do: the permutation or the new shape of each, or the begin and
        the end of each group of rows in their new order.
    shape : tuple of int
        Shape at the end of the chain.
    type : int
        Data type at the end of the chain.
    """

    source: str
    tensor: onnx.TensorProto
    chain: tuple[int, ...]
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    type: int


class GraphIndex:
    """The main graph and all bodies, indexed: who makes and who reads each tensor.

    What it says of bodies holds if no name is defined twice, see `bodies.names_are_unique`.

    Attributes
    ----------
    nodes : sequence of NodeProto
        Those of the main graph by their index, then those of bodies.
    labels : tuple of str
        Names of the nodes, see `bodies.Placed`.
    holders : tuple of (int or None)
        For each node in a body, the index of the main graph's node that holds it.
    stored : dict of str to TensorProto
        Initializers and values of Constant nodes.
    inside : set of str
        Stored tensors that a body has.
    kept : dict of str to str
        Tensors that something beside the nodes refers to, and what that is.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        placed = placed_nodes(graph)
        self.nodes: Sequence[onnx.NodeProto] = [each.node for each in placed]
        self.labels = tuple(each.label for each in placed)
        self.holders = tuple(each.holder for each in placed)
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {item.values.name for item in graph.sparse_initializer}
        self.kept = {value.name: "it is an output of the model" for value in graph.output}
        self.kept.update(dict.fromkeys(_trained(model), "the training information refers to it"))
        self.inside: set[str] = set()
        for body in body_graphs(graph.node):
            for tensor in body.initializer:
                self._store(tensor.name, tensor, inside=True)
            self.sparse.update(item.values.name for item in body.sparse_initializer)
            for output in body.output:
                self.kept.setdefault(output.name, "it is an output of a body")
        self.producer: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.output:
                self.producer.setdefault(name, index)
            for name in set(node.input):
                self.readers[name].append(index)
            value = constant_value(node)
            if value is not None and node.output:
                self._store(node.output[0], value, inside=self.holders[index] is not None)

    def place(self, index: int) -> int:
        """Index of the node of the main graph that is or holds the node of this index."""
        holder = self.holders[index]
        return index if holder is None else holder

    def _store(self, name: str, tensor: onnx.TensorProto, *, inside: bool) -> None:
        if name not in self.stored:
            self.stored[name] = tensor
            if inside:
                self.inside.add(name)

    def origin(self, name: str) -> Origin | str:
        """Follow a tensor back to what is stored; where it is not, to what computes it.

        Returns
        -------
        Origin or str
            The operator that makes the tensor, `SCALED_INTEGERS` if it is arithmetic on stored
            integers of few bits and other constants, ``sparse`` for a sparse initializer, or
            an empty string for an input of the graph.
        """
        chain: list[int] = []
        while name not in self.stored:
            index = self.producer.get(name)
            if index is None:
                return "sparse" if name in self.sparse else ""
            node = self.nodes[index]
            slices = self._slices(node)
            if slices:
                chain += [index, *reversed(slices)]
                name = self.nodes[slices[0]].input[0]
                continue
            if node.op_type not in PASSED or not is_standard(node):
                return SCALED_INTEGERS if self._scaled_integers(index) else str(node.op_type)
            chain.append(index)
            name = node.input[0]
        chain.reverse()
        tensor = self.stored[name]
        shape = tuple(tensor.dims)
        steps: list[tuple[str, tuple[int, ...]]] = []
        data_type = tensor.data_type
        for index in chain:
            node = self.nodes[index]
            if node.op_type == "Cast":
                data_type = attributes(node)["to"]
            elif node.op_type not in ("Identity", "Slice"):
                step = self._step(node, shape)
                if step is None:
                    return str(node.op_type)
                kind, sizes = step
                if kind == "Transpose":
                    shape = tuple(shape[axis] for axis in sizes)
                elif kind == "Reshape":
                    shape = sizes
                steps.append(step)
        return Origin(name, tensor, tuple(chain), tuple(steps), shape, data_type)

    def _scaled_integers(self, index: int) -> bool:
        """Whether a node is the last of a DequantizeLinear that is written out."""
        pending, seen, integers = [index], {index}, False
        while pending:
            node = self.nodes[pending.pop()]
            if node.op_type not in (*SCALING, *PASSED) or not is_standard(node):
                return False
            for name in node.input:
                if name in self.stored:
                    tensor = self.stored[name]
                    integers |= tensor.data_type in INTEGERS and len(tensor.dims) > 1
                elif (maker := self.producer.get(name)) is None:
                    return False
                elif maker not in seen:
                    seen.add(maker)
                    pending.append(maker)
        return integers

    def _step(
        self, node: onnx.NodeProto, shape: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        """What a node that moves elements does to a tensor of this shape, None if it cannot."""
        if node.op_type == "Transpose":
            turn = tuple(attributes(node).get("perm", range(len(shape))[::-1]))
            return ("Transpose", turn) if sorted(turn) == list(range(len(shape))) else None
        if node.op_type == "Concat":
            bounds = self._bounds(node, shape[0]) if shape else None
            return None if bounds is None else ("Rows", bounds)
        if node.op_type in ("Squeeze", "Unsqueeze"):
            return self._with_axes(node, shape)
        wanted = self.stored.get(node.input[1]) if len(node.input) > 1 else None
        if wanted is None or wanted.data_type != onnx.TensorProto.INT64 or len(wanted.dims) > 1:
            return None
        label = f"shape of node {quoted(node.name or node.op_type)}"
        sizes = [int(size) for size in tensor_array(wanted, label).ravel()]
        if not attributes(node).get("allowzero", 0):
            if any(size == 0 and axis >= len(shape) for axis, size in enumerate(sizes)):
                return None
            sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0:
            sizes[sizes.index(-1)] = math.prod(shape) // known
        fits = min(sizes, default=1) >= 0 and math.prod(sizes) == math.prod(shape)
        return ("Reshape", tuple(sizes)) if fits else None

    def _slices(self, node: onnx.NodeProto) -> list[int]:
        """Indices of the nodes whose slices of one tensor a Concat puts together; else none.

        PyTorch writes so the gates of a recurrent layer in the order of ONNX.
        """
        if node.op_type != "Concat" or not is_standard(node):
            return []
        found = [self.producer[name] for name in node.input if name in self.producer]
        sliced = [i for i in found if self.nodes[i].op_type == "Slice" and not self.nodes[i].domain]
        same = len({self.nodes[index].input[0] for index in sliced}) == 1
        return list(dict.fromkeys(sliced)) if same and len(sliced) == len(node.input) else []

    def _bounds(self, node: onnx.NodeProto, rows: int) -> tuple[int, ...] | None:
        """Begin and end of each group of rows in a Concat; None unless each row is there once."""
        bounds: list[int] = []
        for name in node.input:
            its = self._slice_of(self.nodes[self.producer[name]])
            if its is None or its[2:] != (0, 1):
                return None
            bounds += slice(*its[:2]).indices(rows)[:2]
        order = [
            row for begin, end in zip(*[iter(bounds)] * 2, strict=True) for row in range(begin, end)
        ]
        whole = sorted(order) == list(range(rows)) and attributes(node).get("axis") == 0
        return tuple(bounds) if whole else None

    def _slice_of(self, node: onnx.NodeProto) -> tuple[int, ...] | None:
        """Begin, end, axis and step of a Slice along one axis; None if they are not known."""
        values = attributes(node)
        found: list[list[int] | None] = [
            values.get(name, default)
            for name, default in (("starts", None), ("ends", None), ("axes", [0]), ("steps", [1]))
        ]
        for place, name in enumerate(node.input[1:]):
            if name:
                found[place] = self._integers(name)
        known = [its for its in found if its is not None and len(its) == 1]
        return tuple(its[0] for its in known) if len(known) == len(found) else None

    def _integers(self, name: str) -> list[int] | None:
        """Numbers of a stored tensor of integers; None if there is no such."""
        tensor = self.stored.get(name)
        if tensor is None or tensor.data_type not in (TensorProto.INT32, TensorProto.INT64):
            return None
        return [int(number) for number in tensor_array(tensor, quoted(name)).ravel()]

    def _with_axes(
        self, node: onnx.NodeProto, shape: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        """Shape after a Squeeze or Unsqueeze; None if it does not fit."""
        axes = attributes(node).get("axes")
        if len(node.input) > 1:
            axes = self._integers(node.input[1])
        if axes is None:
            return None
        change = np.squeeze if node.op_type == "Squeeze" else np.expand_dims
        try:
            return "Reshape", change(np.broadcast_to(False, shape), tuple(axes)).shape
        except ValueError:
            return None


def _trained(model: onnx.ModelProto) -> set[str]:
    """Names that the training information of a model refers to."""
    names: set[str] = set()
    for training in model.training_info:
        for binding in (*training.initialization_binding, *training.update_binding):
            names |= {binding.key, binding.value}
        for graph in (training.initialization, training.algorithm):
            for node in graph.node:
                names.update(all_inputs(node))
    return names


def all_inputs(node: onnx.NodeProto) -> Iterable[str]:
    """Yield the names that a node reads, those captured by its sub-graphs included."""
    yield from node.input
    yield from inputs_of_bodies(node)


def inputs_of_bodies(node: onnx.NodeProto) -> Iterable[str]:
    """Yield the names that are read inside a node's sub-graphs, their own and captured ones."""
    stack = list(subgraphs(node))
    while stack:
        graph = stack.pop()
        for output in graph.output:
            yield output.name
        for inner in graph.node:
            yield from inner.input
            stack.extend(subgraphs(inner))
