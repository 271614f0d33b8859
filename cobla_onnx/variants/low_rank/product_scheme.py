"""The matricisation of a matrix product's weight: the weight itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from cobla_onnx.graph.layers import Use
from cobla_onnx.graph.operators.base import Shape, elements

__all__ = ["ProductScheme"]


@dataclass(frozen=True)
class ProductScheme:
    """The matrix of a Gemm or MatMul, or a stack of them.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Shape of the weight, (..., rows, columns).
    weight_input : int
        1 where the weight is the right operand, 0 where it is the left one.
    transposed : bool
        Whether Gemm reads the stored weight transposed.
    data_left : bool
        Whether the data is the left operand of the first product. Gemm may transpose its
        data; then (A^T F) is computed as (F^T A)^T, and the second Gemm transposes it.
    """

    name: str
    shape: tuple[int, ...]
    weight_input: int
    transposed: bool
    data_left: bool

    def matrix_shape(self) -> tuple[int, int, int]:
        """Number of matrices, rows and columns as stored."""
        return math.prod(self.shape[:-2]), self.shape[-2], self.shape[-1]

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Reshape a weight into a stack of matrices."""
        return weight.reshape(self.matrix_shape())

    def weight(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Reshape a stack of matrices into the weight: the inverse of `matrix`."""
        return matrix.reshape(self.shape)

    offsets = 1

    @property
    def inputs_first(self) -> bool:
        """Whether rows of the matrix are the inputs, so that its left factor is applied first."""
        return (self.weight_input == 1) != self.transposed

    def rows_of(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Reshape a weight to one row for each output, shape (groups, outputs, size)."""
        stack = self.matrix(weight)
        return stack.swapaxes(1, 2) if self.inputs_first else stack

    def weight_of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Turn one row for each output back into a weight: the inverse of `rows_of`."""
        return self.weight(rows.swapaxes(1, 2) if self.inputs_first else rows)

    def split_moment(self, second: NDArray[Any]) -> NDArray[Any]:
        """Reshape the second moment to (groups, inputs, 1, inputs, 1)."""
        groups, size, _ = second.shape
        return second.reshape(groups, size, 1, size, 1)

    def fold(self, left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the factors in the order in which they are applied to the data."""
        batch = self.shape[:-2]
        left = left.reshape(*batch, *left.shape[1:])
        right = right.reshape(*batch, *right.shape[1:])
        first, second = (left, right) if self.inputs_first else (right, left)
        return (first if self.inputs_first == self.data_left else first.swapaxes(-1, -2)), second

    def unfold(
        self, first: NDArray[Any], second: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Turn the two weights back into matrix factors."""
        if self.inputs_first != self.data_left:
            first = first.swapaxes(-1, -2)
        left, right = (first, second) if self.inputs_first else (second, first)
        return left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:])

    def params_per_rank(self) -> int:
        """Weights of both factors for each unit of rank."""
        count, rows, columns = self.matrix_shape()
        return count * (rows + columns)

    def macs_per_rank(self, use: Use, shapes: Mapping[str, Shape]) -> int | None:
        """MACs of both factors for each unit of rank, or None where shapes are unknown."""
        count = elements(shapes.get(use.output) or None)
        if count is None:
            return None
        _, rows, columns = self.matrix_shape()
        outputs = columns if self.inputs_first else rows
        return count // outputs * (rows + columns)
