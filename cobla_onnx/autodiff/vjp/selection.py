"""The adjoint of indexing along an axis, shared by Slice, Pad, Gather and Resize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.autodiff.emitter import Emitter

__all__ = ["adjoint_of_matrix", "adjoint_of_take"]


def adjoint_of_take(
    g: Emitter, dy: str, shape: Sequence[int], axis: int, indices: NDArray[Any], size: int
) -> str:
    """Write the gradient of y = take(x, indices, axis): what was read twice is added.

    Parameters
    ----------
    dy : str
        Gradient with respect to y, of `shape`.
    indices : array of int, shape (shape[axis],)
        In 0, ..., size - 1.
    size : int
        Length of x along `axis`.
    """
    count = len(indices)
    first = int(indices[0]) if count else 0
    if np.array_equal(indices, np.arange(first, first + count)):
        begins, ends = [0] * len(shape), [0] * len(shape)
        begins[axis], ends[axis] = first, size - first - count
        return g.frame(dy, shape, begins, ends)
    copies, rest = divmod(count, size)
    if not rest and np.array_equal(indices, np.repeat(np.arange(size), copies)):
        split = g.reshape(dy, [*shape[:axis], size, copies, *shape[axis + 1 :]])
        return g.sum(split, [axis + 1])
    # Row i of the table: where x[i] went; what is left of it points at a zero.
    times = np.bincount(indices, minlength=size)
    table = np.full((size, int(times.max())), count, dtype=np.int64)
    order = np.argsort(indices, kind="stable")
    place = np.arange(count) - np.repeat(np.cumsum(times) - times, times)
    table[indices[order], place] = order
    ends = [int(a == axis) for a in range(len(shape))]
    padded = g.frame(dy, shape, [0] * len(shape), ends)
    if table.shape[1] == 1:
        return g.op("Gather", padded, g.constant(table[:, 0]), axis=axis)
    return g.sum(g.op("Gather", padded, g.constant(table), axis=axis), [axis + 1])


def adjoint_of_matrix(
    g: Emitter, dy: str, shape: Sequence[int], axis: int, matrix: NDArray[Any]
) -> str:
    """Write the gradient of y = x M along an axis: dx = dy M^T.

    Parameters
    ----------
    dy : str
        Gradient with respect to y, of `shape`.
    matrix : array, shape (size of x, shape[axis])
    """
    if bool(np.all((matrix == 0) | (matrix == 1)) and np.all(matrix.sum(axis=0) == 1)):
        return adjoint_of_take(g, dy, shape, axis, matrix.argmax(axis=0), matrix.shape[0])
    matrix = matrix.astype(g.dtype)
    rank = len(shape)
    if axis == rank - 1:
        return g.matmul(dy, g.constant(matrix.T))
    if axis == rank - 2:
        return g.matmul(g.constant(matrix), dy)
    before = [*range(axis), *range(axis + 1, rank), axis]
    moved = g.matmul(g.transpose(dy, before), g.constant(matrix.T))
    return g.transpose(moved, [int(a) for a in np.argsort(before)])
