"""The matricisation of the weight with which a recurrent layer reads its sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Use
from cobla_onnx.graph.operators.base import Shape, elements
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme

__all__ = ["RecurrentScheme"]


@dataclass(frozen=True)
class RecurrentScheme(ProductScheme):
    """The rows of all directions as one matrix: they read the same, and share the first factor.

    X W^T = (X V) U^T: a product before the node, which reads its outputs by U.

    Attributes
    ----------
    name, weight_input, transposed, data_left
        As those of `ProductScheme`.
    shape : tuple of int
        Shape of the weight, (directions, rows of all gates, inputs).
    """

    def matrix_shape(self) -> tuple[int, int, int]:
        """One matrix, its rows and columns."""
        return 1, math.prod(self.shape[:-1]), self.shape[-1]

    def fold(self, left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return V, of shape (inputs, rank), and U in the place of the weight."""
        return np.ascontiguousarray(right[0].T), left.reshape(*self.shape[:-1], -1)

    def unfold(
        self, first: NDArray[Any], second: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Turn both weights back into matrix factors."""
        return second.reshape(1, -1, second.shape[-1]), first.T[None]

    def macs_per_rank(self, use: Use, shapes: Mapping[str, Shape]) -> int | None:
        """MACs of both factors for each unit of rank, or None where shapes are unknown."""
        count = elements(shapes.get(use.data))
        if count is None:
            return None
        _, rows, columns = self.matrix_shape()
        return count // columns * (rows + columns)
