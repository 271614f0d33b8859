"""What a distillation did, for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cobla_onnx.text import numbered

__all__ = ["BLOCKS", "NETWORK", "Checkpoint", "Distillation", "Stage", "Trial"]

BLOCKS, NETWORK = "blocks", "network"
"""Stages: what is learned block by block, and by the model as a whole."""


@dataclass(frozen=True)
class Trial:
    """A cycle of training on a part of the samples.

    Attributes
    ----------
    stage : str
    part : int
        From 1.
    passes : int
    rate : float
    loss : float or None
        Mean loss that is followed, at the end, on the samples of the other part; None if it
        exploded, or was not made to its end.
    """

    stage: str
    part: int
    passes: int
    rate: float
    loss: float | None


@dataclass(frozen=True)
class Checkpoint:
    """The state after one pass, or one block, of the training on all of the calibration split.

    Attributes
    ----------
    number : int
        Blocks, or passes, so far; 0 for the state before the first one.
    stage : str
        ``start``, ``blocks`` or ``network``.
    loss : float or None
        Mean over the pass of the loss that is learned, on the calibration split, each batch's
        before its step; behind a block the block's own error in its last pass. None before the
        first one, and where nothing in a block learns.
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

    @property
    def shown(self) -> float:
        """The loss of the samples held back; not a number where it is not finite."""
        return math.nan if self.held_back is None else self.held_back


@dataclass(frozen=True)
class Stage:
    """One way of learning: the trial that gained most, and what became of it.

    Its losses are those that decisions follow, where each half of the calibration split is judged
    under what was made, and then learned, from the other half: no choice before has seen it.

    Attributes
    ----------
    name : str
        ``blocks`` or ``network``.
    kept : bool
        Whether what was learned so is in the result: if in the trials the loss that decisions
        follow gains beyond the noise, and the stated loss is no higher.
    passes : int
        Of the trial that gained most; 0 if none came to its end.
    rate : float
        Largest step, as a fraction of a tensor's root mean square.
    loss_before, loss_after : float or None
        Means over the samples of the trials, before and after; None where they are not finite.
    standard_error : float or None
        Of their difference, over the paired samples; None for a single one.
    stated_loss_is_higher : bool
        Whether the trials gained beyond the noise, and it was not kept since the stated loss rose.
    went_wrong : bool
        Whether they gained, and the training on all samples ended early or went wrong.
    """

    name: str
    kept: bool
    passes: int = 0
    rate: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None
    standard_error: float | None = None
    stated_loss_is_higher: bool = False
    went_wrong: bool = False

    @property
    def text(self) -> str:
        """What it did, in a clause."""
        name = "block by block" if self.name == BLOCKS else "as a whole"
        before, after = self.loss_before, self.loss_after
        if not self.passes:
            return f"{name} no trial came to a good end"
        passes = f"{numbered(self.passes, 'pass', 'es')} at a rate of {self.rate:g}"
        if after is None or (before is not None and before <= after):
            return f"{name} it lost no less"
        change = f"{'infinite' if before is None else f'{before:.4g}'} → {after:.4g}"
        if before is not None and self.standard_error is not None:
            change += f" (lower by {before - after:.2g}, standard error {self.standard_error:.2g})"
        return f"{name} {change} by {passes}{self._refused}"

    @property
    def _refused(self) -> str:
        """Why what gained in trials is not in the result."""
        if self.kept:
            return ""
        if self.went_wrong:
            return ", not kept: the training on all samples ended early, or went wrong"
        if self.stated_loss_is_higher:
            return ", not kept: the stated loss on them rose"
        return ", not kept: not beyond the noise"


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Attributes
    ----------
    kept : bool
        Whether anything that was learned is in the result.
    stages : tuple of Stage
        In order, each beginning where those before it that were kept have led.
    blocks : int
        That the model was cut into; without at least two there is no such stage.
    steps : int
        All, those of the trials among them.
    undone : int
        Trainings that exploded.
    parameters : int
        Numbers that learned.
    samples : int
        That judged the trials.
    left_out : int
        Samples of the calibration split that were not learned from: of too many shapes.
    seconds : float
    trials : tuple of Trial
    checkpoints : tuple of Checkpoint
        Of the trainings on the whole calibration split; none if the trials gained nothing.
    reason : str
        Why nothing was tried; empty otherwise.
    """

    kept: bool = False
    stages: tuple[Stage, ...] = ()
    blocks: int = 0
    steps: int = 0
    undone: int = 0
    parameters: int = 0
    samples: int = 0
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
        if not any(stage.passes for stage in self.stages):
            return "not distilled: no trial came to a good end; give it more time"
        what = "distilled" if self.kept else "not distilled"
        clauses = "; ".join(stage.text for stage in self.stages)
        return f"{what}: in trials, the loss on {self.samples} samples not learned from: {clauses}"
