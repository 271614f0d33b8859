"""Copies and parts of a model whose weights are inputs, so that they can be replaced at will."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.graph.layers import Layer, all_inputs

__all__ = ["Exposed", "expose", "make_value", "prefix", "reached_from"]


@dataclass(frozen=True)
class Exposed:
    """A model that lacks the weights of some layers.

    Attributes
    ----------
    model : onnx.ModelProto
    weights : tuple of str
        Name of the tensor that each layer reads its weight from, of shape ``layer.shape``.
    biases : tuple of (str or None)
        The same for the bias that a layer owns.
    """

    model: onnx.ModelProto
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]


def expose(model: onnx.ModelProto, layers: Sequence[Layer], *, as_inputs: bool) -> Exposed:
    """Copy a model without the weights and own biases of `layers`.

    Every node of a layer reads a new name instead, which is an input of the graph if
    `as_inputs`, and otherwise for the caller to add as an initializer.
    """
    # A weight behind other nodes still has readers: the nodes in between. Through these a tied
    # weight passes, as it is stored, to who reads it otherwise.
    chained = {
        layer.source
        for layer in layers
        if not layer.readings and any(use.chain for use in layer.uses)
    }
    dropped = {layer.source for layer in layers} - chained
    dropped |= {layer.bias for layer in layers if layer.bias is not None}
    result = copy_without_initializers(model, dropped)
    graph = result.graph
    # Before IR version 4 the weights left out are still listed as inputs.
    inputs = [value for value in graph.input if value.name not in dropped]
    del graph.input[:]
    graph.input.extend(inputs)
    weights, biases = [], []
    nodes = all_nodes(graph)
    for number, layer in enumerate(layers):
        weight = f"cobla-onnx/weight/{number}"
        bias = None if layer.bias is None else f"cobla-onnx/bias/{number}"
        for use in layer.uses:
            if layer.readings and use.chain:
                nodes[use.chain[0]].input[0] = weight
            else:
                nodes[use.node].input[layer.reading(use).weight_input] = weight
            if bias is not None:
                nodes[use.node].input[2] = bias
        if as_inputs:
            value = onnx.helper.make_tensor_value_info
            graph.input.append(value(weight, layer.type, layer.shape))
            if bias is not None:
                graph.input.append(value(bias, layer.type, None))
        weights.append(weight)
        biases.append(bias)
    return Exposed(result, tuple(weights), tuple(biases))


def reached_from(model: onnx.ModelProto, names: Iterable[str]) -> set[str]:
    """Tensors of the main graph that depend on any of `names`, these included."""
    reached = set(names)
    for node in model.graph.node:
        if not reached.isdisjoint(all_inputs(node)):
            reached.update(name for name in node.output if name)
    return reached


def prefix(
    model: onnx.ModelProto,
    outputs: Iterable[str],
    given: Mapping[str, onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    """Copy what of a model is needed to compute the tensors `outputs`, and no more.

    The outputs of the result are those, without type and shape; a name that is an input
    of the result is none.

    Parameters
    ----------
    given : mapping of str to ValueInfoProto, optional
        Tensors that need not be computed: inputs of the result in place of the model's.
        What the model itself declares counts first.
    """
    outputs = list(dict.fromkeys(outputs))
    producer = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    for name in given or {}:
        producer.pop(name, None)
    needed: set[int] = set()
    pending = [producer[name] for name in outputs if name in producer]
    read: set[str] = set(outputs)
    while pending:
        index = pending.pop()
        if index in needed:
            continue
        needed.add(index)
        names = {name for name in all_inputs(model.graph.node[index]) if name}
        read |= names
        pending.extend(producer[name] for name in names if name in producer)
    unread = _unread(model, read)
    result = copy_without_initializers(model, unread)
    graph = result.graph
    inputs = [value for value in graph.input if value.name not in unread]
    if given is not None:
        declared = {value.name: value for value in inputs}
        stored = {tensor.name for tensor in graph.initializer}
        inputs = [declared.get(name) or value for name, value in given.items()]
        inputs += [value for name, value in declared.items() if name in stored]
    nodes = [node for i, node in enumerate(model.graph.node) if i in needed]
    del graph.node[:], graph.output[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name in producer)
    return result


def make_value(
    name: str, dtype: np.dtype[Any], shape: Sequence[int | None] | None = None
) -> onnx.ValueInfoProto:
    """Declare a tensor; axes that are None may have any size, and without a shape any rank."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def _unread(model: onnx.ModelProto, read: Collection[str]) -> set[str]:
    return {t.name for t in model.graph.initializer if t.name not in read}
