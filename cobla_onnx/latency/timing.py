"""Measure the running times of several models, run in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.session import Feeds, open_session, random_feeds, run_session

__all__ = ["Comparison", "Stopwatch", "compare", "interleaved"]

# Runs that are not counted: memory is laid out, caches and clock rates settle.
WARM_UP = 2
# Resamples of the pairs of runs, for the interval of a ratio of medians.
RESAMPLES = 500


def involuntary_switches() -> int:
    """Number of involuntary context switches of this process; 0 where the system has no count."""
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def interleaved(
    runs: Sequence[Callable[[], object]],
    *,
    seconds: float,
    least: int,
    most: int,
    clock: Callable[[], float] = time.perf_counter,
    switches: Callable[[], int] = involuntary_switches,
) -> Float64:
    """Time several calls in turn, every other round in reverse order.

    What slows the machine down for a while then meets all of them, and none gains by its
    place. Calls during which the system gave the processor to another program are not
    counted, if each has `least` others; up to twice the time is spent to get these.

    Parameters
    ----------
    seconds : float
        After which no further round begins, if there were `least` of them.
    least, most : int
        Rounds.
    clock, switches : callable
        Seconds, and how often the system has taken the processor away.

    Returns
    -------
    float64 array, shape (rounds, calls)
        Seconds; NaN for what is not counted.
    """
    for run in runs:
        for _ in range(WARM_UP):
            run()
    began = clock()
    rounds: list[list[float]] = []
    calm = np.zeros(len(runs), dtype=int)
    while len(rounds) < least or (
        len(rounds) < most and clock() - began < seconds * (1 if calm.min() >= least else 2)
    ):
        times = [0.0] * len(runs)
        order = range(len(runs))
        for index in order if len(rounds) % 2 == 0 else reversed(order):
            before, started = switches(), clock()
            runs[index]()
            times[index] = clock() - started
            if switches() == before:
                calm[index] += 1
            else:
                times[index] *= -1
        rounds.append(times)
    found: Float64 = np.array(rounds)
    disturbed = np.signbit(found)
    np.abs(found, out=found)
    if calm.min() >= least:
        found[disturbed] = np.nan
    return found


class Stopwatch:
    """Times models in onnxruntime, on the provider of the context.

    Parameters
    ----------
    threads : int
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def times(
        self,
        models: Sequence[onnx.ModelProto],
        feeds: Feeds | None,
        *,
        seconds: float,
        least: int,
        most: int,
    ) -> Float64:
        """Time models with the same inputs in turn.

        Random inputs of the shapes that the first one declares where none are given.

        Returns
        -------
        float64 array, shape (rounds, models)
            Seconds.

        Raises
        ------
        ModelError
            If onnxruntime does not load or run one of them.
        """
        runs = []
        for model in models:
            session = open_session(model, self.threads, timed=True)
            if feeds is None:
                declared = {v.name: tuple(v.shape) for v in session.get_inputs()}
                feeds = random_feeds(session, declared, seed=0)
            # The first run is guarded against those that never end, and gives what can be had.
            names = list(run_session(session, feeds))
            if not names:
                raise ModelError("the model has no output that numpy can hold; cast it to float")
            runs.append(_bound(session.run, names, feeds))
        return interleaved(runs, seconds=seconds, least=least, most=most)


def _bound(run: Callable[..., object], names: list[str], feeds: Feeds) -> Callable[[], object]:
    return lambda: run(names, feeds)


@dataclass(frozen=True)
class Comparison:
    """Times of a model before and after, from runs in turn, in milliseconds.

    Attributes
    ----------
    before, after : tuple of three float
        Median, 10th and 90th percentile.
    ratio : float
        Of the medians.
    low, high : float
        95 % interval of the ratio, by resampling pairs of runs.
    repeats : int
        Runs of each, of which those are counted that were not interrupted.
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    ratio: float
    low: float
    high: float
    repeats: int


def compare(times: Float64) -> Comparison:
    """Compare the second column of times in seconds with the first."""
    spread = 1000 * np.nanpercentile(times, [50, 10, 90], axis=0)
    pick = np.random.default_rng(0).integers(0, len(times), (RESAMPLES, len(times)))
    medians = np.nanmedian(times[pick], axis=1)
    low, high = np.nanpercentile(medians[:, 1] / medians[:, 0], [2.5, 97.5])
    before, after = (tuple(map(float, column)) for column in spread.T[:2])
    return Comparison(
        (before[0], before[1], before[2]),
        (after[0], after[1], after[2]),
        after[0] / before[0],
        float(low),
        float(high),
        len(times),
    )
