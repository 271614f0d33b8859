"""Fit a layer again by least squares on the inputs that it gets after compression.

Layers before it are approximated too, so its inputs x' differ from the original's x. The
layer is fitted again to reproduce the original's output y from x' (Zhang, Zou, He and Sun
2015, asymmetric reconstruction, their eq. 6 to 9): first the unconstrained weight
M = argmin E||y - M x'||^2, drawn towards the original weight by a ridge, then what approximates
it best under the second moment of x'. For factors that is the truncated SVD weighted by this
moment, the reduced-rank solution. The bias absorbs the difference of the means.
"""

from __future__ import annotations

import numpy as np

from cobla_onnx.runtime.lapack import DPOSV, call
from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.svd import Factorization, Float64
from cobla_onnx.variants.low_rank.weighted_svd import balanced, inputs_first

__all__ = ["fitted_rows", "refit_second"]


def fitted_rows(rows: Float64, second: Float64, cross: Float64, ridge: float) -> Float64:
    """Fit a whole weight to the inputs after compression.

    Parameters
    ----------
    rows : float64 array, shape (groups, outputs, size)
        The original weight.
    second : float64 array, shape (groups, size, size)
        Second moment (or covariance) of the inputs after compression.
    cross : float64 array, shape (groups, outputs, size)
        Moment of the original outputs with these inputs.
    ridge : float
        Strength of the pull to the original weight, relative to the mean energy of an input.

    Returns
    -------
    float64 array, shape (groups, outputs, size)
    """
    each = zip(second, cross, rows, strict=True)
    return np.stack([_pulled(*moments, ridge) for moments in each])


def refit_second(
    scheme: Scheme, factors: Factorization, second: Float64, cross: Float64, ridge: float
) -> Factorization:
    """Refit the second factor alone, if it moves over a single position.

    Parameters
    ----------
    second : float64 array, shape (groups, rank, rank)
        Second moment of the first factor's outputs.
    cross : float64 array, shape (groups, outputs, rank)
        Moment of the original outputs with them.
    """
    first, last = inputs_first(scheme, factors)
    pairs = []
    for group, moment in enumerate(second):
        pairs.append((first[group], _pulled(moment, cross[group], last[group].T, ridge).T))
    return balanced(scheme, pairs)


def _pulled(moment: Float64, cross: Float64, rows: Float64, ridge: float) -> Float64:
    """Least squares of outputs on inputs, drawn towards `rows`; shape (outputs, size)."""
    size, energy = len(moment), float(np.trace(moment))
    # Inputs that are always zero carry no information, and leave the weight as it is.
    pull = ridge * energy / size if energy > 0 else 1.0
    right = np.ascontiguousarray(cross + pull * rows)
    try:
        call(DPOSV, b"L", size, len(right), _lifted(moment, pull), size, right, size)
    except np.linalg.LinAlgError:
        # Rounding, of a moment in single precision, goes beyond the ridge.
        return np.asarray(np.linalg.solve(_lifted(moment, pull), right.T).T)
    return right


def _lifted(moment: Float64, pull: float) -> Float64:
    """Add to the diagonal of a matrix, in a copy."""
    result = moment.copy()
    result[np.diag_indices_from(result)] += pull
    return result
