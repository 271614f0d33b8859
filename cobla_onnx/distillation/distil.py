"""Let replacements of layers learn from the original's outputs, and keep it where it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.block_training import BlockTrainer, Cuts, cuts_of
from cobla_onnx.distillation.lessons import Lessons, Split, Taught, taught_by
from cobla_onnx.distillation.parameters import Flat, Parameters
from cobla_onnx.distillation.passes import Choice, Cycles, Passes, choose
from cobla_onnx.distillation.record import (
    BLOCKS,
    NETWORK,
    Checkpoint,
    Distillation,
    Stage,
    Trial,
    finite,
)
from cobla_onnx.distillation.training import Clock, Trainer, steps_of_pass
from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.pool import Pool, open_pool
from cobla_onnx.variants.replacement import Replacement

__all__ = ["Distilled", "Part", "distil"]

# Standard errors by which what was tried must gain, after Breiman et al. 1984, Classification and
# Regression Trees, section 3.4.3.
BETTER = 1.0
# Standard errors by which the held-back samples may lose: they look worse than they are, since
# plan and refit were chosen by them. Beyond that the training went wrong.
WRONG = 3.0
# Part of the time for trials; the training takes about as long as one of them on all parts.
FOR_TRIALS = 0.5
# Times that a training that exploded is begun again with half of its rate.
MOST_UNDONE = 4


class Part(NamedTuple):
    """Replacements of the same plan that were made from some samples, and others that judge."""

    split: Split
    replacements: Sequence[Replacement]


class Distilled(NamedTuple):
    """Replacements, those that were given if nothing was gained, and what was done."""

    replacements: Sequence[Replacement]
    record: Distillation


def distil(
    judge: Judge,
    replacements: Sequence[Replacement],
    passes: Passes,
    parts: Callable[[], Sequence[Part]],
    *,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    seconds: float | None = None,
    threads: int = 1,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Distilled:
    """Lower the loss on the calibration split, as far as that helps other samples.

    After Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network: what is
    stored for the layers, and their biases, take steps along the gradient of the divergence from
    the original's outputs. First each block of the model learns what the original's gives (see
    `BlockLessons`), then the model as a whole learns its outputs. How long, at which rate and
    whether at all, is found for each of the two on parts of the samples (cross-fitting): what
    learned from one part must gain on the other beyond the noise, in the loss that decisions
    follow, and the loss that is stated must not be higher. Then the replacements learn so from the
    whole calibration split.

    Parameters
    ----------
    judge : Judge
    replacements : sequence of Replacement
        Of layers of the judge.
    passes : 'auto' or int
        Over the calibration split; ``auto`` tries more of them as long as that helps.
    parts : callable
        Makes the parts; no sample judges twice. It is only called if something can learn.
    augmentation : Augmentation, optional
        How samples vary each time that they are learned from.
    seed : int
        Of the order of the samples, and of their variants.
    seconds : float, optional
        Time that it may take.
    threads : int
        Shards of samples that run at a time; the result does not depend on it.
    progress : callable
        Called with (stage, done, total).
    """
    clock = Clock(seconds)
    with open_pool(threads) as pool:
        progress("distil", 0, 1)
        learner = _Learner(judge, taught_by(judge, augmentation, seed), pool, seed, clock, progress)
        try:
            own = learner.of(replacements, "distil")
        except ModelError as error:
            return Distilled(replacements, Distillation(reason=error.in_flags()))
        if not own.values.size:
            reasons = own.lessons.blocked.values()
            reason = next(iter(reasons), "no layer stores anything that can learn")
            return Distilled(replacements, Distillation(reason=reason))
        halves = [learner.of(part.replacements, "distil, trials", part.split) for part in parts()]
        if not halves:
            reason = "too few samples to judge what is learned; give more"
            return Distilled(replacements, Distillation(reason=reason))
        stages = [BLOCKS, NETWORK] if len(own.cuts.blocks) > 1 else [NETWORK]
        trials, steps = list[Trial](), steps_of_pass(own.lessons.samples)
        before = _stated(halves)
        tried = [_tried(name, halves, passes, steps, before, trials.append) for name in stages]
        done = _trained(own, tried)
    record = replace(_record_of(own, halves, done), seconds=clock.elapsed, trials=tuple(trials))
    if not record.kept:
        return Distilled(replacements, record)
    return Distilled(own.lessons.parameters.replacements(own.values), record)


@dataclass
class _Learning:
    """Replacements that learn from some samples, by what they have learned so far.

    Attributes
    ----------
    lessons : Lessons
    cuts : Cuts
        Of the model, into blocks.
    values : float32 array, shape (parameters,)
    whole : bool
        Whether they learn from all samples, and not in trials.
    trainers : list of BlockTrainer and Trainer
        That were made so far.
    """

    lessons: Lessons
    cuts: Cuts
    values: Flat
    whole: bool
    clock: Clock
    seed: int
    progress: Callable[[float, int, int], None]
    trainers: list[BlockTrainer | Trainer] = field(default_factory=list)

    def trainer(self, stage: str) -> BlockTrainer | Trainer:
        """Make what trains them, from their values by now."""
        self.trainers.append(self._trainer(stage))
        return self.trainers[-1]

    def _trainer(self, stage: str) -> BlockTrainer | Trainer:
        share = 1.0 if self.whole else FOR_TRIALS
        if stage == BLOCKS:
            return BlockTrainer(
                self.lessons,
                self.cuts,
                self.values,
                clock=self.clock,
                share=share,
                seed=self.seed,
                each=self.whole,
                progress=self.progress,
            )
        return Trainer(
            self.lessons,
            self.values,
            self.lessons.parameters.sizes(),
            clock=self.clock,
            share=share,
            seed=self.seed,
            each_pass=self.whole,
            progress=self.progress,
        )


@dataclass(frozen=True)
class _Learner:
    """Lets replacements of one model learn, from all samples or a part of them."""

    judge: Judge
    taught: Taught
    pool: Pool
    seed: int
    clock: Clock
    progress: Callable[[str, int, int], None]

    def of(
        self, replacements: Sequence[Replacement], name: str, split: Split | None = None
    ) -> _Learning:
        """Make what trains replacements; raise ModelError if there is no gradient graph."""
        parameters = Parameters(self.taught.model, replacements)
        lessons = Lessons(self.judge, self.taught, parameters, self.pool, split)

        def told(loss: float, done: int, total: int) -> None:
            self.progress(f"{name}: held-back loss {loss:.4g}", done, total)

        values = parameters.start()
        cuts = cuts_of(lessons)
        return _Learning(lessons, cuts, values, split is None, self.clock, self.seed, told)


@dataclass(frozen=True)
class _Tried:
    """What trials of a stage found.

    Attributes
    ----------
    name : str
    choice : Choice or None
    stated : float64 array, shape (samples that judge,)
        Stated losses where it led; in the beginning, `before`.
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


