"""The nodes that turn stored codes back into a weight.

Only operators that every opset has are used: Cast, Mul, Div, Sub, Add, Concat, Slice, Gather and
Reshape; below opset 9, where a Constant holds floating-point numbers alone, Unsqueeze, too. All of
their inputs are constants, so that onnxruntime computes the weight once, when it opens the model,
and runs what it would have run. What each node gives it holds until all are computed, so that nodes
are few and give little: codes are looked up in groups, in a table of what all groups stand for.
Codes of 4 bits may also stand in a type of their own (``nibbles``).

From IR version 8 and opset 10 on the nodes are the body of a function of the model, of which each
weight has one node (`decoder`); before that they stand in the graph (`decoder_nodes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.graph.functions import OWN_DOMAIN
from cobla_onnx.variants.names import INTEGER_CONSTANTS, SLICE_BY_INPUTS
from cobla_onnx.variants.storage.packing import PLANES, group_size, plane_names

__all__ = [
    "DOMAIN",
    "Body",
    "decoder",
    "decoder_inputs",
    "decoder_nodes",
]

DOMAIN = OWN_DOMAIN
"""Domain of the functions."""


def decoder_inputs(bits: int, nibbles: bool = False, cut: bool = False) -> list[str]:
    """Names of what a decoder reads.

    ``scale``: of a shape that broadcasts over the weight's. With 8 bits, ``codes``: int8, in the
    shape of the weight. With fewer, ``plane_0``, ...: uint8 arrays as `pack` makes them;
    ``levels``: the table; ``shape``: the weight's, int64; if the last bytes are filled up (`cut`),
    ``count``: number of its elements, int64 of shape (1,). With `nibbles` (4 bits), ``codes``:
    UINT4, in the shape of the weight, and ``levels``.
    """
    if nibbles:
        return ["codes", "levels", "scale"]
    if bits == 8:
        return ["codes", "scale"]
    return [*plane_names(bits), "levels", "scale", "shape", *["count"] * cut]


def decoder(bits: int, opset: int, nibbles: bool = False, cut: bool = False) -> onnx.FunctionProto:
    """Make the function that decodes a weight, called ``Decode4`` or such; from opset 10 on."""
    inputs = decoder_inputs(bits, nibbles, cut)
    by_name = dict(zip(inputs, inputs, strict=True))
    nodes = decoder_nodes(bits, opset, by_name, "weight", str, nibbles=nibbles)
    imports = [helper.make_opsetid("", opset)]
    name = f"Decode{bits}{'Cut' * cut}"
    return helper.make_function(DOMAIN, name, inputs, ["weight"], nodes, imports)


def decoder_nodes(
    bits: int,
    opset: int,
    inputs: Mapping[str, str],
    output: str,
    unique: Callable[[str], str],
    count: int = 0,
    nibbles: bool = False,
) -> list[onnx.NodeProto]:
    """Make the nodes that decode a weight.

    Parameters
    ----------
    inputs : mapping of str to str
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
    body = Body(unique, opset)
    if nibbles:
        index = body.add("Cast", [inputs["codes"]], to=TensorProto.INT32)
        shaped = body.add("Gather", [inputs["levels"], index])
    elif bits == 8:
        shaped = body.add("Cast", [inputs["codes"]], to=TensorProto.FLOAT)
    else:
        planes = [inputs[part] for part in plane_names(bits)]
        values = body.looked_up(bits, planes, inputs["levels"])
        if "count" in inputs:
            values = body.add("Reshape", [values, body.constant(np.array([-1], np.int64))])
            values = body.cut(values, inputs["count"], count)
        shaped = body.add("Reshape", [values, inputs["shape"]])
    body.nodes.append(helper.make_node("Mul", [shaped, inputs["scale"]], [output]))
    return body.nodes


