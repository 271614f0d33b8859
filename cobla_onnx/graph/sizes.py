"""Size in bytes of tensors, from declared type and shape alone, and of tables in attributes."""

from __future__ import annotations

import math

import onnx

__all__ = ["PACKED", "table_bytes", "tensor_bytes"]

# Elements that share a byte. By name, since older onnx versions do not know them all.
PACKED = {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "INT2": 4, "UINT2": 4}


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements, as a Python int, without touching its data."""
    count: int = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    packed = PACKED.get(onnx.TensorProto.DataType.Name(tensor.data_type), 1)
    if packed > 1:
        return (count + packed - 1) // packed
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return count * itemsize


def table_bytes(node: onnx.NodeProto) -> int:
    """Bytes of what an operator of ai.onnx.ml was trained to, which it keeps in attributes.

    Trees, coefficients and vocabularies: 4 bytes a float, 8 an integer, as onnxruntime holds
    them. Other operators have sizes and switches there.
    """
    if node.domain != "ai.onnx.ml":
        return 0
    total = 0
    for attribute in node.attribute:
        total += 4 * len(attribute.floats) + 8 * len(attribute.ints)
        total += sum(map(len, attribute.strings))
        tensors = [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
        total += sum(map(tensor_bytes, tensors))
    return total
