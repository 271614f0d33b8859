"""Weights as codes into a table of levels, with a scale for each output.

A weight w of output o is ``levels[code] * scale[o]``. With 8 bits the levels are the integers from
-128 to 127, whose table needs not be stored. With fewer bits they are those that fit the layer's
own weights best (Lloyd 1982, "Least squares quantization in PCM"): the same bytes as evenly spaced
ones but for the table, and at 4 to 6 bits about three quarters of the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.svd import Float64

__all__ = ["INTEGERS", "SAMPLED", "Coded", "NearestLevel", "fit_levels", "nearest", "signed"]

# Levels of 8-bit codes.
INTEGERS: NDArray[np.float32] = np.arange(-128, 128, dtype=np.float32)
# Cells into which the line is cut to find levels, and most of these in a cell.
CELLS, FEW = 1 << 12, 4
# Most values from which levels are fitted, and most passes over them.
SAMPLED, PASSES = 1 << 16, 60


@dataclass(frozen=True)
class Coded:
    """A weight of few levels.

    Attributes
    ----------
    codes : uint8 array, shape (groups, outputs, size)
        Indices into `levels`.
    levels : float32 array, shape (2 ** bits,)
        Ascending.
    scales : float32 array, shape (groups, outputs)
    """

    codes: NDArray[np.uint8]
    levels: NDArray[np.float32]
    scales: NDArray[np.float32]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.levels) - 1).bit_length()

    def each_scale(self) -> NDArray[np.float32]:
        """Return the scale of each code, a view of shape (groups, outputs, size)."""
        return np.broadcast_to(self.scales[:, :, None], self.codes.shape)

    def dense(self) -> NDArray[np.float32]:
        """Return the weight as onnxruntime computes it, shape (groups, outputs, size)."""
        return np.asarray(self.levels[self.codes] * self.scales[:, :, None])


def signed(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Codes of 8 bits as the integers that they stand for."""
    return np.asarray((codes.astype(np.int16) - 128).astype(np.int8))


class NearestLevel:
    """Finds the levels nearest to values; of two as near, the lower one.

    A search of each value among 63 or 255 levels takes ten times as long as a look into a table:
    the line is cut into cells, and of each the first level is known.

    Parameters
    ----------
    levels : float array, shape (count,)
        At most 256, ascending.

    Attributes
    ----------
    levels : float array, shape (count,)
    """

    def __init__(self, levels: NDArray[Any]) -> None:
        self.levels = levels
        self._even = levels is INTEGERS
        if self._even:
            return
        middles = (levels[1:] + levels[:-1]) / 2
        # The middle above each level.
        self._above = np.append(middles, np.array(np.inf, middles.dtype))
        self._lowest = middles[0]
        # The first level of each cell, where there is a table of cells.
        self._first: NDArray[np.intp] | None = None
        with np.errstate(divide="ignore", over="ignore"):
            self._per_unit = (CELLS - 1) / (middles[-1] - middles[0])
        if 0 < self._per_unit < np.inf:
            # Cells ascend with values, in floating point too: middles of lower cells lie below.
            cells = self._cells(middles)
            self._steps = int(np.bincount(cells).max())
            if self._steps <= FEW:
                self._first = np.searchsorted(cells, np.arange(CELLS))

    def _cells(self, values: NDArray[Any]) -> NDArray[np.intp]:
        """Cell of each value; of those below all middles, and of what is no number, below 0."""
        place = (values - self._lowest) * self._per_unit
        with np.errstate(invalid="ignore"):
            return np.asarray(np.minimum(place, CELLS - 1), np.intp)

    def __call__(self, values: NDArray[Any]) -> NDArray[np.intp]:
        """Return the index of the level nearest to each value."""
        if self._even:
            # There is nothing to look up. `fmax` takes the number where one is none.
            whole = np.fmin(np.fmax(np.ceil(values - 0.5), INTEGERS[0]), INTEGERS[-1])
            return np.asarray(whole - INTEGERS[0], np.intp)
        if self._first is None:
            return np.asarray(self._above[:-1].searchsorted(values), np.intp)
        # Cells of different types would not be the same.
        values = np.asarray(values, self._above.dtype)
        # Clipped, and without a look at whether that is needed.
        found = self._first.take(self._cells(values), mode="clip")
        for _ in range(self._steps):
            found += values > self._above.take(found, mode="clip")
        return found


def nearest(levels: NDArray[Any], values: NDArray[Any]) -> NDArray[np.intp]:
    """Index of the level nearest to each value; see `NearestLevel`."""
    return NearestLevel(levels)(values)


def fit_levels(values: NDArray[Any], count: int) -> NDArray[np.float32]:
    """Fit levels to values by Lloyd's iteration, so that the mean squared error is small.

    It ends in a local minimum, so it is begun twice: between quantiles, which are sparse in the
    tails, and even spacing, which is sparse in the middle; and from even spacing alone. The result
    is never worse than evenly spaced levels from the least value to the greatest.

    Parameters
    ----------
    values : array
        Of a large one, evenly spaced entries are used.
    count : int
        Number of levels.

    Returns
    -------
    float32 array, shape (count,)
        Ascending.
    """
    flat = values.reshape(-1)
    flat = np.sort(flat[:: -(-len(flat) // SAMPLED)].astype(np.float64))
    even = np.linspace(flat[0], flat[-1], count)
    between = (2 * np.quantile(flat, (np.arange(count) + 0.5) / count) + even) / 3
    found = [_iterated(flat, start) for start in (between, even)]
    errors = [_squared_error(flat, levels) for levels in found]
    return found[int(np.argmin(errors))].astype(np.float32)


def _iterated(ascending: Float64, levels: Float64) -> Float64:
    """Move every level to the mean of the values nearest to it, until none moves."""
    sums = np.concatenate([[0.0], np.cumsum(ascending)])
    ends = np.array([0] * len(levels) + [len(ascending)])
    # Of few levels it takes far longer to call functions than to compute: methods are called.
    for _ in range(PASSES):
        ends[1:-1] = ascending.searchsorted((levels[1:] + levels[:-1]) / 2)
        held, totals = ends[1:] - ends[:-1], sums[ends]
        fitted = np.divide(totals[1:] - totals[:-1], held, out=levels.copy(), where=held > 0)
        if (fitted == levels).all():
            break
        fitted.sort()
        levels = fitted
    return levels


def _squared_error(ascending: Float64, levels: Float64) -> float:
    """Sum of the squared distances of values to their nearest levels."""
    inner = ascending.searchsorted((levels[1:] + levels[:-1]) / 2, "right")
    held = np.diff(inner, prepend=0, append=len(ascending))
    return float(np.square(np.repeat(levels, held) - ascending).sum())
