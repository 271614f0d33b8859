"""How far to learn: a rate from short trials, then as many passes as were asked for, or as help."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.distillation.training import Trainer

__all__ = ["Passes", "learn"]

Passes: TypeAlias = Literal["auto"] | int
"""A number of passes over the samples, or as many as help."""

# Relative rates, from the one that is tried first; see `Adam`.
RATES = (1e-2, 3e-3, 1e-3, 3e-4)
# A trial of a rate takes this part of the passes.
TRIAL = 8
# Least steps of the first cycle without a number of passes; each one after it is twice as long.
FIRST_STEPS, MOST_CYCLES = 100, 4
# Standard errors by which a cycle must gain for a longer one to be tried.
WORTHWHILE = 1.0


def learn(trainer: Trainer, passes: Passes) -> float:
    """Train, and return the rate; the trainer has the best state.

    Ctrl-C ends it where it is.
    """
    first = math.ceil(FIRST_STEPS / trainer.steps_of_pass) if passes == "auto" else passes
    rate = RATES[0]
    try:
        rate = _best_rate(trainer, max(1, first // TRIAL))
        for number in range(1 if passes != "auto" else MOST_CYCLES):
            before = trainer.best
            trainer.cycle(f"cycle {number + 1}", before, first << number, rate)
            gain = paired_gain(before.losses, trainer.best.losses)
            if trainer.out_of_time or gain.in_errors <= WORTHWHILE:
                break
    except KeyboardInterrupt:
        pass
    return rate


def _best_rate(trainer: Trainer, passes: int) -> float:
    """Try rates downwards from the first state, as long as lower ones end at a lower loss."""
    best, least = RATES[-1], math.inf
    for rate in RATES:
        undone = trainer.undone
        loss = trainer.cycle(f"rate {rate:g}", trainer.first, passes, rate).loss
        if trainer.undone > undone:
            continue
        if loss >= least:
            break
        best, least = rate, loss
    return best
