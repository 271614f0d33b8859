"""Truncated SVD of a stack of matrices, by the eigenvectors of the smaller Gram matrix.

For a matrix W with fewer rows than columns, W W^T = U S^2 U^T, and the best approximation
of rank r is the projection U_r U_r^T W (Eckart and Young 1936). In float64 this costs a
fraction of a full SVD, never forms the long singular vectors, and its only loss is that
singular values below about 1e-8 of the largest come out as noise of that size: below the
rounding of float32 weights. The projection itself is exact at any rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["Factorization", "factorize", "singular_values"]

Float64: TypeAlias = NDArray[np.float64]
# Elements that are converted to float64 at a time, so that a large weight is never
# held in double precision as a whole.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Factorization:
    """A truncated SVD with the singular values shared evenly: ``left @ right``.

    Attributes
    ----------
    left : float64 array, shape (groups, rows, rank)
        Left singular vectors times the roots of the singular values.
    singular_values : float64 array, shape (groups, rank)
        Descending.
    right : float64 array, shape (groups, rank, columns)
        Right singular vectors times the roots of the singular values.
    """

    left: Float64
    singular_values: Float64
    right: Float64


def _gram(matrix: NDArray[Any]) -> Float64:
    """Gram matrix over the smaller side, accumulated in float64 over chunks of the longer."""
    rows, columns = matrix.shape
    if rows > columns:
        return _gram(matrix.T)
    step = max(1, CHUNK // rows)
    gram = np.zeros((rows, rows))
    for start in range(0, columns, step):
        block = matrix[:, start : start + step].astype(np.float64)
        gram += block @ block.T
    return gram


def singular_values(stack: NDArray[Any]) -> Float64:
    """Singular values of a stack of matrices, combined over the stack.

    Parameters
    ----------
    stack : array, shape (groups, rows, columns)
        Finite, of any floating type.

    Returns
    -------
    float64 array, shape (min(rows, columns),)
        Descending; entry j is the root of the sum over the stack of the squared j-th
        singular value.
    """
    energy = np.zeros(min(stack.shape[1:]))
    for matrix in stack:
        eigenvalues = scipy.linalg.eigvalsh(_gram(matrix), overwrite_a=True)
        energy += np.maximum(eigenvalues[::-1], 0.0)
    return np.sqrt(energy)


def factorize(stack: NDArray[Any], rank: int) -> Factorization:
    """Best approximation of each matrix of a stack by one of rank `rank`.

    Parameters
    ----------
    stack : array, shape (groups, rows, columns)
        Finite, of any floating type.
    rank : int
        From 1 to min(rows, columns), the same for all matrices.
    """
    groups, rows, columns = stack.shape
    size = min(rows, columns)
    left = np.empty((groups, rows, rank))
    right = np.empty((groups, rank, columns))
    values = np.empty((groups, rank))
    for group, matrix in enumerate(stack):
        eigenvalues, vectors = scipy.linalg.eigh(
            _gram(matrix), subset_by_index=(size - rank, size - 1), overwrite_a=True
        )
        values[group] = np.sqrt(np.maximum(eigenvalues[::-1], 0.0))
        basis = _fix_signs(vectors[:, ::-1])
        # One half of each singular value on either side keeps both factors in the
        # range of a narrow type; where it vanishes the factor is left unscaled.
        root = np.sqrt(values[group])
        root[root <= 1e-6 * max(root[0], np.finfo(np.float64).tiny)] = 1.0
        if rows <= columns:
            left[group] = basis * root
            right[group] = _project(basis, matrix) / root[:, None]
        else:
            left[group] = (_project(basis, matrix.T) / root[:, None]).T
            right[group] = basis.T * root[:, None]
    return Factorization(left, values, right)


def _project(basis: Float64, matrix: NDArray[Any]) -> Float64:
    """``basis.T @ matrix`` in float64, over chunks of the longer side."""
    rows, columns = matrix.shape
    step = max(1, CHUNK // rows)
    result = np.empty((basis.shape[1], columns))
    for start in range(0, columns, step):
        block = matrix[:, start : start + step].astype(np.float64)
        result[:, start : start + step] = basis.T @ block
    return result


def _fix_signs(vectors: Float64) -> Float64:
    """Make the largest entry of each column positive, so that results can be repeated."""
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    signs[signs == 0] = 1.0
    return np.asarray(vectors * signs)
