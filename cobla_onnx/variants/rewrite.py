"""Replace the nodes of layers by others, on a copy of the model; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.io.external import mapped_tensor
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Replacement

__all__ = ["add_functions", "rewrite"]


def rewrite(model: onnx.ModelProto, replacements: Sequence[Replacement]) -> onnx.ModelProto:
    """Return a copy of `model` in which each layer is computed by its replacement.

    Weights that are no longer read are left out, as are the Identity, Transpose, Cast and
    Constant nodes before them. Everything else is as it was, in the same order. The
    last of the new nodes keeps the name, the output and the documentation of the original.
    """
    sources = {name for replacement in replacements for name in _replaced(replacement)}
    result = copy_without_initializers(model, sources)
    graph = result.graph
    names = Names(model)
    built: dict[int, list[onnx.NodeProto]] = {}
    for replacement in replacements:
        nodes, weights = _build(replacement, model, names)
        built.update(nodes)
        graph.initializer.extend(weights)
        if model.ir_version < 4:
            # Before IR version 4 every initializer is also an input of the graph.
            graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights
            )
    add_functions(result, names.functions)
    dead = _dead_nodes(model, replacements)
    kept = []
    for index, node in enumerate(model.graph.node):
        if index not in dead:
            kept.extend(built.get(index, [node]))
    del graph.node[:]
    graph.node.extend(kept)
    gone = sources | {name for index in dead for name in model.graph.node[index].output}
    _drop(graph.input, lambda item: item.name in gone)
    _drop(graph.value_info, lambda item: item.name in gone)
    _drop(graph.quantization_annotation, lambda item: item.tensor_name in gone)
    return result


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
    replacement: Replacement, model: onnx.ModelProto, names: Names
) -> tuple[dict[int, list[onnx.NodeProto]], list[onnx.TensorProto]]:
    """Build the nodes that replace each use, by node index, and their initializers."""
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
        initializers.append(_tensor(bias[0], replacement.bias))
    result: dict[int, list[onnx.NodeProto]] = {}
    for use in layer.uses:
        node = model.graph.node[use.node]
        rest = bias or node.input[2:]
        *before, last = replacement.nodes(node, use, operands, rest, names)
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        kept.op_type = last.op_type
        # Of a function of the model; other nodes are of the original's, whose bytes stay.
        if last.domain:
            kept.domain = last.domain
        del kept.input[:], kept.attribute[:]
        kept.input.extend(last.input)
        kept.attribute.extend(last.attribute)
        result[use.node] = [*before, kept]
    result[layer.uses[0].node] = shared + result[layer.uses[0].node]
    return result, initializers


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


def _dead_nodes(model: onnx.ModelProto, replacements: Iterable[Replacement]) -> set[int]:
    """Indices of the nodes before the replaced weights, which are no longer read.

    A layer's weight is read by the layer alone (see `find_layers`), so all of them go.
    """
    dead = {index for r in replacements for use in r.layer.uses for index in use.chain}
    sources = {name for replacement in replacements for name in _replaced(replacement)}
    dead.update(i for i, node in enumerate(model.graph.node) if set(node.output) & sources)
    return dead
