"""Refit the chosen layers one after the other, each on what the ones before it leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.moments import Moment, MomentSum, Taps, parts_of
from cobla_onnx.calibration.patches import ConvPatch, ProductPatch, patch_of
from cobla_onnx.calibration.probe import Probe
from cobla_onnx.calibration.seen import WIDE, Approximation
from cobla_onnx.graph.expose import expose, prefix
from cobla_onnx.graph.layers import Layer, all_inputs, read_weight
from cobla_onnx.lowrank.factorize import Factorization, Float64
from cobla_onnx.lowrank.refit import refit, refit_second
from cobla_onnx.lowrank.schemes import Scheme
from cobla_onnx.parallel import open_pool
from cobla_onnx.runtime import Feeds

__all__ = ["ChosenLayer", "refit_layers"]

# Pull towards the original weight; the one with the least selection loss is taken.
RIDGES = (0.1, 0.01)


@dataclass(frozen=True)
class ChosenLayer:
    """A layer that is factorised.

    Attributes
    ----------
    index : int
        Of the layer in the probe.
    layer : Layer
    scheme : Scheme
    rank : int
    approximation : Approximation
    """

    index: int
    layer: Layer
    scheme: Scheme
    rank: int
    approximation: Approximation


def refit_layers(
    model: onnx.ModelProto,
    chosen: Sequence[ChosenLayer],
    batches: Callable[[], Iterable[Feeds]],
    selection: Probe,
    *,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Approximation], int]:
    """Refit each layer in topological order, and keep what helps.

    A layer's refit is kept only where the loss on the selection split gets less. Layers
    with no approximated layer before them have nothing to refit.

    Parameters
    ----------
    model : ModelProto
        The original.
    chosen : sequence of ChosenLayer
    batches : callable
        Gives a fresh iterator over the calibration split.
    selection : Probe
        On the selection split.

    Returns
    -------
    approximations : list of Approximation
        In the order of `chosen`.
    kept : int
        How many layers were changed.
    """
    order = sorted(range(len(chosen)), key=lambda i: chosen[i].layer.uses[0].node)
    current = [entry.approximation for entry in chosen]
    best = selection.loss(_weights(chosen, current))
    kept = 0
    for number, position in enumerate(order):
        progress(number, len(order))
        pass_ = _Pass(model, chosen, current, position, threads)
        if not pass_.has_approximated_inputs:
            continue
        for candidate in pass_.candidates(batches):
            trial = [*current]
            trial[position] = candidate
            loss = selection.loss(_weights(chosen, trial))
            if loss < best:
                kept += current[position] is chosen[position].approximation
                current, best = trial, loss
    progress(len(order), len(order))
    return current, kept


def _weights(
    chosen: Sequence[ChosenLayer], approximations: Sequence[Approximation]
) -> dict[int, tuple[NDArray[Any], NDArray[Any] | None]]:
    return {
        entry.index: (found.weight, found.bias)
        for entry, found in zip(chosen, approximations, strict=True)
    }


class _Pass:
    """One layer's inputs in the compressed model beside its outputs in the original."""

    def __init__(
        self,
        model: onnx.ModelProto,
        chosen: Sequence[ChosenLayer],
        current: Sequence[Approximation],
        position: int,
        threads: int,
    ) -> None:
        self._model, self._threads = model, threads
        self._entry = chosen[position]
        layer = self._entry.layer
        self._patches = [patch_of(model, layer, use) for use in layer.uses]
        exposed = expose(model, [entry.layer for entry in chosen], as_inputs=False)
        self._before = prefix(exposed.model, [use.data for use in layer.uses])
        read = {name for node in self._before.graph.node for name in all_inputs(node)}
        self._weights: dict[str, NDArray[Any]] = {}
        for entry, found, weight, bias in zip(
            chosen, current, exposed.weights, exposed.biases, strict=True
        ):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.layer.type)
            if weight in read:
                self._weights[weight] = found.weight.astype(dtype)
            if bias is not None and bias in read and found.bias is not None:
                self._weights[bias] = found.bias.astype(dtype)

    @property
    def has_approximated_inputs(self) -> bool:
        return bool(self._weights)

    def candidates(self, batches: Callable[[], Iterable[Feeds]]) -> Iterator[Approximation]:
        """Yield the refitted layer for each ridge."""
        entry = self._entry
        old = entry.approximation
        # Where vectors are too wide to be multiplied out, the first factor stays.
        first = None
        if self._patches[0].size > WIDE:
            factors = old.factors
            first = factors.left if entry.scheme.inputs_first else factors.right.swapaxes(1, 2)
        joint = self._joint(batches, first)
        outputs = entry.scheme.rows_of(old.weight).shape[1]
        size = joint.mean.shape[1] - outputs
        second = joint.second if old.bias is None else joint.covariance()
        inner, cross = second[:, :size, :size], second[:, size:, :size]
        weight = read_weight(self._model, entry.layer)
        for ridge in RIDGES:
            if first is None:
                factors = refit(entry.scheme, weight, inner, cross, entry.rank, ridge)
            else:
                factors = refit_second(entry.scheme, old.factors, inner, cross, ridge)
            yield self._approximation(factors, joint.mean, size, first)

    def _approximation(
        self, factors: Factorization, mean: Float64, size: int, first: Float64 | None
    ) -> Approximation:
        entry = self._entry
        dense = entry.scheme.weight(factors.left @ factors.right)
        bias = entry.approximation.bias
        if bias is not None:
            if first is None:
                reached = np.einsum("gos,gs->go", entry.scheme.rows_of(dense), mean[:, :size])
            else:
                last = factors.right if entry.scheme.inputs_first else factors.left.swapaxes(1, 2)
                begin = factors.left if entry.scheme.inputs_first else factors.right.swapaxes(1, 2)
                # The first factor was rescaled: its outputs are those seen, column by column.
                scale = np.linalg.norm(begin, axis=1) / np.linalg.norm(first, axis=1)
                signs = np.sign(np.einsum("gsr,gsr->gr", begin, first))
                reached = np.einsum("gro,gr->go", last, mean[:, :size] * scale * signs)
            bias = (mean[:, size:] - reached).reshape(bias.shape)
        return Approximation(factors, dense, bias)

    def _joint(self, batches: Callable[[], Iterable[Feeds]], first: Float64 | None) -> Moment:
        """Moment of (inputs after compression, original outputs), stacked."""
        layer = self._entry.layer
        outputs = prefix(self._model, [use.output for use in layer.uses])
        before = Taps(self._before, [use.data for use in layer.uses], 1, self._weights)
        after = Taps(outputs, [use.output for use in layer.uses], 1)

        def add_up(part: list[Feeds]) -> MomentSum:
            total: MomentSum | None = None
            for feeds in part:
                read, given = before.run(feeds), after.run(feeds)
                for patch, use in zip(self._patches, layer.uses, strict=True):
                    for stacked in _stacked(patch, read[use.data], given[use.output], first):
                        total = total or MomentSum(*stacked.shape[:2])
                        total.add(stacked)
            assert total is not None
            return total

        with open_pool(self._threads) as pool:
            sums = pool.map(add_up, parts_of(batches()))
            total = next(sums)
            for found in sums:
                total.merge(found)
        return total.moment()


def _stacked(
    patch: ConvPatch | ProductPatch, data: NDArray[Any], output: NDArray[Any], first: Float64 | None
) -> Iterator[NDArray[np.float64]]:
    """Yield input vectors, seen through the first factor if one is given, above outputs."""
    outputs = patch.outputs(output)
    done = 0
    for vectors in patch.vectors(data):
        wide = vectors.astype(np.float64)
        if first is not None:
            wide = first.swapaxes(1, 2) @ wide
        count = wide.shape[2]
        yield np.concatenate([wide, outputs[:, :, done : done + count]], axis=1)
        done += count
