"""Round the weights of a row together, so that the errors of some make up for those of others.

Columns are rounded one after the other, those of most energy first, and each error is taken from
the columns that are left (Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1; Frantar and
Alistarh 2022, OBQ, arXiv 2208.11580). Then every weight is moved to its best level given all
others, in a few sweeps (coordinate descent, which GPTQ's result is not at the end of).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.coding import NearestLevel

__all__ = ["DAMPING", "Compensation", "Float32", "unavoidable"]

Float32: TypeAlias = NDArray[np.float32]

# Fraction of the mean energy of an input that is added to each. GPTQ adds 0.01; moments of the
# calibration data are shrunk already, by as much as they are uncertain.
DAMPING = 0.001
# Columns whose errors are passed on at a time, as a matrix product.
BLOCK = 32
# Sweeps of coordinate descent.
SWEEPS = 2


def unavoidable(second: Float64) -> Float64:
    """Energy of the inputs that no others make up for, shape (groups,).

    Rounding a column of a row by mistake e leaves e^2 times the energy of its input given the
    inputs whose columns are rounded later, F_jj^2 for S = F F^T. The sum of these over all columns,
    times the row's mean square and the layer's `distortion`, is the error that `round_weight`
    leaves, to about a tenth from 3 bits on: what rounding costs is known before it is done.

    Parameters
    ----------
    second : float64 array, shape (groups, size, size)
    """
    damped, _ = _damped_in_order(second)
    return np.asarray(np.square(np.einsum("gii->gi", _factor(damped))).sum(axis=1))


def _factor(damped: Float64) -> Float64:
    """Return the upper triangular F of which F F^T is the moment."""
    return np.asarray(np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1])


def _damped_in_order(second: Float64) -> tuple[Float64, NDArray[np.intp]]:
    """Return a moment that has an inverse, in the order of rounding, and this order."""
    energy = np.einsum("gii->g", second) / second.shape[1]
    # Inputs that are all zero carry no information; then every weight counts alike.
    added = np.where(energy > 0, DAMPING * energy, 1.0)
    order = np.argsort(-np.einsum("gii->gi", second), axis=1, kind="stable")
    pairs = zip(second, order, strict=True)
    damped = np.stack([each.take(its, axis=1).take(its, axis=0) for each, its in pairs])
    diagonal = np.einsum("gii->gi", damped)
    diagonal += added[:, None]
    return damped, order


class Compensation:
    """Rounds the weights of a row together, under a second moment of its inputs.

    What this takes from the moment is made once, for all numbers of bits and all weights. Columns
    are the leading axis here, in the order in which they are rounded, so that each of them lies
    together in memory; and rows are divided by their scales. These numbers are in single precision,
    far finer than any levels; only the factor of the moment is made in double.

    Parameters
    ----------
    second : float64 array, shape (groups, size, size)
    """

    def __init__(self, second: Float64) -> None:
        damped, self._order = _damped_in_order(second)
        # Of any size, which single precision might not hold. Errors are compared within a row.
        damped /= np.einsum("gii->g", damped)[:, None, None] / second.shape[1]
        self._factor = np.ascontiguousarray(_factor(damped), np.float32)
        self._damped = damped.astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of what is made of the moment."""
        return self.size_of(*self._order.shape)

    @staticmethod
    def size_of(groups: int, size: int) -> int:
        """Bytes of what is made of a moment of shape (groups, size, size)."""
        return 2 * 4 * groups * size**2

    @property
    def energies(self) -> Float32:
        """Energy of each column, relative to the mean, shape (size, groups)."""
        return np.asarray(np.einsum("gii->ig", self._damped))

    def columns(self, rows: NDArray[Any]) -> Float32:
        """Put columns first, in the order of rounding; from shape (groups, outputs, size)."""
        groups, outputs, size = rows.shape
        result = np.empty((size, groups, outputs), np.float32)
        for group, order in enumerate(self._order):
            result[:, group] = rows[group].take(order, axis=1).T
        return result

    def rows(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put columns where they are in the weight again, shape (groups, outputs, size)."""
        result = np.empty((*codes.shape[1:], len(codes)), np.uint8)
        for group, order in enumerate(self._order):
            result[group] = codes[np.argsort(order), group].T
        return result

    def errors(self, change: Float32) -> Float64:
        """Output error of each row, from the changes of columns, shape (groups, outputs)."""
        moved = _through(self._damped, change)
        return np.asarray((moved * change).sum(axis=0, dtype=np.float64))

    def codes(self, nearest: NearestLevel, scaled: Float32) -> tuple[NDArray[np.uint8], Float64]:
        """Round column by column, the error of each taken from those that are left.

        With S = F F^T the error of changes d is ||F^T d||^2, and its term of a column has the
        changes of this column and of those before it alone: rounding makes each term as small as
        it can be. These are the codes of GPTQ, which takes them from the inverse of the moment.

        Parameters
        ----------
        nearest : NearestLevel
        scaled : float32 array, shape (size, groups, outputs)

        Returns
        -------
        uint8 array, shape (size, groups, outputs)
        float64 array, shape (groups, outputs)
            Output error of each row, as by `errors`: as columns are rounded it becomes known.
        """
        levels, codes = nearest.levels, np.empty(scaled.shape, np.uint8)
        changes, lost = np.empty_like(scaled), np.zeros(scaled.shape[1:])
        for begin in range(0, len(scaled), BLOCK):
            end = min(begin + BLOCK, len(scaled))
            # What the changes so far are in the terms of the block's columns.
            terms = _through(self._factor[:, :begin, begin:end], changes[:begin])
            factor = self._factor[:, begin:end, begin:end].transpose(1, 2, 0)[..., None]
            for k in range(end - begin):
                found = nearest(scaled[begin + k] - terms[k] / factor[k, k])
                codes[begin + k] = found
                change = np.subtract(levels.take(found), scaled[begin + k], out=changes[begin + k])
                terms[k:] += change * factor[k, k:]
            lost += np.square(terms).sum(axis=0)
        return codes, lost

    def descended(
        self, nearest: NearestLevel, codes: NDArray[np.uint8], scaled: Float32
    ) -> NDArray[np.uint8]:
        """Move every weight to its best level given all others, until none moves.

        Parameters
        ----------
        nearest : NearestLevel
        codes : uint8 array, shape (size, groups, outputs)
        scaled : float32 array, shape (size, groups, outputs)
        """
        current = nearest.levels[codes]
        slopes = _through(self._damped, current - scaled)
        for _ in range(SWEEPS):
            moved = False
            for begin in range(0, len(codes), BLOCK):
                part = slice(begin, min(begin + BLOCK, len(codes)))
                steps = self._descend(part, slopes[part].copy(), current[part], nearest)
                if steps.any():
                    slopes += _through(self._damped[:, part], steps)
                    moved = True
            if not moved:
                break
        return nearest(current).astype(np.uint8)

    def _descend(
        self, part: slice, slopes: Float32, current: Float32, nearest: NearestLevel
    ) -> Float32:
        """Move the weights of a block of columns, one column after the other; return by how much.

        `slopes` and `current`, which are the block's, are changed in place.
        """
        damped = self._damped[:, part, part].transpose(1, 2, 0)[..., None]
        steps = np.empty_like(slopes)
        for k in range(len(slopes)):
            found = nearest.levels.take(nearest(current[k] - slopes[k] / damped[k, k]))
            steps[k] = found - current[k]
            current[k] = found
            slopes[k + 1 :] += steps[k] * damped[k, k + 1 :]
        return steps


def _through(matrix: Float32, columns: Float32) -> Float32:
    """Transposed matrix of each group times ``columns`` (size, groups, outputs)."""
    product = np.matmul(matrix.transpose(0, 2, 1), columns.transpose(1, 0, 2))
    return np.asarray(product.transpose(1, 0, 2))