def _tried(
    name: str,
    halves: Sequence[_Learning],
    passes: Passes,
    steps: int,
    before: Float64,
    note: Callable[[Trial], None],
) -> _Tried:
    """Try one way of learning on the halves, which move to where it leads if it gains."""
    choice = choose(name, [half.trainer(name) for half in halves], passes, steps, note)
    found = _Tried(name, choice, before, before)
    if choice is None or not found.gained:
        return found
    for half, state in zip(halves, choice.states, strict=True):
        half.values = state.values
    return replace(found, stated=_stated(halves))


def _stated(halves: Sequence[_Learning]) -> Float64:
    """Return the stated losses of all samples that judge."""
    return np.concatenate([half.lessons.stated(half.values) for half in halves])


def _trained(own: _Learning, tried: Sequence[_Tried]) -> list[Stage]:
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
            stages[number] = replace(stages[number], went_wrong=True)
            break
        own.values = end
        if each.is_allowed:
            values, kept = end, number + 1
    own.values = values
    return [
        replace(
            stage, kept=each.gained and number < kept, stated_loss_is_higher=not each.is_allowed
        )
        for number, (stage, each) in enumerate(zip(stages, tried, strict=True))
    ]


def _stage_of(tried: _Tried) -> Stage:
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


def _record_of(
    own: _Learning, halves: Sequence[_Learning], stages: Sequence[Stage]
) -> Distillation:
    """Tell what was done; the checkpoints of several stages are counted through."""
    checkpoints = list[Checkpoint]()
    for trainer in own.trainers:
        done = checkpoints[-1].number if checkpoints else 0
        new = trainer.checkpoints[1:] if checkpoints else trainer.checkpoints
        checkpoints += [replace(point, number=done + point.number) for point in new]
    trainers = [trainer for each in (own, *halves) for trainer in each.trainers]
    return Distillation(
        kept=any(stage.kept for stage in stages),
        stages=tuple(stages),
        blocks=len(own.cuts.blocks),
        steps=sum(each.steps for each in trainers),
        undone=sum(each.undone for each in trainers),
        parameters=own.values.size,
        samples=sum(len(half.trainers[0].first.losses) for half in halves),
        left_out=own.lessons.left_out,
        checkpoints=tuple(checkpoints),
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
