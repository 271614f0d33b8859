"""Cast a whole model to one floating-point type."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from cobla_onnx.graph.protos import STORED_TYPES
from cobla_onnx.graph.tensors import subgraphs, tensor_array

__all__ = ["cast_model", "cast_tensor"]

# Attributes that name a type of the result.
TYPE_ATTRIBUTES = {"to", "dtype", "stash_type", "output_dtype", "output_datatype"}
# Inputs that are single precision by their operators' definition.
SINGLE_INPUTS = {"Resize": (2,), "Upsample": (1,)}


def cast_tensor(tensor: onnx.TensorProto, element_type: int) -> onnx.TensorProto:
    """Copy a tensor, as `element_type` if it is of another floating type."""
    result = onnx.TensorProto()
    if tensor.data_type in STORED_TYPES and tensor.data_type != element_type:
        array = tensor_array(tensor, f"initializer {tensor.name!r}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element_type)
        result.CopyFrom(onnx.numpy_helper.from_array(array.astype(dtype), tensor.name))
    else:
        result.CopyFrom(tensor)
    return result


def cast_model(model: onnx.ModelProto, element_type: int) -> None:
    """Give all floating tensors of a model `element_type`, in place.

    Sub-graphs are included, model-local functions are not. Casts between floating types
    become copies.
    """
    single = set(_single(model))
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        for tensor in graph.initializer:
            if tensor.data_type in STORED_TYPES - {element_type} and tensor.name not in single:
                tensor.CopyFrom(cast_tensor(tensor, element_type))
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if value.type.HasField("tensor_type") and kind.elem_type in STORED_TYPES:
                kind.elem_type = element_type
        for node in graph.node:
            if node.output and node.output[0] not in single:
                _cast_attributes(node, element_type)
            graphs.extend(subgraphs(node))


def _single(model: onnx.ModelProto) -> Iterable[str]:
    for node in model.graph.node:
        for place in SINGLE_INPUTS.get(node.op_type, ()):
            if place < len(node.input) and node.input[place]:
                yield node.input[place]


def _cast_attributes(node: onnx.NodeProto, element_type: int) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            if attribute.t.data_type in STORED_TYPES - {element_type}:
                attribute.t.CopyFrom(cast_tensor(attribute.t, element_type))
        elif attribute.name in TYPE_ATTRIBUTES and attribute.i in STORED_TYPES:
            attribute.i = element_type
    if node.op_type == "Constant" and element_type != onnx.TensorProto.FLOAT:
        _cast_constant(node, element_type)


def _cast_constant(node: onnx.NodeProto, element_type: int) -> None:
    """Turn floats given as a plain attribute, which are single precision, into a tensor."""
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats"):
            many = attribute.name == "value_floats"
            values = list(attribute.floats) if many else [attribute.f]
            shape = [len(values)] if many else []
            tensor = onnx.helper.make_tensor(node.output[0], element_type, shape, values)
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
