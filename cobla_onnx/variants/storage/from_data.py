"""Rounded weights from second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import Layer, read_bias, read_weight
from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.runtime.recent import Recent
from cobla_onnx.variants.low_rank.from_data import layer_importance, layer_moment, mean_change
from cobla_onnx.variants.low_rank.matricisation import layout_of
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.coding import Coded
from cobla_onnx.variants.storage.compensation import Compensation
from cobla_onnx.variants.storage.precision import HALF, in_half
from cobla_onnx.variants.storage.rounding import round_weight

__all__ = ["CodesFromData", "RoundedWeight", "rounded"]


@dataclass(frozen=True)
class RoundedWeight:
    """A weight in fewer bits.

    Attributes
    ----------
    coded : Coded or None
        None for half precision.
    weight : float32 array, shape ``layer.shape``
        As it is decoded.
    bias : float64 array or None
        Corrected to keep the mean of the output; None if the layer has no bias of its own.
    """

    coded: Coded | None
    weight: NDArray[np.float32]
    bias: Float64 | None

    def with_bias(self, bias: Float64) -> RoundedWeight:
        """Return the same weight with another bias."""
        return replace(self, bias=bias)


def rounded(
    layer: Layer, weight: NDArray[Any], bits: int, inputs: Compensation | None
) -> RoundedWeight:
    """Round a weight: under a second moment of its inputs, or every number by itself."""
    if bits == HALF:
        return RoundedWeight(None, in_half(weight).astype(np.float32), None)
    scheme = layout_of(layer)
    coded = round_weight(scheme.rows_of(weight), inputs, bits)
    return RoundedWeight(coded, scheme.weight_of(coded.dense()), None)


class CodesFromData:
    """Rounds weights under the moments of calibration data.

    Layers whose inputs are too many for a moment are rounded number by number.

    Parameters
    ----------
    seen : Seen
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._made: Recent[tuple[str, int], RoundedWeight] = Recent(
            seen.kept, lambda made: made.weight.nbytes
        )
        self._inputs: Recent[str, Compensation] = Recent(
            seen.kept // 2, lambda made: made.nbytes, last=False
        )

    def moment(self, layer: Layer, weight: NDArray[Any]) -> Float64 | None:
        """Moment of a layer's inputs; None if there is none."""
        return None if self._seen.is_wide(layer) else layer_moment(self._seen, layer, weight)

    def importance(self, layer: Layer, weight: NDArray[Any]) -> Float64 | None:
        """How much the error of each output counts; None if all do alike."""
        return layer_importance(self._seen, layer, weight)

    def approximate(self, layer: Layer, form: Any, levels: Sequence[int]) -> list[RoundedWeight]:
        """Return a layer's weight in the given numbers of bits."""
        with one_thread:
            made = (self._made.once((layer.name, b), partial(self._in, layer, b)) for b in levels)
            return list(made)

    def _in(self, layer: Layer, bits: int) -> RoundedWeight:
        weight = read_weight(self._seen.model, layer)
        made = rounded(layer, weight, bits, self._compensation(layer, weight))
        return replace(made, bias=self._bias(layer, weight, made))

    def _compensation(self, layer: Layer, weight: NDArray[Any]) -> Compensation | None:
        if self._seen.is_wide(layer):
            return None
        return self._inputs.once(
            layer.name, lambda: Compensation(layer_moment(self._seen, layer, weight))
        )

    def _bias(self, layer: Layer, weight: NDArray[Any], made: RoundedWeight) -> Float64 | None:
        """Bias that keeps the mean of the output."""
        bias = read_bias(self._seen.model, layer)
        if bias is None or self._seen.is_wide(layer):
            return bias
        change = mean_change(self._seen, layer, weight - made.weight)
        return np.asarray(bias + change.reshape(bias.shape))
