"""Train from the best state so far, and undo what explodes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cobla_onnx.allocation.paired import PairedGain, paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.distillation.adam import Adam
from cobla_onnx.distillation.parameters import Flat
from cobla_onnx.distillation.record import Checkpoint, finite

__all__ = ["State", "Task", "Trainer", "one_cycle"]

# Samples of a step.
BATCH = 32
# Part of a cycle in which the rate rises.
WARM_UP = 0.1
# Factor on the best held-back loss from which on a state counts as exploded, and times that a
# cycle is begun again with half of its rate.
EXPLODED, MOST_UNDONE = 2.0, 4


class Task(Protocol):
    """What is learned.

    Attributes
    ----------
    samples : int
        Of the calibration split.
    """

    @property
    def samples(self) -> int: ...  # noqa: D102

    def gradient(self, values: Flat, chosen: Sequence[int]) -> tuple[float, Flat]:
        """Mean loss of some samples of the calibration split, and its derivatives."""
        ...

    def held_back(self, values: Flat) -> Float64:
        """Loss of each sample that is held back."""
        ...


@dataclass(frozen=True)
class State:
    """Values of all parameters, and the loss of each held-back sample under them."""

    values: Flat
    losses: Float64

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return float(self.losses.mean())


class Trainer:
    """Runs cycles of Adam, and remembers the state with the least held-back loss.

    Parameters
    ----------
    task : Task
    start, sizes : float32 array, shape (parameters,)
        Values, and the root mean square of the tensor of each.
    seed : int
        Of the order of the samples.
    seconds : float, optional
        Time after which no further step is made.
    progress : callable
        Called with the least held-back loss so far, and with steps done and planned.

    Attributes
    ----------
    first, best : State
    passes, steps, undone : int
        See `Distillation`.
    checkpoints : list of Checkpoint
    """

    def __init__(
        self,
        task: Task,
        start: Flat,
        sizes: Flat,
        *,
        seed: int = 0,
        seconds: float | None = None,
        progress: Callable[[float, int, int], None] = lambda loss, done, total: None,
    ) -> None:
        self._task, self._sizes, self._progress = task, sizes, progress
        self._order = np.random.default_rng(seed)
        self._begun, self._seconds = time.perf_counter(), seconds
        self._batch = min(BATCH, task.samples)
        self._planned = 0
        self.first = self.best = State(start.copy(), task.held_back(start))
        self.passes = self.steps = self.undone = 0
        self.checkpoints: list[Checkpoint] = []
        self._note("start", None, self.first)

    @property
    def steps_of_pass(self) -> int:
        """Steps of one pass; what does not fill a batch waits for the next pass."""
        return self._task.samples // self._batch

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    @property
    def out_of_time(self) -> bool:
        """Whether the time is up."""
        return self._seconds is not None and self.elapsed >= self._seconds

    @property
    def gain(self) -> PairedGain:
        """Gain of the best state over the first one, on the samples held back."""
        return paired_gain(self.first.losses, self.best.losses)

    def cycle(self, stage: str, begin: State, passes: int, rate: float) -> State:
        """Make some passes in which the rate rises quickly to its greatest value, then falls to 0.

        Where a loss or a gradient is not finite, or the held-back loss gets far above the best
        one, the rest of the passes begins anew at the best state with half of the rate.

        Returns
        -------
        State
            The last one that was sound; the best one is remembered.
        """
        state, undone = begin, 0
        end = self.passes + passes
        while self.passes < end and undone <= MOST_UNDONE and not self.out_of_time:
            found = self._run(stage, state, end - self.passes, rate)
            if found is not None:
                return found
            state, rate = self.best, rate / 2
            undone += 1
            self.undone += 1
        return state

    def _run(self, stage: str, state: State, passes: int, rate: float) -> State | None:
        """Make a cycle; None if it exploded. A pass that did so counts all the same."""
        values, adam = state.values.copy(), Adam(self._sizes)
        total, done = passes * self.steps_of_pass, 0
        planned = self.steps + total
        for _ in range(passes):
            order, losses = self._order.permutation(self._task.samples), list[float]()
            self.passes += 1
            for number in range(self.steps_of_pass):
                chosen = order[number * self._batch : (number + 1) * self._batch]
                loss, gradient = self._task.gradient(values, chosen.tolist())
                if not (math.isfinite(loss) and np.isfinite(gradient).all()):
                    return None
                values += adam.step(gradient, rate * one_cycle(done / total))
                losses.append(loss)
                done, self.steps = done + 1, self.steps + 1
                self._progress(self.best.loss, self.steps, planned)
                if self.out_of_time:
                    break
            state = State(values.copy(), self._task.held_back(values))
            self._note(stage, float(np.mean(losses)), state)
            if math.isnan(state.loss) or state.loss > EXPLODED * self.best.loss:
                return None
            if state.loss < self.best.loss:
                self.best = state
            if self.out_of_time:
                break
        return state

    def _note(self, stage: str, loss: float | None, state: State) -> None:
        self.checkpoints.append(
            Checkpoint(self.passes, stage, loss, finite(state.loss), self.elapsed)
        )


def one_cycle(done: float) -> float:
    """Factor on the rate when this part of a cycle is done.

    After Smith and Topin 2017, Super-convergence (arXiv 1708.07120), with half a cosine downwards.
    """
    if done < WARM_UP:
        return (done + 0.1 * WARM_UP) / (1.1 * WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
