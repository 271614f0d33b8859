"""Let replacements of layers learn from the original's outputs, and keep it where it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.block_training import cuts_of
from cobla_onnx.distillation.lessons import Lessons, Split, Taught, taught_by
from cobla_onnx.distillation.parameters import Parameters
from cobla_onnx.distillation.passes import Passes
from cobla_onnx.distillation.record import (
    BLOCKS,
    NETWORK,
    Checkpoint,
    Distillation,
    Stage,
    Trial,
)
from cobla_onnx.distillation.stages import Learning, stated, train, try_out
from cobla_onnx.distillation.training import Clock, steps_of_pass
from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.pool import Pool, open_pool
from cobla_onnx.variants.replacement import Replacement

__all__ = ["LEAST_HALF", "Distilled", "Part", "distil"]

# Least samples in a half of those that factors are made from, for a comparison to mean anything.
LEAST_HALF = 8


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
            reason = (
                "too few samples to judge what is learned: of those that are not held back, each "
                f"half needs {LEAST_HALF}; give more"
            )
            return Distilled(replacements, Distillation(reason=reason))
        stages = [BLOCKS, NETWORK] if len(own.cuts.blocks) > 1 else [NETWORK]
        trials, steps = list[Trial](), steps_of_pass(own.lessons.samples)
        before = stated(halves)
        tried = [try_out(name, halves, passes, steps, before, trials.append) for name in stages]
        done = train(own, tried)
    record = replace(_record_of(own, halves, done), seconds=clock.elapsed, trials=tuple(trials))
    if not record.kept:
        return Distilled(replacements, record)
    return Distilled(own.lessons.parameters.replacements(own.values), record)


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
    ) -> Learning:
        """Make what trains replacements; raise ModelError if there is no gradient graph."""
        parameters = Parameters(self.taught.model, replacements)
        lessons = Lessons(self.judge, self.taught, parameters, self.pool, split)

        def told(loss: float, done: int, total: int) -> None:
            self.progress(f"{name}: held-back loss {loss:.4g}", done, total)

        values = parameters.start()
        cuts = cuts_of(lessons)
        return Learning(lessons, cuts, values, split is None, self.clock, self.seed, told)


def _record_of(own: Learning, halves: Sequence[Learning], stages: Sequence[Stage]) -> Distillation:
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
