"""Low rank of the tables of lookups as a family of variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from cobla_onnx.allocation import VariantCurve
from cobla_onnx.allocation.resources import known_costs
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.graph.operators.base import elements, operator_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.runtime.recent import Recent
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, LayerCosts, Measured, OnlyForm, Proposal, VariantFamily
from cobla_onnx.variants.best_rows import best_count
from cobla_onnx.variants.low_rank.ranks import RankRule
from cobla_onnx.variants.low_rank.svd import Factorization, Float64
from cobla_onnx.variants.low_rank.tables import (
    FactoredTable,
    StoredTable,
    TableFactorizer,
    fixed_bytes,
    stored_table,
)

__all__ = ["TABLE", "LowRankTables", "TableUnit"]

TABLE = "table"


@dataclass(frozen=True)
class TableUnit:
    """A table, and how often each of its rows is read, if that is known."""

    weight: Carried
    frequencies: Float64 | None
    cache: Cache | None

    def measure(self) -> Measured:
        """Compute the error at every rank, relative to the energy of the rows that are read."""
        cache = None if self.cache is None else self.cache.fresh()
        table, frequencies = self.weight.array, self.frequencies
        key = "" if cache is None else digest(table, frequencies, best_count(table.shape))

        def compute() -> Arrays:
            with one_thread:
                solver = TableFactorizer(table, frequencies)
            return {"errors": solver.errors(), "values": solver.singular_values}

        found = fetch(cache, "table", key, compute)
        notes = [] if cache is None else cache.notes
        return Measured([found["errors"]], [found["values"]], notes)


class FactoredTablesFromData:
    """Factorises tables, weighted by how often their rows are read.

    Parameters
    ----------
    seen : Seen
    """

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self._solvers: Recent[str, TableFactorizer] = Recent(
            seen.kept, lambda solver: solver.nbytes
        )

    def approximate(self, layer: Layer, form: Any, levels: Sequence[int]) -> list[FactoredTable]:
        """Return a table at the given ranks."""
        with one_thread:
            solver = self._solvers.once(layer.name, partial(self._solver, layer))
            return [solver.factorize(rank) for rank in levels]

    def _solver(self, layer: Layer) -> TableFactorizer:
        table = read_weight(self.seen.model, layer)
        return TableFactorizer(table, self.seen.frequencies(layer))


class LowRankTables(VariantFamily):
    """Two factors in place of a lookup's table; a level is a rank."""

    name = "low-rank table"
    level = "rank"
    outcome = "factorised"
    schemes = (TABLE,)
    refits = False

    def forms(self, layer: Layer) -> Sequence[OnlyForm]:
        """Return the form, for lookups."""
        return (OnlyForm(TABLE),) if operator_of(layer).kind == Lookup.kind else ()

    def most(self, layer: Layer, form: OnlyForm) -> int:
        """Return the full rank."""
        return min(layer.shape)

    def propose(
        self, layer: Layer, costs: LayerCosts, asked: Asked
    ) -> Sequence[Proposal] | Refusal:
        """Propose the ranks at which the table is smaller, unless MACs or time are limited."""
        if not self.forms(layer):
            return Refusal(Reason.OPERATOR)
        room = layer.stored_bytes - 1 - fixed_bytes(layer)
        most = min(self.most(layer, OnlyForm(TABLE)), room // self._bytes_per_rank(layer))
        if most < 1:
            return Refusal(Reason.NO_GAIN)
        if asked.ranks.faster:
            return Refusal(Reason.NOT_FASTER, "whole rows take no MACs")
        if costs.macs is not None and self.macs(layer, None, 1, costs) is None:
            return Refusal(Reason.NOT_FASTER, "shapes not known")
        ranks = asked.ranks.product.candidates(most)
        if not len(ranks):
            return Refusal(Reason.NO_GAIN, str(asked.ranks.product))
        return [Proposal(OnlyForm(TABLE), ranks, self.most(layer, OnlyForm(TABLE)))]

    def _bytes_per_rank(self, layer: Layer) -> int:
        return sum(layer.shape) * helper.tensor_dtype_to_np_dtype(layer.stored_type).itemsize

    def curve(
        self,
        layer: Layer,
        costs: LayerCosts,
        proposal: Proposal,
        errors: Float64,
        spectrum: Float64 | None,
    ) -> VariantCurve:
        """Put costs and errors together; what is stored beside the factors costs at every rank."""
        ranks = proposal.levels
        found = {"mem": fixed_bytes(layer) + ranks * self._bytes_per_rank(layer)}
        macs = None if costs.macs is None else self.macs(layer, None, 1, costs)
        for name, cost in known_costs(mac=macs).items():
            found[name] = ranks * cost
        return VariantCurve(self.name, TABLE, ranks, found, errors, nested=False, spectrum=spectrum)

    def params(self, layer: Layer, form: Any, level: int) -> int:
        """Count the numbers of both factors, and of the rows that stay."""
        return sum(layer.shape) * level + best_count(layer.shape) * layer.shape[1]

    def macs(self, layer: Layer, form: Any, level: int, costs: LayerCosts) -> int | None:
        """Count the MACs of the second factor over all uses; None where shapes are not known."""
        total = 0
        for use in layer.uses:
            size = elements(costs.shapes.get(use.output))
            if size is None:
                return None
            total += size * level
        return total

    def unit(
        self,
        layer: Layer,
        proposals: Sequence[Proposal],
        weight: Carried,
        cache: Cache | None,
        maker: FactoredTablesFromData | None,
    ) -> TableUnit:
        """Collect the input for singular values."""
        return TableUnit(weight, None if maker is None else maker.seen.frequencies(layer), cache)

    def maker(self, seen: Seen) -> FactoredTablesFromData:
        """Weight rows by how often they are read."""
        return FactoredTablesFromData(seen)

    def from_weights(
        self, layer: Layer, form: Any, level: int, weight: NDArray[Any], cache: Cache | None
    ) -> FactoredTable:
        """Factorise a table whose rows count alike."""
        return TableFactorizer(weight, None).factorize(level)

    def replace(self, layer: Layer, form: Any, approximation: FactoredTable) -> StoredTable:
        """Store the factors and the rows that stay."""
        return stored_table(layer, approximation)

    def stand_in(self, layer: Layer, form: Any, level: int) -> StoredTable:
        """Return factors of random content."""
        (rows, width), generator = layer.shape, np.random.default_rng(0)
        left = generator.standard_normal((1, rows, level)) / np.sqrt(level)
        right = generator.standard_normal((1, level, width))
        best = np.arange(best_count(layer.shape))
        factors = Factorization(left, np.ones((1, level)), right)
        return stored_table(layer, FactoredTable(factors, best, np.ones((len(best), width))))

    def allowed(
        self,
        layer: Layer,
        form: Any,
        levels: NDArray[np.int64],
        costs: LayerCosts,
        ranks: RankRule,
    ) -> NDArray[np.int64]:
        """Return those of the ranks that are on the grid; none where MACs or time are limited."""
        most = 0 if ranks.faster else int(levels[-1])
        return np.intersect1d(ranks.product.candidates(most), levels)
