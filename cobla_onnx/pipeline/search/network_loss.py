"""The loss of the whole network as a function of masks, which is what COBLA minimises.

Each layer has a path from rank 0 to its own weight, W(0) = 0, W(1), ..., W(full): the best
truncations at each rank, as they would be used after the allocation. With D_j = W(j) - W(j-1),
the weight at masks m is sum_j m_j D_j, and

    dE/dm_j = <dE/dW, D_j> + <dE/db, d_j>,

where b is the bias, which absorbs the mean of the error, and d_j its change. For a plain
truncated SVD this is Li and Shi's s_j u_j^T (dE/dW) v_j; here it also holds for factors made
from data, whose second factor changes with the rank. Masks come in blocks, so the path is only
needed at the edges of blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation import LayerCurves, Masks, SeparableError
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.evaluation.probe import Pair, Weights
from cobla_onnx.variants.base import Approximation

__all__ = ["Gradients", "LossPath", "NetworkLoss"]

# Bytes of truncated weights that are kept in memory.
KEPT_PATH = 1 << 29
# Number of levels at which slopes are computed, for a curve and for all of a layer, and least for
# a curve; they are interpolated in between.
GRID, ALL_GRIDS, LEAST_GRID = 12, 48, 3
# A loss that no solver accepts.
FORBIDDEN = 1e6


class Gradients(Protocol):
    """The loss of the network as a function of weights, and its derivatives."""

    def loss(self, weights: Weights) -> float:
        """Mean loss over the samples."""
        ...

    def gradient(self, weights: Weights) -> Sequence[Pair]:
        """Derivative of the mean loss with respect to every layer's weight and bias."""
        ...


class LossPath:
    """Truncations of all layers; the most recently used are kept in memory.

    Parameters
    ----------
    whole : sequence of (array, array or None)
        Weight and bias of each original layer.
    approximate : callable
        Returns the approximations for a layer, a curve and ascending ranks.
    """

    def __init__(
        self,
        whole: Sequence[Pair],
        approximate: Callable[[int, int, Sequence[int]], Sequence[Approximation]],
    ) -> None:
        self.whole = whole
        self._approximate = approximate
        self._kept: OrderedDict[tuple[int, int, int], Pair] = OrderedDict()
        self._bytes = 0

    def at(self, layer: int, curve: int, ranks: Sequence[int]) -> list[Pair]:
        """Return the layer's weight and bias at the given ranks, each at least 1."""
        missing = [rank for rank in ranks if (layer, curve, rank) not in self._kept]
        found = {}
        if missing:
            weight, _ = self.whole[layer]
            for rank, made in zip(missing, self._approximate(layer, curve, missing), strict=True):
                found[rank] = (made.weight.astype(weight.dtype), made.bias)
        for rank in ranks:
            key = (layer, curve, rank)
            if key in self._kept:
                found[rank] = self._kept[key]
                self._kept.move_to_end(key)
            else:
                self._kept[key] = found[rank]
                self._bytes += found[rank][0].nbytes
        while self._bytes > KEPT_PATH and self._kept:
            _, (weight, _) = self._kept.popitem(last=False)
            self._bytes -= weight.nbytes
        return [found[rank] for rank in ranks]


