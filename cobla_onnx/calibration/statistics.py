"""Per-layer statistics of the calibration data, and the factors that follow from them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.moments import (
    ALL_UNITS,
    LIMIT,
    Moments,
    Remainder,
    collect_moments,
)
from cobla_onnx.calibration.patches import OutputPatch, Patch, patch_of
from cobla_onnx.calibration.sums import Moment
from cobla_onnx.graph.layers import Layer, read_bias, read_weight
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.pool import Pool, one_thread, open_pool
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.low_rank.matricisation import Scheme, largest_rank, schemes_for
from cobla_onnx.variants.low_rank.shrinkage import FLOOR, shrink, shrink_outputs
from cobla_onnx.variants.low_rank.svd import Factorization, Float64
from cobla_onnx.variants.low_rank.weighted_svd import OutputFactorizer, WeightedFactorizer

__all__ = ["Approximation", "Seen", "Spectra", "SpectraUnit", "Spectrum", "spectra"]

Solver: TypeAlias = WeightedFactorizer | OutputFactorizer
Spectrum: TypeAlias = tuple[Float64, Float64]

# For vectors longer than this, the second moment of the outputs is used instead.
WIDE = 5000
# Most bytes of decompositions that are kept for further ranks.
KEPT = 1 << 28
# Ranks at which an error that does not follow from a spectrum is computed; else interpolated.
GRID = 14


@dataclass(frozen=True)
class Approximation:
    """A layer's approximated weight at some rank.

    Attributes
    ----------
    factors : Factorization
    weight : float64 array, shape ``layer.shape``
        The factors multiplied out.
    bias : float64 array or None
        Corrected to keep the mean of the output; None if the layer has no bias of its own.
    """

    factors: Factorization
    weight: Float64
    bias: Float64 | None


@dataclass(frozen=True)
class SpectraUnit:
    """A layer, the schemes and largest ranks asked for, and its moment.

    A unit of work for `spectra`, with the cache for its result.
    """

    ranks: tuple[tuple[Scheme, int], ...]
    weight: Carried
    wide: bool
    second: Float64
    importance: Float64 | None
    cache: Cache | None
    key: str


@dataclass(frozen=True)
class Spectra:
    """Result of `spectra`: one entry for each scheme, and the cache's notes."""

    spectra: list[Spectrum | None]
    notes: list[str]


def spectra(unit: SpectraUnit) -> Spectra:
    """Compute weighted singular values and errors of a layer under each of its schemes."""
    found: list[Spectrum | None] = []
    cache = None if unit.cache is None else unit.cache.fresh()
    weight = unit.weight.array
    key = "" if cache is None else digest(unit.key, weight)
    for scheme, max_rank in unit.ranks:
        if unit.wide and scheme.offsets > 1:
            found.append(None)
            continue
        compute = partial(_spectrum, unit, scheme, weight, max_rank)
        arrays = fetch(cache, "weighted", digest(key, scheme, max_rank, GRID), compute)
        found.append((arrays["values"], arrays["errors"]))
    return Spectra(found, [] if cache is None else cache.notes)


def _spectrum(unit: SpectraUnit, scheme: Scheme, weight: NDArray[Any], max_rank: int) -> Arrays:
    kind = OutputFactorizer if unit.wide else WeightedFactorizer
    solver = kind(scheme, weight, unit.second, max_rank, unit.importance)
    full_rank = min(scheme.matrix_shape()[1:])
    ranks = np.arange(full_rank + 1)
    if solver.energy <= 0:
        return {"values": solver.singular_values, "errors": np.zeros(full_rank + 1)}
    if scheme.offsets == 1:
        errors = solver.errors(ranks) / solver.energy
    else:
        grid = np.unique(np.geomspace(1, max_rank, GRID).round().astype(np.int64))
        known = np.log(np.maximum(solver.errors(grid) / solver.energy, 1e-9))
        errors = np.exp(
            np.interp(ranks, [0, *grid, full_rank], [0.0, *known, min(known[-1], -20.0)])
        )
    errors[-1] = 0.0
    errors = np.minimum.accumulate(np.minimum(errors, 1.0))
    return {"values": solver.singular_values, "errors": errors}


