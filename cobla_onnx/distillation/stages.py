"""Learn block by block, then as a whole: what trials found of each, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.distillation.block_training import BlockTrainer, Cuts
from cobla_onnx.distillation.lessons import Lessons
from cobla_onnx.distillation.parameters import Flat
from cobla_onnx.distillation.passes import Choice, Passes, choose
from cobla_onnx.distillation.record import BLOCKS, NETWORK, Stage, Trial
from cobla_onnx.distillation.training import Clock, Cycles, Trainer
from cobla_onnx.text import finite

__all__ = ["Learning", "Tried", "stated", "train", "try_out"]

# Standard errors by which what was tried must gain, after Breiman et al. 1984, Classification and
# Regression Trees, section 3.4.3.
BETTER = 1.0
# Standard errors by which the held-back samples may lose: they look worse than they are, since
# plan and refit were chosen by them. Beyond that the training went wrong.
WRONG = 3.0
# Part of the time after which there are no more trials; the training takes about as long as one of
# them on all parts.
FOR_TRIALS = {BLOCKS: 0.3, NETWORK: 0.5}
# Times that a training that exploded is begun again with half of its rate.
MOST_UNDONE = 4


@dataclass
class Learning:
    """Replacements that learn from some samples, by what they have learned so far.

    Attributes
    ----------
    lessons : Lessons
    cuts : Cuts
        Of the model, into blocks.
    values : float32 array, shape (parameters,)
    whole : bool
        Whether they learn from all samples, and not in trials.
    clock : Clock
    seed : int
    progress : callable
        Called with the loss of the samples that judge, and with what is done and planned.
    trainers : list of Cycles
        That were made so far.
    """

    lessons: Lessons
    cuts: Cuts
    values: Flat
    whole: bool
    clock: Clock
    seed: int
    progress: Callable[[float, int, int], None]
    trainers: list[Cycles] = field(default_factory=list)

    def trainer(self, stage: str) -> Cycles:
        """Make what trains them, from their values by now."""
        self.trainers.append(self._trainer(stage))
        return self.trainers[-1]

    def _trainer(self, stage: str) -> Cycles:
        options: dict[str, Any] = {
            "clock": self.clock,
            "share": 1.0 if self.whole else FOR_TRIALS[stage],
            "seed": self.seed,
            "each": self.whole,
            "progress": self.progress,
        }
        if stage == BLOCKS:
            return BlockTrainer(self.lessons, self.cuts, self.values, **options)
        return Trainer(self.lessons, self.values, self.lessons.parameters.sizes(), **options)


@dataclass(frozen=True)
class Tried:
    """What trials of a stage found.

    Attributes
    ----------
    name : str
    choice : Choice or None
    stated, before : float64 array, shape (samples that judge,)
        Stated losses where it led, and before any stage.
    """

    name: str
    choice: Choice | None
    stated: Float64
    before: Float64

    @property
    def gained(self) -> bool:
        """Whether the loss that decisions follow fell beyond the noise.

        What comes after it then begins where it led.
        """
        return self.choice is not None and self.choice.gain.in_errors > BETTER

    @property
    def is_allowed(self) -> bool:
        """Whether the stated loss is no higher than in the beginning.

        It differs from the one that gained where decisions follow a divergence at a temperature:
        samples that were learned by heart gain by that on others, too, and lose at temperature 1.
        """
        # Not "less": a loss that is no number is refused, too.
        return paired_gain(self.before, self.stated).in_errors >= 0


def try_out(
    name: str,
    halves: Sequence[Learning],
    passes: Passes,
    steps: int,
    before: Float64,
    note: Callable[[Trial], None],
) -> Tried:
    """Try one way of learning on the halves, which move to where it leads if it gains."""
    choice = choose(name, [half.trainer(name) for half in halves], passes, steps, note)
    found = Tried(name, choice, before, before)
    if choice is None or not found.gained:
        return found
    for half, state in zip(halves, choice.states, strict=True):
        half.values = state.values
    return replace(found, stated=stated(halves))


def stated(halves: Sequence[Learning]) -> Float64:
    """Return the stated losses of all samples that judge."""
    return np.concatenate([half.lessons.stated(half.values) for half in halves])


def train(own: Learning, tried: Sequence[Tried]) -> list[Stage]:
    """Learn as it gained in trials, as far as the stated loss allows.

    Blocks may raise it where the network as a whole, which learns after them, more than makes up
    for it.
    """
    most = max((n for n, each in enumerate(tried) if each.gained and each.is_allowed), default=-1)
    stages = [_stage_of(each) for each in tried]
    values, kept = own.values, 0
    for number, each in enumerate(tried[: most + 1]):
        if each.choice is None or not each.gained:
            continue
        end = _cycled(own.trainer(each.name), each.choice)
        if end is None:
            # What was to begin where it led cannot be, either.
            stages = [
                replace(stage, went_wrong=each.gained and number <= place <= most)
                for place, (stage, each) in enumerate(zip(stages, tried, strict=True))
            ]
            break
        own.values = end
        if each.is_allowed:
            values, kept = end, number + 1
    own.values = values
    return [
        replace(
            stage,
            kept=each.gained and number < kept,
            stated_loss_is_higher=each.gained and number >= kept and not each.is_allowed,
        )
        for number, (stage, each) in enumerate(zip(stages, tried, strict=True))
    ]


def _stage_of(tried: Tried) -> Stage:
    choice = tried.choice
    if choice is None:
        return Stage(tried.name, kept=False)
    return Stage(
        tried.name,
        kept=False,
        passes=choice.passes,
        rate=choice.rate,
        loss_before=finite(choice.before),
        loss_after=finite(choice.after),
        standard_error=finite(choice.gain.standard_error),
    )


def _cycled(trainer: Cycles, choice: Choice) -> Flat | None:
    """Train as it was chosen, with less of a rate if it explodes; None if it went wrong."""
    rate = choice.rate
    for _ in range(1 + MOST_UNDONE):
        state = trainer.cycle(choice.passes, rate)
        if state is not None:
            gain = paired_gain(trainer.first.losses, state.losses).in_errors
            # One that was cut short, where the rate is still high, was not what was tried.
            return state.values if gain > (-WRONG if state.whole else 0.0) else None
        rate /= 2
    return None
