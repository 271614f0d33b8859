"""Refit the chosen layers one after the other, on the inputs that compressed layers produce.

Which of a layer's candidates is best, the factors before refit among them, is decided where the
layer is: by the error of its own outputs on the held-back samples, which needs their moments alone.
Whether the network gains is asked a few times on the way, after about as many layers each time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.moments import parts_of
from cobla_onnx.calibration.patches import ReadPatch, finite_outputs, patch_of
from cobla_onnx.calibration.positions import Chosen, choose_positions, sample_seeds
from cobla_onnx.calibration.statistics import WIDE
from cobla_onnx.calibration.sums import Joint, JointSum
from cobla_onnx.graph.layers import Layer, Use, read_weight
from cobla_onnx.graph.subgraph import expose, reached_from
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.variants.base import Approximation
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.regression import refit, refit_second
from cobla_onnx.variants.low_rank.shrinkage import shrink_joint
from cobla_onnx.variants.low_rank.svd import Factorization, Float64
from cobla_onnx.variants.low_rank.weighted_svd import inputs_first
from cobla_onnx.variants.registry import require_family

__all__ = ["ChosenLayer", "refit_layers", "replaced_weights"]

Pairing: TypeAlias = Callable[[NDArray[Any], NDArray[Any], Chosen], "Iterator[VectorPair]"]
"""Yields a layer's input vectors beside its outputs, from one batch of both tensors."""

VectorPair: TypeAlias = tuple[Float64, NDArray[Any]]
"""Input and output vectors at the same positions, shapes (groups, size or outputs, positions)."""

Item = TypeVar("Item")

_Sums: TypeAlias = tuple[JointSum, JointSum]
"""Over the calibration split, and over the samples held back."""

Seeded: TypeAlias = tuple[tuple[Feeds, Feeds], tuple[int, ...]]
"""A batch's tensors in the original and in the compressed model, and its samples' seeds."""

# Strengths of the ridge towards the original weight; that with the least held-back error is used.
RIDGES = (0.1, 0.01)
# Times that the loss of the whole network is measured on the way.
CHECKS = 8
# Vectors for each of a layer's inputs that a regression gets, over all samples, and the least
# number of a sample's: the excess error of least squares is about 1 / `VECTORS`.
VECTORS, LEAST_VECTORS = 32, 64


@dataclass(frozen=True)
class ChosenLayer:
    """A layer that is replaced.

    Attributes
    ----------
    index : int
        Of the layer in the probe.
    layer : Layer
    form : Form
    level : int
    approximation : Approximation
        Of the family that the form belongs to.
    importance : float64 array, optional
        How much each of the layer's outputs counts.
    """

    index: int
    layer: Layer
    form: Any
    level: int
    approximation: Any
    importance: Float64 | None = None


def refit_layers(
    model: onnx.ModelProto,
    chosen: Sequence[ChosenLayer],
    batches: Callable[[], Iterable[Feeds]],
    selection: Probe,
    *,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Approximation], int]:
    """Refit each layer in topological order, and keep refits where they help.

    A layer's refit is kept only if it lowers the error of the layer's outputs on the selection
    split, and if the layers between two checks, of which it is one, lower the loss there. Layers
    with no approximated layer before them have nothing to refit.

    Parameters
    ----------
    model : ModelProto
        The original.
    chosen : sequence of ChosenLayer
    batches : callable
        Gives a fresh iterator over the calibration split.
    selection : Probe
        Has the samples of the selection split, and evaluates the loss there.

    Returns
    -------
    approximations : list of Approximation
        In the order of `chosen`.
    kept : int
        How many layers were changed.
    """
    order = sorted(range(len(chosen)), key=lambda i: chosen[i].layer.uses[0].node)
    current = [entry.approximation for entry in chosen]
    best = selection.loss(replaced_weights(chosen, current))
    selection.rest()
    walk = _Walk(model, chosen, batches, selection.batches, threads)
    able = [i for i in order if _refits(chosen[i]) and walk.is_moved(chosen[i].layer)]
    done = 0
    for section in _sections(able):
        start, before = walk.place, list(current)
        for position in section:
            progress(done, len(able))
            current[position] = _Refit(model, chosen[position]).best(walk, current)
            done += 1
        if all(current[position] is before[position] for position in section):
            continue
        loss = selection.loss(replaced_weights(chosen, current))
        selection.rest()
        if loss < best:
            best = loss
        else:
            current, walk.place = before, start
    progress(len(able), len(able))
    kept = sum(made is not entry.approximation for made, entry in zip(current, chosen, strict=True))
    return current, kept


def _refits(entry: ChosenLayer) -> bool:
    return require_family(entry.form.name).refits


