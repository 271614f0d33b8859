"""Evaluate candidate weights layer by layer, reusing the activations before the layer.

Activations before a layer do not depend on its weight. An `OnwardProbe` computes them once for
all candidates, and continues from there for the next layer.
"""

from __future__ import annotations

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

__all__ = ["OnwardProbe"]

# Most bytes of weights with which a session holds all weights but the layer's own: it runs faster
# then, since onnxruntime packs a copy in the order of its kernels.
PACKED = 1 << 28
# Bytes of weights from which on opening a session takes longer than running a few layers again. One
# session then serves all layers of a unit, with the weights of all of them as inputs.
SHARED = 1 << 25


class OnwardProbe:
    """The samples of a `Probe`, advanced through its model layer by layer.

    Parameters
    ----------
    probe : Probe
    threads : int
    unit : sequence of int
        Indices of layers, if no others will be asked for, and with the same weights elsewhere.
    """

    def __init__(self, probe: Probe, threads: int, unit: Sequence[int] = ()) -> None:
        self._probe, self._threads = probe, threads
        self._frontier = Frontier(probe.exposed.model, lambda: probe.batches)
        self._line = 0
        size = sum(array.nbytes for array in probe.feeds({}).values())
        self._unit = frozenset(unit) if size >= SHARED else frozenset()
        # The part after the cut at the first layer of the unit.
        self._shared: _Rest | None = None

    def losses(
        self, index: int, candidates: Sequence[Pair], weights: Weights
    ) -> list[NDArray[np.float64]]:
        """Loss of every sample for each candidate of a layer; advances the samples to it.

        Parameters
        ----------
        index : int
            Index of the layer; it must not come earlier in the model than the last one.
        candidates : sequence of (array, array or None)
            Weights and biases for the layer.
        weights : mapping of int to (array, array or None)
            Replaced weights of other layers; fixed for those already passed.

        Returns
        -------
        list of float64 array, shape (samples,)
        """
        line = self._probe.layers[index].uses[0].node
        assert line >= self._line
        self._line = line
        feeds = self._probe.feeds(weights)
        rest, store = self._shared, Store()
        crossing = self._frontier.crossing(line)
        ahead = None if rest else self._frontier.taps(crossing, feeds, threads=self._threads)
        losses: list[list[NDArray[np.float64]]] = [[] for _ in candidates]
        pairs = zip(self._frontier.batches(), self._probe.expected, strict=True)
        for batch, expected in pairs:
            given = batch
            if ahead is not None:
                values = ahead.run(batch)
                store.put(values)
                rest = rest or self._rest(values, batch, index, feeds)
                given = values if rest.from_line else batch
            assert rest is not None
            for candidate, found in zip(candidates, losses, strict=True):
                outputs = rest.run(given, self._probe.feeds_of(index, candidate))
                found.append(sample_losses(self._probe.measures, expected, outputs))
        if ahead is not None and rest is not None:
            if rest.from_line:
                self._frontier = self._frontier.moved_to(store)
            if index in self._unit and (store.whole or not rest.from_line):
                self._shared = rest
        return [np.concatenate(found) for found in losses]

    def _rest(self, values: Feeds, batch: Feeds, index: int, feeds: Feeds) -> _Rest:
        """Open the part after the cut; from the present cut, if the graph cannot be cut there."""
        own = sorted(self._unit if index in self._unit else {index})
        begin = partial(_Rest, probe=self._probe, own=own, feeds=feeds, threads=self._threads)
        if can_be_fed(values):
            try:
                return begin(self._frontier.at(values), from_line=True)
            except ModelError:
                # onnxruntime does not load this part by itself.
                pass
        return begin(self._frontier.at(batch), from_line=False)


class _Rest:
    """The part of a model after a cut, with the weights of some layers as inputs."""

    def __init__(
        self,
        frontier: Frontier,
        *,
        probe: Probe,
        own: Sequence[int],
        feeds: Feeds,
        threads: int,
        from_line: bool,
    ) -> None:
        self.from_line = from_line
        exposed = probe.exposed
        names = {exposed.weights[index] for index in own} | {exposed.biases[index] for index in own}
        packed = sum(array.nbytes for array in feeds.values()) <= PACKED
        self._own = {n: array for n, array in feeds.items() if n in names}
        self._fed = {} if packed else {n: array for n, array in feeds.items() if n not in names}
        stored = {n: array for n, array in feeds.items() if packed and n not in names}
        inputs = {n: array.dtype for n, array in (self._fed | self._own).items()}
        self._taps = frontier.taps(probe.measures, stored, inputs=inputs, threads=threads)

    def run(self, values: Feeds, candidate: Feeds) -> dict[str, Any]:
        """Return the compared outputs of one batch with another weight."""
        return self._taps.run({**values, **self._fed, **self._own, **candidate})
