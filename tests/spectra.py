"""Spectra of single layers, for tests of moments."""

from __future__ import annotations

import numpy as np

from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.matricisation import Scheme


def spectrum(
    factors: FactorsFromData, layer: Layer, scheme: Scheme, weight: np.ndarray, max_rank: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Weighted singular values and errors; None if the layer is wide and cannot tell."""
    with one_thread:
        found = factors.unit(layer, [(scheme, max_rank)], Carried(weight, False)).measure()
    values, errors = found.spectra[0], found.errors[0]
    return None if values is None or errors is None else (values, errors)
