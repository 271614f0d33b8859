"""A table in few bits with a scale for each row, and the nodes that look rows up in it.

Those whose errors would count most are stored in 8 bits, beside the table (`best_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx.numpy_helper import from_array

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.variants.best_rows import best_count, best_of, place_type, places
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Place, Replacement, narrowed, own_node
from cobla_onnx.variants.storage.coding import Coded, signed
from cobla_onnx.variants.storage.decoding import DOMAIN
from cobla_onnx.variants.storage.packing import filling, pack_rows, packed_bytes, plane_names
from cobla_onnx.variants.storage.precision import HALF, in_half
from cobla_onnx.variants.storage.rounding import round_weight
from cobla_onnx.variants.storage.row_decoding import RowFormat, row_decoder, row_decoder_nodes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "RoundedTable",
    "StoredRows",
    "best_rows",
    "round_table",
    "stored_rows",
    "table_bytes",
]


# Numbers of a table up to which all rows are decoded when the model opens: a megabyte.
OPENED = 1 << 18
# The opset from which there is Range: the numbers of all rows would take bytes as a constant.
RANGE = 11
# What lookups of a table read that was decoded before.
TABLE = "table"


def best_rows(shape: tuple[int, ...], bits: int) -> int:
    """Number of a table's rows that are stored in 8 bits, where the others have fewer."""
    return best_count(shape) if bits < 8 else 0


def table_bytes(layer: Layer, bits: int) -> int:
    """Bytes of a table in so many bits, with all that decodes its rows."""
    rows, width = layer.shape
    if bits == HALF:
        return 2 * layer.params
    scales = 4 * rows
    if bits == 8:
        return layer.params + scales
    # Levels, and the width of a row.
    total = rows * packed_bytes(width, bits) + scales + (4 << bits) + 8
    best = best_rows(layer.shape, bits)
    if best:
        total += rows * place_type(best).itemsize + (best + 1) * (width + 4)
    return total


def _row_format(layer: Layer, bits: int, mixed: bool) -> RowFormat:
    """How the rows of a table are stored in so many bits."""
    cut = bits < 8 and filling(layer.shape[1], bits) > 0
    return RowFormat(bits, mixed, cut, layer.type)


@dataclass(frozen=True)
class RoundedTable:
    """A table in fewer bits.

    Attributes
    ----------
    coded : Coded or None
        Rows of the table as rows of a weight of one group; None for half precision.
    best : int64 array
        Rows that are stored in 8 bits, ascending.
    best_coded : Coded or None
        These rows; None if there are none.
    weight : array, shape (rows, width)
        As it is decoded, in the type in which the lookup gives it.
    bias : None
        A lookup has none.
    """

    coded: Coded | None
    best: NDArray[np.int64]
    best_coded: Coded | None
    weight: NDArray[Any]
    bias: None = None


def round_table(
    table: NDArray[Any], bits: int, frequencies: Float64 | None, best: int, floating: int
) -> RoundedTable:
    """Round every number of a table by itself: levels that fit all, and a scale for each row.

    Parameters
    ----------
    table : array, shape (rows, width)
    frequencies : float64 array, shape (rows,), optional
        How much the error of each row counts; by default all do alike.
    best : int
        Number of rows that are stored in 8 bits.
    floating : int
        Type in which rows are looked up.
    """
    kind, none = helper.tensor_dtype_to_np_dtype(floating), np.zeros(0, np.int64)
    if bits == HALF:
        return RoundedTable(None, none, None, in_half(table).astype(kind))
    coded = round_weight(table[None], None, bits)
    weight = coded.dense()[0]
    if not best:
        return RoundedTable(coded, none, None, weight.astype(kind))
    change = weight.astype(np.float64) - table
    errors = np.einsum("rw,rw->r", change, change)
    if frequencies is not None:
        errors = errors * frequencies
    chosen = best_of(errors, best)
    best_coded = round_weight(table[None, chosen], None, 8)
    weight[chosen] = best_coded.dense()[0]
    return RoundedTable(coded, chosen, best_coded, weight.astype(kind))


