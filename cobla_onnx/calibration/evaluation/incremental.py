"""Evaluate candidate weights layer by layer, reusing the activations before the layer.

Activations before a layer do not depend on its weight. An `OnwardProbe` computes them once for
all candidates, and continues from there for the next layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store, can_be_fed
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.calibration.evaluation.probe import Pair, Probe, Weights
from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.session import Feeds

__all__ = ["OnwardProbe", "has_lost"]

# Most bytes of weights with which a session holds all weights but the layer's own: it runs faster
# then, since onnxruntime packs a copy in the order of its kernels.
PACKED = 1 << 28
# Standard errors of a mean difference beyond which a candidate has lost, and least samples.
DOUBT, LEAST = 3.0, 8


class OnwardProbe:
    """The samples of a `Probe`, advanced through its model layer by layer.

    Parameters
    ----------
    probe : Probe
    threads : int
    """

    def __init__(self, probe: Probe, threads: int) -> None:
        self._probe, self._threads = probe, threads
        self._frontier = Frontier(probe.exposed.model, lambda: probe.batches)
        self._line = 0

    def losses(
        self, index: int, candidates: Sequence[Pair], weights: Weights
    ) -> list[NDArray[np.float64]]:
        """Loss of every sample for each candidate of a layer; advances the samples to it.

        The parameters are those of `race`.

        Returns
        -------
        list of float64 array, shape (samples,)
        """
        found = self.race(index, candidates, weights, None)
        return [losses for losses in found if losses is not None]

    def race(
        self,
        index: int,
        candidates: Sequence[Pair],
        weights: Weights,
        best: NDArray[np.float64] | None,
    ) -> list[NDArray[np.float64] | None]:
        """Loss of every sample for each candidate; None for candidates given up early.

        A candidate is given up once another, or `best`, is significantly better on the samples
        so far, see `has_lost` (after Maron and Moore 1994, Hoeffding races).

        Parameters
        ----------
        index : int
            Index of the layer; it must not come earlier in the model than the last one.
        candidates : sequence of (array, array or None)
            Weights and biases for the layer.
        weights : mapping of int to (array, array or None)
            Replaced weights of other layers; fixed for those already passed.
        best : float64 array, shape (samples,), optional
            Losses that a candidate must beat; without them none is given up.

        Returns
        -------
        list of float64 array, shape (samples,), or None
        """
        line = self._probe.layers[index].uses[0].node
        assert line >= self._line
        self._line = line
        feeds = self._probe.feeds(weights)
        crossing = self._frontier.crossing(line)
        ahead = self._frontier.taps(crossing, feeds, threads=self._threads)
        store = Store()
        rest: _Rest | None = None
        losses: list[list[NDArray[np.float64]]] = [[] for _ in candidates]
        running = list(range(len(candidates)))
        pairs = zip(self._frontier.batches(), self._probe.expected, strict=True)
        for batch, expected in pairs:
            values = ahead.run(batch)
            store.put(values)
            rest = rest or self._rest(values, batch, index, feeds)
            given = values if rest.from_line else batch
            for number in running:
                outputs = rest.run(given, self._probe.feeds_of(index, candidates[number]))
                losses[number].append(sample_losses(self._probe.measures, expected, outputs))
            if best is not None:
                running = _still_running(running, losses, best)
        if rest is not None and rest.from_line:
            self._frontier = self._frontier.moved_to(store)
        return [
            np.concatenate(found) if number in running else None
            for number, found in enumerate(losses)
        ]

    def _rest(self, values: Feeds, batch: Feeds, index: int, feeds: Feeds) -> _Rest:
        """Open the part after the cut; from the present cut, if the graph cannot be cut there."""
        begin = partial(_Rest, probe=self._probe, index=index, feeds=feeds, threads=self._threads)
        if can_be_fed(values):
            try:
                return begin(self._frontier.at(values), from_line=True)
            except ModelError:
                # onnxruntime does not load this part by itself.
                pass
        return begin(self._frontier.at(batch), from_line=False)


def _still_running(
    running: Sequence[int],
    losses: Sequence[Sequence[NDArray[np.float64]]],
    best: NDArray[np.float64],
) -> list[int]:
    """Candidates that have lost neither to `best` nor to the leading one."""
    so_far = {number: np.concatenate(losses[number]) for number in running}
    leading = min(so_far.values(), key=lambda found: float(found.mean()), default=best)
    return [
        number
        for number, found in so_far.items()
        if not has_lost(found, best[: len(found)])
        and (found is leading or not has_lost(found, leading))
    ]


def has_lost(losses: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether losses exceed others on the same samples by more than `DOUBT` standard errors.

    Parameters
    ----------
    losses, others : float64 array, shape (samples,)
    """
    if len(losses) < LEAST or not np.isfinite([losses, others]).all():
        return False
    worse = losses - others
    error = float(worse.std(ddof=1)) / math.sqrt(len(worse))
    return float(worse.mean()) > DOUBT * error


class _Rest:
    """The part of a model after a cut, with the weight of one layer as an input."""

    def __init__(
        self,
        frontier: Frontier,
        *,
        probe: Probe,
        index: int,
        feeds: Feeds,
        threads: int,
        from_line: bool,
    ) -> None:
        self.from_line = from_line
        names = probe.exposed.weights[index], probe.exposed.biases[index]
        own = {name for name in names if name is not None}
        packed = sum(array.nbytes for array in feeds.values()) <= PACKED
        self._own = {name: feeds[name] for name in own}
        self._fed = {} if packed else {n: array for n, array in feeds.items() if n not in own}
        stored = {n: array for n, array in feeds.items() if packed and n not in own}
        inputs = {n: array.dtype for n, array in (self._fed | self._own).items()}
        self._taps = frontier.taps(probe.measures, stored, inputs=inputs, threads=threads)

    def run(self, values: Feeds, candidate: Feeds) -> dict[str, Any]:
        """Return the compared outputs of one batch with another weight."""
        return self._taps.run({**values, **self._fed, **self._own, **candidate})
