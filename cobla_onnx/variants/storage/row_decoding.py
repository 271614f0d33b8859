"""The nodes that look rows up in a table of few bits, and decode those alone.

A large table stays as it is stored, also in memory: a decoder of the whole weight, as layers have
it (`decoding`), would be folded to a table in single precision when the model opens, or computed in
every run. Of a small one all rows are looked up at once, which is folded. Rows are packed one by
one, so that the lookup takes bytes. What neighbouring codes stand for is looked up at once, in a
table of all such groups that onnxruntime computes when it opens the model: numbers one by one take
most of the time of a lookup.

From IR version 8 and opset 10 on the nodes are the body of a function of the model, of which each
lookup has one node (`row_decoder`); before that they stand in the graph (`row_decoder_nodes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from cobla_onnx.variants.storage.decoding import DOMAIN, Body
from cobla_onnx.variants.storage.packing import group_size, plane_names
from cobla_onnx.variants.storage.precision import HALF

__all__ = ["RowFormat", "row_decoder", "row_decoder_nodes"]

# The opset from which Reshape takes lengths of 0 as they are, if it is told to.
ALLOWS_ZERO = 14


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a table are stored.

    Attributes
    ----------
    bits : int
    mixed : bool
        Whether some rows are stored in 8 bits; not with 8 bits or more.
    cut : bool
        Whether the last bytes of a row are filled up; not with 8 bits or more.
    floating : int
        Type of the rows once they are decoded, FLOAT or FLOAT16.
    """

    bits: int
    mixed: bool = False
    cut: bool = False
    floating: int = TensorProto.FLOAT

    @property
    def name(self) -> str:
        """Name of the function."""
        mixed, cut = self.mixed * "Mixed", self.cut * "Cut"
        return f"Rows{self.bits}{mixed}{cut}{(self.floating != TensorProto.FLOAT) * 'Half'}"

    @property
    def inputs(self) -> list[str]:
        """Names of what a lookup reads beside the numbers of rows.

        ``half``: the table in half precision, of 16 bits. ``scale``: of shape (rows, 1). With 8
        bits, ``codes``: int8, in the shape of the table. With fewer, ``plane_0``, ...: uint8 arrays
        as `pack_rows` makes them; ``levels``: what codes stand for; ``width``: of a row, int64 of
        shape (1,). If some rows are stored in 8 bits, ``place``: integers of shape (rows,), places
        in ``best_codes`` and ``best_scale``, whose first row is 0 and stands for all others. The
        scale of rows that are there is 0.
        """
        if self.bits == HALF:
            return ["half"]
        if self.bits == 8:
            return ["codes", "scale"]
        best = ["place", "best_codes", "best_scale"] if self.mixed else []
        return [*plane_names(self.bits), "levels", "scale", "width", *best]


def row_decoder(form: RowFormat, opset: int) -> onnx.FunctionProto:
    """Make the function that looks rows up; its first input, ``ids``, are their numbers."""
    inputs = ["ids", *form.inputs]
    nodes = row_decoder_nodes(form, opset, dict(zip(inputs, inputs, strict=True)), "rows", str, 0)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, form.name, inputs, ["rows"], nodes, imports)


def row_decoder_nodes(
    form: RowFormat,
    opset: int,
    inputs: Mapping[str, str],
    output: str,
    unique: Callable[[str], str],
    width: int,
) -> list[onnx.NodeProto]:
    """Make the nodes that look rows up.

    Parameters
    ----------
    inputs : mapping of str to str
        Names of the tensors by those in `RowFormat.inputs`, and of the numbers of rows, ``ids``.
    output : str
        Name of the rows.
    unique : callable
        Makes a name unique among the tensors of the graph.
    width : int
        Of a row; used below opset 10, where it is an attribute.
    """
    body = Body(unique, opset)
    if form.bits == HALF:
        half = body.add("Gather", [inputs["half"], inputs["ids"]])
        return [*body.nodes, helper.make_node("Cast", [half], [output], to=form.floating)]
    if form.bits == 8:
        body.add("Identity", [_scaled(body, inputs["codes"], inputs["scale"], inputs["ids"])])
    else:
        rows, shape = _unpacked(body, form, inputs, width)
        # Otherwise a length of 0 stands for the input's: right for a batch of none, and no other.
        empty = {"allowzero": 1} if opset >= ALLOWS_ZERO else {}
        body.add("Reshape", [rows, shape], **empty)
    if form.floating != TensorProto.FLOAT:
        body.add("Cast", [body.nodes[-1].output[0]], to=form.floating)
    body.nodes[-1].output[0] = output
    return body.nodes


def _scaled(body: Body, codes: str, scale: str, ids: str) -> str:
    """Look up rows of 8 bits, and their scales."""
    wide = body.add("Cast", [body.add("Gather", [codes, ids])], to=TensorProto.FLOAT)
    return body.add("Mul", [wide, body.add("Gather", [scale, ids])])


def _unpacked(
    body: Body, form: RowFormat, inputs: Mapping[str, str], width: int
) -> tuple[str, str]:
    """Decode the rows below each other, whatever the shape of their numbers; return the shape, too.

    With two axes no operator needs to count its axes from the end, which old opsets cannot.
    """
    flat = body.add("Reshape", [inputs["ids"], body.constant(np.array([-1], np.int64))])
    read = [body.add("Gather", [inputs[part], flat]) for part in plane_names(form.bits)]
    groups = body.looked_up(form.bits, read, inputs["levels"], axis=1)
    # The number of rows may be 0, so that a length of -1 would be no length.
    first_two = body.add("Shape", [read[0]])
    size = body.constant(np.array([1, group_size(form.bits)], np.int64))
    values = body.add("Reshape", [groups, body.add("Mul", [first_two, size])])
    if form.cut:
        values = body.cut(values, inputs["width"], width, axis=1)
    rows = body.add("Mul", [values, body.add("Gather", [inputs["scale"], flat])])
    if form.mixed:
        place = body.add(
            "Cast", [body.add("Gather", [inputs["place"], flat])], to=TensorProto.INT32
        )
        best = _scaled(body, inputs["best_codes"], inputs["best_scale"], place)
        rows = body.add("Add", [rows, best])
    shape = body.add("Concat", [body.add("Shape", [inputs["ids"]]), inputs["width"]], axis=0)
    return rows, shape
