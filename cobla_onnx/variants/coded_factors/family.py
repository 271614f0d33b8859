"""Coded factors as a family of variants: two factors in fewer bits in place of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation import VariantCurve
from cobla_onnx.allocation.resources import known_costs
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, ErrorUnit, LayerCosts, Proposal, VariantFamily
from cobla_onnx.variants.coded_factors.form import CodedScheme, coded_name
from cobla_onnx.variants.coded_factors.from_data import PairsFromData
from cobla_onnx.variants.coded_factors.pair import (
    Alone,
    FromInputs,
    RoundedPair,
    random_pair,
    round_pair,
)
from cobla_onnx.variants.coded_factors.stored import StoredPair, pair_bytes, stored_pair
from cobla_onnx.variants.coded_factors.units import PairsAlone, PairUnit
from cobla_onnx.variants.low_rank.family import LowRankFamily
from cobla_onnx.variants.low_rank.matricisation import largest_rank
from cobla_onnx.variants.low_rank.ranks import RankRule
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.low_rank.units import factorize_layer
from cobla_onnx.variants.storage.family import takes_bits
from cobla_onnx.variants.storage.precision import FORMATS

__all__ = ["CodedFactorsFamily"]

FACTORS = LowRankFamily()


class CodedFactorsFamily(VariantFamily):
    """Two factors in fewer bits; forms are matricisations with bits, levels are ranks."""

    name = "coded factors"
    level = "rank"
    outcome = "factorised in fewer bits"
    schemes = tuple(coded_name(scheme, bits) for scheme in FACTORS.schemes for bits in FORMATS)
    refits = True
    needs_bits = True

    def forms(self, layer: Layer) -> Sequence[CodedScheme]:
        """Return all matricisations of a layer's weight, in all numbers of bits."""
        if not takes_bits(layer):
            return ()
        return [CodedScheme(scheme, bits) for scheme in FACTORS.forms(layer) for bits in FORMATS]

    def most(self, layer: Layer, form: CodedScheme) -> int:
        """Return the full rank, which stands for the layer itself."""
        return FACTORS.most(layer, form.scheme)

    def propose(
        self, layer: Layer, costs: LayerCosts, asked: Asked
    ) -> Sequence[Proposal] | Refusal:
        """Propose the ranks of unrounded factors in the bits that are asked for."""
        if not takes_bits(layer) or not asked.bits:
            return Refusal(Reason.NO_GAIN)
        pairs = FACTORS.propose(layer, costs, asked)
        if isinstance(pairs, Refusal):
            return pairs
        found = []
        for pair in pairs:
            for bits in asked.bits:
                form = CodedScheme(pair.form, bits)
                its = pair.levels[pair_bytes(layer, form, pair.levels) < layer.stored_bytes]
                if len(its):
                    found.append(Proposal(form, its, pair.most))
        return found or Refusal(Reason.NO_GAIN)

    def curve(
        self,
        layer: Layer,
        costs: LayerCosts,
        proposal: Proposal,
        errors: Float64,
        spectrum: Float64 | None,
    ) -> VariantCurve:
        """Put costs and errors of a proposal together for the allocation."""
        form = proposal.form
        found = {"mem": pair_bytes(layer, form, proposal.levels)}
        two_nodes = replace(costs, folding=False)
        per_rank = None if costs.macs is None else FACTORS.macs(layer, form.scheme, 1, two_nodes)
        per_level = known_costs(mac=per_rank)
        for name, cost in per_level.items():
            found[name] = proposal.levels * cost
        nested = not layer.readings
        curve = VariantCurve(
            self.name, form.name, proposal.levels, found, errors, per_level, nested
        )
        return FACTORS.as_written(layer, form.scheme, costs, curve)

    def params(self, layer: Layer, form: CodedScheme, level: int) -> int:
        """Count the weights of both factors."""
        return FACTORS.params(layer, form.scheme, level)

    def macs(self, layer: Layer, form: CodedScheme, level: int, costs: LayerCosts) -> int | None:
        """Count the MACs over all uses: of both factors, or of the layer; None if not known."""
        return FACTORS.macs(layer, form.scheme, level, costs)

    def can_fold(self, layer: Layer, form: CodedScheme) -> bool:
        """Whether a few nodes make the weight from both factors."""
        return FACTORS.can_fold(layer, form.scheme)

    def folds(self, layer: Layer, form: CodedScheme, level: int, costs: LayerCosts) -> bool:
        """Whether factors are multiplied out: where two nodes would be no faster than the layer."""
        return FACTORS.folds(layer, form.scheme, level, costs)

    def unit(
        self,
        layer: Layer,
        proposals: Sequence[Proposal],
        weight: Carried,
        cache: Cache | None,
        maker: PairsFromData | None,
    ) -> ErrorUnit:
        """Collect the input of the prediction."""
        forms = tuple(proposal.form for proposal in proposals)
        if maker is None:
            return PairsAlone(forms, weight, cache)
        largest = {p.form.scheme: largest_rank(layer, p.form.scheme) for p in proposals}
        return PairUnit(forms, maker.spectra(layer, list(largest.items()), weight))

    def maker(self, seen: Seen) -> PairsFromData:
        """Round under the moments of calibration data."""
        return PairsFromData(seen)

    def from_weights(
        self, layer: Layer, form: CodedScheme, level: int, weight: NDArray[Any], cache: Cache | None
    ) -> RoundedPair:
        """Round the factors of the weight itself; the bias stays."""
        factors = factorize_layer(layer, form.scheme, level, weight, cache)
        return round_pair(form, factors, Alone(form.scheme, weight))

    def refit(
        self,
        layer: Layer,
        form: CodedScheme,
        level: int,
        weight: Float64,
        second: Float64,
        importance: Float64 | None,
    ) -> RoundedPair:
        """Factorise and round a weight under the moment of its inputs."""
        pair = FACTORS.refit(layer, form.scheme, level, weight, second, importance)
        return round_pair(form, pair.factors, FromInputs(form.scheme, weight, second))

    def replace(self, layer: Layer, form: CodedScheme, approximation: RoundedPair) -> StoredPair:
        """Store the codes of both factors, or half precision."""
        return stored_pair(layer, approximation)

    def stand_in(self, layer: Layer, form: CodedScheme, level: int) -> StoredPair:
        """Return codes of random content."""
        return stored_pair(layer, random_pair(form.scheme, level, form.bits))

    def allowed(
        self,
        layer: Layer,
        form: CodedScheme,
        levels: NDArray[np.int64],
        costs: LayerCosts,
        ranks: RankRule,
    ) -> NDArray[np.int64]:
        """Return those of the ranks that are on the grid, and worth their MACs."""
        return FACTORS.allowed(layer, form.scheme, levels, costs, ranks)
