"""Measure the loss with candidate weights for single layers, in parallel over a pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.incremental import OnwardProbe
from cobla_onnx.calibration.evaluation.output_choice import LossName
from cobla_onnx.calibration.evaluation.probe import KEPT_OUTPUTS, Pair, Probe
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.randomness import random_nodes
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.temporary import Shelf
from cobla_onnx.runtime.transfer import Shared

__all__ = ["SpreadProbe"]

# Layers in one unit of work, the same for any number of workers, and bytes of candidates beyond
# which a unit has fewer.
LAYERS_PER_UNIT = 4
UNIT_BYTES = 1 << 26

_Entry: TypeAlias = "tuple[int, list[Pair]]"


@dataclass(frozen=True)
class _Origin:
    """The arguments of a `Probe`, for a worker that builds its own."""

    model: onnx.ModelProto
    layers: Sequence[Layer]
    batches: Shelf
    loss: LossName | Mapping[str, Measure]
    labels: Sequence[NDArray[np.int64]] | None
    whole: Sequence[Pair] | None

    def __getstate__(self) -> dict[str, Any]:
        # Other processes have the model, and read its weights.
        return {**vars(self), "whole": None}


@dataclass(frozen=True)
class _Unit:
    origin: Shared
    entries: Sequence[_Entry]
    apart: bool


def _open(origin: _Origin) -> Probe:
    # One thread, as everywhere in a unit of work: several units run at a time.
    probe = Probe(
        origin.model,
        origin.layers,
        origin.batches,
        origin.loss,
        1,
        labels=origin.labels,
        whole=origin.whole,
    )
    probe.rest()
    return probe


def _measure_original(origin: Shared) -> tuple[float, int]:
    probe = origin.built(_open)
    losses = probe.unchanged
    if random_nodes(probe.exposed.model):
        # It differs from itself in every run, and so do all candidates from it.
        losses = probe.losses({})
        probe.rest()
    return float(losses.mean()), probe.samples


def _measure(unit: _Unit) -> list[list[float]]:
    indices = [] if unit.apart else [index for index, _ in unit.entries]
    onward = OnwardProbe(unit.origin.built(_open), 1, indices)
    return [
        [float(losses.mean()) for losses in onward.losses(index, candidates, {})]
        for index, candidates in unit.entries
    ]


class SpreadProbe:
    """Losses of a model with the weight of one layer replaced, from the workers of a pool.

    Parameters
    ----------
    pool : Pool
    model, layers, batches, loss, labels, whole
        As for `Probe`. Nothing is run before a loss is asked for.
    apart : bool
        Whether each layer gets a session of its own, however large the weights are.
    """

    def __init__(
        self,
        pool: Pool,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        batches: Iterable[Feeds],
        loss: LossName | Mapping[str, Measure],
        labels: Sequence[NDArray[np.int64]] | None = None,
        whole: Sequence[Pair] | None = None,
        apart: bool = False,
    ) -> None:
        self._pool, self._apart = pool, apart
        self._layers = layers
        origin = _Origin(model, layers, _bounded(batches), loss, labels, whole)
        self._origin = pool.share(origin)

    def original(self) -> tuple[float, int]:
        """Mean loss of the original, and the number of samples on which losses are measured."""
        (found,) = self._pool.map(_measure_original, [self._origin])
        return found

    def mean_losses(self, wanted: Iterable[tuple[int, Iterable[Pair]]]) -> Iterator[list[float]]:
        """Yield the mean losses of each layer's candidates, layer by layer.

        Parameters
        ----------
        wanted : iterable of (int, iterable of (array, array or None))
            Index of a layer, and candidate weights and biases for it.
        """
        units = (_Unit(self._origin, entries, self._apart) for entries in self._units(wanted))
        for found in self._pool.map(_measure, units, self._pool.runs_at_most, small=True):
            yield from found

    def _units(self, wanted: Iterable[tuple[int, Iterable[Pair]]]) -> Iterator[list[_Entry]]:
        """Split the candidates into units; in each, layers are in the order of the model."""
        entries: list[_Entry] = []
        size, last = 0, 0
        for index, candidates in wanted:
            layer = self._layers[index]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(layer.type)
            narrow: list[Pair] = [(np.asarray(w, dtype), bias) for w, bias in candidates]
            more = sum(weight.nbytes for weight, _ in narrow)
            line = layer.uses[0].node
            full = len(entries) == LAYERS_PER_UNIT or size + more > UNIT_BYTES
            if entries and (full or line < last):
                yield entries
                entries, size = [], 0
            entries.append((index, narrow))
            size, last = size + more, line
        if entries:
            yield entries


def _bounded(batches: Iterable[Feeds]) -> Shelf:
    """As many batches as a probe would keep."""
    kept = Shelf()
    room = KEPT_OUTPUTS
    for feeds in batches:
        kept.append(feeds)
        room -= sum(value.nbytes for value in feeds.values())
        if room < 0:
            break
    return kept
