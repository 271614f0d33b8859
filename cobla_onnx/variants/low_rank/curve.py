"""The curve of a matricisation: costs proportional to the rank, errors from singular values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation import VariantCurve
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.allocation.resources import known_costs

__all__ = ["LOW_RANK", "rank_curve", "relative_errors", "tails"]

# Name of the family.
LOW_RANK = "low-rank"


def rank_curve(
    scheme: str,
    singular_values: Float64,
    ranks: NDArray[np.int64],
    bytes_per_rank: int,
    macs_per_rank: int | None,
    errors: Float64 | None = None,
) -> VariantCurve:
    """Return the curve of a layer under one scheme.

    Parameters
    ----------
    scheme : str
        Name of the scheme (``matrix``, ``channel``, ``input``, ``spatial-hw``, ...).
    singular_values : float64 array, shape (full_rank,)
        Descending.
    ranks : int64 array, shape (candidates,)
        Ascending.
    bytes_per_rank, macs_per_rank : int
        ``macs_per_rank`` is None when the MACs of the model are not known.
    errors : float64 array, shape (full_rank + 1,), optional
        Squared relative error at each rank, where it does not follow from the singular values.
    """
    per_level = known_costs(mem=bytes_per_rank, mac=macs_per_rank)
    return VariantCurve(
        LOW_RANK,
        scheme,
        ranks,
        {name: ranks * cost for name, cost in per_level.items()},
        relative_errors(singular_values) if errors is None else errors,
        per_level,
        spectrum=singular_values,
    )


def relative_errors(singular_values: Float64) -> Float64:
    """Squared relative error of truncation at ranks 0 to full rank, descending to 0.

    Parameters
    ----------
    singular_values : float64 array, shape (full_rank,)
    """
    lost = tails(singular_values)
    return lost / lost[0] if lost[0] > 0 else lost


def tails(singular_values: Float64) -> Float64:
    """Sum of the squares beyond each rank, from rank 0 to full rank."""
    return np.append(np.cumsum(np.square(singular_values)[::-1])[::-1], 0.0)
