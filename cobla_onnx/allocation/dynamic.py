"""Solve the integer problem with a single budget by dynamic programming.

With one constraint the multiple-choice knapsack needs no branching: layer by layer, the least
loss at every cost is kept (Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, section
11.5). With equal layers, such as the blocks of a transformer, branch and bound tries the same
sums in every order; here they cost nothing extra. Costs are counted in steps of their greatest
common divisor, where that is coarse enough. Otherwise the problem is solved twice: with costs
rounded up, so that the answer meets the budget, and rounded down, which gives a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation.problem import Float64

__all__ = ["Programme", "solve_programme"]

# Most steps into which the budget is divided: 10,000 for each percent of rounding in 100 layers.
STEPS = 1 << 16
# Most columns times steps, which limits the work to about a second.
WORK = 1 << 28


@dataclass(frozen=True)
class Programme:
    """Result of dynamic programming.

    Attributes
    ----------
    columns : int64 array, shape (layers,), or None
        The chosen column of each layer; None if no choice of rounded costs fits.
    bound : float
        Lower bound on the loss of any choices that meet the budget.
    """

    columns: NDArray[np.int64] | None
    bound: float


def solve_programme(
    layer: NDArray[np.int64], loss: Float64, cost: NDArray[np.int64], room: int
) -> Programme:
    """Choose one column of each layer, with the least total loss within the room.

    Parameters
    ----------
    layer : int64 array, shape (columns,)
        The layer of each column, ascending from 0 without gaps.
    loss : float64 array, shape (columns,)
    cost : int64 array, shape (columns,)
        At least 0.
    room : int
        Most that the chosen costs may add up to.
    """
    if room < 0:
        return Programme(None, np.inf)
    steps = max(1, min(STEPS, WORK // max(len(layer), 1)))
    unit = int(np.gcd.reduce(cost[cost > 0])) if (cost > 0).any() else 1
    if room // unit <= steps:
        columns, value = _solve(layer, loss, cost // unit, room // unit)
        return Programme(columns, value)
    unit = -(-room // steps)
    columns, _ = _solve(layer, loss, -(-cost // unit), room // unit)
    _, bound = _solve(layer, loss, cost // unit, -(-room // unit))
    return Programme(columns, bound)


def _solve(
    layer: NDArray[np.int64], loss: Float64, weight: NDArray[np.int64], room: int
) -> tuple[NDArray[np.int64] | None, float]:
    """Return the best columns, None where none fit, and their loss."""
    starts = np.searchsorted(layer, np.arange(int(layer[-1]) + 2))
    least = np.zeros(room + 1)
    # Relative to the first column of the layer.
    dtype = np.int16 if np.diff(starts).max() < 1 << 15 else np.int32
    chosen = np.zeros((len(starts) - 1, room + 1), dtype)
    for number, (first, last) in enumerate(pairwise(starts)):
        best = np.full(room + 1, np.inf)
        for column in range(first, last):
            spent = int(weight[column])
            if spent > room:
                continue
            there = least[: room + 1 - spent] + loss[column]
            better = there < best[spent:]
            np.copyto(best[spent:], there, where=better)
            np.copyto(chosen[number, spent:], column - first, where=better)
        least = best
    if not np.isfinite(least[room]):
        return None, np.inf
    columns = np.empty(len(starts) - 1, np.int64)
    left = room
    for number in range(len(columns) - 1, -1, -1):
        columns[number] = starts[number] + chosen[number, left]
        left -= int(weight[columns[number]])
    return columns, float(least[room])
