"""Limits of what stands for the time, so that a measured time should meet its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from cobla_onnx.allocation import Constraint
from cobla_onnx.pipeline.search.ways import Found

__all__ = ["Aims"]

# A plan is close enough if it uses at least this fraction of the limit.
CLOSE = 0.98
# Fraction of the limit that is aimed at, since the next measurement differs by the noise.
AIM = 0.995
# The next plan keeps this fraction of the distance between its two neighbours from either.
INSIDE = 0.1
# Bounds on the ratio of actual to predicted saving.
LEAST_SCALE, MOST_SCALE = 0.2, 3.0


@dataclass(frozen=True)
class Aims:
    """Limits of what stands for the time, so that the measured time should meet its own.

    Attributes
    ----------
    proxy : Constraint
    limit : float
        Fraction of the original's time.
    alone : float
        That of the model without any ranks: in 8 bits, it is not 1.
    """

    proxy: Constraint
    limit: float
    alone: float

    def predicted(self, cost: int) -> float:
        """Fraction of the original's time that a cost stands for."""
        return self.alone * cost / self.proxy.total if self.proxy.total else self.alone

    def _of(self, predicted: float) -> Constraint:
        share = predicted / self.alone
        within = min(math.floor(share * self.proxy.total), self.proxy.limit)
        return replace(self.proxy, limit=within)

    def first(self) -> Constraint:
        """Trust what stands for the time."""
        return self._saving(1.0)

    def _saving(self, scale: float) -> Constraint:
        """Assume that `scale` of the predicted saving is realised."""
        allowed = AIM * self.limit if self.limit < self.alone else self.limit
        return self._of(self.alone - (self.alone - allowed) / scale)

    def next(self, tried: Sequence[Found]) -> Constraint:
        """Correct by what was measured.

        While no plan is fast enough, from the saving of the last one; then from the monotone curve
        through all plans and the model without any, well between the dearest plan that is fast
        enough and the next dearer one that is not. A plan that is both cheaper and slower than
        another, as grids and kernels would have it, does not lower the curve. Where a plan is close
        to the limit already, the middle between the two, which the curve knows least of.
        """
        if not any(found.measured.ratio <= self.limit for found in tried):
            return self._saving(self._scale(tried[-1]))
        promised = {found.measured.ratio: found.predicted for found in tried}
        promised[self.alone] = self.alone
        ratios = sorted(promised)
        low = max(promised[ratio] for ratio in ratios if ratio <= self.limit)
        dearer = [promised[ratio] for ratio in ratios if ratio > self.limit]
        high = min((cost for cost in dearer if cost > low), default=self.alone)
        least, most = sorted((low + INSIDE * (high - low), high - INSIDE * (high - low)))
        if len(ratios) < 2:
            return self._of(least)
        if any(self.is_close(ratio) for ratio in ratios):
            return self._of((low + high) / 2)
        costs = np.maximum.accumulate([promised[ratio] for ratio in ratios])
        curve = scipy.interpolate.PchipInterpolator(ratios, costs)
        return self._of(min(max(float(curve(AIM * self.limit)), least), most))

    def is_close(self, ratio: float) -> bool:
        """Whether a measured time is within the limit, and uses nearly all of it."""
        return CLOSE * self.limit <= ratio <= self.limit

    def _scale(self, found: Found) -> float:
        """Return the ratio of actual to predicted saving."""
        promised, saved = self.alone - found.predicted, self.alone - found.measured.ratio
        if promised <= 0:
            return 1.0
        return min(max(saved / promised, LEAST_SCALE), MOST_SCALE)
