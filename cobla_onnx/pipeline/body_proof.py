"""Check the new nodes of layers in bodies, each on random data of its own.

What a tensor in a body holds cannot be read from a run, and the branch of an If may never be
taken; a layer alone needs neither. Placing and naming are proved by runs of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.deviation import rounding_error
from cobla_onnx.errors import VerificationError
from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.convolution import Convolution, geometry_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.graph.operators.product import Product
from cobla_onnx.graph.operators.transposed_convolution import TransposedConvolution
from cobla_onnx.graph.order import sort_nodes
from cobla_onnx.graph.protos import copied_node
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.text import quoted
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import add_functions

__all__ = ["EXAMPLES", "append_slice", "checked", "provable", "prove_in_bodies"]

# Positions along an axis whose length is free.
SOME = 3
# How often a kernel moves along each axis.
STEPS = 2

DENSE, BIAS = "dense weight", "dense bias"


def _for_convolution(layer: Layer, node: onnx.NodeProto) -> tuple[int, ...]:
    kernel = layer.shape[2:]
    strides, dilations, _ = geometry_of(node, kernel)
    rows = zip(kernel, strides, dilations, strict=True)
    sizes = [(size - 1) * step + 1 + STEPS * stride for size, stride, step in rows]
    return (1, layer.shape[1] * layer.attributes["group"], *sizes)


def _for_transposed(layer: Layer, node: onnx.NodeProto) -> tuple[int, ...]:
    return (1, layer.shape[0], *(SOME,) * len(layer.shape[2:]))


def _for_product(layer: Layer, node: onnx.NodeProto) -> tuple[int, ...]:
    values, right = layer.attributes, layer.weight_input == 1
    turned = bool(values.get("transB" if right else "transA", 0))
    inner = layer.shape[-2] if right != turned else layer.shape[-1]
    flipped = bool(values.get("transA" if right else "transB", 0))
    rows = right != flipped
    return (*layer.shape[:-2], *((SOME, inner) if rows else (inner, SOME)))


def _for_lookup(layer: Layer, node: onnx.NodeProto) -> tuple[int, ...]:
    return (1, SOME)


EXAMPLES: dict[str, Callable[[Layer, onnx.NodeProto], tuple[int, ...]]] = {
    Convolution.kind: _for_convolution,
    TransposedConvolution.kind: _for_transposed,
    Product.kind: _for_product,
    Lookup.kind: _for_lookup,
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
    nodes = all_nodes(original.graph)
    parts = _Parts.of(compressed)
    return max(_check(original, parts, replacement, nodes, threads) for replacement in inside)


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
        node = self.producer.get(name)
        return name in self.stored or (node is not None and node.op_type == "Constant")


def _check(
    original: onnx.ModelProto,
    parts: _Parts,
    replacement: Replacement,
    nodes: Sequence[onnx.NodeProto],
    threads: int,
) -> float:
    """Run the nodes of one layer, old and new, as a model of their own."""
    layer = replacement.layer
    generator = np.random.default_rng(0)
    graph = onnx.GraphProto(name="one layer")
    weights: dict[str, NDArray[Any]] = {DENSE: replacement.dense()}
    if replacement.bias is not None:
        weights[BIAS] = replacement.bias
    feeds: dict[str, NDArray[Any]] = {}
    renamed: dict[str, str] = {}
    for use in (use for use in layer.uses if use.holder is not None):
        node = nodes[use.node]
        dense = graph.node.add()
        dense.CopyFrom(node)
        # Nodes of two bodies may have the same name.
        dense.ClearField("name")
        dense.input[layer.weight_input] = DENSE
        if replacement.bias is not None:
            dense.input[2] = BIAS
        feeds[use.data] = _data(layer, node, generator)
        # A bias may be computed in the body, too.
        others = [name for name in node.input[2:] if name and not parts.constant(name)]
        feeds.update((name, _summand(layer, generator)) for name in others)
        renamed[use.output] = f"{use.output} by new nodes"
    present, copied = {*feeds, *weights}, set[str]()
    for output in renamed:
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


def _data(layer: Layer, node: onnx.NodeProto, generator: np.random.Generator) -> NDArray[Any]:
    """Draw data that a node of a layer can read."""
    operator = operator_of(layer)
    shape = EXAMPLES[operator.kind](layer, node)
    if operator.kind == Lookup.kind:
        return generator.integers(0, layer.shape[0], shape)
    return _normal(layer, shape, generator)


def _summand(layer: Layer, generator: np.random.Generator) -> NDArray[Any]:
    outputs = operator_of(layer).output_axis(layer)
    return _normal(layer, (1 if outputs is None else outputs.size,), generator)


def _normal(layer: Layer, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(layer.type)
    return generator.standard_normal(shape).astype(dtype)


def checked(values: Mapping[str, Any], dense: str, new: str, tolerance: float) -> float:
    """Compare the output of a layer's new nodes with that of a dense weight.

    Raises
    ------
    VerificationError
        If they differ by more than rounding.
    """
    error = rounding_error(values[dense], values[new])
    if not error <= tolerance:
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
