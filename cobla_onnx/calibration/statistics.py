"""Per-layer statistics of the calibration data: second moments, and what they are moments of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.frequencies import RowCounts, count_rows
from cobla_onnx.calibration.moment import Moment
from cobla_onnx.calibration.moments import (
    ALL_UNITS,
    LIMIT,
    Moments,
    Remainder,
    collect_moments,
)
from cobla_onnx.calibration.patches import WIDE, OutputPatch, Patch, ReadPatch, patch_of
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.operators.gather import LookupPatch
from cobla_onnx.runtime.cache import Cache, digest
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds

__all__ = ["Seen"]

Made = TypeVar("Made")

# Most bytes of decompositions that are kept for further ranks.
KEPT = 1 << 27


class Seen:
    """Second moments of all layers' inputs, from one pass over the calibration split.

    Of lookups, how often each row is read.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of Layer
    batches : callable
        Returns a fresh iterator over batches of samples.
    pool : Pool, optional
        Accumulates the moments; without it batches are read one after the other.
    cache : Cache, optional
        Keeps them under `key`, which identifies the model and the batches.
    progress : callable
    wide : int
        Layers with longer vectors are measured by their outputs; of their schemes only those
        remain whose second factor moves over a single position.
    importance : mapping of str to float64 array, optional
        Weights of a layer's outputs, by the layer's name; see `heads`.
    sums : int
        Most bytes of second moments in all units of work together; one holds at most half.
    taps : TapLimit, optional
        For the tensors that are read from a run.
    samples : int, optional
        Their number; of many, fewer vectors of each are seen, by others with `in_others` too.

    Attributes
    ----------
    kept : int
        Bytes of decompositions of these statistics that may be kept for the next level that is
        asked for.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        batches: Callable[[], Iterable[Feeds]],
        *,
        pool: Pool | None = None,
        cache: Cache | None = None,
        key: str = "",
        progress: Callable[[int, int], None] = lambda done, total: None,
        wide: int = WIDE,
        importance: Mapping[str, NDArray[np.float64]] | None = None,
        sums: int = ALL_UNITS,
        taps: TapLimit | None = None,
        samples: int | None = None,
    ) -> None:
        self.model, self.cache, self.kept = model, cache, KEPT
        self._made: dict[Callable[[Seen], Any], Any] = {}
        self._means: dict[str, NDArray[np.float64]] = {}
        self.importance = importance or {}
        self._others = partial(
            Seen,
            model,
            pool=pool,
            wide=wide,
            importance=importance,
            sums=sums,
            taps=taps,
            samples=samples,
        )
        self.key = digest(key, wide)
        self._patches = {layer.name: _patches(model, layer, wide) for layer in layers}
        patches = [patch for its in self._patches.values() for patch in its]
        rows = [patch for patch in patches if isinstance(patch, LookupPatch)]
        self._counts = _of_layers(self._patches, count_rows(model, rows, batches))
        self._store: Moments = collect_moments(
            model,
            [patch for patch in patches if not isinstance(patch, LookupPatch)],
            batches,
            pool=pool or Pool(),
            cache=cache,
            key=self.key,
            progress=progress,
            limit=min(LIMIT, sums // 2),
            together=min(ALL_UNITS, sums),
            taps=taps,
            samples=samples,
        )

    def once(self, make: Callable[[Seen], Made]) -> Made:
        """Return what `make` makes of these statistics, always the same one.

        Families that need the same decompositions then share them.
        """
        if make not in self._made:
            # Another thread may have come first.
            self._made.setdefault(make, make(self))
        found: Made = self._made[make]
        return found

    def in_others(self, layers: Sequence[Layer], batches: Callable[[], Iterable[Feeds]]) -> Seen:
        """Collect the same statistics of some layers on other samples, without the cache."""
        result = self._others(layers, batches)
        # They are asked for a level or two, where these are asked again and again.
        result.kept = self.kept // 4
        return result

    def without(self, part: Seen) -> Seen:
        """Return the same statistics of the samples that `part` has not seen, by subtraction.

        Parameters
        ----------
        part : Seen
            From `in_others`, on some of the same samples; only its layers are available.
        """
        rest = copy.copy(self)
        rest._made, rest._means = {}, {}
        rest._store = Remainder(self._store, part._store)
        rest._counts = {n: self._counts[n].without(its) for n, its in part._counts.items()}
        rest.cache, rest.kept = None, part.kept
        return rest

    def close(self) -> None:
        """Free the disk space."""
        self._store.close()

    def patches(self, layer: Layer) -> Sequence[Patch]:
        """Return what vectors are read at each use of a layer."""
        return self._patches[layer.name]

    def is_wide(self, layer: Layer) -> bool:
        """Whether a layer is measured by its outputs alone."""
        if layer.readings:
            return False
        return isinstance(self._patches[layer.name][0], OutputPatch | LookupPatch)

    def is_centred(self, layer: Layer) -> bool:
        """Whether something absorbs the mean of the output, so that the covariance counts."""
        # A bias of its own absorbs the mean, any other is part of a wide layer's outputs.
        biased = len(self.model.graph.node[layer.uses[0].node].input) > 2
        return layer.bias is not None or (self.is_wide(layer) and biased)

    def moment(self, layer: Layer) -> Moment:
        """Moment of a layer's inputs or, if it is wide, of its outputs; not of a lookup's."""
        return self.moment_of(self._patches[layer.name])

    def mean(self, layer: Layer) -> NDArray[np.float64]:
        """Mean of what `moment` is a moment of; it is kept, where a moment may have to be read."""
        if layer.name not in self._means:
            self._means[layer.name] = self.moment(layer).mean
        return self._means[layer.name]

    def moment_of(self, patches: Sequence[Patch]) -> Moment:
        """Moment over some of the patches of a layer; not of lookups'."""
        return self._store.get(patches)

    def counts(self, layer: Layer) -> RowCounts | None:
        """How often each row of a lookup's table was read, over all uses; None of other layers."""
        return self._counts.get(layer.name)

    def frequencies(self, layer: Layer) -> NDArray[np.float64] | None:
        """Estimated frequencies of the rows of a lookup's table; None of other layers."""
        counts = self.counts(layer)
        return None if counts is None else counts.frequencies()


def _of_layers(
    patches: Mapping[str, Sequence[Patch]], found: Mapping[LookupPatch, RowCounts]
) -> dict[str, RowCounts]:
    """Add up the counts of each layer's uses."""
    counts: dict[str, RowCounts] = {}
    for name, its in patches.items():
        for patch in its:
            if isinstance(patch, LookupPatch):
                known = counts.get(name)
                counts[name] = found[patch] if known is None else known.plus(found[patch])
    return counts


def _patches(model: onnx.ModelProto, layer: Layer, wide: int) -> list[Patch]:
    patches: list[Patch] = []
    for use in layer.uses:
        patch = patch_of(model, layer, use)
        if patch.size <= wide or isinstance(patch, LookupPatch) or not isinstance(patch, ReadPatch):
            patches.append(patch)
        else:
            outputs = layer.params // (patch.groups * patch.size)
            patches.append(OutputPatch(use.output, patch, outputs))
    return patches