class Seen:
    """Second moments of all layers' inputs, from one pass over the calibration split.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of Layer
    batches : callable
        Returns a fresh iterator over batches of samples.
    threads : int
        Threads of this process, if no pool is given.
    pool : Pool, optional
        Accumulates the moments.
    cache : Cache, optional
        Keeps them under `key`, which identifies the model and the batches.
    progress : callable
    wide : int
        Layers with longer vectors are measured by their outputs; of their schemes only those
        remain whose second factor moves over a single position.
    importance : mapping of str to float64 array, optional
        Weights of a layer's outputs, by the layer's name; see `heads`.
    limit, together : int
        Most bytes of second moments in one unit of work, and in all units together.
    taps : TapLimit, optional
        For the tensors that are read from a run.
    kept : int
        Bytes of decompositions that are kept for the next rank that is asked for.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        batches: Callable[[], Iterable[Feeds]],
        *,
        threads: int = 1,
        pool: Pool | None = None,
        cache: Cache | None = None,
        key: str = "",
        progress: Callable[[int, int], None] = lambda done, total: None,
        wide: int = WIDE,
        importance: Mapping[str, Float64] | None = None,
        limit: int = LIMIT,
        together: int = ALL_UNITS,
        taps: TapLimit | None = None,
        kept: int = KEPT,
    ) -> None:
        self._model, self._cache = model, cache
        self.importance = importance or {}
        self._others = partial(
            Seen,
            model,
            threads=threads,
            pool=pool,
            wide=wide,
            importance=importance,
            limit=limit,
            together=together,
            taps=taps,
            # They are asked for a rank or two, where this is asked again and again.
            kept=kept // 4,
        )
        self._kept = kept
        self.key = digest(key, wide)
        self._patches = {layer.name: _patches(model, layer, wide) for layer in layers}
        with nullcontext(pool) if pool is not None else open_pool(threads) as working:
            self._store: Moments = collect_moments(
                model,
                [patch for patches in self._patches.values() for patch in patches],
                batches,
                pool=working,
                cache=cache,
                key=self.key,
                progress=progress,
                limit=limit,
                together=together,
                taps=taps,
            )
        # Decompositions with their size in bytes, the most recently used at the end.
        self._solvers: OrderedDict[tuple[str, str], tuple[Solver, int]] = OrderedDict()

    def in_others(self, layers: Sequence[Layer], batches: Callable[[], Iterable[Feeds]]) -> Seen:
        """Collect the same statistics of some layers on other samples, without the cache."""
        return self._others(layers, batches)

    def without(self, part: Seen) -> Seen:
        """Return the same statistics of the samples that `part` has not seen, by subtraction.

        Parameters
        ----------
        part : Seen
            From `in_others`, on some of the same samples; only its layers are available.
        """
        rest = copy.copy(self)
        rest._store = Remainder(self._store, part._store)
        rest._cache, rest._kept, rest._solvers = None, part._kept, OrderedDict()
        return rest

    def close(self) -> None:
        """Free the disk space."""
        self._store.close()

    def is_wide(self, layer: Layer) -> bool:
        """Whether a layer is measured by its outputs alone."""
        return isinstance(self._patches[layer.name][0], OutputPatch)

    def spectrum(
        self, layer: Layer, scheme: Scheme, weight: NDArray[Any], max_rank: int
    ) -> Spectrum | None:
        """Weighted singular values, and squared relative output errors at all ranks.

        Returns
        -------
        tuple of float64 arrays, shapes (full_rank,) and (full_rank + 1,), or None
            None if the layer is wide and the scheme needs more than its outputs.
        """
        unit = self.unit(layer, [(scheme, max_rank)], Carried(weight, False))
        with one_thread:
            return spectra(unit).spectra[0]

    def unit(
        self, layer: Layer, ranks: Sequence[tuple[Scheme, int]], weight: Carried
    ) -> SpectraUnit:
        """Collect the input of `spectra`, for schemes with the largest ranks asked for."""
        moment = self._read(layer, weight.array)
        importance = self.importance.get(layer.name)
        centred = self._is_centred(layer)
        key = digest(self.key, self._patches[layer.name], centred, FLOOR, importance)
        wide = self.is_wide(layer)
        return SpectraUnit(tuple(ranks), weight, wide, moment, importance, self._cache, key)

    def approximate(
        self, layer: Layer, scheme: Scheme, ranks: Sequence[int]
    ) -> list[Approximation]:
        """Return the best approximations of a layer at the given ranks."""
        weight = read_weight(self._model, layer)
        bias = read_bias(self._model, layer)
        result = []
        with one_thread:
            solver = self._factorizer(layer, scheme, weight, max(ranks))
            for rank in ranks:
                factors = solver.factorize(rank)
                dense = scheme.weight(factors.left @ factors.right)
                moved = None
                if bias is not None:
                    moved = bias + self._shift(layer, scheme, weight, bias, factors)
                result.append(Approximation(factors, dense, moved))
        return result

    def _factorizer(self, layer: Layer, scheme: Scheme, weight: NDArray[Any], rank: int) -> Solver:
        key = (layer.name, scheme.name)
        found = self._solvers.pop(key, None)
        if found is None or found[0].max_rank < rank:
            # Always the same number of directions, whatever is asked for first, so that results do
            # not depend on it.
            usual = largest_rank(layer, scheme)
            most = usual if rank <= usual else min(scheme.matrix_shape()[1:])
            second = self._read(layer, weight)
            kind = OutputFactorizer if self.is_wide(layer) else WeightedFactorizer
            solver = kind(scheme, weight, second, most, self.importance.get(layer.name))
            found = solver, solver.nbytes
        self._solvers[key] = found
        held = sum(size for _, size in self._solvers.values())
        while held > self._kept and len(self._solvers) > 1:
            _, (_, size) = self._solvers.popitem(last=False)
            held -= size
        return found[0]

    def _read(self, layer: Layer, weight: NDArray[Any]) -> Float64:
        """Moment of a layer's inputs or outputs, shrunk towards the one without data."""
        moment = self._moment(layer)
        second, mean = moment.second, moment.mean
        if self._is_centred(layer):
            second, mean = moment.covariance(), np.zeros_like(mean)
        if self.is_wide(layer):
            rows = schemes_for(layer)[0].rows_of(weight)
            return shrink_outputs(second, rows, moment.effective, mean)[0]
        return shrink(second, moment.effective, mean)[0]

    def _is_centred(self, layer: Layer) -> bool:
        # A bias of its own absorbs the mean, any other is part of a wide layer's outputs.
        biased = len(self._model.graph.node[layer.uses[0].node].input) > 2
        return layer.bias is not None or (self.is_wide(layer) and biased)

    def _moment(self, layer: Layer) -> Moment:
        return self._store.get(self._patches[layer.name])

    def _shift(
        self,
        layer: Layer,
        scheme: Scheme,
        weight: NDArray[Any],
        bias: NDArray[Any],
        factors: Factorization,
    ) -> Float64:
        """Mean of the change of the output by the approximation."""
        mean = self._moment(layer).mean
        if self.is_wide(layer):
            # Orthogonal projection of the outputs on the range of the second factor.
            second = factors.right if scheme.inputs_first else factors.left.swapaxes(1, 2)
            without = mean - bias.reshape(mean.shape)
            pairs = zip(second, without, strict=True)
            kept = [rows.T @ np.linalg.lstsq(rows.T, m, rcond=None)[0] for rows, m in pairs]
            lost = without - np.stack(kept)
        else:
            dense = scheme.weight(factors.left @ factors.right)
            lost = np.einsum("gos,gs->go", scheme.rows_of(weight - dense), mean)
        return np.asarray(lost).reshape(bias.shape)


def _patches(model: onnx.ModelProto, layer: Layer, wide: int) -> list[Patch]:
    patches: list[Patch] = []
    for use in layer.uses:
        patch = patch_of(model, layer, use)
        if patch.size > wide:
            outputs = layer.params // (patch.groups * patch.size)
            patches.append(OutputPatch(use.output, patch, outputs))
        else:
            patches.append(patch)
    return patches
