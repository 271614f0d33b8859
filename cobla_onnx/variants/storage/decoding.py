"""The nodes that turn stored codes back into a weight.

Only operators that every opset has are used: Cast, Mul, Floor, Sub, Add, Concat, Slice, Gather and
Reshape. All of their inputs are constants, so that onnxruntime computes the weight once, when it
opens the model, and runs what it would have run. Codes of 4 bits may also stand in a type of their
own (``nibbles``), which Cast reads: half the time of opening, and less memory meanwhile.

From IR version 8 and opset 10 on the nodes are the body of a function of the model, of which each
weight has one node (`decoder`); before that they stand in the graph (`decoder_nodes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.graph.functions import OWN_DOMAIN
from cobla_onnx.variants.names import SLICE_BY_INPUTS
from cobla_onnx.variants.storage.packing import PLANES

__all__ = [
    "DOMAIN",
    "Body",
    "constant_bytes",
    "decoder",
    "decoder_inputs",
    "decoder_nodes",
]

DOMAIN = OWN_DOMAIN
"""Domain of the functions."""


def decoder_inputs(bits: int, nibbles: bool = False) -> list[str]:
    """Names of what a decoder reads.

    ``scale``: of a shape that broadcasts over the weight's. With 8 bits, ``codes``: int8, in the
    shape of the weight. With fewer, ``plane_0``, ...: uint8 arrays as `pack` makes them;
    ``levels``: the table; ``shape``: the weight's, int64; ``count``: number of its elements, int64
    of shape (1,). With `nibbles` (4 bits), ``codes``: UINT4, in the shape of the weight, and
    ``levels``.
    """
    if nibbles:
        return ["codes", "levels", "scale"]
    if bits == 8:
        return ["codes", "scale"]
    planes = [f"plane_{number}" for number in range(len(PLANES[bits]))]
    return [*planes, "levels", "scale", "shape", "count"]


def decoder(bits: int, opset: int, nibbles: bool = False) -> onnx.FunctionProto:
    """Make the function that decodes a weight, called ``Decode{bits}``; from opset 10 on."""
    inputs = decoder_inputs(bits, nibbles)
    by_name = dict(zip(inputs, inputs, strict=True))
    nodes = decoder_nodes(bits, opset, by_name, "weight", str, 0, nibbles)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, f"Decode{bits}", inputs, ["weight"], nodes, imports)


def decoder_nodes(
    bits: int,
    opset: int,
    inputs: dict[str, str],
    output: str,
    unique: Callable[[str], str],
    count: int,
    nibbles: bool = False,
) -> list[onnx.NodeProto]:
    """Make the nodes that decode a weight.

    Parameters
    ----------
    inputs : dict of str to str
        Names of the tensors by those in `decoder_inputs`.
    output : str
        Name of the weight.
    unique : callable
        Makes a name unique among the tensors of the graph.
    count : int
        Number of the weight's elements; used below opset 10, where it is an attribute.
    nibbles : bool
        Whether codes of 4 bits stand in UINT4.
    """
    body = Body(unique)
    if nibbles:
        index = body.add("Cast", [inputs["codes"]], to=TensorProto.INT32)
        shaped = body.add("Gather", [inputs["levels"], index])
    elif bits == 8:
        shaped = body.add("Cast", [inputs["codes"]], to=TensorProto.FLOAT)
    else:
        shaped = body.looked_up(bits, opset, inputs, count)
    body.nodes.append(helper.make_node("Mul", [shaped, inputs["scale"]], [output]))
    return body.nodes


@functools.cache
def constant_bytes(bits: int) -> int:
    """Most bytes of the constants in a decoder's body, whatever the opset."""
    nodes = decoder(bits, SLICE_BY_INPUTS).node
    values = [helper.get_attribute_value(n.attribute[0]) for n in nodes if n.op_type == "Constant"]
    return sum(numpy_helper.to_array(value).nbytes for value in values)


@dataclass
class Body:
    """Nodes that are made one after the other."""

    unique: Callable[[str], str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    numbers: dict[float, str] = field(default_factory=dict)
    begin: str = ""

    def looked_up(self, bits: int, opset: int, inputs: dict[str, str], count: int) -> str:
        """Put planes together to indices, and take the levels there, in the weight's shape."""
        index = ""
        for number, width in enumerate(PLANES[bits]):
            plane = self.add("Cast", [inputs[f"plane_{number}"]], to=TensorProto.FLOAT)
            fields = self.cut(self.fields(plane, width), opset, inputs, count)
            if index:
                above = self.add("Mul", [index, self.number(float(1 << width))])
                fields = self.add("Add", [above, fields])
            index = fields
        index = self.add("Cast", [index], to=TensorProto.INT32)
        values = self.add("Gather", [inputs["levels"], index])
        return self.add("Reshape", [values, inputs["shape"]])

    def cut(self, fields: str, opset: int, inputs: dict[str, str], count: int) -> str:
        """Leave out the fields with which the last bytes of a plane are filled up."""
        if opset < SLICE_BY_INPUTS:
            return self.add("Slice", [fields], starts=[0], ends=[count])
        self.begin = self.begin or self.constant(np.zeros(1, np.int64))
        return self.add("Slice", [fields, self.begin, inputs["count"]])

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = self.unique(f"decode_{len(self.nodes)}")
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant; return its name."""
        return self.add("Constant", [], value=numpy_helper.from_array(value))

    def number(self, value: float) -> str:
        """Name a constant of the body, the same for the same value."""
        if value not in self.numbers:
            self.numbers[value] = self.constant(np.array(value, np.float32))
        return self.numbers[value]

    def fields(self, plane: str, width: int, axis: int = 0) -> str:
        """Split bytes into fields of a width, the lowest first, one part after the other."""
        parts, rest = [], plane
        for _ in range(8 // width - 1):
            whole = self.add("Mul", [rest, self.number(1.0 / (1 << width))])
            above = self.add("Floor", [whole])
            parts.append(
                self.add("Sub", [rest, self.add("Mul", [above, self.number(float(1 << width))])])
            )
            rest = above
        return self.add("Concat", [*parts, rest], axis=axis) if parts else rest
