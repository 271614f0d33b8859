"""Round weights to few levels so that the layer's outputs change least.

The output error of a rounded weight W + D on inputs with second moment S is tr(D S D^T), so that
an error of one weight can be made up for by the others of its row, see `compensation`. Scales are
those of several that leave each row the least error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.coding import INTEGERS, SAMPLED, Coded, NearestLevel, fit_levels
from cobla_onnx.variants.storage.compensation import Compensation
from cobla_onnx.variants.storage.precision import HALF, in_half

__all__ = ["distortion", "mean_squares", "output_error", "round_weight"]

# Weights that are rounded at a time: under a moment, as products of matrices; and one by one, where
# what is computed of them stays in a processor's cache.
TOGETHER_AT_ONCE, ALONE_AT_ONCE = 1 << 22, 1 << 15
# Most weights that are rounded with several scales at once.
TOGETHER = 1 << 18
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
    at_once = ALONE_AT_ONCE if inputs is None else TOGETHER_AT_ONCE
    step = max(1, at_once // max(groups * size, 1))
    nearest, parts = NearestLevel(levels), []
    for begin in range(0, outputs, step):
        some = slice(begin, begin + step)
        scales = [
            (factor * sizes[:, some]).astype(np.float32)
            for factor in (INTEGER if bits == 8 else FITTED)
        ]
        parts.append(_rounded(np.asarray(rows[:, some], np.float32), nearest, scales, inputs))
    return Coded(
        np.concatenate([part.codes for part in parts], axis=1),
        levels,
        np.concatenate([part.scales for part in parts], axis=1),
    )


def _rounded(
    rows: NDArray[np.float32],
    nearest: NearestLevel,
    scales: Sequence[NDArray[np.float32]],
    inputs: Compensation | None,
) -> Coded:
    """Round rows with the best of several scales for each."""
    levels = nearest.levels
    if inputs is None:
        alone = _best_alone(rows.transpose(2, 0, 1), nearest, scales, None)
        return Coded(alone.codes.transpose(1, 2, 0), levels, alone.scales)
    columns = inputs.columns(rows)
    best = _best_alone(columns, nearest, scales, inputs.energies)
    change = levels[best.codes] - _unscaled(columns, best.scales)
    # What is rounded one by one takes part, so that the result is never worse than that.
    best = best._replace(errors=_in_units(inputs.errors(change), best.scales))
    near = [(factor * best.scales).astype(np.float32) for factor in NEAR]
    # Small weights with all scales at once: column by column, calls take longer than numbers do.
    for part in [near] if rows.size <= TOGETHER else [[each] for each in near]:
        scaled = np.concatenate([_unscaled(columns, each) for each in part], axis=2)
        codes, errors = inputs.codes(nearest, scaled)
        each_one = np.split(codes, len(part), 2), part, np.split(errors, len(part), 1)
        for its, scale, lost in zip(*each_one, strict=True):
            best = _better_rows(best, _judged(its, scale, lost))
    moved = inputs.descended(nearest, best.codes, _unscaled(columns, best.scales))
    return Coded(inputs.rows(moved), levels, best.scales)


def _best_alone(
    columns: NDArray[np.float32],
    nearest: NearestLevel,
    scales: Sequence[NDArray[np.float32]],
    energies: NDArray[np.float32] | None,
) -> _Judged:
    """Round every number to the nearest level, with the scale that is best for each row.

    As if inputs were independent.

    Parameters
    ----------
    columns : float32 array, shape (size, groups, outputs)
    nearest : NearestLevel
    scales : sequence of float32 array, each of shape (groups, outputs)
    energies : float32 array, shape (size, groups), optional
        Of the inputs; of the same energy, if not given.
    """

    def rounded(scale: NDArray[np.float32]) -> _Judged:
        scaled = _unscaled(columns, scale)
        codes = nearest(scaled)
        scaled -= nearest.levels.take(codes)
        squares = np.square(scaled, out=scaled)
        if energies is not None:
            squares *= energies[:, :, None]
        return _judged(codes.astype(np.uint8), scale, squares.sum(axis=0, dtype=np.float64))

    return reduce(_better_rows, map(rounded, scales))


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
        lost = float(output_error(round_weight(some, None, bits), some, None).sum())
    elif max(rows.max(initial=0.0), -rows.min(initial=0.0)) > np.finfo(np.float16).max:
        return math.inf
    else:
        # Small numbers lose more than others, down to all of it.
        lost = float(np.square(in_half(some).astype(np.float64) - some).sum())
    energy = float(mean_squares(some).sum()) * size
    return lost / energy if energy > 0 else 0.0


class _Judged(NamedTuple):
    """A weight in fewer bits, columns first, and the error of each of its rows.

    Attributes
    ----------
    codes : uint8 array, shape (size, groups, outputs)
    scales : float32 array, shape (groups, outputs)
    errors : float64 array, shape (groups, outputs)
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    errors: Float64


def _judged(codes: NDArray[np.uint8], scales: NDArray[np.float32], errors: Float64) -> _Judged:
    """Judge a weight, from errors of its rows over their scales."""
    return _Judged(codes, scales, _in_units(errors, scales))


def _in_units(errors: Float64, scales: NDArray[np.float32]) -> Float64:
    """Squared errors of rows, from those of rows over their scales."""
    return np.asarray(errors * np.square(scales.astype(np.float64)))


def _better_rows(one: _Judged, other: _Judged) -> _Judged:
    """Take every row from the weight that leaves it less error."""
    better = other.errors < one.errors
    return _Judged(
        np.where(better, other.codes, one.codes),
        np.where(better, other.scales, one.scales),
        np.where(better, other.errors, one.errors),
    )


def _unscaled(columns: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    """Numbers over the scales of their rows, which are the last axes; 0 for rows of scale 0."""
    return np.asarray(np.divide(columns, scales, where=scales > 0, out=np.zeros_like(columns)))
