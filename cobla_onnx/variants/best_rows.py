"""The rows of a table that count most, which are stored better than the others.

Of an embedding's rows few are read most of the time. Their number follows from the shape alone, so
that costs are known before any row is: one of 32, which in 8 bits costs a quarter of a bit for
each weight of the table. They lie beside the table, and a number for each row says where.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_count", "best_of", "place_type", "places"]

# Rows of which one is stored better, and the least width: the places must cost little beside rows.
RARE, WIDE = 32, 64


def best_count(shape: tuple[int, ...]) -> int:
    """Number of a table's rows that are stored better."""
    rows, width = shape
    return rows // RARE if width >= WIDE else 0


def best_of(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Rows of the largest weights, ascending; of equal ones the first."""
    return np.sort(np.argsort(-weights, kind="stable")[:count])


def place_type(count: int) -> np.dtype[Any]:
    """Smallest type that holds the places of so many rows."""
    return np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if count <= np.iinfo(t).max))


def places(best: NDArray[np.int64], rows: int) -> NDArray[Any]:
    """Places of all rows of a table: from 1 on of those that are stored better, 0 of the others."""
    found = np.zeros(rows, place_type(len(best)))
    found[best] = np.arange(1, len(best) + 1)
    return found
