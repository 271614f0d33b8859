"""A lookup's table as the product of two factors, with some of its rows as they are.

A row of the table is the row of the first factor, of rank r, times the second factor. That costs
MACs, where the lookup of whole rows costs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.variants.best_rows import best_count, best_of, place_type, places
from cobla_onnx.variants.low_rank.curve import tails
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from cobla_onnx.variants.low_rank.svd import CHUNK, Factorization, Float64
from cobla_onnx.variants.low_rank.weighted_svd import balanced
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Replacement, narrowed

__all__ = ["FactoredTable", "StoredTable", "TableFactorizer", "fixed_bytes", "stored_table"]


def fixed_bytes(layer: Layer) -> int:
    """Bytes of what is stored beside the factors of a table, whatever the rank."""
    rows, width = layer.shape
    count = best_count(layer.shape)
    if not count:
        return 0
    itemsize = helper.tensor_dtype_to_np_dtype(layer.stored_type).itemsize
    return rows * place_type(count).itemsize + (count + 1) * width * itemsize


@dataclass(frozen=True)
class FactoredTable:
    """A table at some rank.

    Attributes
    ----------
    factors : Factorization
        Of one group; rows of the left factor that are in `best` are 0.
    best : int64 array
        Rows that are as they were, ascending.
    rows : array, shape (best, width)
    bias : None
        A lookup has none.
    """

    factors: Factorization
    best: NDArray[np.int64]
    rows: NDArray[Any]
    bias: None = None

    @cached_property
    def weight(self) -> Float64:
        """The table, shape (rows, width)."""
        found = self.factors.left[0] @ self.factors.right[0]
        found[self.best] = self.rows
        return np.asarray(found)


class TableFactorizer:
    """Factorise a table so that the rows that are read differ least.

    With the frequencies f of its rows, E||y - y'||^2 = sum_i f_i ||t_i - t_i'||^2: the best factors
    are T V and V^T, with V the leading eigenvectors of T^T diag(f) T.

    Parameters
    ----------
    table : array, shape (rows, width)
    frequencies : float64 array, shape (rows,), optional
        By default all rows count alike.

    Attributes
    ----------
    singular_values : float64 array, shape (min(rows, width),)
        Of diag(f)^(1/2) T without the rows that are kept, descending.
    energy : float
        E||y||^2, of all rows.
    """

    def __init__(self, table: NDArray[Any], frequencies: Float64 | None) -> None:
        if frequencies is None:
            frequencies = np.full(len(table), 1.0 / len(table))
        self._table = table
        each = np.einsum("rw,rw->r", table, table, dtype=np.float64) * frequencies
        self.best = best_of(each, best_count(table.shape))
        self.energy = float(each.sum())
        rest = frequencies.copy()
        rest[self.best] = 0
        values, vectors = np.linalg.eigh(_moment(table, rest))
        self._vectors = vectors[:, ::-1]
        size = min(table.shape)
        self.singular_values: Float64 = np.sqrt(np.maximum(values[::-1][:size], 0.0))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._vectors.nbytes + self._table.nbytes

    def errors(self) -> Float64:
        """Squared relative error at ranks 0 to full rank."""
        lost = tails(self.singular_values)
        found = lost / self.energy if self.energy > 0 else np.zeros_like(lost)
        found[0] = 1.0
        return np.minimum(found, 1.0)

    def factorize(self, rank: int) -> FactoredTable:
        """Return the table at a rank."""
        right = self._vectors[:, :rank]
        left = self._table.astype(np.float64) @ right
        left[self.best] = 0
        scheme = ProductScheme("table", self._table.shape, 1, transposed=False, data_left=True)
        factors = balanced(scheme, [(left, right.T)])
        return FactoredTable(factors, self.best, self._table[self.best])


def _moment(table: NDArray[Any], frequencies: Float64) -> Float64:
    """Second moment of the rows that a lookup gives, shape (width, width)."""
    width = table.shape[1]
    total: Float64 = np.zeros((width, width))
    step = max(1, CHUNK // width)
    for begin in range(0, len(table), step):
        part = slice(begin, begin + step)
        rows = table[part].astype(np.float64)
        total += (rows * frequencies[part, None]).T @ rows
    return np.asarray((total + total.T) / 2)


@dataclass(frozen=True)
class StoredTable(Replacement):
    """The factors of a table, in its type, and the rows that are as they were.

    Attributes
    ----------
    layer, arrays, bias
        As those of `Replacement`; the arrays are ``first_factor`` and ``second_factor`` and, if
        some rows are as they were, ``best``, whose first row is 0, and ``place``, see `places`.
    best : int64 array
    """

    best: NDArray[np.int64]

    def dense(self) -> NDArray[Any]:
        """Return the table that the arrays stand for."""
        kind = helper.tensor_dtype_to_np_dtype(self.layer.type)
        first, second = self.arrays["first_factor"], self.arrays["second_factor"]
        wide = np.result_type(first.dtype, np.float32)
        found = first.astype(wide) @ second.astype(wide)
        if len(self.best):
            found[self.best] = self.arrays["best"][1:]
        return np.asarray(found.astype(kind))

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Cast the second factor; of what is looked up, every use casts its own rows."""
        if self.layer.type == self.layer.stored_type:
            return [], dict(stored)
        name = stored["second_factor"]
        cast = names.tensor(f"{name}_cast")
        node = helper.make_node(
            "Cast", [name], [cast], names.node(f"{name}_cast"), to=self.layer.type
        )
        return [node], {**stored, "second_factor": cast}

    def nodes(
        self,
        node: onnx.NodeProto,
        use: Use,
        operands: Mapping[str, str],
        rest: Sequence[str],
        names: Names,
    ) -> list[onnx.NodeProto]:
        """Build a lookup of short rows and a product; and a lookup of whole rows and a sum."""
        label = node.name or use.output
        made: list[onnx.NodeProto] = []

        def add(op: str, inputs: list[str], part: str, **values: Any) -> str:
            output = names.tensor(f"{label}/{part}")
            its = helper.make_node(op, inputs, [output], names.node(f"{label}/{part}"), **values)
            made.append(its)
            return output

        def looked_up(part: str, ids: str) -> str:
            rows = add("Gather", [operands[part], ids], part)
            if part == "place":
                return add("Cast", [rows], "place_cast", to=TensorProto.INT32)
            if self.layer.type == self.layer.stored_type:
                return rows
            return add("Cast", [rows], f"{part}_cast", to=self.layer.type)

        short = [looked_up("first_factor", use.data), operands["second_factor"]]
        if not len(self.best):
            return [*made, helper.make_node("MatMul", short, [use.output], node.name)]
        product = add("MatMul", short, "lowrank")
        whole = looked_up("best", looked_up("place", use.data))
        return [*made, helper.make_node("Add", [product, whole], [use.output], node.name)]


def stored_table(layer: Layer, made: FactoredTable) -> StoredTable:
    """Store a table at some rank, in its type.

    Raises
    ------
    ModelError
        If a factor overflows it.
    """
    dtype = helper.tensor_dtype_to_np_dtype(layer.stored_type)
    what = "a factor of its table"
    arrays: dict[str, NDArray[Any]] = {
        "first_factor": narrowed(layer, made.factors.left[0], dtype, what),
        "second_factor": narrowed(layer, made.factors.right[0], dtype, what),
    }
    if len(made.best):
        whole = np.pad(made.rows, ((1, 0), (0, 0)))
        arrays |= {
            "best": narrowed(layer, whole, dtype, "its table"),
            "place": places(made.best, layer.shape[0]),
        }
    return StoredTable(layer, arrays, None, made.best)
