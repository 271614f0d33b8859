"""What a model's layers saw in the calibration data, and the factors that follow from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.moments import Moment, collect_moments
from cobla_onnx.calibration.patches import OutputPatch, Patch, patch_of
from cobla_onnx.graph.layers import Layer, read_bias, read_weight
from cobla_onnx.lowrank.factorize import Factorization, Float64
from cobla_onnx.lowrank.schemes import Scheme
from cobla_onnx.lowrank.weighted import OutputFactorizer, WeightedFactorizer
from cobla_onnx.runtime import Feeds

__all__ = ["Approximation", "Seen"]

Solver: TypeAlias = WeightedFactorizer | OutputFactorizer

# Vectors longer than this are not multiplied out: the moment of the outputs serves.
WIDE = 5000
# Bytes of second moments whose decomposition is kept for the next rank that is asked for.
KEPT = 1 << 28
# Ranks at which an error that no spectrum tells is computed; in between it is interpolated.
GRID = 14


@dataclass(frozen=True)
class Approximation:
    """A layer's weight at some rank.

    Attributes
    ----------
    factors : Factorization
    weight : float64 array, shape ``layer.shape``
        The factors multiplied out.
    bias : float64 array or None
        Keeps the mean of the output; None where the layer has no bias of its own.
    """

    factors: Factorization
    weight: Float64
    bias: Float64 | None


class Seen:
    """Second moments of all layers' inputs, from one pass over the calibration split.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of Layer
    batches : callable
        Gives a fresh iterator over batches of samples.
    threads : int
    progress : callable
    wide : int
        Layers with longer vectors are seen by their outputs; of their schemes only those
        remain whose second factor stays in place.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        batches: Callable[[], Iterable[Feeds]],
        *,
        threads: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        wide: int = WIDE,
    ) -> None:
        self._model = model
        self._patches = {layer.name: _patches(model, layer, wide) for layer in layers}
        self._store = collect_moments(
            model,
            [patch for patches in self._patches.values() for patch in patches],
            batches,
            threads=threads,
            progress=progress,
        )
        # Decompositions, the last used at the end, with their size in bytes.
        self._solvers: OrderedDict[tuple[str, str], tuple[Solver, int]] = OrderedDict()

    def close(self) -> None:
        """Give the disk space back."""
        self._store.close()

    def is_wide(self, layer: Layer) -> bool:
        """Whether a layer is seen by its outputs alone."""
        return isinstance(self._patches[layer.name][0], OutputPatch)

    def spectrum(
        self, layer: Layer, scheme: Scheme, weight: NDArray[Any], max_rank: int
    ) -> tuple[Float64, Float64] | None:
        """Weighted singular values, and squared relative output errors at all ranks.

        Returns
        -------
        tuple of float64 arrays, shapes (full_rank,) and (full_rank + 1,), or None
            None where the layer is wide and the scheme needs more than its outputs.
        """
        if self.is_wide(layer) and scheme.offsets > 1:
            return None
        solver = self._factorizer(layer, scheme, weight, max_rank)
        full_rank = min(scheme.matrix_shape()[1:])
        ranks = np.arange(full_rank + 1)
        if solver.energy <= 0:
            return solver.singular_values, np.zeros(full_rank + 1)
        if scheme.offsets == 1:
            errors = solver.errors(ranks) / solver.energy
        else:
            grid = np.unique(np.geomspace(1, max_rank, GRID).round().astype(np.int64))
            known = np.log(np.maximum(solver.errors(grid) / solver.energy, 1e-9))
            errors = np.exp(
                np.interp(ranks, [0, *grid, full_rank], [0.0, *known, min(known[-1], -20.0)])
            )
        errors[-1] = 0.0
        return solver.singular_values, np.minimum.accumulate(np.minimum(errors, 1.0))

    def approximate(
        self, layer: Layer, scheme: Scheme, ranks: Sequence[int]
    ) -> list[Approximation]:
        """Return the best approximations of a layer at the given ranks."""
        weight = read_weight(self._model, layer)
        bias = read_bias(self._model, layer)
        solver = self._factorizer(layer, scheme, weight, max(ranks))
        result = []
        for rank in ranks:
            factors = solver.factorize(rank)
            dense = scheme.weight(factors.left @ factors.right)
            moved = None
            if bias is not None:
                moved = bias + self._shift(layer, scheme, weight, bias, factors)
            result.append(Approximation(factors, dense, moved))
        return result

    def _factorizer(
        self, layer: Layer, scheme: Scheme, weight: NDArray[Any], max_rank: int
    ) -> Solver:
        key = (layer.name, scheme.name)
        found = self._solvers.pop(key, None)
        if found is None or found[0].max_rank < max_rank:
            found = self._decompose(layer, scheme, weight, max_rank)
        self._solvers[key] = found
        while sum(size for _, size in self._solvers.values()) > KEPT and len(self._solvers) > 1:
            self._solvers.popitem(last=False)
        return found[0]

    def _decompose(
        self, layer: Layer, scheme: Scheme, weight: NDArray[Any], max_rank: int
    ) -> tuple[Solver, int]:
        moment = self._moment(layer)
        wide = self.is_wide(layer)
        # A bias of its own absorbs the mean, any other is part of a wide layer's outputs.
        biased = len(self._model.graph.node[layer.uses[0].node].input) > 2
        centred = layer.bias is not None or (wide and biased)
        second = moment.covariance() if centred else moment.second
        kind = OutputFactorizer if wide else WeightedFactorizer
        return kind(scheme, weight, second, max_rank), 2 * second.nbytes + 16 * layer.params

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
        """Mean of what the approximation takes from the output."""
        mean = self._moment(layer).mean
        if self.is_wide(layer):
            # Orthogonal projection of the outputs on what the second factor reaches.
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