def _sections(items: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut a sequence into at most `CHECKS` parts of about the same length."""
    count = min(CHECKS, len(items))
    edges = [number * len(items) // max(count, 1) for number in range(count + 1)]
    for start, end in itertools.pairwise(edges):
        yield items[start:end]


def replaced_weights(
    chosen: Sequence[ChosenLayer], approximations: Sequence[Approximation]
) -> dict[int, tuple[NDArray[Any], NDArray[Any] | None]]:
    """Approximated weight and bias of each chosen layer, in the form that `Probe` takes."""
    return {
        entry.index: (found.weight, found.bias)
        for entry, found in zip(chosen, approximations, strict=True)
    }


class _Walk:
    """Both models, original and compressed, with the tensors of all samples before a layer.

    Attributes
    ----------
    place : tuple of Frontier
        How far the samples are in the original and in the compressed model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        chosen: Sequence[ChosenLayer],
        batches: Callable[[], Iterable[Feeds]],
        held_back: Iterable[Feeds],
        threads: int,
    ) -> None:
        self._model, self._chosen, self._threads = model, chosen, threads
        self._seeds = [sample_seeds(feeds) for feeds in batches()]
        self._made = len(self._seeds)
        self._samples = sum(map(len, self._seeds))
        self._seeds += [sample_seeds(feeds) for feeds in held_back]
        self._exposed = expose(model, [entry.layer for entry in chosen], as_inputs=False)

        def every() -> Iterable[Feeds]:
            return itertools.chain(batches(), held_back)

        self.place = Frontier(model, every), Frontier(self._exposed.model, every)
        self._moved = reached_from(self._exposed.model, self._exposed.weights)

    def is_moved(self, layer: Layer) -> bool:
        """Whether any approximated layer comes before this one."""
        return any(use.data in self._moved for use in layer.uses)

    def joint(
        self, layer: Layer, current: Sequence[Approximation], pairing: Sequence[Pairing]
    ) -> tuple[Joint, Joint]:
        """Moments of (inputs after compression, original outputs), over all uses of a layer.

        All samples are advanced to its first use. The second moments are of the samples held back.
        """
        weights = self._feeds(current)
        places = self.place
        sums: list[_Sums] = []
        for use, paired in zip(layer.uses, pairing, strict=True):
            found, places = self._see(layer, use, paired, places, weights)
            sums.append(found)
            if use is layer.uses[0]:
                self.place = places
        made, held_back = sums[0]
        for more_made, more_held_back in sums[1:]:
            made.merge(more_made)
            held_back.merge(more_held_back)
        return made.joint(), held_back.joint()

    def _feeds(self, current: Sequence[Approximation]) -> dict[str, NDArray[Any]]:
        """Weights and biases of all chosen layers, by their input names in the exposed model."""
        feeds: dict[str, NDArray[Any]] = {}
        names = zip(self._exposed.weights, self._exposed.biases, strict=True)
        for entry, found, (weight, bias) in zip(self._chosen, current, names, strict=True):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.layer.type)
            feeds[weight] = found.weight.astype(dtype)
            if bias is not None and found.bias is not None:
                feeds[bias] = found.bias.astype(dtype)
        return feeds

    def _see(
        self,
        layer: Layer,
        use: Use,
        paired: Pairing,
        places: tuple[Frontier, Frontier],
        weights: dict[str, NDArray[Any]],
    ) -> tuple[_Sums, tuple[Frontier, Frontier]]:
        """Sum over the samples at one use; also return the frontiers before it."""
        original, compressed = places
        crossing = original.crossing(use.node), compressed.crossing(use.node)
        stores = Store(), Store()
        right = original.taps([*crossing[0], use.output])
        left = compressed.taps([*crossing[1], use.data], weights)
        patch = patch_of(self._model, layer, use)
        most = max(LEAST_VECTORS, math.ceil(VECTORS * patch.size / self._samples))

        def add_up(part: list[Seeded]) -> tuple[JointSum, list[list[Feeds]]]:
            total: JointSum | None = None
            moved = []
            for pair, seeds in part:
                given, read = right.run(pair[0]), left.run(pair[1])
                chosen = choose_positions(patch, read[use.data], seeds, most)
                wanted = finite_outputs(given[use.output])
                for vectors, outputs in paired(read[use.data], wanted, chosen):
                    groups, size = vectors.shape[:2]
                    total = total or JointSum(groups, size, outputs.shape[1])
                    total.add(vectors, outputs, chosen.each, chosen.share)
                values = zip((given, read), crossing, strict=True)
                moved.append([{name: found[name] for name in names} for found, names in values])
            assert total is not None
            return total, moved

        totals: list[JointSum | None] = [None, None]
        pairs = zip(original.batches(), compressed.batches(), strict=True)
        seeded = zip(pairs, self._seeds, strict=True)
        # Splits of the units, in their order.
        numbers = (len(list(parts_of(split))) for split in self._split(self._seeds))
        of_split = [number for number, count in enumerate(numbers) for _ in range(count)]
        with open_pool(self._threads) as pool:
            units = (part for split in self._split(seeded) for part in parts_of(split))
            found_units = pool.map(add_up, units, self._threads)
            for split, (found, moved) in zip(of_split, found_units, strict=True):
                total = totals[split]
                if total is None:
                    totals[split] = found
                else:
                    total.merge(found)
                for batch in moved:
                    for store, values in zip(stores, batch, strict=True):
                        store.put(values)
        made, held_back = totals
        assert made is not None
        assert held_back is not None
        moved_to = original.moved_to(stores[0]), compressed.moved_to(stores[1])
        return (made, held_back), moved_to

    def _split(self, batches: Iterable[Item]) -> Iterator[Iterable[Item]]:
        """Part what belongs to the calibration split's batches from what follows."""
        rest = iter(batches)
        yield itertools.islice(rest, self._made)
        yield rest


