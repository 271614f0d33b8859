"""Replace the allocation's answer only by one that is better beyond the noise.

The losses of a few dozen held-back samples differ between plans by less than their noise, and
the best of several by such losses is chosen by luck. So the answer is the last round's, whose
model knows most, and gives way only to what all samples together say is better, each judged
under factors that were made without it. The held-back samples alone decide only who takes part,
since that costs no more than a pass over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from cobla_onnx.allocation import Allocation, Constraint, LayerCurves, WeightError, allocate
from cobla_onnx.allocation.paired import PairedGain, paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.graph.layers import read_weight
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.crossfit import CrossFit
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import Rival
from cobla_onnx.variants.low_rank.units import ValuesUnit, weight_values

__all__ = ["WEIGHTS_ALONE", "Rivals"]

WEIGHTS_ALONE = "weights alone"
# Standard errors on the held-back samples that a rival has to be better by to take part, and
# how many may.
PROMISING, PLACES = 0.5, 2
# Standard errors on all samples that it has to be better by to be taken, after Breiman et al.
# 1984, Classification and Regression Trees, section 3.4.3.
BETTER = 1.0
# Fewer samples than these in each half tell nothing.
LEAST = 8


class Settled(NamedTuple):
    """An answer, its rivals, and the losses on the held-back samples of all that were looked at.

    Those of the allocation's own answer come first.
    """

    allocation: Allocation
    rivals: tuple[Rival, ...]
    losses: tuple[float, ...]


@dataclass
class Rivals:
    """Compares answers to a budget.

    Parameters
    ----------
    finisher : Finisher
    """

    finisher: Finisher

    def __post_init__(self) -> None:
        self._crossfit = CrossFit(self.finisher)

    @property
    def _analysis(self) -> Analysis:
        return self.finisher.analysis

    def settle(self, own: Allocation, others: Iterable[tuple[str, Allocation]]) -> Settled:
        """Return the answer, and what came of the rivals that looked promising.

        Parameters
        ----------
        own : Allocation
        others : iterable of (str, Allocation)
            Where each comes from, and what it is.
        """
        before = self._held_back(own)
        known = {own.choices: float(before.mean())}
        promising = []
        for origin, other in others:
            if other.choices in known:
                continue
            losses = self._held_back(other)
            known[other.choices] = float(losses.mean())
            gain = paired_gain(before, losses).in_errors
            if gain > PROMISING:
                promising.append((gain, origin, other))
        promising.sort(key=lambda entry: -entry[0])
        answer, rivals = own, tuple[Rival, ...]()
        if promising and min(map(len, self._crossfit.halves)) >= LEAST:
            answer, rivals = self._on_all(own, [entry[1:] for entry in promising[:PLACES]])
        return Settled(answer, rivals, tuple(known.values()))

    def _on_all(
        self, own: Allocation, others: Sequence[tuple[str, Allocation]]
    ) -> tuple[Allocation, tuple[Rival, ...]]:
        before = self._crossfit.losses(self._plan(own))
        gains = [paired_gain(before, self._crossfit.losses(self._plan(o))) for _, o in others]
        best = max(range(len(others)), key=lambda k: gains[k].mean)
        taken = gains[best].in_errors > BETTER
        rivals = tuple(
            _rival(origin, gain, taken and k == best)
            for k, ((origin, _), gain) in enumerate(zip(others, gains, strict=True))
        )
        if not taken:
            return own, rivals
        gain, (origin, other) = gains[best], others[best]
        return other.noting(
            f"this is the answer to a near problem ({origin}): its loss is lower by "
            f"{gain.mean:.3g} (standard error {gain.standard_error:.2g}, {gain.samples} samples)"
        ), rivals

    def or_weights_alone(
        self, own: Allocation, constraints: Sequence[Constraint], refit: bool
    ) -> tuple[Allocation, Rival]:
        """Return what has the lower loss on the held-back samples: `own`, or no data at all.

        Parameters
        ----------
        own : Allocation
        constraints : sequence of Constraint
        refit : bool
            Whether factors that see data are refitted; those of the weights are not.
        """
        curves = self.weight_curves
        alone = allocate(curves, WeightError(curves), constraints, solver="milp")
        alone = replace(alone, factors="weights")
        without, before = self._held_back(alone), self._held_back(own)
        gain = paired_gain(before, without)
        if gain.mean > 0 and refit:
            weights = self.finisher.refitted_weights(self._plan(own))
            gain = paired_gain(self.finisher.judge.followed.losses(weights), without)
        taken = gain.mean > 0
        rival = _rival(WEIGHTS_ALONE, gain, taken)
        if not taken:
            return own, rival
        return alone.noting(
            "the data were used to compare and to verify alone: factors of the weights themselves "
            f"lose less on the {gain.samples} held-back samples; more samples would help"
        ), rival

    def _held_back(self, allocation: Allocation) -> Float64:
        return self.finisher.judge.followed.losses(self.finisher.weights(self._plan(allocation)))

    def _plan(self, allocation: Allocation) -> Plan:
        return self._analysis.plan(allocation.choices, allocation.factors)

    @cached_property
    def weight_curves(self) -> tuple[LayerCurves, ...]:
        """The curves of the analysis, with the singular values of the weights themselves."""
        finisher, analysis = self.finisher, self._analysis
        units = (
            ValuesUnit(
                schemes, finisher.pool.carry(read_weight(finisher.model, layer)), finisher.cache
            )
            for layer, schemes in zip(analysis.layers, analysis.schemes, strict=True)
        )
        found = []
        made = finisher.pool.map(weight_values, units)
        for layer, its in zip(analysis.curves, made, strict=True):
            curves = zip(layer.curves, its.values, strict=True)
            found.append(
                replace(
                    layer,
                    curves=tuple(
                        replace(curve, singular_values=values, errors=None)
                        for curve, values in curves
                    ),
                )
            )
            if finisher.cache is not None:
                finisher.cache.notes += its.notes
        return tuple(found)


def _rival(origin: str, gain: PairedGain, taken: bool) -> Rival:
    mean, error = (
        value if math.isfinite(value) else None for value in (gain.mean, gain.standard_error)
    )
    return Rival(origin, mean, error, gain.samples, taken)