@dataclass
class Body:
    """Nodes that are made one after the other."""

    unique: Callable[[str], str]
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    numbers: dict[tuple[type[np.generic], int], str] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = self.unique(f"decode_{len(self.nodes)}")
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant of one or two numbers, or from opset 9 on of any; return its name."""
        if self.opset >= INTEGER_CONSTANTS or value.dtype.kind == "f":
            return self.add("Constant", [], value=numpy_helper.from_array(value))
        # More than two floating-point numbers would count as a weight.
        assert value.size <= 2
        floating = self.add("Constant", [], value=numpy_helper.from_array(value.astype(np.float32)))
        return self.add("Cast", [floating], to=helper.np_dtype_to_tensor_dtype(value.dtype))

    def number(self, value: int, kind: type[np.generic] = np.int32) -> str:
        """Name a constant of the body, the same for the same value."""
        if (kind, value) not in self.numbers:
            self.numbers[kind, value] = self.constant(np.array(value, kind))
        return self.numbers[kind, value]

    def looked_up(self, bits: int, planes: Sequence[str], levels: str, axis: int = 0) -> str:
        """Decode the groups of codes that bytes of the planes hold, one after the other.

        Parameters
        ----------
        planes : sequence of str
            Bytes as `pack` makes them or, along axis 1, as `pack_rows` does.
        levels : str
            What codes stand for.

        Returns
        -------
        str
            Of the shape of the first plane, with one axis more for the codes of a group.
        """
        size, rest = group_size(bits), bits - PLANES[bits][0]
        index, *below = [self.add("Cast", [plane], to=TensorProto.INT32) for plane in planes]
        for plane in below:
            above = self.add("Mul", [index, self.number(1 << rest * size)])
            index = self.add("Add", [above, self._fields(plane, rest * size, axis)])
        return self.add("Gather", [self._levels_of_groups(levels, bits), index])

    def _fields(self, plane: str, width: int, axis: int) -> str:
        """Split bytes into fields of a width, the lowest first, one part after the other."""
        parts, rest = [], plane
        for _ in range(8 // width - 1):
            above = self.add("Div", [rest, self.number(1 << width)])
            parts.append(self.add("Sub", [rest, self.add("Mul", [above, self.number(1 << width)])]))
            rest = above
        return self.add("Concat", [*parts, rest], axis=axis)

    def _levels_of_groups(self, levels: str, bits: int) -> str:
        """Compute what all groups of codes stand for, shape (groups, codes of a group).

        A group's index has the bits of the first plane of all its codes above those of the second,
        the first code's lowest. So with an axis for each of these, a code's levels lie along two
        of them, and do not depend on the others.
        """
        size, widths, codes = group_size(bits), PLANES[bits], []
        lengths = np.array([1 << width for width in widths], np.int64)
        if self.opset < INTEGER_CONSTANTS:
            levels = self.add("Reshape", [levels, self.constant(lengths)])
        for place in range(size):
            its = [size * plane + size - 1 - place for plane in range(len(widths))]
            if self.opset < INTEGER_CONSTANTS:
                others = sorted({*range(size * len(widths))} - {*its})
                codes.append(self.add("Unsqueeze", [levels], axes=others))
                continue
            shape = np.ones(size * len(widths), np.int64)
            shape[its] = lengths
            codes.append(self.add("Reshape", [levels, self.constant(shape)]))
        zeros = [self.add("Mul", [code, self.number(0, np.float32)]) for code in codes]
        nothing = functools.reduce(lambda one, other: self.add("Add", [one, other]), zeros)
        column = self.constant(np.array([-1, 1], np.int64))
        filled = [self.add("Add", [code, nothing]) for code in codes]
        return self.add("Concat", [self.add("Reshape", [c, column]) for c in filled], axis=1)

    def cut(self, values: str, length: str, count: int, axis: int = 0) -> str:
        """Leave out what bytes are filled up with: from `length` on, or below opset 10 `count`."""
        if self.opset < SLICE_BY_INPUTS:
            return self.add("Slice", [values], axes=[axis], starts=[0], ends=[count])
        begin, along = (self.constant(np.array([value], np.int64)) for value in (0, axis))
        return self.add("Slice", [values, begin, length, along])
