"""Input of the allocation: cost and loss of every layer at every candidate rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "Curve", "Float64", "LayerCurves"]

Float64: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One layer under one scheme: its singular values and what a unit of rank costs.

    Attributes
    ----------
    scheme : str
        Name of the scheme (``matrix``, ``channel``, ``input``, ``spatial-hw``, ...).
    singular_values : float64 array, shape (full_rank,)
        Descending. For grouped layers, entry j is the root of the sum over the groups
        of the squared j-th singular value, since ranks are equal over groups.
    ranks : int64 array, shape (candidates,)
        Candidate ranks, ascending, each at least 1. At each of them the layer is smaller than
        the whole one.
    bytes_per_rank, macs_per_rank : int
        Cost of one unit of rank; a choice of rank r costs r times that.
        ``macs_per_rank`` is None when the MACs of the model are not known.
    errors : float64 array, shape (full_rank + 1,), optional
        Squared relative error at each rank, where it does not follow from the singular values.
    times : int64 array, shape (candidates,), optional
        Nanoseconds that the two factors take at each of `ranks`, non-decreasing.
    """

    scheme: str
    singular_values: Float64
    ranks: NDArray[np.int64]
    bytes_per_rank: int
    macs_per_rank: int | None
    errors: Float64 | None = None
    times: NDArray[np.int64] | None = None

    def relative_errors(self) -> Float64:
        """Squared relative error at ranks 0 to full rank, descending to 0."""
        if self.errors is not None:
            return self.errors
        energy = np.square(self.singular_values)
        total = float(energy.sum())
        tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
        return tail / total if total > 0 else tail


@dataclass(frozen=True)
class LayerCurves:
    """The options of a layer: keep it whole, or choose a point on one of its curves.

    Attributes
    ----------
    name : str
        Name of the layer, for messages.
    bytes_whole, macs_whole : int
        Cost of the layer kept whole; ``macs_whole`` is None when not known.
    time_whole : int or None
        Nanoseconds that the layer takes when kept whole, where that was measured.
    curves : tuple of Curve
        One per scheme that has at least one candidate rank; never empty.
    """

    name: str
    bytes_whole: int
    macs_whole: int | None
    curves: tuple[Curve, ...]
    time_whole: int | None = None


@dataclass(frozen=True)
class Choice:
    """A point on a curve: the index of the layer's curve, and a rank.

    The choice to keep a layer whole is written as None.
    """

    curve: int
    rank: int
