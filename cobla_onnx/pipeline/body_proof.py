"""Check the new nodes of layers in bodies, each on random data of its own.

What a tensor in a body holds cannot be read from a run, and the branch of an If may never be
taken; a layer alone needs neither. Placing and naming are proved by runs of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.deviation import rounding_error
from cobla_onnx.errors import VerificationError
from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.index import GraphIndex, Origin
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.convolution import Convolution, geometry_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.graph.operators.product import Product
from cobla_onnx.graph.operators.recurrent import (
    BIASES,
    GATES,
    LENGTHS,
    PEEPHOLES,
    STATES,
    InputWeight,
    StateWeight,
)
from cobla_onnx.graph.operators.transposed_convolution import TransposedConvolution
from cobla_onnx.graph.order import sort_nodes
from cobla_onnx.graph.protos import copied_node
from cobla_onnx.graph.tensors import subgraphs
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.text import quoted
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import add_functions
from cobla_onnx.wording import option_name

__all__ = ["EXAMPLES", "append_slice", "checked", "provable", "prove_in_bodies"]

# Positions along an axis whose length is free.
SOME = 3
# How often a kernel moves along each axis.
STEPS = 2

DENSE, BIAS = "dense weight", "dense bias"


ShapeOf: TypeAlias = Callable[[str], tuple[int, ...]]
"""Gives the shape of a stored weight as a node reads it, by the name of what it reads."""


def _for_convolution(layer: Layer, node: onnx.NodeProto, _: ShapeOf) -> tuple[int, ...]:
    kernel = layer.shape[2:]
    strides, dilations = geometry_of(node, kernel)[:2]
    rows = zip(kernel, strides, dilations, strict=True)
    sizes = [(size - 1) * step + 1 + STEPS * stride for size, stride, step in rows]
    return (1, layer.shape[1] * layer.attributes["group"], *sizes)


def _for_transposed(layer: Layer, node: onnx.NodeProto, _: ShapeOf) -> tuple[int, ...]:
    return (1, layer.shape[0], *(SOME,) * len(layer.shape[2:]))


def _for_product(layer: Layer, node: onnx.NodeProto, _: ShapeOf) -> tuple[int, ...]:
    values, right = layer.attributes, layer.weight_input == 1
    turned = bool(values.get("transB" if right else "transA", 0))
    inner = layer.shape[-2] if right != turned else layer.shape[-1]
    flipped = bool(values.get("transA" if right else "transB", 0))
    rows = right != flipped
    return (*layer.shape[:-2], *((SOME, inner) if rows else (inner, SOME)))


def _for_lookup(layer: Layer, node: onnx.NodeProto, _: ShapeOf) -> tuple[int, ...]:
    return (1, SOME)


def _for_sequence(layer: Layer, node: onnx.NodeProto, shape_of: ShapeOf) -> tuple[int, ...]:
    # Onnxruntime runs no others than those of layout 0: steps, samples, entries.
    return (SOME, 1, shape_of(node.input[1])[-1])


EXAMPLES: dict[str, Callable[[Layer, onnx.NodeProto, ShapeOf], tuple[int, ...]]] = {
    Convolution.kind: _for_convolution,
    TransposedConvolution.kind: _for_transposed,
    Product.kind: _for_product,
    Lookup.kind: _for_lookup,
    InputWeight.kind: _for_sequence,
    StateWeight.kind: _for_sequence,
}
"""Shapes of data that a node can read, by the kind of its operator."""


def provable(layer: Layer) -> bool:
    """Whether data can be made up for a layer."""
    return operator_of(layer).kind in EXAMPLES


def prove_in_bodies(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Iterable[Replacement],
    threads: int,
) -> float:
    """Compare the new nodes of layers in bodies with their nodes under the same dense weight.

    Returns
    -------
    float
        Largest difference, relative to the largest output of a layer.

    Raises
    ------
    VerificationError
    """
    inside = [replacement for replacement in replacements if replacement.layer.in_body]
    if not inside:
        return 0.0
    index = GraphIndex(original)
    parts = _Parts.of(compressed)
    return max(_check(original, parts, replacement, index, threads) for replacement in inside)


@dataclass(frozen=True)
class _Parts:
    """What a compressed model is made of, by the names of tensors."""

    producer: Mapping[str, onnx.NodeProto]
    stored: Mapping[str, onnx.TensorProto]
    functions: Sequence[onnx.FunctionProto]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Parts:
        producer = {name: node for node in all_nodes(model.graph) for name in node.output}
        return cls(producer, {t.name: t for t in model.graph.initializer}, model.functions)

    def constant(self, name: str) -> bool:
        """Whether a tensor comes from constants alone, here through nodes without bodies."""
        node = self.producer.get(name)
        if name in self.stored or node is None:
            return name in self.stored
        if not node.input or next(subgraphs(node), None) is not None:
            return node.op_type == "Constant"
        return all(self.constant(each) for each in node.input if each)


def _check(
    original: onnx.ModelProto,
    parts: _Parts,
    replacement: Replacement,
    index: GraphIndex,
    threads: int,
) -> float:
    """Run the nodes of one layer, old and new, as a model of their own."""
    layer = replacement.layer
    example = _Example(layer, index, np.random.default_rng(0))
    graph = onnx.GraphProto(name="one layer")
    weights: dict[str, NDArray[Any]] = {DENSE: replacement.dense()}
    if replacement.bias is not None:
        weights[BIAS] = replacement.bias
    feeds: dict[str, NDArray[Any]] = {}
    renamed: dict[str, str] = {}
    for use in (use for use in layer.uses if use.holder is not None):
        node, new = index.nodes[use.node], parts.producer[use.output]
        dense = graph.node.add()
        dense.CopyFrom(_with_dense_weight(layer, node, new))
        if replacement.bias is not None:
            dense.input[2] = BIAS
        feeds[use.data] = example.data(node)
        # A bias may be computed in the body, too, and so may states.
        others = enumerate(node.input[2:], 2)
        feeds.update(
            (name, example.other(node, place))
            for place, name in others
            if name and name != node.input[layer.weight_input] and not parts.constant(name)
        )
        renamed.update((name, f"{name} by new nodes") for name in node.output if name)
    present, copied = {*feeds, *weights}, set[str]()
    inputs = {name for node in graph.node for name in node.input if name not in present}
    for output in (*renamed, *sorted(inputs)):
        append_slice(graph, parts.producer, output, renamed, present, copied)
    sort_nodes(graph)
    read = {name for node in graph.node for name in node.input} - present
    graph.initializer.extend(parts.stored[name] for name in sorted(read) if name in parts.stored)
    for name, array in feeds.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    model = onnx.helper.make_model(graph, opset_imports=list(original.opset_import))
    model.ir_version = max(original.ir_version, 4)
    add_functions(model, parts.functions)
    session = open_session(model, threads, [*renamed, *renamed.values()], weights)
    values = run_session(session, feeds)
    return max(checked(values, old, new, replacement.tolerance) for old, new in renamed.items())


def _with_dense_weight(layer: Layer, node: onnx.NodeProto, new: onnx.NodeProto) -> onnx.NodeProto:
    """Return a layer's node with the dense weight, and `new` the last one of those in its place.

    A recurrent node has two weights, and what is proved of one of them is proved beside what has
    become of the other one.
    """
    kind = operator_of(layer).kind
    dense = copied_node(new if kind == StateWeight.kind else node)
    # Nodes of two bodies may have the same name.
    dense.ClearField("name")
    if kind == InputWeight.kind:
        dense.input[StateWeight.weight_inputs[0]] = new.input[StateWeight.weight_inputs[0]]
    dense.input[layer.weight_input] = DENSE
    return dense


@dataclass(frozen=True)
class _Example:
    """Draws what the nodes of a layer read."""

    layer: Layer
    index: GraphIndex
    generator: np.random.Generator

    def data(self, node: onnx.NodeProto) -> NDArray[Any]:
        """Draw data."""
        operator = operator_of(self.layer)
        shape = EXAMPLES[operator.kind](self.layer, node, self._shape_of)
        if operator.kind == Lookup.kind:
            return self.generator.integers(0, self.layer.shape[0], shape)
        return self._normal(shape)

    def other(self, node: onnx.NodeProto, place: int) -> NDArray[Any]:
        """Draw a bias, or what a recurrent node reads beside its data and weights."""
        if operator_of(self.layer).kind in (InputWeight.kind, StateWeight.kind):
            if place == LENGTHS:
                return np.full(1, SOME, np.int32)
            return self._normal(self._of_directions(node, place))
        outputs = operator_of(self.layer).output_axis(self.layer)
        return self._normal((1 if outputs is None else outputs.size,))

    def _of_directions(self, node: onnx.NodeProto, place: int) -> tuple[int, ...]:
        directions, _, hidden = self._shape_of(node.input[StateWeight.weight_inputs[0]])
        if place in STATES:
            return (directions, 1, hidden)
        vectors = 2 * GATES[node.op_type] if place == BIASES else PEEPHOLES
        return (directions, vectors * hidden)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        found = self.index.origin(name)
        assert isinstance(found, Origin), name
        return found.shape

    def _normal(self, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.layer.type)
        return self.generator.standard_normal(shape).astype(dtype)


def checked(values: Mapping[str, Any], dense: str, new: str, tolerance: float) -> float:
    """Compare the output of a layer's new nodes with that of a dense weight.

    Raises
    ------
    VerificationError
        If they differ by more than rounding.
    """
    error = rounding_error(values[dense], values[new])
    if not error <= tolerance:
        if np.isfinite(values[dense]).all() and not np.isfinite(values[new]).all():
            raise VerificationError(
                f"tensor {quoted(dense)}: its new nodes overflow where the dense weight gives "
                "numbers near the end of their type's range; nothing was written, leave the layer "
                f"out by {option_name('exclude')}"
            )
        raise VerificationError(
            f"tensor {quoted(dense)}: its new nodes differ from the dense weight by "
            f"{error:.2g} of its largest value, {tolerance:g} is allowed; nothing was written, "
            "please report this"
        )
    return error


def append_slice(
    graph: onnx.GraphProto,
    producer: Mapping[str, onnx.NodeProto],
    output: str,
    renamed: Mapping[str, str],
    present: set[str],
    copied: set[str],
) -> None:
    """Copy the nodes that compute `output` from tensors of the original, with new names."""
    nodes, wanted = [], [output]
    while wanted:
        name = wanted.pop()
        node = producer.get(name)
        if node is None or name in copied:
            continue
        copied.update(node.output)
        copy = copied_node(node)
        copy.name = ""
        for place, made in enumerate(node.output):
            copy.output[place] = renamed.get(made, made)
        nodes.append(copy)
        wanted.extend(i for i in node.input if i and i not in present)
    graph.node.extend(reversed(nodes))
