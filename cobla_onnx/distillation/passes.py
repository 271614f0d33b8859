"""How far to learn, and at which rate: what helps samples that nothing before has seen.

Each trainer here learns from a part of the samples, beginning with what the steps before
distillation made of that part alone, and is judged by the other part. So beginning and end are
compared fairly, and all parts together are as many samples as there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from cobla_onnx.allocation.paired import PairedGain, paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.distillation.record import Trial
from cobla_onnx.distillation.training import Cycles, State
from cobla_onnx.text import finite

__all__ = ["Choice", "Passes", "choose"]

Passes: TypeAlias = Literal["auto"] | int
"""A number of passes over the samples, or as many as help."""

# Relative rates (see `Adam`), and the place of the one that is tried first.
RATES, USUAL = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4), 3
# Least steps of the first cycle without a number of passes, and least passes; each cycle after it
# is twice as long.
FIRST_STEPS, FIRST_PASSES, MOST_CYCLES = 50, 2, 4
# Cycles that are sure to follow on the first part: at the rates on either side of the usual one.
SURE = 2
# Seconds that are too short to be told from none.
TICK = 1e-3
# Standard errors by which a cycle must gain for a longer one to be tried.
WORTHWHILE = 1.0


@dataclass(frozen=True)
class Choice:
    """A cycle that was tried on all parts.

    Attributes
    ----------
    passes : int
    rate : float
    states : tuple of State
        In which it ended, part by part.
    gain : PairedGain
        Over the beginnings, on all samples that judged.
    before, after : float
        Mean losses of these.
    """

    passes: int
    rate: float
    states: tuple[State, ...]
    gain: PairedGain
    before: float
    after: float

    @property
    def losses(self) -> Float64:
        """Of all samples that judged, at the end."""
        return np.concatenate([state.losses for state in self.states])


class _Trials:
    """Cycles on each part, none of which is made twice."""

    def __init__(
        self, stage: str, trainers: Sequence[Cycles], note: Callable[[Trial], None]
    ) -> None:
        self.stage, self.trainers, self._note = stage, trainers, note
        self._known: dict[tuple[int, int, float], State | None] = {}
        # Of a pass; not known, and not needed, where the time has no limit.
        self._seconds = 0.0

    def end(self, part: int, passes: int, rate: float) -> State | None:
        """Return where a cycle ends; None if it exploded or was not made to its end."""
        key = part, passes, rate
        if key not in self._known:
            trainer = self.trainers[part]
            found = trainer.cycle(passes, rate)
            if found is not None and not found.whole:
                found = None
            self._known[key] = found
            loss = None if found is None else finite(found.loss)
            self._note(Trial(self.stage, part + 1, passes, rate, loss))
        return self._known[key]

    def loss(self, part: int, passes: int, rate: float) -> float:
        """Mean loss where a cycle ends; infinite if there is no end."""
        found = self.end(part, passes, rate)
        return math.inf if found is None or math.isnan(found.loss) else found.loss

    def affordable(self, most: int) -> int:
        """Return passes of a cycle that can be made at all rates and on all parts in the time.

        Two passes, which are the fewest, are made to see how long they take.
        """
        before = self._left
        if math.isinf(before) or most <= FIRST_PASSES:
            return most
        self.end(0, FIRST_PASSES, RATES[USUAL])
        self._seconds = (before - self._left) / FIRST_PASSES
        cycles = SURE + len(self.trainers)
        return min(most, max(FIRST_PASSES, int(self._left / max(self._seconds, TICK) / cycles)))

    def have_time(self, passes: int) -> bool:
        """Whether there is time for such a cycle, and as many on the other parts."""
        return not self.are_over and self._left >= self._seconds * passes * len(self.trainers)

    @property
    def _left(self) -> float:
        return min(trainer.left for trainer in self.trainers)

    @property
    def are_over(self) -> bool:
        return any(trainer.is_over for trainer in self.trainers)

    def choice(self, passes: int, rate: float) -> Choice | None:
        """Make a cycle on all parts; None unless all come to a good end."""
        ends = list[State]()
        for part in range(len(self.trainers)):
            found = self.end(part, passes, rate)
            if found is None:
                return None
            ends.append(found)
        before = np.concatenate([trainer.first.losses for trainer in self.trainers])
        after = np.concatenate([state.losses for state in ends])
        gain = paired_gain(before, after)
        return Choice(passes, rate, tuple(ends), gain, float(before.mean()), float(after.mean()))


def choose(
    stage: str,
    trainers: Sequence[Cycles],
    passes: Passes,
    steps_of_pass: int,
    note: Callable[[Trial], None] = lambda trial: None,
) -> Choice | None:
    """Choose a rate by the first part, then the number of passes by all; None if nothing ended.

    Parameters
    ----------
    stage : str
        Which one it is, see `Stage`.
    trainers : sequence of Cycles
    passes : 'auto' or int
    steps_of_pass : int
        Of the training that is to follow, on the samples of all parts.
    note : callable
        Called with each trial.
    """
    trials = _Trials(stage, trainers, note)
    least = max(FIRST_PASSES, math.ceil(FIRST_STEPS / steps_of_pass))
    first = trials.affordable(least) if passes == "auto" else passes
    rate = _best_rate(trials, first)
    best = trials.choice(first, rate)
    if passes != "auto":
        return best
    for _ in range(1, MOST_CYCLES):
        if best is None or not trials.have_time(2 * best.passes):
            break
        longer = trials.choice(2 * best.passes, rate)
        if longer is None:
            break
        gain = paired_gain(best.losses, longer.losses)
        if gain.mean <= 0:
            break
        best = longer
        if gain.in_errors <= WORTHWHILE:
            break
    return best


def _best_rate(trials: _Trials, passes: int) -> float:
    """Walk from the usual rate down, or else up, as long as the loss of the first part falls."""
    best, least = USUAL, trials.loss(0, passes, RATES[USUAL])
    for step in (1, -1):
        place = best + step
        while 0 <= place < len(RATES) and trials.have_time(passes):
            loss = trials.loss(0, passes, RATES[place])
            # At rates that explode nothing is known yet.
            if not (loss < least or loss == math.inf == least):
                break
            best, least, place = place, loss, place + step
        if best != USUAL:
            break
    return RATES[best]
