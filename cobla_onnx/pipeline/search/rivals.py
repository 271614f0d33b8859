"""Replace the allocation's answer only by one that is better beyond the noise.

On a few dozen held-back samples, plans differ by less than the noise, so that choosing the best
of several by these losses is luck. The answer is therefore that of the last round, whose model
has the most measurements. It is replaced only by a rival that is better on all samples together,
each judged under factors that were made without it (cross-fitting). The held-back samples alone
decide only which rivals take part, since that costs just one pass over them. The most promising
one is compared first, and none after one that is taken. An answer that loses next to nothing has no
rivals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cobla_onnx.allocation import Allocation, Constraint, LayerCurves, WeightError, allocate
from cobla_onnx.allocation.paired import PairedGain, paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.crossfit import CrossFit
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import Rival
from cobla_onnx.text import finite

__all__ = ["WEIGHTS_ALONE", "Rivals"]

WEIGHTS_ALONE = "weights alone"
# Standard errors by which a rival must be better on the held-back samples to take part, and the
# most rivals that do.
PROMISING, PLACES = 0.5, 2
# Standard errors by which it must be better on all samples to be taken, after Breiman et al.
# 1984, Classification and Regression Trees, section 3.4.3.
BETTER = 1.0
# Loss that no comparison is worth: it is about that of weights in float16 (docs/benchmarks.md).
NEGLIGIBLE = 1e-6


class Settled(NamedTuple):
    """An answer, its rivals, and the losses on the held-back samples of all plans considered.

    The loss of the allocation's own answer comes first.
    """

    allocation: Allocation
    rivals: tuple[Rival, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Rivals:
    """Compares answers to a budget.

    Parameters
    ----------
    finisher : Finisher
    crossfit : CrossFit
        Judges a plan of the finisher on all samples.
    """

    finisher: Finisher
    crossfit: CrossFit

    @property
    def _analysis(self) -> Analysis:
        return self.finisher.analysis

    def settle(self, own: Allocation, others: Iterable[tuple[str, Allocation]]) -> Settled:
        """Return the answer, and the results of the rivals that looked promising.

        Parameters
        ----------
        own : Allocation
        others : iterable of (str, Allocation)
            The origin of each, and the allocation.
        """
        before = self._held_back(own)
        known = {own.choices: float(before.mean())}
        if before.mean() <= NEGLIGIBLE:
            return Settled(own, (), tuple(known.values()))
        promising = []
        for number, (origin, other) in enumerate(others):
            self.finisher.context.progress("other answers", number, number + 1)
            if other.choices in known:
                continue
            losses = self._held_back(other)
            known[other.choices] = float(losses.mean())
            gain = paired_gain(before, losses).in_errors
            if gain > PROMISING:
                promising.append((gain, origin, other))
        self.finisher.context.progress("other answers", len(known), len(known))
        promising.sort(key=lambda entry: -entry[0])
        answer, rivals = own, tuple[Rival, ...]()
        if promising and self.crossfit.is_possible:
            answer, rivals = self._on_all(own, [entry[1:] for entry in promising[:PLACES]])
        return Settled(answer, rivals, tuple(known.values()))

    def _on_all(
        self, own: Allocation, others: Sequence[tuple[str, Allocation]]
    ) -> tuple[Allocation, tuple[Rival, ...]]:
        """Return the first of the others that is better on all samples, or `own`."""
        rivals: list[Rival] = []
        answer, total = own, len(others)
        for number, (origin, other) in enumerate(others):
            self.finisher.context.progress("answers on all samples", number, total)
            gain = self.crossfit.gain(self._plan(own), self._plan(other))
            taken = gain.in_errors > BETTER
            rivals.append(_rival(origin, gain, taken))
            if taken:
                note = (
                    f"not the last round's answer but another ({origin}): its loss is lower by "
                    f"{gain.mean:.3g} (standard error {gain.standard_error:.2g}, "
                    f"{gain.samples} samples)"
                )
                answer = other.noting(note)
                break
        self.finisher.context.progress("answers on all samples", total, total)
        return answer, tuple(rivals)

    def or_weights_alone(
        self,
        own: Allocation,
        constraints: Sequence[Constraint],
        curves: Sequence[LayerCurves],
        refit: bool,
    ) -> tuple[Allocation, Rival]:
        """Return the better one on the held-back samples: `own`, or the plan without data.

        Parameters
        ----------
        own : Allocation
        constraints : sequence of Constraint
        curves : sequence of LayerCurves
            Of the weights themselves.
        refit : bool
            Whether factors made from data are refitted; those of the weights are not.
        """
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
        return self.finisher.held_back(self._plan(allocation))

    def _plan(self, allocation: Allocation) -> Plan:
        return self._analysis.plan(allocation.choices, allocation.factors)


def _rival(origin: str, gain: PairedGain, taken: bool) -> Rival:
    return Rival(origin, finite(gain.mean), finite(gain.standard_error), gain.samples, taken)
