"""Low rank as a family of variants: two factors in place of a weight, under each matricisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation import VariantCurve
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.layers import Layer, Reason
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.convolution import is_depthwise
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, ErrorUnit, LayerCosts, Proposal, VariantFamily
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.curve import LOW_RANK, rank_curve
from cobla_onnx.variants.low_rank.folded import can_fold, no_faster
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.matricisation import (
    SCHEMES,
    Scheme,
    largest_rank,
    schemes_for,
)
from cobla_onnx.variants.low_rank.nodes import FactorPair, make_replacement, stand_in
from cobla_onnx.variants.low_rank.ranks import RankGrid, RankRule
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.low_rank.units import ValuesUnit, factorize_layer
from cobla_onnx.variants.low_rank.weighted_svd import WeightedFactorizer
from cobla_onnx.variants.tied import macs_per_rank

__all__ = ["LowRankFamily"]


class LowRankFamily(VariantFamily):
    """Two factors in place of a weight; forms are matricisations, levels are ranks."""

    name = LOW_RANK
    level = "rank"
    outcome = "factorised"
    schemes = ("matrix", "channel", "input", "spatial-hw", "spatial-wh")
    refits = True

    def forms(self, layer: Layer) -> Sequence[Scheme]:
        """Return all matricisations of a layer's weight; none of vectors."""
        return () if is_depthwise(layer) else schemes_for(layer)

    def most(self, layer: Layer, form: Scheme) -> int:
        """Return the full rank."""
        return min(form.matrix_shape()[1:])

    def propose(
        self, layer: Layer, costs: LayerCosts, asked: Asked
    ) -> Sequence[Proposal] | Refusal:
        """Propose the ranks at which the layer is smaller, and not slower: in MACs, or at all."""
        if operator_of(layer).kind not in SCHEMES:
            return Refusal(Reason.OPERATOR)
        if is_depthwise(layer):
            return Refusal(Reason.DEPTHWISE)
        grid, pointwise = _grid(layer, asked.ranks)
        found, useful = [], False
        for scheme in schemes_for(layer, asked.scheme):
            most, folds = largest_rank(layer, scheme), costs.folding and can_fold(layer, scheme)
            per_rank = None if costs.macs is None else _macs_per_rank(layer, scheme, costs)
            if costs.macs is not None:
                if not per_rank:
                    continue
                useful |= most >= 1 and costs.macs >= per_rank
                if not folds:
                    most = min(most, asked.ranks.most(costs.macs, per_rank, pointwise=pointwise))
            useful |= most >= 1
            ranks = grid.candidates(most)
            if costs.quick and costs.macs and per_rank and not folds:
                ranks = ranks[~no_faster(layer, ranks, per_rank, costs.macs)]
            if len(ranks):
                found.append(Proposal(scheme, ranks, self.most(layer, scheme)))
        if found:
            return found
        if not useful:
            return Refusal(Reason.NO_GAIN)
        return Refusal(Reason.NOT_FASTER, "" if grid.complete else str(grid))

    def curve(
        self,
        layer: Layer,
        costs: LayerCosts,
        proposal: Proposal,
        errors: Float64,
        spectrum: Float64 | None,
    ) -> VariantCurve:
        """Put costs and errors of a proposal together for the allocation."""
        scheme = proposal.form
        dtype = onnx.helper.tensor_dtype_to_np_dtype(layer.stored_type)
        values = np.zeros(proposal.most) if spectrum is None else spectrum
        per_rank = None if costs.macs is None else _macs_per_rank(layer, scheme, costs)
        curve = rank_curve(
            scheme.name,
            values,
            proposal.levels,
            self.params(layer, scheme, 1) * dtype.itemsize,
            per_rank,
            errors,
        )
        # Masks lie between the factors of one product, and a tied weight has several.
        curve = replace(curve, nested=not layer.readings)
        return self.as_written(layer, scheme, costs, curve)

    def as_written(
        self, layer: Layer, scheme: Scheme, costs: LayerCosts, curve: VariantCurve
    ) -> VariantCurve:
        """Return a curve with the MACs of the whole layer where factors are multiplied out."""
        if not any(self.folds(layer, scheme, int(rank), costs) for rank in curve.levels):
            return curve
        macs = [self.macs(layer, scheme, int(rank), costs) for rank in curve.levels]
        proportional = {name: cost for name, cost in curve.per_level.items() if name != "mac"}
        return replace(curve.with_cost("mac", np.array(macs)), per_level=proportional)

    def params(self, layer: Layer, form: Any, level: int) -> int:
        """Count the weights of both factors."""
        return int(form.params_per_rank() * level)

    def macs(self, layer: Layer, form: Any, level: int, costs: LayerCosts) -> int | None:
        """Count the MACs over all uses: of both factors, or of the layer; None if not known."""
        if self.folds(layer, form, level, costs):
            return costs.macs
        per_rank = _macs_per_rank(layer, form, costs)
        return None if per_rank is None else per_rank * level

    def can_fold(self, layer: Layer, form: Any) -> bool:
        """Whether a few nodes make the weight from both factors."""
        return can_fold(layer, form)

    def folds(self, layer: Layer, form: Any, level: int, costs: LayerCosts) -> bool:
        """Whether factors are multiplied out: where two nodes would be no faster than the layer."""
        if not costs.folding or costs.macs is None or not can_fold(layer, form):
            return False
        per_rank = _macs_per_rank(layer, form, costs)
        return per_rank is not None and bool(no_faster(layer, level, per_rank, costs.macs))

    def unit(
        self,
        layer: Layer,
        proposals: Sequence[Proposal],
        weight: Carried,
        cache: Cache | None,
        maker: FactorsFromData | None,
    ) -> ErrorUnit:
        """Collect the input for singular values: of the outputs or, without data, the weight."""
        if maker is None:
            return ValuesUnit(tuple(p.form for p in proposals), weight, cache)
        return maker.unit(layer, [(p.form, int(p.levels[-1])) for p in proposals], weight)

    def maker(self, seen: Seen) -> FactorsFromData:
        """Make factors from calibration data; other families round the same ones."""
        return seen.once(FactorsFromData)

    def from_weights(
        self, layer: Layer, form: Scheme, level: int, weight: NDArray[Any], cache: Cache | None
    ) -> LowRankWeight:
        """Factorise the weight itself; the bias stays."""
        return LowRankWeight(form, factorize_layer(layer, form, level, weight, cache), None)

    def refit(
        self,
        layer: Layer,
        form: Scheme,
        level: int,
        weight: Float64,
        second: Float64,
        importance: Float64 | None,
    ) -> LowRankWeight:
        """Factorise a weight under the moment of its inputs."""
        factors = WeightedFactorizer(form, weight, second, level, importance).factorize(level)
        return LowRankWeight(form, factors, None)

    def replace(self, layer: Layer, form: Scheme, approximation: LowRankWeight) -> FactorPair:
        """Turn factors into the weights of two nodes."""
        return make_replacement(layer, form, approximation.factors, approximation.bias)

    def stand_in(self, layer: Layer, form: Scheme, level: int) -> FactorPair:
        """Return factors of random content, which take the same time."""
        return stand_in(layer, form, level)

    def allowed(
        self,
        layer: Layer,
        form: Scheme,
        levels: NDArray[np.int64],
        costs: LayerCosts,
        ranks: RankRule,
    ) -> NDArray[np.int64]:
        """Return those of the ranks that are on the grid, and worth their MACs."""
        grid, pointwise = _grid(layer, ranks)
        most = int(levels[-1])
        per_rank = _macs_per_rank(layer, form, costs)
        if costs.macs is not None and per_rank is not None:
            most = min(most, ranks.most(costs.macs, per_rank, pointwise=pointwise))
        return np.intersect1d(grid.candidates(most), levels)


def _macs_per_rank(layer: Layer, scheme: Scheme, costs: LayerCosts) -> int | None:
    """MACs of two nodes for each unit of rank, over all uses; None where shapes are not known."""
    total = 0
    for use in layer.uses:
        reading = layer.reading(use)
        per_rank = (
            scheme.macs_per_rank(use, costs.shapes)
            if reading is layer
            else macs_per_rank(reading, use, costs.shapes)
        )
        if per_rank is None:
            return None
        total += per_rank
    return total


def _grid(layer: Layer, rule: RankRule) -> tuple[RankGrid, bool]:
    """Ranks of a layer under a rule, and whether it is a 1 x 1 convolution."""
    blocked = layer.op == "Conv" and len(layer.shape) == 4
    return rule.convolution if blocked else rule.product, blocked and layer.shape[2:] == (1, 1)
