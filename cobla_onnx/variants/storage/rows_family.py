"""Tables in fewer bits as a family of variants: rows with a scale each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.runtime.recent import Recent
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Measured, OnlyForm, Proposal
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.bits_family import BitsFamily, between
from cobla_onnx.variants.storage.rows import (
    RoundedTable,
    StoredRows,
    best_rows,
    round_table,
    stored_rows,
    table_bytes,
)

__all__ = ["ROWS", "RowStorageFamily"]

ROWS = "rows"
# Numbers of a table up to which the errors of all its rows are measured. Of larger ones it is the
# rows that count most, up to half as many, and evenly spaced ones that stand for all others.
MEASURED = 1 << 24


@dataclass(frozen=True)
class RowsUnit:
    """A table, the numbers of bits that are asked for, and how often each row is read."""

    weight: Carried
    layer: Layer
    bits: tuple[int, ...]
    frequencies: Float64 | None
    cache: Cache | None

    def measure(self) -> Measured:
        """Measure the error of every format, relative to the energy of the rows that are read."""
        cache = None if self.cache is None else self.cache.fresh()
        table = self.weight.array
        frequencies = self.frequencies
        if frequencies is None:
            frequencies = np.full(len(table), 1.0 / len(table))
        key = "" if cache is None else digest(table, frequencies, self.layer.type, self.bits)
        compute = partial(_errors, self.layer, table, frequencies, self.bits)
        lost = fetch(cache, "rows", key, compute)["errors"]
        known = between(dict(zip(self.bits, lost.tolist(), strict=True)))
        return Measured([known], [None], [] if cache is None else cache.notes)


def _errors(layer: Layer, table: NDArray[Any], frequencies: Float64, bits: Sequence[int]) -> Arrays:
    energy = np.einsum("rw,rw->r", table, table, dtype=np.float64) * frequencies
    total = float(energy.sum())
    if total <= 0:
        return {"errors": np.zeros(len(bits))}
    chosen, shares = _measured_rows(table.shape, energy)
    lost = []
    with one_thread:
        for each in bits:
            rows, weights = table[chosen], frequencies[chosen]
            best = min(best_rows(layer.shape, each), len(rows) // 2)
            made = round_table(rows, each, weights, best, layer.type)
            change = made.weight.astype(np.float64) - rows
            errors = np.einsum("rw,rw->r", change, change) * weights
            lost.append(float(errors @ shares) / total)
    return {"errors": np.array(lost)}


def _measured_rows(shape: tuple[int, ...], energy: Float64) -> tuple[NDArray[np.int64], Float64]:
    """Rows whose errors are measured, and for how many rows each of them stands."""
    rows, width = shape
    most = max(MEASURED // width, 2)
    if rows <= most:
        return np.arange(rows), np.ones(rows)
    order = np.argsort(-energy, kind="stable")
    first, rest = order[: most // 2], np.sort(order[most // 2 :])
    some = rest[:: -(-len(rest) // (most - most // 2))]
    share = float(energy[rest].sum()) / max(float(energy[some].sum()), np.finfo(np.float64).tiny)
    return np.append(first, some), np.append(np.ones(len(first)), np.full(len(some), share))


class RoundedTablesFromData:
    """Rounds tables; data says how much the error of each row counts.

    Parameters
    ----------
    seen : Seen
    """

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self._made: Recent[tuple[str, int], RoundedTable] = Recent(
            seen.kept, lambda made: made.weight.nbytes
        )

    def approximate(self, layer: Layer, form: Any, levels: Sequence[int]) -> list[RoundedTable]:
        """Return a table in the given numbers of bits."""
        with one_thread:
            made = (self._made.once((layer.name, b), partial(self._in, layer, b)) for b in levels)
            return list(made)

    def _in(self, layer: Layer, bits: int) -> RoundedTable:
        table = read_weight(self.seen.model, layer)
        return _rounded(layer, table, bits, self.seen.frequencies(layer))


class RowStorageFamily(BitsFamily):
    """Tables in fewer bits; a level is a number of bits."""

    name = "row storage"
    schemes = (ROWS,)
    refits = False

    def forms(self, layer: Layer) -> Sequence[OnlyForm]:
        """Return the form, for tables in single or half precision."""
        return (OnlyForm(ROWS),) if _takes(layer) else ()

    def stored_bytes(self, layer: Layer, bits: int) -> int:
        """Bytes of the table in so many bits."""
        return table_bytes(layer, bits)

    def refusal(self, layer: Layer) -> Refusal:
        """Say that other families are for what is no lookup."""
        return Refusal(Reason.OPERATOR)

    def unit(
        self,
        layer: Layer,
        proposals: Sequence[Proposal],
        weight: Carried,
        cache: Cache | None,
        maker: RoundedTablesFromData | None,
    ) -> RowsUnit:
        """Collect the input of the measurement."""
        bits = tuple(int(b) for proposal in proposals for b in proposal.levels)
        frequencies = None if maker is None else maker.seen.frequencies(layer)
        return RowsUnit(weight, layer, bits, frequencies, cache)

    def maker(self, seen: Seen) -> RoundedTablesFromData:
        """Weight errors by how often rows are read."""
        return RoundedTablesFromData(seen)

    def from_weights(
        self, layer: Layer, form: Any, level: int, weight: NDArray[Any], cache: Cache | None
    ) -> RoundedTable:
        """Round every number by itself."""
        return _rounded(layer, weight, level, None)

    def replace(self, layer: Layer, form: Any, approximation: RoundedTable) -> StoredRows:
        """Store codes and scales, or half precision."""
        return stored_rows(layer, approximation)

    def stand_in(self, layer: Layer, form: Any, level: int) -> StoredRows:
        """Return codes of random content."""
        table = np.random.default_rng(0).standard_normal(layer.shape, np.float32)
        return stored_rows(layer, _rounded(layer, table, level, None))


def _rounded(
    layer: Layer, table: NDArray[Any], bits: int, frequencies: Float64 | None
) -> RoundedTable:
    return round_table(table, bits, frequencies, best_rows(layer.shape, bits), layer.type)


def _takes(layer: Layer) -> bool:
    floating = layer.type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    return floating and operator_of(layer).kind == Lookup.kind
