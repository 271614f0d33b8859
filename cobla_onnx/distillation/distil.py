"""Let replacements of layers learn from the original's outputs, and keep it where it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.distillation.lessons import Lessons, taught_by
from cobla_onnx.distillation.parameters import Parameters
from cobla_onnx.distillation.passes import Passes, learn
from cobla_onnx.distillation.record import Distillation, finite
from cobla_onnx.distillation.training import Trainer
from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.variants.replacement import Replacement

__all__ = ["Distilled", "distil"]

# Standard errors by which the best state must gain, after Breiman et al. 1984, Classification and
# Regression Trees, section 3.4.3. Two refuse what is better on thousands of other images, since the
# divergence of fifty samples is dominated by a few of them.
BETTER = 1.0
# Standard errors by which the loss itself may look worse, where decisions follow another one.
TOLERANCE = 1.0


class Distilled(NamedTuple):
    """Replacements, those that were given if nothing was gained, and what was done."""

    replacements: Sequence[Replacement]
    record: Distillation


def distil(
    judge: Judge,
    replacements: Sequence[Replacement],
    passes: Passes,
    *,
    seed: int = 0,
    seconds: float | None = None,
    threads: int = 1,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Distilled:
    """Lower the loss on the calibration split, as far as that helps other samples.

    After Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network: what is
    stored for the layers, and their biases, take steps along the gradient of the divergence from
    the original's outputs. The state with the least loss on the samples held back is the answer if
    it gains there beyond the noise, and if the loss that is stated, where it is another one, is not
    higher beyond it; otherwise the replacements are those that were given.

    Parameters
    ----------
    judge : Judge
    replacements : sequence of Replacement
        Of layers of the judge.
    passes : 'auto' or int
        Over the calibration split; ``auto`` goes on as long as the held-back loss falls.
    seed : int
        Of the order of the samples.
    seconds : float, optional
        Time that it may take.
    threads : int
        Shards of samples that run at a time; the result does not depend on it.
    progress : callable
        Called with (stage, done, total).
    """
    with open_pool(threads) as pool:
        taught = taught_by(judge)
        parameters = Parameters(taught[0], replacements)
        progress("distil", 0, 1)
        try:
            lessons = Lessons(judge, taught, parameters, pool)
        except ModelError as error:
            return Distilled(replacements, Distillation(False, reason=error.in_flags()))
        start = parameters.start()
        if not start.size:
            reason = next(iter(lessons.blocked.values()), "no layer stores anything that can learn")
            return Distilled(replacements, Distillation(False, reason=reason))
        trainer = Trainer(
            lessons,
            start,
            parameters.sizes(),
            seed=seed,
            seconds=seconds,
            progress=lambda loss, done, total: progress(
                f"distil: held-back loss {loss:.4g}", done, total
            ),
        )
        rate = learn(trainer, passes)
    gain, kept = trainer.gain, False
    if trainer.gain.in_errors > BETTER:
        stated = paired_gain(
            *(lessons.stated(each.values) for each in (trainer.first, trainer.best))
        )
        kept = stated.in_errors > -TOLERANCE
    record = Distillation(
        kept=kept,
        passes=trainer.passes,
        steps=trainer.steps,
        rate=rate,
        undone=trainer.undone,
        parameters=start.size,
        loss_before=finite(trainer.first.loss),
        loss_after=finite(trainer.best.loss),
        standard_error=finite(gain.standard_error),
        samples=gain.samples,
        seconds=trainer.elapsed,
        checkpoints=tuple(trainer.checkpoints),
        left_out=lessons.left_out,
    )
    return Distilled(parameters.replacements(trainer.best.values) if kept else replacements, record)
