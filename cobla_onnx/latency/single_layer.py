"""Cut one node, or what replaces it, out of a model as a model of its own, to be timed.

The node keeps its attributes, the shape of its input and what is constant about it. What
follows it is left out: an activation or a normalisation is fused into the whole node and
into the last one of its replacement alike, so that it adds the same to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.layers import Layer, Use, find_layers, read_weight
from cobla_onnx.graph.macs import Shape
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.graph.operators.recurrent import LENGTHS, InputWeight, StateWeight
from cobla_onnx.graph.protos import OVERRIDABLE_FROM, copied_node
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.variants.registry import forms_of, stand_in
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.writing import Storage, Writing

__all__ = ["MicroGraph", "layer_key", "micro_graph"]


def _typed_shape(shape: Shape | None) -> list[int] | None:
    known = [size for size in shape or () if size is not None]
    return known if shape is not None and len(known) == len(shape) else None


def layer_key(
    model: onnx.ModelProto, layer: Layer, use: Use, shapes: Mapping[str, Shape]
) -> str | None:
    """Describe all that the time of one use of a layer depends on; None if it is not known.

    Uses with the same description take the same time.
    """
    node = all_nodes(model.graph)[use.node]
    data = _typed_shape(shapes.get(use.data))
    others = [_typed_shape(shapes.get(name)) if name else [] for name in _others(node, layer)]
    if data is None or None in others:
        return None
    values = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in sorted(attributes(node).items())
    }
    parts = [
        node.op_type,
        onnx.TensorProto.DataType.Name(layer.type).lower(),
        "x".join(map(str, data)),
        f"weight[{layer.weight_input}] {'x'.join(map(str, layer.shape))}",
        *(f"{name}={value}" for name, value in values.items()),
    ]
    if others:
        parts.append(f"and {others}")
    if _listed(model, layer):
        parts.append("weight is an input")
    return ", ".join(parts)


def _others(node: onnx.NodeProto, layer: Layer) -> list[str]:
    """Names of a node's inputs beside data and weight; empty ones are left out by the node."""
    known = layer.weight_input, 0 if layer.weight_input else 1
    return [name for place, name in enumerate(node.input) if place not in known]


def _listed(model: onnx.ModelProto, layer: Layer) -> bool:
    """Whether the weight may be replaced at run time, which forbids onnxruntime its layouts."""
    return model.ir_version >= OVERRIDABLE_FROM and any(
        v.name == layer.source for v in model.graph.input
    )


@dataclass(frozen=True)
class MicroGraph:
    """A model of one node.

    Attributes
    ----------
    model : onnx.ModelProto
        Its first input is the data.
    layer : Layer
        The node, as it stands in `model`.
    """

    model: onnx.ModelProto
    layer: Layer

    def replaced(self, scheme: str, level: int, storage: Storage = "auto") -> onnx.ModelProto:
        """Return the model with random numbers in place of the layer's replacement."""
        made = stand_in(self.layer, forms_of(self.layer)[scheme], level)
        return rewrite(self.model, [made.written(Writing.into(self.model, storage))])


def micro_graph(
    model: onnx.ModelProto, layer: Layer, use: Use, shapes: Mapping[str, Shape]
) -> MicroGraph:
    """Cut one use of a layer out of a model; `layer_key` must know its shapes."""
    node = copied_node(all_nodes(model.graph)[use.node])
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weight_name = "weight"
    node.input[layer.weight_input] = weight_name
    tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(read_weight(model, layer)))]
    tensors[0].name = weight_name
    kind = operator_of(layer).kind
    is_recurrent = kind in (InputWeight.kind, StateWeight.kind)
    if is_recurrent and len(node.input) > LENGTHS and node.input[LENGTHS] not in stored:
        # Nobody knows which lengths are usual; without any, all sequences are as long as can be.
        node.input[LENGTHS] = ""
    is_lookup = kind == Lookup.kind
    data_type = onnx.TensorProto.INT64 if is_lookup else layer.type
    data_shape = _typed_shape(shapes[use.data])
    inputs = [onnx.helper.make_tensor_value_info(use.data, data_type, data_shape)]
    for name in dict.fromkeys(n for n in _others(node, layer) if n):
        if name in stored:
            array = tensor_array(stored[name], name)
            tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        else:
            shape = _typed_shape(shapes.get(name))
            inputs.append(onnx.helper.make_tensor_value_info(name, layer.type, shape))
    if _listed(model, layer):
        value = onnx.helper.make_tensor_value_info(weight_name, layer.type, layer.shape)
        inputs.append(value)
    shape = _typed_shape(shapes.get(use.output))
    output = onnx.helper.make_tensor_value_info(use.output, layer.type, shape)
    graph = onnx.helper.make_graph([node], "one layer", inputs, [output], tensors)
    result = onnx.helper.make_model(graph, opset_imports=list(model.opset_import))
    result.ir_version = max(model.ir_version, 4)
    found = find_layers(result).layers
    return MicroGraph(result, next(x for x in found if x.weight_input == layer.weight_input))
