"""Test whether one answer is better than another beyond the noise of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cobla_onnx.allocation.problem import Float64

__all__ = ["PairedGain", "paired_gain"]


@dataclass(frozen=True)
class PairedGain:
    """Mean gain of one answer over another, on the same samples.

    Attributes
    ----------
    mean : float
        Mean loss before less mean loss after; positive where the second answer is better.
    standard_error : float
    samples : int
    """

    mean: float
    standard_error: float
    samples: int

    @property
    def in_errors(self) -> float:
        """The mean over its standard error: the statistic of the paired t-test."""
        if self.mean == 0.0:
            return 0.0
        return self.mean / max(self.standard_error, float(np.finfo(np.float64).tiny))


def paired_gain(before: Float64, after: Float64) -> PairedGain:
    """Compare losses of the same samples, each float64 of shape (samples,).

    Losses that are not finite are worse than any finite ones, and equal to each other. With one
    sample the standard error is unknown, and taken as infinite.
    """
    count = len(before)
    finite = bool(np.isfinite(before).all()), bool(np.isfinite(after).all())
    if not all(finite):
        worse, better = (np.inf if ok else 0.0 for ok in finite)
        return PairedGain(0.0 if finite[0] == finite[1] else better - worse, 0.0, count)
    gain = before - after
    error = float(gain.std(ddof=1) / np.sqrt(count)) if count > 1 else np.inf
    return PairedGain(float(gain.mean()), error, count)
