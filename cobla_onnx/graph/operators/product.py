"""Extract the vectors that the weight of a Gemm or MatMul is multiplied with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.graph.operators.convolution import cut

__all__ = ["ProductPatch"]


@dataclass(frozen=True)
class ProductPatch:
    """How a Gemm or MatMul reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor.
    columns : bool
        Whether the vectors are its columns, not its rows (the weight is the left operand, or
        Gemm transposes its data).
    batch : tuple of int
        Leading axes of the weight; each matrix of the stack has its own moment.
    size : int
        Entries of a vector.
    output_columns : bool
        Whether each output vector is a column of the output.
    """

    data: str
    columns: bool
    batch: tuple[int, ...]
    size: int
    output_columns: bool

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return math.prod(self.batch)

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        return int(self._inputs(data).shape[2])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (groups, size, positions).

        The parameters are those of `ConvPatch.vectors`.
        """
        stack = self._inputs(data)
        count = stack.shape[2] if chosen is None else len(chosen)
        for part in cut(count, self.groups * self.size, each):
            yield stack[:, :, part if chosen is None else chosen[part]]

    def outputs(self, output: NDArray[Any]) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (groups, outputs, positions)."""
        columns = self.output_columns and output.ndim > 1
        return self._stack(output if output.ndim > 1 else output[None], columns)

    def _inputs(self, data: NDArray[Any]) -> NDArray[Any]:
        return self._stack(data if data.ndim > 1 else data[None], self.columns and data.ndim > 1)

    def _stack(self, array: NDArray[Any], columns: bool) -> NDArray[Any]:
        """Group the vectors of an array by the matrix of the weight that multiplies them."""
        if not columns:
            array = array.swapaxes(-1, -2)
        shape = np.broadcast_shapes(array.shape[:-2], self.batch)
        array = np.broadcast_to(array, (*shape, *array.shape[-2:]))
        lead = len(shape) - len(self.batch)
        # Along an axis of length 1 of the weight, all data is multiplied with the same matrix.
        apart = [lead + axis for axis, length in enumerate(self.batch) if length != 1]
        together = [axis for axis in range(len(shape)) if axis not in apart]
        order = (*apart, array.ndim - 2, *together, array.ndim - 1)
        return array.transpose(order).reshape(self.groups, array.shape[-2], -1)
