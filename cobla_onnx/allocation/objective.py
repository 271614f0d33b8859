"""Objectives of the allocation, as functions of masks on singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation.problem import Choice, Float64, LayerCurves, LossCurves

__all__ = [
    "Masks",
    "Objective",
    "OutputError",
    "SeparableError",
    "WeightError",
    "loss_curves",
    "masks_of",
]


@dataclass(frozen=True)
class Masks:
    """Relaxed masks: the fraction of each singular value that is kept.

    Attributes
    ----------
    schemes : tuple of int
        For each layer, the curve whose singular values are masked.
    values : tuple of float64 array, each of shape (most,)
        In [0, 1]; all ones is the layer kept whole.
    edges : tuple of int64 array, each of shape (blocks + 1,), optional
        Where blocks of equal masks begin, starting with 0 and ending with the level of the
        whole layer. If empty, each mask is a block of its own.
    """

    schemes: tuple[int, ...]
    values: tuple[Float64, ...]
    edges: tuple[NDArray[np.int64], ...] = ()

    def blocks(self, layer: int) -> NDArray[np.int64]:
        """Return the edges of a layer's blocks, from 0 to the level of the whole layer."""
        if self.edges:
            return self.edges[layer]
        return np.arange(len(self.values[layer]) + 1)


class Objective(Protocol):
    """A loss as a function of masks, with its gradient and a separable model of it."""

    name: str

    def value(self, masks: Masks) -> float:
        """Loss at the masks."""
        ...

    def gradient(self, masks: Masks) -> tuple[Float64, ...]:
        """Derivative with respect to each mask, in the shape of ``masks.values``.

        Only its sums over the blocks of the masks are used.
        """
        ...

    def curve(self, layer: int, curve: int) -> Float64:
        """Loss of replacing this layer alone, at levels 0 to the whole layer; 0 at the end."""
        ...


class SeparableError:
    """A sum over layers of a loss that depends on the layer's own masks alone.

    Let c_r be the loss of a layer at rank r, and d_j = c_(j-1) - c_j the loss that singular
    value j saves. The loss at masks m is sum_j d_j (1 - m_j)^2, which is c_r for 0/1 masks.
    """

    def __init__(self, name: str, curves: Sequence[Sequence[Float64]]) -> None:
        self.name = name
        self._curves = curves
        self._steps = tuple(tuple(-np.diff(curve) for curve in layer) for layer in curves)

    def value(self, masks: Masks) -> float:
        """Loss at the masks."""
        return float(
            sum(steps[scheme] @ np.square(1.0 - mask) for steps, scheme, mask in self._terms(masks))
        )

    def gradient(self, masks: Masks) -> tuple[Float64, ...]:
        """Derivative with respect to each mask: -2 d_j (1 - m_j)."""
        return tuple(
            -2.0 * steps[scheme] * (1.0 - mask) for steps, scheme, mask in self._terms(masks)
        )

    def curve(self, layer: int, curve: int) -> Float64:
        """Loss at each level, from 0 to the whole layer."""
        return self._curves[layer][curve]

    def scaled(self, factor: float) -> SeparableError:
        """Return the same loss times `factor`."""
        curves = [[factor * curve for curve in layer] for layer in self._curves]
        return SeparableError(self.name, curves)

    def _terms(self, masks: Masks) -> zip[tuple[tuple[Float64, ...], int, Float64]]:
        return zip(self._steps, masks.schemes, masks.values, strict=True)


class WeightError(SeparableError):
    """Relative squared weight error, summed over layers: needs no data.

    With W = U diag(s) V^T and masks m the loss of a layer is
    ||W - U diag(m s) V^T||^2 / ||W||^2 = sum_j s_j^2 (1 - m_j)^2 / sum_j s_j^2.
    """

    def __init__(self, layers: Sequence[LayerCurves]) -> None:
        super().__init__("weights", [[curve.errors for curve in layer.curves] for layer in layers])


class OutputError(SeparableError):
    """Measured loss of the network with one layer replaced, summed over layers.

    Parameters
    ----------
    curves : sequence over layers and their curves of float64 array
        Loss at levels 0 to the whole layer, descending to 0.
    """

    def __init__(self, curves: Sequence[Sequence[Float64]]) -> None:
        super().__init__("output", curves)


def loss_curves(objective: Objective, layers: Sequence[LayerCurves]) -> LossCurves:
    """Return the objective's curves of all layers."""
    return [
        [objective.curve(index, number) for number in range(len(layer.curves))]
        for index, layer in enumerate(layers)
    ]


def masks_of(layers: Sequence[LayerCurves], choices: Sequence[Choice | None]) -> Masks:
    """Convert choices to 0/1 masks."""
    schemes, values, edges = [], [], []
    for layer, choice in zip(layers, choices, strict=True):
        scheme = 0 if choice is None else choice.curve
        most = layer.curves[scheme].most
        mask = np.ones(most)
        cuts = [0, most]
        if choice is not None:
            mask[choice.level :] = 0.0
            cuts = [0, choice.level, most]
        schemes.append(scheme)
        values.append(mask)
        edges.append(np.unique(np.array(cuts, dtype=np.int64)))
    return Masks(tuple(schemes), tuple(values), tuple(edges))
