"""Replace the nodes of layers by others, on a copy of the model; nothing else changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.bodies import all_nodes, body_graphs
from cobla_onnx.graph.index import GraphIndex
from cobla_onnx.graph.io.external import mapped_tensor
from cobla_onnx.graph.io.model_file import add_initializers, copy_without_initializers
from cobla_onnx.graph.protos import copied_node
from cobla_onnx.graph.tensors import subgraphs
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Replacement

__all__ = ["BIAS", "Rewritten", "add_functions", "rewrite", "rewrite_named"]

BIAS = "bias"
"""Stands beside the parts of a replacement for its bias."""


class Rewritten(NamedTuple):
    """A model in which layers are computed by their replacements.

    Attributes
    ----------
    model : ModelProto
    stored : list of dict of str to str
        For each replacement, the name of the initializer of each of its parts, and of `BIAS`.
    """

    model: onnx.ModelProto
    stored: list[Mapping[str, str]]


def rewrite(model: onnx.ModelProto, replacements: Sequence[Replacement]) -> onnx.ModelProto:
    """Return a copy of `model` in which each layer is computed by its replacement.

    Weights that are no longer read are left out, as are the nodes before them that moved their
    elements or cast them, with the constants that say how. Everything else is as it was, in the
    same order. The last of the new nodes keeps the name, the output and the documentation of the
    original. What a layer in a body stores is in the main graph, and its nodes are in the body.
    """
    return rewrite_named(model, replacements).model


def rewrite_named(model: onnx.ModelProto, replacements: Sequence[Replacement]) -> Rewritten:
    """Do the same as `rewrite`, and tell the names of what is stored."""
    chains = {index for r in replacements for use in r.layer.uses for index in use.chain}
    sources = {name for replacement in replacements for name in _replaced(replacement)}
    sources |= _read_alone(model, chains)
    result = copy_without_initializers(model, sources)
    graph = result.graph
    names = Names(model)
    built: dict[str, list[onnx.NodeProto]] = {}
    shared: dict[int, list[onnx.NodeProto]] = defaultdict(list)
    stored: list[Mapping[str, str]] = []
    originals = all_nodes(model.graph)
    for replacement in replacements:
        weights, before, its_names = _build(replacement, originals, names, built)
        stored.append(its_names)
        # Uses in several bodies can all read what stands before the first of them.
        shared[min(use.place for use in replacement.layer.uses)] += before
        add_initializers(result, weights)
    add_functions(result, names.functions)
    # A layer's weight is read by the layer alone (see `find_layers`), so all before it goes.
    dead = chains | {i for i, node in enumerate(model.graph.node) if set(node.output) & sources}
    kept: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        if index not in dead:
            kept.extend((*shared[index], *_replaced_nodes(node, built)))
    del graph.node[:]
    graph.node.extend(kept)
    gone = sources | {name for index in dead for name in model.graph.node[index].output}
    _drop(graph.input, lambda item: item.name in gone)
    _drop(graph.value_info, lambda item: item.name in gone)
    _drop(graph.quantization_annotation, lambda item: item.tensor_name in gone)
    return Rewritten(result, stored)


def add_functions(model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto]) -> None:
    """Add the functions that a model does not have, each once, and import their domains."""
    present = {(function.domain, function.name) for function in model.functions}
    known = {entry.domain for entry in model.opset_import}
    for function in functions:
        if (function.domain, function.name) not in present:
            present.add((function.domain, function.name))
            model.functions.append(function)
        if function.domain not in known:
            known.add(function.domain)
            model.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))


def _replaced_nodes(
    node: onnx.NodeProto, built: Mapping[str, list[onnx.NodeProto]]
) -> list[onnx.NodeProto]:
    """Return what takes the place of a node: others, itself, or itself with other bodies."""
    found = next((built[name] for name in node.output if name in built), None)
    if found is not None:
        return found
    inside = [inner for body in body_graphs([node]) for inner in body.node]
    if not any(name in built for inner in inside for name in inner.output):
        return [node]
    result = copied_node(node)
    for body, original in zip(subgraphs(result), subgraphs(node), strict=True):
        nodes = [new for inner in original.node for new in _replaced_nodes(inner, built)]
        del body.node[:]
        body.node.extend(nodes)
    return [result]


def _replaced(replacement: Replacement) -> list[str]:
    """Names of the stored tensors that a replacement makes superfluous."""
    layer = replacement.layer
    return [layer.source] + ([layer.bias] if replacement.bias is not None and layer.bias else [])


def _drop(items: Any, unwanted: Any) -> None:
    kept = [item for item in items if not unwanted(item)]
    if len(kept) < len(items):
        del items[:]
        items.extend(kept)


def _build(
    replacement: Replacement,
    originals: Sequence[onnx.NodeProto],
    names: Names,
    built: dict[str, list[onnx.NodeProto]],
) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto], dict[str, str]]:
    """Build the nodes of each use, in `built` by its output.

    Where another weight of a node was replaced, the last of its nodes is.

    Returns
    -------
    list of TensorProto
        Initializers.
    list of NodeProto
        Nodes that all uses share.
    dict of str to str
        Names of the initializers by the part that is stored.
    """
    layer = replacement.layer
    stored = {part: names.tensor(f"{layer.name}/{part}") for part in replacement.arrays}
    initializers = [
        _tensor(stored[part], array, replacement.nibbles.get(part))
        for part, array in replacement.arrays.items()
    ]
    shared, operands = replacement.shared(stored, names)
    bias: list[str] = []
    if replacement.bias is not None:
        bias = [names.tensor(f"{layer.name}/bias")]
        stored[BIAS] = bias[0]
        initializers.append(_tensor(bias[0], replacement.bias))
    for use in layer.uses:
        *earlier, node = built.get(use.output, [originals[use.node]])
        rest = bias or node.input[2:]
        *before, last = replacement.nodes(node, use, operands, rest, names)
        kept = copied_node(node)
        kept.op_type = last.op_type
        # Of a function of the model; other nodes are of the original's, whose bytes stay.
        if last.domain:
            kept.domain = last.domain
        del kept.input[:], kept.attribute[:]
        kept.input.extend(last.input)
        kept.attribute.extend(last.attribute)
        built[use.output] = [*earlier, *before, kept]
    return initializers, shared, stored


def _tensor(
    name: str, array: NDArray[Any], nibbles: tuple[int, ...] | None = None
) -> onnx.TensorProto:
    """Return an initializer; one that is a mapped file stays there.

    Parameters
    ----------
    nibbles : tuple of int, optional
        Shape of a UINT4 tensor whose bytes the array has.
    """
    tensor = mapped_tensor(name, array)
    tensor = tensor or onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    if nibbles is not None:
        tensor.data_type = onnx.TensorProto.UINT4
        del tensor.dims[:]
        tensor.dims.extend(nibbles)
    return tensor


def _read_alone(model: onnx.ModelProto, nodes: Collection[int]) -> set[str]:
    """Stored tensors that nobody but the given nodes reads."""
    graph = GraphIndex(model)
    read = {name for index in nodes for name in graph.nodes[index].input} & graph.stored.keys()
    return {n for n in read if n not in graph.kept and set(graph.readers[n]) <= set(nodes)}
