"""Lower bound on the loss at every cost, from the linear relaxation.

For one budget the linear relaxation of the multiple-choice knapsack is solved for all limits at
once: take the lower convex hull of loss against cost for each layer, then all segments of all
hulls in the order of loss per unit of cost saved (Sinha and Zoltners 1979, The Multiple-Choice
Knapsack Problem, Operations Research 27).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cobla_onnx.allocation.budget import Constraint
from cobla_onnx.allocation.problem import Float64, LayerCurves, LossCurves

__all__ = ["Front", "least_losses", "lower_hull"]


@dataclass(frozen=True)
class Front:
    """Least loss against the fraction kept, for one cost.

    Attributes
    ----------
    kept : tuple of float
        Fractions of the original's cost, descending from what is left with all layers whole: 1, or
        less where something is saved before any choice.
    losses : tuple of float
        Lower bounds on the loss of any choices that keep at most that fraction; piecewise
        linear in between.
    """

    kept: tuple[float, ...]
    losses: tuple[float, ...]


def least_losses(
    layers: Sequence[LayerCurves], losses: LossCurves, constraint: Constraint, points: int = 64
) -> Front:
    """Bound the loss at every cost.

    Parameters
    ----------
    layers : sequence of LayerCurves
    losses : sequence over layers and their curves of float64 array
        Loss at levels 0 to the whole layer.
    constraint : Constraint
        Of these layers. Its cost, ``mem`` or ``mac``, is meant; its limit does not matter.
    points : int
        Number of points returned at most. With fewer points than segments, the line is too
        high between points, never at them.
    """
    saved: list[Float64] = [np.zeros(1)]
    lost: list[Float64] = [np.zeros(1)]
    for number, layer in enumerate(layers):
        whole = constraint.whole(layer)
        savings: list[Float64] = [np.zeros(1)]
        costs: list[Float64] = [np.zeros(1)]
        for curve, loss in zip(layer.curves, losses[number], strict=True):
            savings.append(whole - constraint.costs(curve).astype(np.float64))
            costs.append(loss[curve.levels])
        steps = lower_hull(np.concatenate(savings), np.concatenate(costs))
        saved.append(np.diff(steps[0]))
        lost.append(np.diff(steps[1]))
    gains, prices = np.concatenate(saved), np.concatenate(lost)
    order = np.argsort(prices / np.maximum(gains, 1e-300), kind="stable")
    # Of nothing, all is kept.
    total = constraint.total or 1
    whole = constraint.cost(layers, [None] * len(layers)) if constraint.total else 1
    kept = (whole - np.cumsum(gains[order])) / total
    values = np.cumsum(prices[order])
    chosen = np.unique(np.searchsorted(-kept, -np.linspace(kept[0], kept[-1], points)))
    chosen = np.minimum(chosen, len(kept) - 1)
    return Front(tuple(float(x) for x in kept[chosen]), tuple(float(y) for y in values[chosen]))


def lower_hull(savings: Float64, losses: Float64) -> tuple[Float64, Float64]:
    """Lower convex hull of loss against saving, from nothing saved to most saved."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(zip(savings.tolist(), losses.tolist(), strict=True)):
        if x < 0 or (hull and x <= hull[-1][0]):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return np.array([x for x, _ in hull]), np.array([y for _, y in hull])


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
