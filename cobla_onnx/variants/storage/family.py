"""Storage precision as a family of variants: a weight in fewer bits, the node as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Measured, OnlyForm, Proposal
from cobla_onnx.variants.low_rank.matricisation import has_layout, layout_of
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.bits_family import BitsFamily, between
from cobla_onnx.variants.storage.compensation import Compensation, unavoidable
from cobla_onnx.variants.storage.from_data import CodesFromData, RoundedWeight, rounded
from cobla_onnx.variants.storage.rounding import distortion, mean_squares
from cobla_onnx.variants.storage.stored import (
    StoredWeight,
    coded_weight,
    half_weight,
    stored_bytes,
)

__all__ = ["STORED", "RoundingUnit", "StorageFamily", "takes_bits"]

STORED = "stored"


@dataclass(frozen=True)
class RoundingUnit:
    """A weight, the numbers of bits that are asked for, and the moment of its inputs, if known."""

    weight: Carried
    layer: Layer
    bits: tuple[int, ...]
    second: Float64 | None
    importance: Float64 | None

    def measure(self) -> Measured:
        """Predict the error of every format, relative to the energy of the outputs."""
        rows = layout_of(self.layer).rows_of(self.weight.array)
        weights = np.ones(rows.shape[:2])
        if self.importance is not None:
            weights = self.importance.reshape(rows.shape[:2])
        squares = mean_squares(rows)
        if self.second is None:
            left, energy = np.full(len(rows), float(rows.shape[2])), squares * rows.shape[2]
        else:
            left = unavoidable(self.second)
            energy = np.einsum("gos,gos->go", rows @ self.second, rows)
        total = float((energy * weights).sum())
        unmade = float((squares * left[:, None] * weights).sum())
        share = unmade / total if total > 0 else 0.0
        lost = {bits: distortion(rows, bits) for bits in self.bits}
        # A share of nothing leaves what is infinite infinite.
        known = {bits: each * share if np.isfinite(each) else each for bits, each in lost.items()}
        return Measured([between(known)], [None], [])


class StorageFamily(BitsFamily):
    """Weights in fewer bits; a level is a number of bits."""

    name = "storage"
    schemes = (STORED,)
    refits = True

    def forms(self, layer: Layer) -> Sequence[OnlyForm]:
        """Return the form, for weights that are single precision where they are used."""
        return (OnlyForm(STORED),) if takes_bits(layer) else ()

    def stored_bytes(self, layer: Layer, bits: int) -> int:
        """Bytes of the weight in so many bits."""
        return stored_bytes(layer, bits)

    def refusal(self, layer: Layer) -> Refusal:
        """Name the type of a weight that is not single precision."""
        return Refusal(Reason.TYPE, TensorProto.DataType.Name(layer.type))

    def unit(
        self,
        layer: Layer,
        proposals: Sequence[Proposal],
        weight: Carried,
        cache: Cache | None,
        maker: CodesFromData | None,
    ) -> RoundingUnit:
        """Collect the input of the prediction."""
        bits = tuple(int(b) for proposal in proposals for b in proposal.levels)
        if maker is None:
            return RoundingUnit(weight, layer, bits, None, None)
        second = maker.moment(layer, weight.array)
        return RoundingUnit(weight, layer, bits, second, maker.importance(layer, weight.array))

    def maker(self, seen: Seen) -> CodesFromData:
        """Round under the moments of calibration data."""
        return CodesFromData(seen)

    def from_weights(
        self, layer: Layer, form: Any, level: int, weight: NDArray[Any], cache: Cache | None
    ) -> RoundedWeight:
        """Round every weight by itself."""
        return rounded(layer, weight, level, None)

    def refit(
        self,
        layer: Layer,
        form: Any,
        level: int,
        weight: Float64,
        second: Float64,
        importance: Float64 | None,
    ) -> RoundedWeight:
        """Round a weight under the moment of its inputs."""
        return rounded(layer, weight, level, Compensation(second))

    def replace(self, layer: Layer, form: Any, approximation: RoundedWeight) -> StoredWeight:
        """Store the codes, or half precision."""
        if approximation.coded is None:
            return half_weight(layer, approximation.weight, approximation.bias)
        return coded_weight(layer, approximation.coded, approximation.bias)

    def stand_in(self, layer: Layer, form: Any, level: int) -> StoredWeight:
        """Return codes of random content."""
        shape = layer.shape
        weight = np.random.default_rng(0).standard_normal(shape, np.float32) / np.sqrt(shape[0])
        return self.replace(layer, form, rounded(layer, weight, level, None))


def takes_bits(layer: Layer) -> bool:
    """Whether a layer's weight can be stored in fewer bits: it is single precision where used."""
    return layer.type == TensorProto.FLOAT and has_layout(layer)
