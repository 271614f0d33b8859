"""Error of two rounded factors at every rank, before any of them is rounded.

Truncation, the rounding of the first factor and that of the second add up as squares. Rounding
one factor loses its distortion (a number for each count of bits) times an energy that is known in
closed form for all ranks at once:

* of the first, sum over components k of ``squares[k] * strengths[k]`` times the energy of its
  inputs that no others make up for (`compensation.unavoidable`); the second factor, fitted again,
  makes up for what stays within the span of the first, which of n inputs at rank r is r / n of it;
* of the second, (sum over k of the root of ``strengths[k] * energies[k]``)^2 over the length of a
  row, since its components are scaled for the least loss (see `pair`).
"""

from __future__ import annotations

import numpy as np

from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.low_rank.weighted_svd import Components

__all__ = ["errors_in_bits", "rounding_energies"]


def rounding_energies(
    components: Components, unmade: Float64, inputs: int, offsets: int
) -> tuple[Float64, Float64]:
    """Energies that the distortions of both factors multiply, at ranks 0 to the largest.

    Parameters
    ----------
    components : Components
    unmade : float64 array, shape (groups,)
        Energy of the first factor's inputs that others do not make up for, summed over offsets.
    inputs : int
        Length of what the first factor reads.
    offsets : int
        Positions over which the second factor moves.

    Returns
    -------
    first, second : float64 arrays, shape (max_rank + 1,)
    """
    squares, strengths = components.squares, components.strengths
    ranks = np.arange(1, squares.shape[1] + 1)
    first = np.cumsum(squares * strengths * (unmade / offsets)[:, None], axis=1).sum(axis=0)
    first *= 1 - ranks / inputs
    roots = np.cumsum(np.sqrt(strengths * np.maximum(components.energies, 0.0)), axis=1)
    second = (np.square(roots) / (offsets * ranks)).sum(axis=0)
    return np.append(0.0, first), np.append(0.0, second)


def errors_in_bits(
    truncated: Float64, energies: tuple[Float64, Float64], distortions: tuple[float, float]
) -> Float64:
    """Squared relative error at ranks 0 to full rank, descending to 0.

    Parameters
    ----------
    truncated : float64 array, shape (full_rank + 1,)
        That of unrounded factors.
    energies : pair of float64 arrays
        From `rounding_energies`, relative to the energy of the output.
    distortions : pair of float
        Mean squared errors of rounding, relative to the mean squares.
    """
    full = len(truncated)
    errors = truncated.copy()
    for energy, distortion in zip(energies, distortions, strict=True):
        # Beyond the largest rank that was looked at, no rank is a candidate.
        errors += distortion * np.pad(energy, (0, full - len(energy)), mode="edge")
    errors[0], errors[-1] = 1.0, 0.0
    return np.asarray(np.minimum.accumulate(np.minimum(errors, 1.0)))
