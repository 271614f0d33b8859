"""Second factor of a layer by least squares, for a first factor that is given.

The first factor's outputs at all positions over which the second one moves are its inputs; their
second moment, and that with the layer's outputs, follow from the moment of the layer's inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.shrinkage import without_zeros
from cobla_onnx.variants.low_rank.svd import Float64

__all__ = [
    "by_output",
    "cholesky",
    "conditional_energies",
    "explained_energy",
    "inputs_first_matrix",
    "solve",
    "split_moments",
    "through",
]


def inputs_first_matrix(scheme: Scheme, weight: NDArray[Any]) -> Float64:
    """Unfold a weight so that its rows are what the first factor reads.

    Returns
    -------
    float64 array, shape (groups, rows, columns)
    """
    stack = scheme.matrix(weight).astype(np.float64)
    return stack if scheme.inputs_first else stack.swapaxes(1, 2)


def split_moments(scheme: Scheme, stack: Float64, second: Float64) -> tuple[Float64, Float64]:
    """Moment of a layer's inputs by the axes of both factors, and that with its outputs.

    Parameters
    ----------
    stack : float64 array, shape (groups, rows, columns)
        From `inputs_first_matrix`.
    second : float64 array, shape (groups, size, size)
        A moment of zeros stands for the identity.

    Returns
    -------
    split : float64 array, shape (groups, rows, offsets, rows, offsets)
    cross : float64 array, shape (groups, rows * offsets, outputs)
    """
    split = scheme.split_moment(without_zeros(second))
    flat = by_output(scheme, stack)
    return split, np.matmul(split.reshape(*flat.shape[:2], -1), flat)


def by_output(scheme: Scheme, stack: NDArray[Any]) -> NDArray[Any]:
    """Arrange inputs-first matrices like the moment that `Scheme.split_moment` gives.

    Parameters
    ----------
    stack : array, shape (groups, rows, columns)

    Returns
    -------
    array, shape (groups, rows * offsets, outputs)
    """
    groups, rows, columns = stack.shape
    outputs = columns // scheme.offsets
    return stack.reshape(groups, rows, outputs, -1).swapaxes(2, 3).reshape(groups, -1, outputs)


def through(moment: Float64, cross: Float64, left: Float64) -> tuple[Float64, Float64]:
    """Second moment of the first factor's outputs, and their product with the layer's outputs.

    Parameters
    ----------
    moment : float64 array, shape (rows, offsets, rows, offsets)
    cross : float64 array, shape (rows * offsets, outputs)
        Moment of the layer's inputs with its outputs.
    left : float64 array, shape (rows, rank)
        The first factor.

    Returns
    -------
    products : float64 array, shape (rank, offsets, rank, offsets)
    cross : float64 array, shape (rank, offsets, outputs)
    """
    rows, offsets = moment.shape[:2]
    rank = left.shape[1]
    half = (left.T @ moment.reshape(rows, -1)).reshape(rank, offsets, rows, offsets)
    products = np.einsum("rjbk,bs->rjsk", half, left, optimize=True)
    return products, (left.T @ cross.reshape(rows, -1)).reshape(rank, offsets, -1)


def solve(products: Float64, cross: Float64) -> Float64:
    """Least squares of outputs (rank, offsets, outputs) on reduced inputs."""
    rank, offsets, outputs = cross.shape
    size = rank * offsets
    right = cross.reshape(size, outputs)
    factor, scale = cholesky(products.reshape(size, size))
    solution = scipy.linalg.cho_solve(factor, right / scale[:, None]) / scale[:, None]
    return np.asarray(solution).reshape(rank, offsets, outputs)


def explained_energy(products: Float64, cross: Float64) -> Float64:
    """Energy that the least squares of `solve` explains at each rank, starting with 1.

    With G = L L^T the energy is the sum of squares of L^-1 cross; the systems of lower
    ranks are leading blocks of that of the highest, and so are their factors.
    """
    rank, offsets, outputs = cross.shape
    size = rank * offsets
    if not size:
        return np.zeros(0)
    (lower, _), scale = cholesky(products.reshape(size, size))
    reached = scipy.linalg.solve_triangular(
        lower, cross.reshape(size, outputs) / scale[:, None], lower=True, overwrite_b=True
    )
    each = np.einsum("so,so->s", reached, reached).reshape(rank, offsets).sum(axis=1)
    return np.asarray(np.cumsum(each))


def conditional_energies(products: Float64) -> Float64:
    """Energy of each component that the ones before it do not tell, summed over offsets.

    Parameters
    ----------
    products : float64 array, shape (rank, offsets, rank, offsets)

    Returns
    -------
    float64 array, shape (rank,)
    """
    rank, offsets = products.shape[:2]
    (lower, _), scale = cholesky(products.reshape(rank * offsets, -1))
    return np.asarray(np.square(np.diagonal(lower) * scale).reshape(rank, offsets).sum(axis=1))


def cholesky(gram: Float64) -> tuple[tuple[Float64, bool], Float64]:
    """Factorise a positive definite matrix, scaled to a unit diagonal.

    Returns the lower factor in the form that scipy's `cho_solve` takes, and the roots of the
    diagonal.
    """
    scale = np.sqrt(np.maximum(np.diagonal(gram), np.finfo(np.float64).tiny))
    # numpy's, unlike scipy's, lets other Python threads run meanwhile.
    return (np.linalg.cholesky(gram / np.outer(scale, scale)), True), scale
