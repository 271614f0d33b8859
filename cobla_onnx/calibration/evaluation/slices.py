"""Mean, variance and error of each feature of an output, accumulated batch by batch.

A feature slice is everything at one index of one axis: a column of an embedding, a channel of
an image, a row of a detector's output. The axis of the features is the one along which the
variances differ most, once all samples have been added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SliceSums", "Slices"]

# Elements added at a time, in double precision.
AT_ONCE = 1 << 22
# Most slices of one axis; longer axes are taken for positions.
MOST_SLICES = 1 << 20
# Deviations below this many units of the type's precision, relative to the slice's own size, are
# rounding: the slice does not vary. A variance counts as at least that of `COARSE` units, so that
# a slice of almost no variance does not outweigh the others.
ROUNDING, COARSE = 64.0, 1024.0
# The last axis of a map is taken for the features only if the deviation of its variances is larger
# by this factor, and by this number: channels come first by convention.
FACTOR, MARGIN = 2.0, 0.5


@dataclass
class SliceSums:
    """Sums over everything at each index of an axis; over all values if there is no axis.

    Attributes
    ----------
    count : float
        Values in each slice.
    mean, moment, error : float64 array, shape (slices,)
        Mean, sum of squared distances from it, and sum of squared errors.
    """

    count: float
    mean: NDArray[np.float64]
    moment: NDArray[np.float64]
    error: NDArray[np.float64]

    def add(self, other: SliceSums) -> None:
        """Add the sums of other samples; Chan, Golub and LeVeque 1979, equation 2.1."""
        total = self.count + other.count
        if total == 0:
            return
        shift = other.mean - self.mean
        self.mean = self.mean + shift * (other.count / total)
        self.moment = (
            self.moment + other.moment + np.square(shift) * (self.count * other.count / total)
        )
        self.error = self.error + other.error
        self.count = total

    def variances(self, precision: float) -> NDArray[np.float64]:
        """Variance of each slice; 0 for slices that do not vary beyond rounding."""
        variance = self.moment / max(self.count, 1.0)
        size = np.square(self.mean) + variance
        least = np.square(COARSE * precision) * size
        varying = variance > np.square(ROUNDING * precision) * size
        return np.where(varying, np.maximum(variance, least), 0.0)


def _sums(
    values: NDArray[np.float64], error: NDArray[np.float64] | None, axis: int | None
) -> SliceSums:
    count = 1 if axis is None else values.shape[axis]
    before = 1 if axis is None else int(np.prod(values.shape[:axis]))
    grouped = values.reshape(before, count, -1)
    size = grouped.shape[0] * grouped.shape[2]
    mean = grouped.mean(axis=(0, 2))
    moment = np.square(grouped - mean[:, None]).sum(axis=(0, 2))
    wrong = np.zeros(count) if error is None else error.reshape(grouped.shape).sum(axis=(0, 2))
    return SliceSums(float(size), mean, moment, wrong)


@dataclass
class Slices:
    """Slices of an output along every axis that may hold the features.

    These are all axes but the first that have the same size in all samples; of more than three
    axes only the second and the last. Of a map with a single channel there are none: its columns
    are places, of which those at a margin may hardly vary.

    Attributes
    ----------
    dtype : numpy dtype
    sizes : tuple of (int or None)
        Size of each axis; None if it differs between batches.
    whole : SliceSums
        Sums over everything.
    by_axis : dict of int to SliceSums
    """

    dtype: np.dtype[Any]
    sizes: tuple[int | None, ...] = ()
    whole: SliceSums = field(
        default_factory=lambda: SliceSums(0.0, np.zeros(1), np.zeros(1), np.zeros(1))
    )
    by_axis: dict[int, SliceSums] = field(default_factory=dict)
    _empty: bool = True

    def add(
        self,
        values: NDArray[Any],
        actual: NDArray[Any] | None = None,
        mask: NDArray[Any] | None = None,
    ) -> None:
        """Add samples, optionally with those of another model to measure its error.

        Parameters
        ----------
        values : array, shape (samples, ...)
            Infinite values count as zeros.
        actual : array, same shape, optional
        mask : array, shape (samples, positions), optional
            The positions, along the first two axes of the output, that count.
        """
        values = np.atleast_1d(values)
        actual = None if actual is None else np.atleast_1d(actual)
        self._fit(values.shape)
        step = max(1, AT_ONCE * len(values) // max(values.size, 1))
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            old = values[rows].astype(np.float64)
            error = None
            if actual is not None:
                new = actual[rows].astype(np.float64)
                error = np.square(np.subtract(new, old, where=new != old, out=np.zeros_like(old)))
                error[np.isnan(error)] = np.inf
            old[~np.isfinite(old)] = 0.0
            if mask is not None:
                chosen = mask[rows].astype(bool)
                old = old[chosen][:, None]
                error = None if error is None else error[chosen][:, None]
            if old.size:
                self._add(old, error)

    def _fit(self, shape: Sequence[int]) -> None:
        """Record a shape; axes of varying size hold no features."""
        if self._empty:
            self.sizes = tuple(shape)
            self._empty = False
            for axis in self._candidates():
                zeros = np.zeros(shape[axis])
                self.by_axis[axis] = SliceSums(0.0, zeros, zeros, zeros)
        elif len(shape) != len(self.sizes):
            self.sizes, self.by_axis = (None,) * len(shape), {}
        else:
            self.sizes = tuple(
                a if a == b else None for a, b in zip(self.sizes, shape, strict=True)
            )
        self.by_axis = {a: s for a, s in self.by_axis.items() if self.sizes[a] is not None}

    def _candidates(self) -> Iterator[int]:
        last = len(self.sizes) - 1
        if last > 2 and self.sizes[1] == 1:
            return
        for axis in dict.fromkeys((1, last)):
            size = self.sizes[axis] if 1 <= axis <= last else None
            if size is not None and 2 <= size <= MOST_SLICES:
                yield axis

    def _add(self, values: NDArray[np.float64], error: NDArray[np.float64] | None) -> None:
        self.whole.add(_sums(values, error, None))
        for axis, sums in list(self.by_axis.items()):
            if values.shape[axis] != len(sums.mean):
                # A mask has merged this axis with the first.
                del self.by_axis[axis]
                continue
            sums.add(_sums(values, error, axis))

    @property
    def precision(self) -> float:
        """Relative distance between adjacent numbers of the output's type."""
        return float(np.finfo(self.dtype).eps) if self.dtype.kind == "f" else 0.0

    def feature_axis(self) -> int | None:
        """Axis along which the variances of slices differ most; None if there is none."""
        spreads = {axis: self._spread(axis) for axis in self.by_axis}
        if len(spreads) == 2 and len(self.sizes) > 3:
            first, last = spreads[1], spreads[len(self.sizes) - 1]
            return len(self.sizes) - 1 if last > FACTOR * first + MARGIN else 1
        # Among equals, the last.
        return max(spreads, key=lambda axis: (spreads[axis], axis), default=None)

    def _spread(self, axis: int) -> float:
        """Standard deviation of the logarithms of the variances along an axis."""
        variances = self.by_axis[axis].variances(self.precision)
        largest = float(variances.max(initial=0.0))
        if largest <= 0:
            return 0.0
        return float(np.log(np.maximum(variances / largest, self.precision**2 + 1e-300)).std())

    def of(self, axis: int | None) -> SliceSums:
        """Sums along an axis, or of everything."""
        return self.whole if axis is None else self.by_axis[axis]

    def scale(self, axis: int | None) -> NDArray[np.float64]:
        """Weights of squared errors: reciprocal variances over the number of varying slices.

        If nothing varies, the reciprocal of the mean square is used for all.
        """
        sums = self.of(axis)
        variances = sums.variances(self.precision)
        varying = variances > 0
        if varying.any():
            number = int(varying.sum())
            return np.divide(1.0 / number, variances, where=varying, out=np.zeros(len(variances)))
        size = float(np.square(sums.mean).mean())
        return np.full(len(variances), 1.0 / (size if size > 0 else 1.0) / len(variances))

    def relative_errors(
        self, axis: int | None, scale: Sequence[float] | None = None
    ) -> NDArray[np.float64]:
        """Root of error over variance of each slice; NaN for those that do not vary.

        Parameters
        ----------
        axis : int or None
        scale : sequence of float, optional
            Result of `scale` for other samples, used in place of the variances of these.
        """
        sums = self.of(axis)
        mean = sums.error / max(sums.count, 1.0)
        if scale is not None and len(scale) == len(mean):
            weights = np.array(scale) * max(np.count_nonzero(scale), 1)
        else:
            variances = sums.variances(self.precision)
            weights = np.divide(1.0, variances, where=variances > 0, out=np.zeros(len(mean)))
        with np.errstate(invalid="ignore"):
            return np.where(weights > 0, np.sqrt(mean * weights), np.nan)
