"""The matricisation of a lookup's table: rows of rank r, then a product with a small matrix.

A row of a table T = A B is the row of A, of rank r, times B. That costs MACs, where the lookup of
whole rows costs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.graph.operators.base import Shape, elements
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.variants.low_rank.matricisation import SCHEMES, ProductScheme, Scheme
from cobla_onnx.variants.low_rank.svd import CHUNK, Float64

__all__ = ["LookupScheme", "table_moment"]


@dataclass(frozen=True)
class LookupScheme(ProductScheme):
    """A table, as the matrix on the right of one-hot vectors."""

    def macs_per_rank(self, use: Use, shapes: Mapping[str, Shape]) -> int | None:
        """MACs for each unit of rank, all of the second factor; None where shapes are unknown."""
        return elements(shapes.get(use.output))


def _lookup(layer: Layer, wanted: str) -> tuple[Scheme, ...]:
    return (LookupScheme("matrix", layer.shape, 1, transposed=False, data_left=True),)


SCHEMES[Lookup.kind] = _lookup


def table_moment(table: NDArray[Any], frequencies: Float64) -> Float64:
    """Second moment of the rows that a lookup gives, shape (1, width, width).

    Parameters
    ----------
    table : array, shape (rows, width)
    frequencies : float64 array, shape (rows,)
        How often each row is read.
    """
    width = table.shape[1]
    total: Float64 = np.zeros((width, width))
    step = max(1, CHUNK // width)
    for begin in range(0, len(table), step):
        part = slice(begin, begin + step)
        rows = table[part].astype(np.float64)
        total += (rows * frequencies[part, None]).T @ rows
    return ((total + total.T) / 2)[None]