class _Refit:
    """Refits one layer to the original's outputs on the inputs after compression."""

    def __init__(self, model: onnx.ModelProto, entry: ChosenLayer) -> None:
        self._model, self._entry = model, entry
        self._patches = [patch_of(model, entry.layer, use) for use in entry.layer.uses]

    def best(self, walk: _Walk, current: Sequence[Approximation]) -> Approximation:
        """Refit the layer under each ridge; return the best, or what there was if none is better.

        By the error of the layer's outputs on the samples held back.
        """
        entry = self._entry
        old = entry.approximation
        # Where vectors are too wide for their second moment, the first factor stays.
        weight = read_weight(self._model, entry.layer)
        first, rows = None, entry.form.rows_of(weight).astype(np.float64)
        if self._patches[0].size > WIDE:
            first, last = inputs_first(entry.form, old.factors)
            rows = last.swapaxes(1, 2)
        pairing = [partial(_paired, patch, first) for patch in self._patches]
        joint, held_back = walk.joint(entry.layer, current, pairing)
        inputs = joint.inputs
        own_bias = old.bias is not None
        inner, cross = shrink_joint(
            inputs.covariance() if own_bias else inputs.second,
            joint.covariance() if own_bias else joint.cross,
            rows,
            inputs.effective,
            np.zeros_like(inputs.mean) if own_bias else inputs.mean,
        )
        best: Approximation = old
        least = self._error(held_back, old, first)
        for ridge in RIDGES:
            if first is None:
                factors = refit(
                    entry.form, weight, inner, cross, entry.level, ridge, entry.importance
                )
            else:
                factors = refit_second(entry.form, old.factors, inner, cross, ridge)
            made = self._approximation(factors, joint, first)
            error = self._error(held_back, made, first)
            if error < least:
                best, least = made, error
        return best

    def _approximation(
        self, factors: Factorization, joint: Joint, first: Float64 | None
    ) -> LowRankWeight:
        made = LowRankWeight(self._entry.form, factors, None)
        bias = self._entry.approximation.bias
        if bias is not None:
            reached = np.einsum("gos,gs->go", self._rows(made, first), joint.inputs.mean)
            made = made.with_bias((joint.mean - reached).reshape(bias.shape))
        return made

    def _rows(self, made: LowRankWeight, first: Float64 | None) -> Float64:
        """What turns the vectors of the walk into outputs, shape (groups, outputs, size)."""
        form = self._entry.form
        if first is None:
            return np.asarray(form.rows_of(made.weight))
        begin, last = inputs_first(form, made.factors)
        # The first factor was rescaled: so are its measured outputs, column by column.
        before = np.linalg.norm(first, axis=1)
        scale = np.linalg.norm(begin, axis=1) / np.where(before > 0, before, 1.0)
        signs = np.sign(np.einsum("gsr,gsr->gr", begin, first))
        return np.asarray((last * (scale * signs)[:, :, None]).swapaxes(1, 2))

    def _error(self, joint: Joint, made: LowRankWeight, first: Float64 | None) -> float:
        return joint.squared_error(self._rows(made, first), made.bias, self._entry.importance)


def _paired(
    patch: ReadPatch,
    first: Float64 | None,
    data: NDArray[Any],
    output: NDArray[Any],
    chosen: Chosen,
) -> Iterator[VectorPair]:
    """Yield input vectors (through the first factor, if given) beside output vectors."""
    outputs = patch.outputs(output)
    if chosen.index is not None:
        outputs = outputs[:, :, chosen.index]
    done = 0
    for vectors in patch.vectors(data, chosen.index, chosen.each):
        wide = vectors.astype(np.float64)
        if first is not None:
            wide = first.swapaxes(1, 2) @ wide
        count = wide.shape[2]
        yield wide, outputs[:, :, done : done + count]
        done += count
