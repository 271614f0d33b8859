"""Eigenvalues of symmetric matrices now, their leading eigenvectors later, from one reduction.

A = Q T Q^T with T tridiagonal (Golub and Van Loan 2013, Matrix Computations, section 8.3) is most
of the work of the eigenvalues, which those of T are, and of the eigenvectors, which are Q times
those of T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.runtime.lapack import DORMTR, DSTEDC, DSTERF, DSYTRD, call, call_sized

__all__ = ["Tridiagonal", "eigenvalues", "leading_eigenvectors", "reduced"]

Float64: TypeAlias = NDArray[np.float64]
# Eigenvectors of T that become those of A at a time. Their number is always the same, so that the
# last bits of a vector do not depend on how many others are asked for.
PANEL = 512


@dataclass(frozen=True)
class Tridiagonal:
    """A stack of symmetric matrices, reduced to tridiagonal ones by reflections.

    Attributes
    ----------
    reflectors : float64 array, shape (groups, size, size)
        As LAPACK's dsytrd leaves them.
    factors : float64 array, shape (groups, size)
        Of the reflectors; the last one has no meaning.
    diagonal : float64 array, shape (groups, size)
    beside : float64 array, shape (groups, size)
        What stands beside the diagonal; the last number has no meaning.
    scales : float64 array, shape (groups,)
        By which the tridiagonal matrices are to be multiplied: powers of two.
    """

    reflectors: Float64
    factors: Float64
    diagonal: Float64
    beside: Float64
    scales: Float64


def reduced(matrices: Float64) -> Tridiagonal:
    """Reduce symmetric matrices, in place.

    Parameters
    ----------
    matrices : float64 array, shape (groups, size, size)
        Finite and in C order; overwritten.
    """
    groups, size, _ = matrices.shape
    factors, diagonal, beside = (np.zeros((groups, size)) for _ in range(3))
    largest = np.maximum(matrices.max(axis=(1, 2)), -matrices.min(axis=(1, 2)))
    scales = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))))
    for group, matrix in enumerate(matrices):
        matrix /= scales[group]
        call_sized(DSYTRD, b"L", size, matrix, size, diagonal[group], beside[group], factors[group])
    return Tridiagonal(matrices, factors, diagonal, beside, scales)


def eigenvalues(form: Tridiagonal) -> Float64:
    """Return all eigenvalues, ascending, shape (groups, size)."""
    values, beside = form.diagonal.copy(), form.beside.copy()
    for group, found in enumerate(values):
        call(DSTERF, len(found), found, beside[group])
    return np.asarray(values * form.scales[:, None])


def leading_eigenvectors(form: Tridiagonal, group: int, count: int) -> tuple[Float64, Float64]:
    """Return the largest eigenvalues of a matrix of a stack, and their eigenvectors.

    All of T are computed, by divide and conquer, and only the wanted ones are multiplied by Q.

    Parameters
    ----------
    count : int
        From 1 to size.

    Returns
    -------
    values : float64 array, shape (count,)
        Descending.
    vectors : float64 array, shape (size, count)
        Orthonormal columns.
    """
    size = form.diagonal.shape[1]
    values, beside = form.diagonal[group].copy(), form.beside[group].copy()
    # In LAPACK's order these are columns.
    rows = np.empty((size, size))
    whole = np.empty(5 * size + 3, np.int32)
    call_sized(DSTEDC, b"I", size, values, beside, rows, size, integers=whole)
    # The routine writes into them for a moment.
    reflectors, factors = form.reflectors[group].copy(), form.factors[group]
    for end in range(size, max(size - count, 0), -PANEL):
        panel = rows[max(end - PANEL, 0) : end]
        shape = b"L", b"L", b"N", size, len(panel)
        call_sized(DORMTR, *shape, reflectors, size, factors, panel, size)
    return values[::-1][:count] * form.scales[group], rows[::-1][:count].T
