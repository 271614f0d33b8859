"""What a distillation did, for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Checkpoint", "Distillation", "finite"]


def finite(value: float) -> float | None:
    """Return a number, or None where JSON could not express it."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Checkpoint:
    """The state after one pass.

    Attributes
    ----------
    number : int
        Passes so far, from 0 for the state before the first one.
    stage : str
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
    """What a distillation did; losses are those that decisions follow, on the held-back samples.

    Attributes
    ----------
    kept : bool
        Whether what was learned is in the result: if the loss that decisions follow gains beyond
        the noise, and the loss itself is not worse beyond it.
    passes : int
        Over the calibration split, those of the trials of rates among them.
    steps : int
    rate : float
        Largest step, as a fraction of a tensor's root mean square.
    undone : int
        Times that it went back to the best state with half of the rate.
    parameters : int
        Numbers that learned.
    loss_before, loss_after : float or None
        Means before, and in the best state; None where they are not finite.
    standard_error : float or None
        Of their difference, over the paired samples; None for a single one.
    samples : int
        Held-back samples.
    left_out : int
        Samples of the calibration split that were not learned from: of too many shapes.
    seconds : float
    checkpoints : tuple of Checkpoint
        One for each pass.
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
    left_out: int = 0
    seconds: float = 0.0
    checkpoints: tuple[Checkpoint, ...] = ()
    reason: str = ""

    @property
    def text(self) -> str:
        """What it did, in a line."""
        if self.reason:
            return f"not distilled: {self.reason}"
        passes = f"{self.passes} pass{'' if self.passes == 1 else 'es'}"
        before, after = self.loss_before, self.loss_after
        if after is None or (before is not None and before <= after):
            return f"distilled in vain: {passes}, the {self.samples} held-back samples lost no less"
        change = f"held-back loss {'infinite' if before is None else f'{before:.4g}'} → {after:.4g}"
        if before is not None and self.standard_error is not None:
            change += f" (lower by {before - after:.2g}, standard error {self.standard_error:.2g})"
        outcome = "kept" if self.kept else "not kept: not beyond the noise of the loss"
        return f"distilled: {passes}, {change} on {self.samples} samples, {outcome}"
