"""Round weights to few levels so that the layer's outputs change least.

The output error of a rounded weight W + D on inputs with second moment S is tr(D S D^T), so that
an error of one weight can be made up for by the others of its row. Columns are rounded one after
the other, those of most energy first, and each error is taken from the columns that are left
(Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1; Frantar and Alistarh 2022, OBQ, arXiv
2208.11580). Then every weight is moved to its best level given all others, in a few sweeps
(coordinate descent, which GPTQ's result is not at the end of). Scales are those of several that
leave each row the least error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtri

from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.coding import INTEGERS, SAMPLED, Coded, fit_levels, nearest
from cobla_onnx.variants.storage.precision import HALF, in_half

__all__ = [
    "Compensation",
    "distortion",
    "mean_squares",
    "output_error",
    "round_weight",
    "unavoidable",
]

# Fraction of the mean energy of an input that is added to each. GPTQ adds 0.01; moments of the
# calibration data are shrunk already, by as much as they are uncertain.
DAMPING = 0.001
# Columns whose errors are passed on at a time, as a matrix product.
BLOCK = 32
# Weights that are rounded at a time, in double precision.
AT_ONCE = 1 << 22
# Most weights that are rounded with several scales at once.
TOGETHER = 1 << 18
# Sweeps of coordinate descent.
SWEEPS = 3
# Scales that are tried, as multiples of the row's root mean square, or, with integers as levels,
# of the scale that just holds its largest weight.
FITTED, INTEGER = (0.8, 0.9, 1.0, 1.1, 1.2), (0.85, 0.9, 0.95, 1.0)
# Scales that are tried with compensation, as multiples of the best one without.
NEAR = (0.9, 1.0, 1.1)
# Rows of smaller numbers are 0: what is below the normal numbers of single precision loses nothing,
# and processors multiply it a hundred times slower. Channels that training gave up hold such.
LEAST = 2.0**10 * float(np.finfo(np.float32).tiny)


def round_weight(rows: NDArray[Any], inputs: Compensation | None, bits: int) -> Coded:
    """Round the rows of a weight.

    Parameters
    ----------
    rows : array, shape (groups, outputs, size)
    inputs : Compensation, optional
        For their second moment; without it every weight is rounded to its nearest level.
    bits : int
        2 to 6, or 8.

    Returns
    -------
    Coded
    """
    sizes = _sizes(rows, bits)
    sizes[sizes < LEAST] = 0.0
    levels = INTEGERS if bits == 8 else fit_levels(_normalised(rows, sizes), 1 << bits)
    groups, outputs, size = rows.shape
    step = max(1, AT_ONCE // max(groups * size, 1))
    parts = []
    for begin in range(0, outputs, step):
        some = slice(begin, begin + step)
        scales = [
            (factor * sizes[:, some]).astype(np.float32)
            for factor in (INTEGER if bits == 8 else FITTED)
        ]
        wide = rows[:, some].astype(np.float64)
        parts.append(_rounded(wide, levels, scales, inputs))
    return Coded(
        np.concatenate([part.codes for part in parts], axis=1),
        levels,
        np.concatenate([part.scales for part in parts], axis=1),
    )


def _rounded(
    rows: Float64,
    levels: NDArray[np.float32],
    scales: Sequence[NDArray[np.float32]],
    inputs: Compensation | None,
) -> Coded:
    """Round rows with the best of several scales for each."""
    judged = partial(_Judged.of, rows, None if inputs is None else inputs.second)
    alone = (judged(Coded(_nearest_codes(levels, rows, each), levels, each)) for each in scales)
    best = reduce(_better_rows, alone)
    if inputs is None:
        return best.coded
    near = [(factor * best.coded.scales).astype(np.float32) for factor in NEAR]
    # Small weights with all scales at once: column by column, calls take longer than numbers do.
    parts = [near] if rows.size <= TOGETHER else [[each] for each in near]
    compensated = (
        judged(Coded(codes, levels, each))
        for part in parts
        for codes, each in zip(inputs.codes(levels, rows, part), part, strict=True)
    )
    # What is rounded one by one takes part, so that the result is never worse than that.
    return inputs.descended(reduce(_better_rows, compensated, best).coded, rows)


def _sizes(rows: NDArray[Any], bits: int) -> Float64:
    """Size of each row: its root mean square or, with integers as levels, the unit of its largest.

    Of shape (groups, outputs).
    """
    if bits == 8:
        largest = np.maximum(rows.max(axis=2, initial=0.0), -rows.min(axis=2, initial=0.0))
        return np.asarray(largest.astype(np.float64) / 127)
    return np.sqrt(mean_squares(rows))


def _normalised(rows: NDArray[Any], sizes: Float64) -> Float64:
    """Some weights, evenly spaced, over the size of their row."""
    places = np.arange(0, rows.size, -(-rows.size // SAMPLED))
    values = rows.reshape(-1)[places].astype(np.float64)
    return _unscaled(values, sizes.reshape(-1)[places // rows.shape[2]])


def mean_squares(rows: NDArray[Any]) -> Float64:
    """Mean square of each row, shape (groups, outputs)."""
    total = np.einsum("gos,gos->go", rows, rows, dtype=np.float64)
    return np.asarray(total / max(rows.shape[2], 1))


def output_error(coded: Coded, rows: NDArray[Any], second: Float64 | None) -> Float64:
    """Squared output error of each row, tr(D S D^T) by rows, shape (groups, outputs)."""
    change = coded.dense().astype(np.float64) - rows
    moved = change if second is None else change @ second
    return np.asarray(np.einsum("gos,gos->go", moved, change))


def distortion(rows: NDArray[Any], bits: int) -> float:
    """Mean squared error of rounding every weight by itself, relative to the mean square.

    Of a large weight, of evenly spaced rows; infinite if half precision overflows anywhere.

    Parameters
    ----------
    rows : array, shape (groups, outputs, size)
    bits : int
        One of those in `precision.FORMATS`.
    """
    groups, outputs, size = rows.shape
    some = rows[:, :: max(1, -(-outputs * groups * size // SAMPLED))]
    if bits != HALF:
        # A row's numbers may come in any order; levels are found faster for ascending ones.
        some = np.sort(some, axis=2)
        lost = float(output_error(round_weight(some, None, bits), some, None).sum())
    elif max(rows.max(initial=0.0), -rows.min(initial=0.0)) > np.finfo(np.float16).max:
        return math.inf
    else:
        # Small numbers lose more than others, down to all of it.
        lost = float(np.square(in_half(some).astype(np.float64) - some).sum())
    energy = float(mean_squares(some).sum()) * size
    return lost / energy if energy > 0 else 0.0


def unavoidable(second: Float64) -> Float64:
    """Energy of the inputs that no others make up for, shape (groups,).

    Rounding a column of a row by mistake e leaves e^2 times the energy of its input given the
    inputs whose columns are rounded later, 1 / U_jj^2 of GPTQ. The sum of these over all columns,
    times the row's mean square and the layer's `distortion`, is the error that `round_weight`
    leaves, to about a tenth from 3 bits on: what rounding costs is known before it is done.

    Parameters
    ----------
    second : float64 array, shape (groups, size, size)
    """
    damped, _ = _damped_in_order(second)
    return np.asarray(np.square(np.einsum("gii->gi", _reversed_factor(damped))).sum(axis=1))


def _reversed_factor(damped: Float64) -> Float64:
    """Return U^-1 for the upper triangular U with U^T U the inverse, rows and columns reversed.

    So reversed it is the Cholesky factor of the reversed moment, and no inverse is needed.
    """
    return np.asarray(np.linalg.cholesky(damped[:, ::-1, ::-1]))


def _damped_in_order(second: Float64) -> tuple[Float64, NDArray[np.intp]]:
    """Return a moment that has an inverse, in the order of rounding, and this order."""
    energy = np.einsum("gii->g", second) / second.shape[1]
    # Inputs that are all zero carry no information; then every weight counts alike.
    added = np.where(energy > 0, DAMPING * energy, 1.0)
    order = np.argsort(-np.einsum("gii->gi", second), axis=1, kind="stable")
    damped = _reordered(_reordered(second, order, 2), order, 1)
    diagonal = np.einsum("gii->gi", damped)
    diagonal += added[:, None]
    return damped, order


class _Judged(NamedTuple):
    """A weight in fewer bits, and the output error of each of its rows."""

    coded: Coded
    errors: Float64

    @staticmethod
    def of(rows: Float64, second: Float64 | None, coded: Coded) -> _Judged:
        """Judge a weight."""
        return _Judged(coded, output_error(coded, rows, second))


def _better_rows(one: _Judged, other: _Judged) -> _Judged:
    """Take every row from the weight that leaves it less error."""
    better = other.errors < one.errors
    coded = Coded(
        np.where(better[:, :, None], other.coded.codes, one.coded.codes),
        one.coded.levels,
        np.where(better, other.coded.scales, one.coded.scales),
    )
    return _Judged(coded, np.where(better, other.errors, one.errors))


def _nearest_codes(
    levels: NDArray[np.float32], rows: Float64, scales: NDArray[np.float32]
) -> NDArray[np.uint8]:
    return nearest(levels, _unscaled(rows, scales)).astype(np.uint8)


class Compensation:
    """Rounds the weights of a row together, under a second moment of its inputs.

    What this takes from the moment is made once, when the first weight is rounded, for all numbers
    of bits and all weights. Columns are the leading axis here, in the order in which they are
    rounded, so that each of them lies together in memory; and rows are divided by their scales.

    Parameters
    ----------
    second : float64 array, shape (groups, size, size)
    """

    def __init__(self, second: Float64) -> None:
        self.second = second

    @property
    def nbytes(self) -> int:
        """Bytes of the moment, and of what is made of it: as many again, twice."""
        return 3 * self.second.nbytes

    @cached_property
    def _in_order(self) -> tuple[Float64, NDArray[np.intp]]:
        return _damped_in_order(self.second)

    @property
    def _damped(self) -> Float64:
        return self._in_order[0]

    @property
    def _order(self) -> NDArray[np.intp]:
        return self._in_order[1]

    @cached_property
    def upper(self) -> Float64:
        """With its transpose it makes the inverse of the damped moment."""
        inverses = [dtrtri(each, lower=1)[0] for each in _reversed_factor(self._damped)]
        return np.ascontiguousarray(np.stack(inverses)[:, ::-1, ::-1])

    def codes(
        self, levels: NDArray[np.float32], rows: Float64, scales: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.uint8]]:
        """Round column by column, the error of each taken from those that are left.

        Once with each of the given scales.
        """
        known = levels.astype(np.float64)
        between = (known[1:] + known[:-1]) / 2
        scaled = np.concatenate([_unscaled(rows, each) for each in scales], axis=1)
        rest = self._columns(scaled)
        codes = np.zeros(rest.shape, np.uint8)
        for begin in range(0, len(rest), BLOCK):
            end = min(begin + BLOCK, len(rest))
            block, errors = rest[begin:end], np.empty((end - begin, *rest.shape[1:]))
            upper = self.upper[:, begin:end, begin:end].transpose(1, 2, 0)[..., None]
            for k in range(end - begin):
                found = between.searchsorted(block[k])
                codes[begin + k] = found
                errors[k] = (block[k] - known[found]) / upper[k, k]
                block[k + 1 :] -= errors[k] * upper[k, k + 1 :]
            if end < len(rest):
                _subtract(rest[end:], self.upper[:, begin:end, end:], errors)
        return np.split(self._back(codes), len(scales), axis=1)

    def descended(self, coded: Coded, rows: Float64) -> Coded:
        """Move every weight to its best level given all others, until none moves."""
        levels = coded.levels.astype(np.float64)
        codes = self._columns(coded.codes)
        current = levels[codes]
        slopes = np.zeros_like(current)
        _subtract(slopes, self._damped, self._columns(_unscaled(rows, coded.scales)) - current)
        for _ in range(SWEEPS):
            moved = False
            for begin in range(0, len(codes), BLOCK):
                end = min(begin + BLOCK, len(codes))
                steps = self._descend(slice(begin, end), slopes, current, codes, levels)
                if steps.any():
                    _subtract(slopes, self._damped[:, begin:end], -steps)
                    moved = True
            if not moved:
                break
        return Coded(self._back(codes), coded.levels, coded.scales)

    def _columns(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Put the columns first, in the order of rounding; shape (size, groups, outputs)."""
        return np.ascontiguousarray(_reordered(rows, self._order, 2).transpose(2, 0, 1))

    def _back(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put columns in the order of the weight again."""
        inverse = np.argsort(self._order, axis=1)
        return np.ascontiguousarray(_reordered(codes.transpose(1, 2, 0), inverse, 2))

    def _descend(
        self,
        part: slice,
        slopes: Float64,
        current: Float64,
        codes: NDArray[np.uint8],
        levels: Float64,
    ) -> Float64:
        """Move the weights of a block of columns, one column after the other; return by how much.

        `current` and `codes` are changed in place, `slopes` is left to the caller.
        """
        between = (levels[1:] + levels[:-1]) / 2
        block, damped = slopes[part].copy(), self._damped[:, part, part]
        damped = damped.transpose(1, 2, 0)[..., None]
        steps, weights, its_codes = np.empty_like(block), current[part], codes[part]
        for k in range(len(block)):
            found = between.searchsorted(weights[k] - block[k] / damped[k, k])
            its_codes[k] = found
            steps[k] = levels[found] - weights[k]
            weights[k] += steps[k]
            block[k + 1 :] += steps[k] * damped[k, k + 1 :]
        return steps


def _subtract(rest: Float64, matrix: Float64, errors: Float64) -> None:
    """Take ``errors`` (columns, groups, outputs), through a matrix for each group, from `rest`."""
    for group, its in enumerate(matrix):
        rest[:, group] -= its.T @ errors[:, group]


def _unscaled(values: NDArray[Any], scales: NDArray[Any]) -> Float64:
    """Values of rows over their scales; 0 for rows of scale 0."""
    shaped = scales.reshape(scales.shape + (1,) * (values.ndim - 2)).astype(np.float64)
    return np.asarray(np.divide(values, shaped, where=shaped > 0, out=np.zeros_like(values)))


def _reordered(array: NDArray[Any], order: NDArray[np.intp], axis: int) -> NDArray[Any]:
    """Take the entries along an axis in the order of each group."""
    shape = [len(order), 1, 1]
    shape[axis] = order.shape[1]
    return np.take_along_axis(array, order.reshape(shape), axis=axis)
