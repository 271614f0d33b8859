"""Rounded factors from second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import Layer, read_bias, read_weight
from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.runtime.recent import Recent
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.coded_factors.form import CodedScheme
from cobla_onnx.variants.coded_factors.pair import (
    FromInputs,
    FromOutputs,
    RoundedPair,
    round_pair,
)
from cobla_onnx.variants.low_rank.from_data import FactorsFromData, SpectraUnit, layer_moment
from cobla_onnx.variants.low_rank.matricisation import Scheme

__all__ = ["PairsFromData"]


class PairsFromData:
    """Rounds factors under the moments of calibration data.

    Parameters
    ----------
    seen : Seen
    """

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self._factors = seen.once(FactorsFromData)
        self._made: Recent[tuple[str, str, int], RoundedPair] = Recent(
            seen.kept, lambda made: made.weight.nbytes + made.factors.left.nbytes
        )
        self._targets: Recent[tuple[str, str], FromInputs | FromOutputs] = Recent(
            seen.kept // 2, lambda made: made.nbytes, last=False
        )

    def spectra(
        self, layer: Layer, ranks: Sequence[tuple[Scheme, int]], weight: Carried
    ) -> SpectraUnit:
        """Collect what is known of a layer's data, for schemes with the largest ranks."""
        return self._factors.unit(layer, ranks, weight)

    def approximate(
        self, layer: Layer, form: CodedScheme, levels: Sequence[int]
    ) -> list[RoundedPair]:
        """Return a layer's factors at the given ranks, rounded."""
        held = {rank: self._made.get((layer.name, form.name, rank)) for rank in levels}
        made = {rank: pair for rank, pair in held.items() if pair is not None}
        missing = [rank for rank in levels if rank not in made]
        if missing:
            made.update(self._rounded(layer, form, missing))
        return [made[rank] for rank in levels]

    def _rounded(
        self, layer: Layer, form: CodedScheme, ranks: Sequence[int]
    ) -> dict[int, RoundedPair]:
        weight = read_weight(self.seen.model, layer)
        result = {}
        with one_thread:
            solver = self._factors.solver(layer, form.scheme, weight, max(ranks))
            target = self._targets.once(
                (layer.name, form.scheme.name), lambda: self._target(layer, form.scheme, weight)
            )
            for rank in ranks:
                made = round_pair(form, solver.factorize(rank), target)
                made = self._with_bias(layer, weight, made)
                result[rank] = self._made.put((layer.name, form.name, rank), made)
        return result

    def _target(
        self, layer: Layer, scheme: Scheme, weight: NDArray[Any]
    ) -> FromInputs | FromOutputs:
        moment = layer_moment(self.seen, layer, weight)
        if not self.seen.is_wide(layer):
            return FromInputs(scheme, weight, moment)
        importance = self.seen.importance.get(layer.name)
        shape = scheme.rows_of(weight).shape[:2]
        return FromOutputs(moment, None if importance is None else importance.reshape(shape))

    def _with_bias(self, layer: Layer, weight: NDArray[Any], made: RoundedPair) -> RoundedPair:
        bias = read_bias(self.seen.model, layer)
        if bias is None:
            return made
        shifted = bias + self._factors.shift(layer, weight, bias, made)
        return made.with_bias(shifted)
