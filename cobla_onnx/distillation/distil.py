"""Let replacements of layers learn from the original's outputs, and keep it where it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.lessons import Lessons, Split, Taught, taught_by
from cobla_onnx.distillation.parameters import Flat, Parameters
from cobla_onnx.distillation.passes import Choice, Passes, choose
from cobla_onnx.distillation.record import Distillation, Trial, finite
from cobla_onnx.distillation.training import Clock, Trainer
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
    the original's outputs. How many, at which rate and whether at all, is found on parts of the
    samples (cross-fitting): what learned from one part must gain on the other beyond the noise, in
    the loss that decisions follow, and the loss that is stated must not be higher. Then the
    replacements learn so from the whole calibration split.

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
            return Distilled(replacements, Distillation(False, reason=error.in_flags()))
        if not own.trainer.first.values.size:
            reasons = own.lessons.blocked.values()
            reason = next(iter(reasons), "no layer stores anything that can learn")
            return Distilled(replacements, Distillation(False, reason=reason))
        halves = [learner.of(part.replacements, "distil, trials", part.split) for part in parts()]
        if not halves:
            reason = "too few samples to judge what is learned; give more"
            return Distilled(replacements, Distillation(False, reason=reason))
        tried = list[Trial]()
        trainers = [each.trainer for each in halves]
        choice = choose(trainers, passes, own.trainer.steps_of_pass, tried.append)
        end, loses = None, False
        if choice is not None and choice.gain.in_errors > BETTER:
            loses = _loses(halves, choice)
            end = None if loses else _trained(own.trainer, choice)
    record = replace(
        _record_of([*trainers, own.trainer], choice),
        kept=end is not None,
        stated_loss_is_higher=loses,
        left_out=own.lessons.left_out,
        seconds=clock.elapsed,
        trials=tuple(tried),
    )
    return Distilled(replacements if end is None else own.parameters.replacements(end), record)


class _Learning(NamedTuple):
    """Replacements that learn: their numbers, the samples, and what makes the steps."""

    parameters: Parameters
    lessons: Lessons
    trainer: Trainer


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
        self, replacements: Sequence[Replacement], stage: str, split: Split | None = None
    ) -> _Learning:
        """Make what trains replacements; raise ModelError if there is no gradient graph."""
        parameters = Parameters(self.taught.model, replacements)
        lessons = Lessons(self.judge, self.taught, parameters, self.pool, split)
        trainer = Trainer(
            lessons,
            parameters.start(),
            parameters.sizes(),
            clock=self.clock,
            share=1.0 if split is None else FOR_TRIALS,
            seed=self.seed,
            each_pass=split is None,
            progress=lambda loss, done, total: self.progress(
                f"{stage}: held-back loss {loss:.4g}", done, total
            ),
        )
        return _Learning(parameters, lessons, trainer)


def _record_of(trainers: Sequence[Trainer], choice: Choice | None) -> Distillation:
    """Tell what was tried, and the training of the last trainer."""
    record = Distillation(
        kept=False,
        steps=sum(each.steps for each in trainers),
        undone=sum(each.undone for each in trainers),
        parameters=trainers[-1].first.values.size,
        checkpoints=tuple(trainers[-1].checkpoints),
    )
    if choice is None:
        return record
    return replace(
        record,
        passes=choice.passes,
        rate=choice.rate,
        loss_before=finite(choice.before),
        loss_after=finite(choice.after),
        standard_error=finite(choice.gain.standard_error),
        samples=choice.gain.samples,
    )


def _loses(halves: Sequence[_Learning], choice: Choice) -> bool:
    """Whether the stated loss got higher on the samples that judged.

    It differs from the one that gained where decisions follow a divergence at a temperature:
    samples that were learned by heart gain by that on others, too, and lose at temperature 1.
    """
    before, after = (
        np.concatenate(
            [each.lessons.stated(state.values) for each, state in zip(halves, ends, strict=True)]
        )
        for ends in ([each.trainer.first for each in halves], choice.states)
    )
    # Not "less": a loss that is no number is refused, too.
    return not paired_gain(before, after).in_errors >= 0


def _trained(trainer: Trainer, choice: Choice) -> Flat | None:
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
