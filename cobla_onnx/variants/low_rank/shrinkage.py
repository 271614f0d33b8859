"""Shrink a second moment of few samples towards the one that is assumed without data.

The moment of a few samples contains nothing about the directions that the samples do not cover,
and overstates those that they cover by chance. S' = (1 - l) S + l (tr S / n) I follows the
samples as far as they are informative, and otherwise the weight alone, since with the identity
the weighted SVD is the plain one. Ledoit and Wolf (2004, "A well-conditioned estimator for
large-dimensional covariance matrices", eq. 14) give the l with the least expected distance
to the true moment: the variance of S over its squared distance from the prior. With many
samples it vanishes.

The floor of l prevents directions that no sample covers from being scaled up: float32
activations leave about 1e-7 of the largest entry in them, squared far below the floor, which
is in turn far below any error that a rank is chosen for.
"""

from __future__ import annotations

import numpy as np

from cobla_onnx.variants.low_rank.svd import Float64

__all__ = ["FLOOR", "shrink", "shrink_joint", "shrink_outputs", "shrinkage", "without_zeros"]

# Least weight of the prior. Solves lose about 1e-16 over it; null directions hold 1e-14.
FLOOR = 1e-6


def shrinkage(second: Float64, distance: Float64, effective: Float64, mean: Float64) -> Float64:
    """Return the weight of the prior, l, for each group.

    Parameters
    ----------
    second : float64 array, shape (groups, size, size)
    distance : float64 array, shape (groups,)
        Squared distance of the prior, which has the same trace.
    effective : float64 array, shape (groups,)
        Effective number of independent vectors; where it is 0, the weight is 1.
    mean : float64 array, shape (groups, size)
        Mean of the vectors; 0 for a covariance.

    Returns
    -------
    float64 array, shape (groups,)
        Between `FLOOR` and 1.
    """
    traces, norms = np.einsum("gii->g", second), np.einsum("gij,gij->g", second, second)
    normal = traces**2 + norms - 2 * np.einsum("gi,gi->g", mean, mean) ** 2
    shares, certain = np.ones_like(traces), effective * distance
    np.divide(normal, certain, out=shares, where=certain > 0)
    return np.asarray(np.clip(shares, FLOOR, 1.0))


def shrink(
    second: Float64, effective: Float64, mean: Float64, out: Float64 | None = None
) -> tuple[Float64, Float64]:
    """Shrink moments of inputs towards the identity.

    Parameters
    ----------
    second, effective, mean
        As for `shrinkage`.
    out : float64 array, optional
        Where the result is put, which may be `second` itself.

    Returns
    -------
    drawn : float64 array, shape (groups, size, size)
        Positive definite; a moment of zeros stays as it is.
    shares : float64 array, shape (groups,)
        Weights of the prior.
    """
    size = second.shape[1]
    level = np.einsum("gii->g", second) / size
    # Of the prior, level times the identity, which is never made: as large as the moment.
    norms = np.einsum("gij,gij->g", second, second)
    distance = np.maximum(norms - size * level**2, 0.0)
    shares = shrinkage(second, distance, effective, mean)
    drawn = np.multiply((1 - shares)[:, None, None], second, out=out)
    diagonal = np.einsum("gii->gi", drawn)
    diagonal += (shares * level)[:, None]
    return drawn, shares


def shrink_joint(
    second: Float64, cross: Float64, rows: Float64, effective: Float64, mean: Float64
) -> tuple[Float64, Float64]:
    """Shrink moments of inputs, and of inputs with outputs, towards those without data.

    Parameters
    ----------
    second, effective, mean
        As for `shrink`.
    cross : float64 array, shape (groups, outputs, size)
        Moment of the outputs with the inputs.
    rows : float64 array, shape (groups, outputs, size)
        The weight.

    Returns
    -------
    second, cross : float64 arrays
    """
    drawn, shares = shrink(second, effective, mean)
    level = shares * np.einsum("gii->g", second) / second.shape[1]
    kept = (1 - shares)[:, None, None]
    return drawn, kept * cross + level[:, None, None] * rows


def shrink_outputs(
    outputs: Float64, rows: Float64, effective: Float64, mean: Float64
) -> tuple[Float64, Float64]:
    """Shrink moments of outputs towards those that isotropic inputs would give.

    Parameters
    ----------
    outputs : float64 array, shape (groups, outputs, outputs)
    rows : array, shape (groups, outputs, size)
        The weight.
    effective, mean
        As for `shrinkage`.
    """
    wide = rows.astype(np.float64)
    prior = wide @ wide.swapaxes(1, 2)
    traces = np.einsum("gii->g", prior)
    energies = np.einsum("gii->g", outputs)
    # Outputs that are all zero carry no information: the weight itself is approximated.
    seen = (energies > 0) & (traces > 0)
    level = np.divide(energies, traces, out=np.ones_like(traces), where=seen)
    prior *= level[:, None, None]
    apart = outputs - prior
    shares = shrinkage(outputs, np.einsum("gij,gij->g", apart, apart), effective, mean)
    kept = (1 - shares)[:, None, None]
    return kept * outputs + (1 - kept) * prior, shares


def without_zeros(second: Float64) -> Float64:
    """Replace moments of zeros, which carry no information, by the identity."""
    silent = np.einsum("gii->g", second) <= 0
    if not silent.any():
        return second
    return np.where(silent[:, None, None], np.eye(second.shape[1]), second)