@dataclass
class NetworkLoss:
    """Mean loss of the network on calibration samples, as a function of masks.

    Parameters
    ----------
    layers : sequence of LayerCurves
    path : LossPath
    gradients : Gradients
    separable : SeparableError
        A model of the loss that is a sum over layers.
    fixed : frozenset of int
        Layers without a gradient; their masks stay as they are.
    """

    layers: Sequence[LayerCurves]
    path: LossPath
    gradients: Gradients
    separable: SeparableError
    fixed: frozenset[int] = frozenset()
    name: str = "loss"

    def curve(self, layer: int, curve: int) -> Float64:
        """Return the separable model's loss at ranks 0 to full rank."""
        return self.separable.curve(layer, curve)

    def value(self, masks: Masks) -> float:
        """Loss at the masks."""
        return self.gradients.loss(self.weights(masks))

    def gradient(self, masks: Masks) -> tuple[Float64, ...]:
        """Derivative with respect to each block of masks, divided evenly over its masks."""
        slopes = self.gradients.gradient(self.weights(masks))
        result = []
        for index, slope in enumerate(slopes):
            edges = masks.blocks(index)
            points = self._points(index, masks)
            steps = [_inner(slope, _difference(b, a)) for a, b in pairwise(points)]
            sizes = np.diff(edges)
            result.append(np.repeat(np.array(steps) / sizes, sizes))
        return tuple(result)

    def weights(self, masks: Masks) -> dict[int, Pair]:
        """Weight and bias of every layer that is not whole."""
        result = {}
        for index, mask in enumerate(masks.values):
            if (mask == 1.0).all():
                continue
            levels = mask[masks.blocks(index)[:-1]]
            points = self._points(index, masks)
            # sum of m_k (W_(k+1) - W_k), written as a sum over the points themselves.
            shares = -np.diff(np.concatenate([[1.0], levels, [0.0]]))
            dtype = self.path.whole[index][0].dtype
            weight: NDArray[Any] = np.zeros(points[0][0].shape, dtype)
            bias = None if points[0][1] is None else np.zeros(points[0][1].shape)
            for share, (at, moved) in zip(shares, points, strict=True):
                if share:
                    weight += dtype.type(share) * at
                    if bias is not None and moved is not None:
                        bias += share * moved
            result[index] = (weight, bias)
        return result

    def model(self, masks: Masks, damping: float) -> list[list[Float64]]:
        """Predict the loss for every rank of every curve, with the other layers' masks held fixed.

        A second-order model: the true slope at the present weights, and `damping` times the
        curvature of the separable model, in which the errors of a layer's singular values add
        up. Losses are relative to the layer kept whole, as the knapsack expects.
        """
        present = self.weights(masks)
        slopes = self.gradients.gradient(present)
        result = []
        for index, (layer, slope) in enumerate(zip(self.layers, slopes, strict=True)):
            if index in self.fixed:
                result.append(self._as_it_is(index, masks))
                continue
            now = present.get(index, self.path.whole[index])
            steps = -np.diff(self.curve(index, masks.schemes[index]))
            mask = masks.values[index]
            lost, kept = steps * np.square(1.0 - mask), steps * np.square(mask)
            whole = _inner(slope, _difference(self.path.whole[index], now)) + damping * lost.sum()
            curves = []
            for number in range(len(layer.curves)):
                if number == masks.schemes[index]:
                    # Masks below the rank go to 1, those beyond it to 0.
                    curvature = np.append(0.0, np.cumsum(lost)) + np.append(
                        np.cumsum(kept[::-1])[::-1], 0.0
                    )
                else:
                    # Errors under two different schemes are treated as orthogonal.
                    curvature = self.curve(index, number) + lost.sum()
                linear = self._slope_along(index, number, slope, now, round(float(mask.sum())))
                curves.append(linear + damping * curvature - whole)
            if not all(np.isfinite(curve).all() for curve in curves):
                # Its derivatives overflow: they do not say where the loss falls.
                curves = self._as_it_is(index, masks)
            result.append(curves)
        return result

    def _as_it_is(self, index: int, masks: Masks) -> list[Float64]:
        """Losses that keep a layer at its present rank, relative to the layer kept whole."""
        rank = round(float(masks.values[index].sum()))
        lengths = [curve.most + 1 for curve in self.layers[index].curves]
        curves = [np.full(length, FORBIDDEN) for length in lengths]
        if rank < lengths[masks.schemes[index]] - 1:
            curves[masks.schemes[index]][rank] = -FORBIDDEN
        return curves

    def _slope_along(self, index: int, number: int, slope: Pair, now: Pair, rank: int) -> Float64:
        """Inner product of slope and change of weight, at all ranks of one curve."""
        curves = self.layers[index].curves
        curve = curves[number]
        full_rank = curve.most
        count = min(GRID, max(LEAST_GRID, ALL_GRIDS // len(curves)))
        grid = np.geomspace(curve.levels[0], curve.levels[-1], count).round().astype(np.int64)
        if not curve.nested:
            # There may be nothing between two levels.
            places = np.linspace(0, len(curve.levels) - 1, min(count, len(curve.levels)))
            grid = curve.levels[places.round().astype(np.int64)]
        if curve.levels[0] <= rank <= curve.levels[-1] and (curve.nested or rank in curve.levels):
            grid = np.append(grid, rank)
        grid = np.unique(grid)
        points = [*self.path.at(index, number, grid.tolist()), self.path.whole[index]]
        known = [_inner(slope, _difference(point, now)) for point in points]
        return np.interp(np.arange(full_rank + 1), [*grid, full_rank], known)

    def _points(self, index: int, masks: Masks) -> list[Pair]:
        """Weight and bias at the edges of a layer's blocks, from rank 0 to the whole weight."""
        edges = masks.blocks(index)
        inner = self.path.at(index, masks.schemes[index], edges[1:-1].tolist())
        weight, bias = self.path.whole[index]
        nothing = np.zeros_like(weight)
        # At rank 0 the layer's output is its bias alone: the one at the start of the path.
        start = bias if bias is None or not inner else _start_bias(inner, bias)
        return [(nothing, start), *inner, (weight, bias)]


def _start_bias(inner: Sequence[Pair], bias: NDArray[Any]) -> NDArray[Any]:
    first = inner[0][1]
    return bias if first is None else first


def _difference(high: Pair, low: Pair) -> Pair:
    bias = None if high[1] is None or low[1] is None else high[1] - low[1]
    return high[0] - low[0], bias


def _inner(slope: Pair, step: Pair) -> float:
    """Inner product of a derivative and a change of weight and bias."""
    total = float(np.vdot(slope[0], step[0]))
    if slope[1] is not None and step[1] is not None:
        total += float(np.vdot(slope[1], step[1]))
    return total
