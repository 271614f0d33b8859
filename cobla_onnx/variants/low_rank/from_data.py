"""Low-rank approximations from second moments: the errors of all ranks, and the factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.layers import Layer, read_bias, read_weight
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.runtime.recent import Recent
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.text import quoted
from cobla_onnx.variants.base import Measured
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.matricisation import (
    Scheme,
    largest_rank,
    layout_of,
    schemes_for,
)
from cobla_onnx.variants.low_rank.shrinkage import FLOOR, shrink, shrink_outputs
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.low_rank.tied_factors import TiedFactorizer
from cobla_onnx.variants.low_rank.tied_moments import Sides, sides_of
from cobla_onnx.variants.low_rank.weighted_svd import (
    OutputFactorizer,
    WeightedFactorizer,
    inputs_first,
)

__all__ = [
    "FactorsFromData",
    "SpectraUnit",
    "layer_importance",
    "layer_moment",
    "mean_change",
    "solver_of",
    "truncation_errors",
]

Solver: TypeAlias = WeightedFactorizer | OutputFactorizer | TiedFactorizer

# Decompositions in a temporary file, as a multiple of the bytes of those in memory: of the layers
# of a large network each takes longer to make again than all to read.
ON_DISK = 16

# Ranks at which an error that does not follow from a spectrum is computed; else interpolated.
GRID = 14


@dataclass(frozen=True)
class SpectraUnit:
    """A layer, the schemes and largest ranks asked for, and its moment.

    A unit of work, with the cache for its result. Of a tied weight, `sides` are its moments.
    """

    ranks: tuple[tuple[Scheme, int], ...]
    weight: Carried
    wide: bool
    second: Float64
    importance: Float64 | None
    cache: Cache | None
    key: str
    sides: Sides | None = None

    def measure(self) -> Measured:
        """Compute weighted singular values and errors of a layer under each of its schemes."""
        result = Measured([], [], [])
        cache = None if self.cache is None else self.cache.fresh()
        weight = self.weight.array
        key = "" if cache is None else digest(self.key, weight)
        for scheme, max_rank in self.ranks:
            if self.wide and scheme.offsets > 1:
                result.errors.append(None)
                result.spectra.append(None)
                continue
            compute = partial(_spectrum, self, scheme, max_rank)
            arrays = fetch(cache, "weighted", digest(key, scheme, max_rank, GRID), compute)
            result.errors.append(arrays["errors"])
            result.spectra.append(arrays["values"])
        if cache is not None:
            result.notes.extend(cache.notes)
        return result


def solver_of(unit: SpectraUnit, scheme: Scheme, max_rank: int) -> Solver:
    """Return what factorises the unit's layer under a scheme."""
    weight = unit.weight.array
    if unit.sides is not None:
        return TiedFactorizer(scheme, weight, unit.sides, max_rank)
    return _kind(unit.wide)(scheme, weight, unit.second, max_rank, unit.importance)


def _kind(wide: bool) -> type[WeightedFactorizer] | type[OutputFactorizer]:
    """What factorises by the moment of outputs, for wide layers, or of inputs."""
    return OutputFactorizer if wide else WeightedFactorizer


def truncation_errors(solver: Solver) -> Float64:
    """Squared relative error of unrounded factors at ranks 0 to full rank, descending to 0."""
    scheme, max_rank = solver.scheme, solver.max_rank
    full_rank = min(scheme.matrix_shape()[1:])
    ranks = np.arange(full_rank + 1)
    if solver.energy <= 0:
        return np.zeros(full_rank + 1)
    if scheme.offsets == 1 and not isinstance(solver, TiedFactorizer):
        errors = solver.errors(ranks) / solver.energy
    else:
        grid = np.unique(np.geomspace(1, max_rank, GRID).round().astype(np.int64))
        known = np.log(np.maximum(solver.errors(grid) / solver.energy, 1e-9))
        errors = np.exp(
            np.interp(ranks, [0, *grid, full_rank], [0.0, *known, min(known[-1], -20.0)])
        )
    errors[-1] = 0.0
    return np.minimum.accumulate(np.minimum(errors, 1.0))


def _spectrum(unit: SpectraUnit, scheme: Scheme, max_rank: int) -> Arrays:
    solver = solver_of(unit, scheme, max_rank)
    return {"values": solver.singular_values, "errors": truncation_errors(solver)}