@dataclass(frozen=True)
class StoredRows(Replacement):
    """A table in few bits, and lookups that decode rows; a small table is decoded before them.

    Attributes
    ----------
    layer, arrays, bias
        As those of `Replacement`; the arrays are those of `RowFormat.inputs`.
    form : RowFormat
    weight : array, shape (rows, width)
        The table as it is decoded.
    """

    form: RowFormat
    weight: NDArray[Any]

    @property
    def held(self) -> int:
        """Bytes of memory that it takes, the decoded table included."""
        return self.nbytes + self.weight.nbytes

    def moved(self, place: Place) -> Self:
        """Return the same with equal arrays, the decoded table among them."""
        return replace(super().moved(place), weight=place("decoded", self.weight))

    def dense(self) -> NDArray[Any]:
        """Return the table as it is decoded."""
        return self.weight

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build no nodes, since every lookup decodes its own rows; or those that decode them all.

        These are of a small table. Their inputs are all constant, so that onnxruntime computes it
        once, when it opens the model.
        """
        if self.layer.params > OPENED or names.opset < RANGE:
            return [], dict(stored)
        label = self.layer.name
        numbers = [np.array(number, np.int64) for number in (0, len(self.weight), 1)]
        bounds = [names.tensor(f"{label}/rows") for _ in numbers]
        nodes = [
            helper.make_node("Constant", [], [name], names.node(name), value=from_array(number))
            for name, number in zip(bounds, numbers, strict=True)
        ]
        ids, table = names.tensor(f"{label}/ids"), names.tensor(f"{label}/decoded")
        nodes.append(helper.make_node("Range", bounds, [ids], names.node(ids)))
        decode = self._looked_up({"ids": ids, **stored}, table, label, names)
        for node in decode:
            node.name = names.node(f"{label}/decode")
        return [*nodes, *decode], {TABLE: table}

    def nodes(
        self,
        node: onnx.NodeProto,
        use: Use,
        operands: Mapping[str, str],
        rest: Sequence[str],
        names: Names,
    ) -> list[onnx.NodeProto]:
        """Build the nodes of a lookup; of a table that is decoded before, its own node."""
        if TABLE in operands:
            return [own_node(node, self.layer.weight_input, operands[TABLE], rest)]
        inputs, label = {"ids": use.data, **operands}, node.name or use.output
        nodes = self._looked_up(inputs, use.output, label, names)
        for each in nodes[:-1]:
            each.name = names.node(f"{label}/decode")
        nodes[-1].name = node.name
        return nodes

    def _looked_up(
        self, inputs: Mapping[str, str], output: str, label: str, names: Names
    ) -> list[onnx.NodeProto]:
        """Build one node of a function of the model or, in old models, what would be its body."""
        if names.takes_functions:
            function = names.function(row_decoder(self.form, names.opset))
            given = [inputs[part] for part in ("ids", *self.form.inputs)]
            return [helper.make_node(function, given, [output], domain=DOMAIN)]

        def unique(part: str) -> str:
            return names.tensor(f"{label}/{part}")

        width = self.layer.shape[1]
        return row_decoder_nodes(self.form, names.opset, inputs, output, unique, width)


def stored_rows(layer: Layer, made: RoundedTable) -> StoredRows:
    """Store what a table was rounded to.

    Raises
    ------
    ModelError
        If a number of it overflows half precision.
    """
    coded, best = made.coded, made.best_coded
    if coded is None:
        half = narrowed(layer, made.weight, np.dtype(np.float16), "its table")
        return StoredRows(layer, {"half": half}, None, _row_format(layer, HALF, False), made.weight)
    scale = coded.scales[0][:, None].copy()
    form = _row_format(layer, coded.bits, best is not None)
    if coded.bits == 8:
        arrays: dict[str, NDArray[Any]] = {"codes": signed(coded.codes[0]), "scale": scale}
        return StoredRows(layer, arrays, None, form, made.weight)
    codes = coded.codes[0]
    planes = dict(zip(plane_names(coded.bits), pack_rows(codes, coded.bits), strict=True))
    width = np.array([codes.shape[1]], np.int64)
    arrays = {**planes, "levels": coded.levels, "scale": scale, "width": width}
    if best is not None:
        scale[made.best] = 0
        arrays |= {
            "place": places(made.best, len(codes)),
            "best_codes": np.pad(signed(best.codes[0]), ((1, 0), (0, 0))),
            "best_scale": np.pad(best.scales[0], (1, 0))[:, None],
        }
    return StoredRows(layer, arrays, None, form, made.weight)
