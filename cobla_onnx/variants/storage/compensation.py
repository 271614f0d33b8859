"""Round the weights of a row together, so that the errors of some make up for those of others.

Columns are rounded one after the other, those of most energy first, and each error is taken from
the columns that are left (Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1; Frantar and
Alistarh 2022, OBQ, arXiv 2208.11580). Then every weight is moved to its best level given all
others, in a few sweeps (coordinate descent, which GPTQ's result is not at the end of).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtri

from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.coding import Coded

__all__ = ["DAMPING", "Compensation", "unavoidable", "unscaled"]

# Fraction of the mean energy of an input that is added to each. GPTQ adds 0.01; moments of the
# calibration data are shrunk already, by as much as they are uncertain.
DAMPING = 0.001
# Columns whose errors are passed on at a time, as a matrix product.
BLOCK = 32
# Sweeps of coordinate descent.
SWEEPS = 3


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
        scaled = np.concatenate([unscaled(rows, each) for each in scales], axis=1)
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
        _subtract(slopes, self._damped, self._columns(unscaled(rows, coded.scales)) - current)
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


def unscaled(values: NDArray[Any], scales: NDArray[Any]) -> Float64:
    """Values of rows over their scales; 0 for rows of scale 0."""
    shaped = scales.reshape(scales.shape + (1,) * (values.ndim - 2)).astype(np.float64)
    return np.asarray(np.divide(values, shaped, where=shaped > 0, out=np.zeros_like(values)))


def _reordered(array: NDArray[Any], order: NDArray[np.intp], axis: int) -> NDArray[Any]:
    """Take the entries along an axis in the order of each group."""
    shape = [len(order), 1, 1]
    shape[axis] = order.shape[1]
    return np.take_along_axis(array, order.reshape(shape), axis=axis)