class FactorsFromData:
    """Makes factors from the second moments of layers' inputs or outputs.

    Parameters
    ----------
    seen : Seen
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._solvers: Recent[tuple[str, str], Solver] = Recent(
            seen.kept, lambda solver: solver.nbytes, last=False, on_disk=ON_DISK * seen.kept
        )

    def unit(
        self, layer: Layer, ranks: Sequence[tuple[Scheme, int]], weight: Carried
    ) -> SpectraUnit:
        """Collect the input of a measurement, for schemes with the largest ranks asked for."""
        sides = sides_of(self._seen, layer, weight.array) if layer.readings else None
        moment = layer_moment(self._seen, layer, weight.array)
        importance = layer_importance(self._seen, layer, weight.array)
        centred = self._seen.is_centred(layer)
        key = digest(self._seen.key, self._seen.patches(layer), centred, FLOOR, importance)
        wide = self._seen.is_wide(layer)
        return SpectraUnit(
            tuple(ranks), weight, wide, moment, importance, self._seen.cache, key, sides
        )

    def approximate(self, layer: Layer, form: Scheme, levels: Sequence[int]) -> list[LowRankWeight]:
        """Return the best approximations of a layer at the given ranks."""
        weight = read_weight(self._seen.model, layer)
        bias = read_bias(self._seen.model, layer)
        result = []
        with one_thread:
            solver = self.solver(layer, form, weight, max(levels))
            for rank in levels:
                made = LowRankWeight(form, solver.factorize(rank), None)
                if bias is not None:
                    made = made.with_bias(bias + self.shift(layer, weight, bias, made))
                result.append(made)
        return result

    def solver(self, layer: Layer, scheme: Scheme, weight: NDArray[Any], rank: int) -> Solver:
        """Return what factorises a layer under a scheme at ranks up to `rank`.

        Raises
        ------
        UsageError
            If the data say nothing about the scheme.
        """
        key = (layer.name, scheme.name)
        self._refuse_unknown(layer, scheme)
        found = self._solvers.get(key)
        if found is not None and found.max_rank >= rank:
            return found
        # Always the same number of directions, whatever is asked for first, so that results do
        # not depend on it.
        usual = largest_rank(layer, scheme)
        most = usual if rank <= usual else min(scheme.matrix_shape()[1:])
        if layer.readings:
            sides = sides_of(self._seen, layer, weight)
            return self._solvers.put(key, TiedFactorizer(scheme, weight, sides, most))
        second = layer_moment(self._seen, layer, weight)
        kind = _kind(self._seen.is_wide(layer))
        importance = layer_importance(self._seen, layer, weight)
        return self._solvers.put(key, kind(scheme, weight, second, most, importance))

    def _refuse_unknown(self, layer: Layer, scheme: Scheme) -> None:
        """Raise where a plan, made without data, has a scheme that data say nothing about."""
        if self._seen.is_wide(layer) and scheme.offsets > 1:
            known = [each.name for each in schemes_for(layer) if each.offsets == 1]
            raise UsageError(
                f"plan: layer {quoted(layer.name)} reads too many inputs for factors of scheme "
                f'{scheme.name!r} to follow from data; use {" or ".join(known)}, or "factors": '
                '"weights" for the whole plan'
            )

    def shift(
        self,
        layer: Layer,
        weight: NDArray[Any],
        bias: NDArray[Any],
        made: LowRankWeight,
    ) -> Float64:
        """Mean of the change of the output by the approximation."""
        if not self._seen.is_wide(layer):
            return mean_change(self._seen, layer, weight - made.weight).reshape(bias.shape)
        # Orthogonal projection of the outputs on the range of the second factor.
        mean = self._seen.mean(layer)
        _, second = inputs_first(made.scheme, made.factors)
        without = mean - bias.reshape(mean.shape)
        pairs = zip(second, without, strict=True)
        kept = [rows.T @ np.linalg.lstsq(rows.T, m, rcond=None)[0] for rows, m in pairs]
        return np.asarray(without - np.stack(kept)).reshape(bias.shape)


def mean_change(seen: Seen, layer: Layer, change: NDArray[Any]) -> Float64:
    """Mean of what a change of the weight does to the outputs, shape (groups, outputs).

    For layers that are seen by their inputs.
    """
    rows = layout_of(layer).rows_of(change)
    return np.asarray(np.einsum("gos,gs->go", rows, seen.mean(layer)))


def layer_importance(seen: Seen, layer: Layer, weight: NDArray[Any]) -> Float64 | None:
    """How much the squared error of each output of a layer counts; None if all do alike."""
    if layer.readings:
        return sides_of(seen, layer, weight).importance
    return seen.importance.get(layer.name)


def layer_moment(seen: Seen, layer: Layer, weight: NDArray[Any]) -> Float64:
    """Moment of a layer's inputs or outputs, shrunk towards the one without data."""
    if layer.readings:
        return sides_of(seen, layer, weight).second
    moment = seen.moment(layer)
    second, mean = moment.second, moment.mean
    if seen.is_centred(layer):
        second, mean = moment.covariance(out=second), np.zeros_like(mean)
    if seen.is_wide(layer):
        rows = layout_of(layer).rows_of(weight)
        return shrink_outputs(second, rows, moment.effective, mean)[0]
    # Nobody else has it, and it may be by far the largest array there is.
    return shrink(second, moment.effective, mean, out=second)[0]
