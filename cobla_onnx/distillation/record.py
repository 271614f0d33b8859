"""What a distillation did, for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Checkpoint", "Distillation", "Trial", "finite"]


def finite(value: float) -> float | None:
    """Return a number, or None where JSON could not express it."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Trial:
    """A cycle of training on a part of the samples.

    Attributes
    ----------
    part : int
        From 1.
    passes : int
    rate : float
    loss : float or None
        Mean loss that is followed, at the end, on the samples of the other part; None if it
        exploded, or was not made to its end.
    """

    part: int
    passes: int
    rate: float
    loss: float | None


@dataclass(frozen=True)
class Checkpoint:
    """The state after one pass of the training on all of the calibration split.

    Attributes
    ----------
    number : int
        Passes so far, from 0 for the state before the first one.
    stage : str
        ``start`` or ``training``.
    loss : float or None
        Mean over the pass of the loss that is learned, on the calibration split, each batch's
        before its step; None before the first pass.
    held_back : float or None
        Loss that is followed, on the selection split; None where it is not finite.
    seconds : float
        Since the start.
    """

    number: int
    stage: str
    loss: float | None
    held_back: float | None
    seconds: float


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Its losses are those that decisions follow, where each half of the calibration split is judged
    under what was made, and then learned, from the other half: no choice before has seen it.

    Attributes
    ----------
    kept : bool
        Whether what was learned is in the result: if in the trials the loss that decisions follow
        gains beyond the noise, and the stated loss is no higher.
    passes : int
        Of the trial that gained most, and of the training on the whole calibration split if it did
        so beyond the noise; 0 if no trial came to its end.
    steps : int
        All, those of the trials among them.
    rate : float
        Largest step, as a fraction of a tensor's root mean square.
    undone : int
        Trainings that exploded.
    parameters : int
        Numbers that learned.
    loss_before, loss_after : float or None
        Means over the samples of the trials, before and after; None where they are not finite.
    standard_error : float or None
        Of their difference, over the paired samples; None for a single one.
    samples : int
        That judged the trials.
    stated_loss_is_higher : bool
        Whether the trials gained beyond the noise, and it was not kept since the stated loss rose.
    left_out : int
        Samples of the calibration split that were not learned from: of too many shapes.
    seconds : float
    trials : tuple of Trial
    checkpoints : tuple of Checkpoint
        One for each pass over the whole calibration split; none if the trials gained nothing.
    reason : str
        Why nothing was tried; empty otherwise.
    """

    kept: bool
    passes: int = 0
    steps: int = 0
    rate: float = 0.0
    undone: int = 0
    parameters: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    standard_error: float | None = None
    samples: int = 0
    stated_loss_is_higher: bool = False
    left_out: int = 0
    seconds: float = 0.0
    trials: tuple[Trial, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    reason: str = ""

    @property
    def text(self) -> str:
        """What it did, in a line."""
        if self.reason:
            return f"not distilled: {self.reason}"
        before, after = self.loss_before, self.loss_after
        if not self.passes:
            return "not distilled: no trial came to a good end; give it more time"
        passes = f"{self.passes} pass{'' if self.passes == 1 else 'es'} at a rate of {self.rate:g}"
        if after is None or (before is not None and before <= after):
            return f"not distilled: in trials, {self.samples} samples not learned from lost no less"
        change = f"{'infinite' if before is None else f'{before:.4g}'} → {after:.4g}"
        if before is not None and self.standard_error is not None:
            change += f" (lower by {before - after:.2g}, standard error {self.standard_error:.2g})"
        what = "distilled" if self.kept else "not distilled"
        outcome = "" if self.kept else self._refused
        return (
            f"{what}: {passes}; in trials, the loss on {self.samples} samples not learned from "
            f"went {change}{outcome}"
        )

    @property
    def _refused(self) -> str:
        """Why what gained in trials is not in the result."""
        if self.checkpoints:
            return "; but the training on all samples ended early, or went wrong"
        if self.stated_loss_is_higher:
            return "; but the stated loss on them rose"
        return ", not beyond the noise of the loss"
