"""Train in a cycle of Adam, and notice what explodes."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.distillation.adam import Adam
from cobla_onnx.distillation.parameters import Flat
from cobla_onnx.distillation.record import NETWORK, Checkpoint
from cobla_onnx.errors import ModelError
from cobla_onnx.text import finite

__all__ = ["Clock", "Cycles", "State", "Task", "Trainer", "one_cycle", "steps_of_pass"]

# Samples of a step.
BATCH = 32
# Part of a cycle in which the rate rises.
WARM_UP = 0.1
# Factor on the first held-back loss from which on a state counts as exploded.
EXPLODED = 2.0


class Task(Protocol):
    """What is learned.

    Attributes
    ----------
    samples : int
        That are learned from.
    """

    @property
    def samples(self) -> int: ...  # noqa: D102

    def gradient(self, values: Flat, chosen: Sequence[int]) -> tuple[float, Flat]:
        """Mean loss of some of the samples, and its derivatives."""
        ...

    def held_back(self, values: Flat) -> Float64:
        """Loss of each sample that judges, which are others."""
        ...


@dataclass
class Clock:
    """Time since it was made, and when it is up.

    Attributes
    ----------
    limit : float, optional
        Seconds after which no further step is made.
    interrupted : bool
        Whether Ctrl-C was pressed; no further step is made.
    """

    limit: float | None = None
    interrupted: bool = False
    _begun: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._begun

    def left(self, share: float = 1.0) -> float:
        """Seconds of this share of the limit that are left; infinite without a limit."""
        return math.inf if self.limit is None else share * self.limit - self.elapsed

    def is_up(self, share: float = 1.0) -> bool:
        """Whether this share of the limit is over, or Ctrl-C was pressed."""
        return self.left(share) <= 0 or self.interrupted


@dataclass(frozen=True)
class State:
    """Values of all parameters, and the loss of each sample that judges under them.

    Attributes
    ----------
    whole : bool
        Whether the cycle that ended here was made to its end.
    """

    values: Flat
    losses: Float64
    whole: bool = True

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return float(self.losses.mean())


class Cycles(ABC):
    """Learns from some samples in cycles, each from the first state; what trainers share.

    Parameters
    ----------
    first : State
    clock : Clock
    share : float
        Of the clock's time, after which no further step is made.
    seed : int
        Of the order of the samples, with which each cycle begins anew, and of their variants.
    each : bool
        Whether the samples that judge do so after each pass or block, or at the end of a cycle
        alone: there may be as many of them as of those that are learned from.
    progress : callable
        Called with the loss of the samples that judge, and with what is done and planned.

    Attributes
    ----------
    steps, undone : int
        See `Distillation`.
    checkpoints : list of Checkpoint
        Of the last cycle.
    """

    stage: ClassVar[str]

    def __init__(
        self,
        first: State,
        *,
        clock: Clock | None = None,
        share: float = 1.0,
        seed: int = 0,
        each: bool = True,
        progress: Callable[[float, int, int], None] = lambda loss, done, total: None,
    ) -> None:
        self.first = first
        self._clock, self._share, self._seed = clock or Clock(), share, seed
        self._each, self._progress = each, progress
        self.steps = self.undone = 0
        self.checkpoints: list[Checkpoint] = []

    @property
    def left(self) -> float:
        """Seconds of its share of the time that are left; infinite without a limit."""
        return self._clock.left(self._share)

    @property
    def is_over(self) -> bool:
        """Whether its share of the time is up, or Ctrl-C was pressed."""
        return self._clock.is_up(self._share)

    @abstractmethod
    def cycle(self, passes: int, rate: float) -> State | None:
        """Make a cycle, which ends where it is if time is up, or Ctrl-C is pressed.

        Returns
        -------
        State or None
            The last one. None if a loss or a gradient was not finite, a number overflows the type
            in which it is stored, or the loss of the samples that judge got far above the first.
        """

    def _begin(self) -> None:
        """Begin the checkpoints of a cycle."""
        self.checkpoints = []
        self._note(0, None, self.first)

    def _explodes(self, state: State) -> bool:
        # Not "greater": a loss that is no number has exploded, too.
        return not state.loss <= EXPLODED * self.first.loss

    def _note(self, number: int, loss: float | None, state: State) -> None:
        mean = None if loss is None else finite(loss)
        stage = self.stage if number else "start"
        self.checkpoints.append(
            Checkpoint(number, stage, mean, finite(state.loss), self._clock.elapsed)
        )


class Trainer(Cycles):
    """Runs cycles of Adam, each from the first state.

    Parameters
    ----------
    task : Task
    start, sizes : float32 array, shape (parameters,)
        Values, and the root mean square of the tensor of each.
    options
        Those of `Cycles`.
    """

    stage = NETWORK

    def __init__(self, task: Task, start: Flat, sizes: Flat, **options: Any) -> None:
        super().__init__(State(start.copy(), task.held_back(start)), **options)
        self.task, self._sizes = task, sizes
        self._batch = min(BATCH, task.samples)

    @property
    def steps_of_pass(self) -> int:
        """Steps of one pass."""
        return steps_of_pass(self.task.samples)

    def cycle(self, passes: int, rate: float) -> State | None:
        """Make some passes in which the rate rises quickly to its greatest value, then falls to 0.

        See `Cycles`.
        """
        self._begin()
        state, adam = replace(self.first, whole=False), Adam(self._sizes)
        order, done, values = np.random.default_rng(self._seed), 0, state.values
        for number in range(1, passes + 1):
            if self.is_over:
                break
            try:
                values, loss, done = self._pass(values, adam, order, rate, done, passes)
                if not (self._each or number == passes or self.is_over):
                    continue
                losses = self.task.held_back(values)
            except (FloatingPointError, ModelError):
                # What is not finite, or overflows the type in which it is stored.
                self.undone += 1
                return None
            state = State(values, losses, done == passes * self.steps_of_pass)
            self._note(number, loss, state)
            if self._explodes(state):
                self.undone += 1
                return None
        return state

    def _pass(
        self,
        values: Flat,
        adam: Adam,
        order: np.random.Generator,
        rate: float,
        done: int,
        passes: int,
    ) -> tuple[Flat, float, int]:
        """Make one pass; raise FloatingPointError on what is not finite."""
        values, losses, total = values.copy(), list[float](), passes * self.steps_of_pass
        samples = order.permutation(self.task.samples)
        for number in range(self.steps_of_pass):
            chosen = samples[number * self._batch : (number + 1) * self._batch]
            try:
                loss, gradient = self.task.gradient(values, chosen.tolist())
            except KeyboardInterrupt:
                self._clock.interrupted = True
                break
            if not (math.isfinite(loss) and np.isfinite(gradient).all()):
                raise FloatingPointError
            values += adam.step(gradient, rate * one_cycle(done / total))
            losses.append(loss)
            done, self.steps = done + 1, self.steps + 1
            self._progress(self.checkpoints[-1].shown, done, total)
            if self.is_over:
                break
        return values, float(np.mean(losses)) if losses else math.nan, done


def steps_of_pass(samples: int) -> int:
    """Steps of a pass over so many samples; what does not fill a batch waits for the next pass."""
    return samples // min(BATCH, samples)


def one_cycle(done: float) -> float:
    """Factor on the rate when this part of a cycle is done.

    After Smith and Topin 2017, Super-convergence (arXiv 1708.07120), with half a cosine downwards.
    """
    if done < WARM_UP:
        return (done + 0.1 * WARM_UP) / (1.1 * WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
