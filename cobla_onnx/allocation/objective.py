"""What the allocation minimises, as a function of masks on singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cobla_onnx.allocation.curves import Choice, Float64, LayerCurves

__all__ = ["Masks", "Objective", "WeightError", "masks_of"]


@dataclass(frozen=True)
class Masks:
    """Relaxed masks: what share of each singular value is kept.

    Attributes
    ----------
    schemes : tuple of int
        For each layer, the curve whose singular values are masked.
    values : tuple of float64 array, each of shape (full_rank,)
        In [0, 1]; all ones is the layer kept whole.
    """

    schemes: tuple[int, ...]
    values: tuple[Float64, ...]


class Objective(Protocol):
    """A loss of masks, with its gradient and a separable model of it."""

    name: str

    def value(self, masks: Masks) -> float:
        """Loss at the masks."""
        ...

    def gradient(self, masks: Masks) -> tuple[Float64, ...]:
        """Derivative by each mask, in the shape of ``masks.values``."""
        ...

    def curve(self, layer: int, curve: int) -> Float64:
        """Loss of truncating this layer alone, at ranks 0 to full rank; 0 at the end."""
        ...


class WeightError:
    """Relative squared weight error, summed over layers: needs no data.

    With W = U diag(s) V^T and masks m the loss of a layer is
    ||W - U diag(m s) V^T||^2 / ||W||^2 = sum_j s_j^2 (1 - m_j)^2 / sum_j s_j^2.
    """

    name = "weights"

    def __init__(self, layers: Sequence[LayerCurves]) -> None:
        self._energies = tuple(
            tuple(_relative_energy(curve.singular_values) for curve in layer.curves)
            for layer in layers
        )

    def value(self, masks: Masks) -> float:
        """Loss at the masks."""
        return float(
            sum(
                energies[scheme] @ np.square(1.0 - mask)
                for energies, scheme, mask in self._terms(masks)
            )
        )

    def gradient(self, masks: Masks) -> tuple[Float64, ...]:
        """Derivative by each mask: -2 s_j^2 (1 - m_j) / sum of s^2."""
        return tuple(
            -2.0 * energies[scheme] * (1.0 - mask) for energies, scheme, mask in self._terms(masks)
        )

    def curve(self, layer: int, curve: int) -> Float64:
        """Relative energy beyond each rank, from 0 to full rank."""
        energy = self._energies[layer][curve]
        return np.append(np.cumsum(energy[::-1])[::-1], 0.0)

    def _terms(self, masks: Masks) -> zip[tuple[tuple[Float64, ...], int, Float64]]:
        return zip(self._energies, masks.schemes, masks.values, strict=True)


def _relative_energy(singular_values: Float64) -> Float64:
    energy = np.square(singular_values)
    total = energy.sum()
    return energy / total if total > 0 else energy


def masks_of(layers: Sequence[LayerCurves], choices: Sequence[Choice | None]) -> Masks:
    """Write choices as 0/1 masks."""
    schemes, values = [], []
    for layer, choice in zip(layers, choices, strict=True):
        scheme = 0 if choice is None else choice.curve
        mask = np.ones(len(layer.curves[scheme].singular_values))
        if choice is not None:
            mask[choice.rank :] = 0.0
        schemes.append(scheme)
        values.append(mask)
    return Masks(tuple(schemes), tuple(values))
