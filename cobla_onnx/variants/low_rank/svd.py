"""Truncated SVD of a stack of matrices, from the eigenvectors of the smaller Gram matrix.

For a matrix W with fewer rows than columns, W W^T = U S^2 U^T, and the best approximation
of rank r is the projection U_r U_r^T W (Eckart and Young 1936). In float64 this costs a
fraction of a full SVD and never forms the long singular vectors. The only loss is that
singular values below about 1e-8 of the largest come out as noise of that size, which is
below the rounding of float32 weights. The projection itself is exact at any rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.tridiagonal import (
    Tridiagonal,
    eigenvalues,
    leading_eigenvectors,
    reduced,
)

__all__ = [
    "Basis",
    "Factorization",
    "factorize",
    "gram_matrices",
    "leading_vectors",
    "singular_values",
]

Float64: TypeAlias = NDArray[np.float64]
# Elements converted to float64 at a time, so that a large weight is never held in double precision
# as a whole. Of 4,096 x 25,088 a quarter as many take a third longer: each product is added.
CHUNK = 1 << 24


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


@dataclass(frozen=True)
class Basis:
    """Leading singular vectors of the shorter sides of a stack of matrices.

    Attributes
    ----------
    vectors : float64 array, shape (groups, min(rows, columns), count)
    singular_values : float64 array, shape (groups, count)
        Descending.
    """

    vectors: Float64
    singular_values: Float64


def gram_matrices(stack: NDArray[Any]) -> Float64:
    """Gram matrices of a stack over the smaller side: singular values and vectors follow from them.

    Of large matrices they take as long as either.

    Parameters
    ----------
    stack : array, shape (groups, rows, columns)
        Finite, of any floating type.

    Returns
    -------
    float64 array, shape (groups, min(rows, columns), min(rows, columns))
    """
    groups, rows, columns = stack.shape
    grams = np.zeros((groups, *(min(rows, columns),) * 2))
    for gram, matrix in zip(grams, stack, strict=True):
        for _, block in _chunks(matrix):
            gram += block @ block.T if rows <= columns else block.T @ block
    return grams


def _chunks(matrix: NDArray[Any]) -> Iterator[tuple[slice, Float64]]:
    """Yield chunks of the longer side, contiguous, so that bits do not depend on layout."""
    rows, columns = matrix.shape
    step = max(1, CHUNK // min(rows, columns))
    for start in range(0, max(rows, columns), step):
        part = slice(start, start + step)
        block = matrix[:, part] if rows <= columns else matrix[part]
        yield part, np.ascontiguousarray(block, np.float64)


def singular_values(grams: Tridiagonal) -> Float64:
    """Singular values of a stack of matrices, combined over the stack.

    Parameters
    ----------
    grams : Tridiagonal
        Of what `gram_matrices` returns.

    Returns
    -------
    float64 array, shape (size,)
        Descending; entry j is the root of the sum over the stack of the squared j-th
        singular value.
    """
    energies = np.maximum(eigenvalues(grams)[:, ::-1], 0.0)
    return np.asarray(np.sqrt(energies.sum(axis=0)))


def leading_vectors(grams: Tridiagonal, count: int) -> Basis:
    """Leading singular vectors of the shorter side of each matrix, with their values.

    They are the same whatever `count` was, so that a kept basis serves every rank up to it.

    Parameters
    ----------
    grams : Tridiagonal
        Of what `gram_matrices` returns.
    count : int
        From 1 to size.
    """
    groups, size = grams.diagonal.shape
    vectors = np.empty((groups, size, count))
    values = np.empty((groups, count))
    for group in range(groups):
        found, columns = leading_eigenvectors(grams, group, count)
        values[group] = np.sqrt(np.maximum(found, 0.0))
        vectors[group] = _fix_signs(columns)
    return Basis(vectors, values)


def factorize(stack: NDArray[Any], rank: int, basis: Basis | None = None) -> Factorization:
    """Best approximation of rank `rank` of each matrix of a stack.

    Parameters
    ----------
    stack : array, shape (groups, rows, columns)
        Finite, of any floating type.
    rank : int
        From 1 to min(rows, columns), the same for all matrices.
    basis : Basis, optional
        Of the same stack, with at least `rank` vectors; computed if not given.
    """
    groups, rows, columns = stack.shape
    found = basis or leading_vectors(reduced(gram_matrices(stack)), rank)
    left = np.empty((groups, rows, rank))
    right = np.empty((groups, rank, columns))
    values = found.singular_values[:, :rank].copy()
    for group, matrix in enumerate(stack):
        vectors = np.ascontiguousarray(found.vectors[group, :, :rank])
        # The root of each singular value on either side keeps both factors in the range of a
        # narrow type; where the value vanishes, the factor is left unscaled.
        root = np.sqrt(values[group])
        root[root <= 1e-6 * max(root[0], np.finfo(np.float64).tiny)] = 1.0
        if rows <= columns:
            left[group] = vectors * root
            for part, block in _chunks(matrix):
                right[group][:, part] = vectors.T @ block
            right[group] /= root[:, None]
        else:
            for part, block in _chunks(matrix):
                left[group][part] = block @ vectors
            left[group] /= root
            right[group] = vectors.T * root[:, None]
    return Factorization(left, values, right)


def _fix_signs(vectors: Float64) -> Float64:
    """Make the largest entry of each column positive, so that results are reproducible."""
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    signs[signs == 0] = 1.0
    return np.asarray(vectors * signs)
