"""Walk the samples through the original and the compressed model, from layer to layer.

At each layer the moments of its inputs after compression with the original's outputs are summed,
over the calibration split and over the samples held back. What layers behind it become does not
matter yet, so that each layer's weight can be decided when the samples are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store
from cobla_onnx.calibration.evaluation.probe import Weights
from cobla_onnx.calibration.moments import parts_of
from cobla_onnx.calibration.patches import finite_outputs, patch_of
from cobla_onnx.calibration.positions import (
    Chosen,
    choose_positions,
    enough_positions,
    sample_seeds,
)
from cobla_onnx.calibration.sums import Joint, JointSum
from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.graph.subgraph import expose, reached_from
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.runtime.session import Feeds

__all__ = ["VectorPair", "Walk"]

Pairing: TypeAlias = Callable[[NDArray[Any], NDArray[Any], Chosen], "Iterator[VectorPair]"]
"""Yields a layer's input vectors beside its outputs, from one batch of both tensors."""

VectorPair: TypeAlias = tuple[NDArray[Any], NDArray[Any]]
"""Input and output vectors at the same positions, shapes (groups, size or outputs, positions)."""

Item = TypeVar("Item")

Sums: TypeAlias = tuple[JointSum, JointSum]
"""Over the calibration split, and over the samples held back."""

Seeded: TypeAlias = tuple[tuple[Feeds, Feeds], tuple[int, ...]]
"""A batch's tensors in the original and in the compressed model, and its samples' seeds."""

# Vectors for each of a layer's inputs that a regression gets, over all samples: the excess error
# of least squares is about 1 / `VECTORS`.
VECTORS = 32
# Most bytes of sums in all units of work together, beside those of the units that are done.
SUMS = 1 << 28


class Walk:
    """Both models, original and compressed, with the tensors of all samples before a layer.

    Parameters
    ----------
    model : ModelProto
        The original.
    layers : mapping of int to Layer
        Layers that are replaced, by their index in the probe.
    batches : callable
        Gives a fresh iterator over the calibration split.
    held_back : iterable of dict
        Batches of the selection split.
    threads : int

    Attributes
    ----------
    place : tuple of Frontier
        How far the samples are in the original and in the compressed model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Mapping[int, Layer],
        batches: Callable[[], Iterable[Feeds]],
        held_back: Iterable[Feeds],
        threads: int,
    ) -> None:
        self._model, self._layers, self._threads = model, layers, threads
        self._seeds = [sample_seeds(feeds) for feeds in batches()]
        self._made = len(self._seeds)
        self._samples = sum(map(len, self._seeds))
        self._seeds += [sample_seeds(feeds) for feeds in held_back]
        self._exposed = expose(model, list(layers.values()), as_inputs=False)

        def every() -> Iterable[Feeds]:
            return itertools.chain(batches(), held_back)

        self.place = Frontier(model, every), Frontier(self._exposed.model, every)
        self._moved = reached_from(self._exposed.model, self._exposed.weights)

    def is_moved(self, layer: Layer) -> bool:
        """Whether any approximated layer comes before this one."""
        return any(use.data in self._moved for use in layer.uses)

    def joint(
        self,
        layer: Layer,
        weights: Weights,
        pairing: Sequence[Pairing],
        shape: tuple[int, int, int],
        exact: bool,
    ) -> tuple[Joint, Joint]:
        """Moments of (inputs after compression, original outputs), over all uses of a layer.

        All samples are advanced to its first use. The second moments are of the samples held back.

        Parameters
        ----------
        pairing : sequence of callable
            For each use.
        shape : tuple of int
            Groups, outputs and entries of the input vectors that `pairing` yields.
        exact : bool
            As for `JointSum`.
        """
        feeds = self._feeds(weights)
        places = self.place
        groups, outputs, size = shape
        empty = partial(JointSum, groups, size, outputs, exact)
        sums: list[JointSum] = []
        for use, paired in zip(layer.uses, pairing, strict=True):
            found, places = self._see(layer, use, paired, places, feeds, empty)
            if use is layer.uses[0]:
                self.place = places
            for total, more in zip(sums, found, strict=False):
                total.merge(more)
            sums = sums or list(found)
        # Each sum is freed before the next moment is made of one: they may be large.
        return sums.pop(0).joint(), sums.pop(0).joint()

    def _feeds(self, weights: Weights) -> dict[str, NDArray[Any]]:
        """Weights and biases of all chosen layers, by their input names in the exposed model."""
        feeds: dict[str, NDArray[Any]] = {}
        names = zip(self._exposed.weights, self._exposed.biases, strict=True)
        for index, (name, bias_name) in zip(self._layers, names, strict=True):
            weight, bias = weights[index]
            feeds[name] = weight
            if bias_name is not None and bias is not None:
                feeds[bias_name] = bias.astype(weight.dtype)
        return feeds

    def _see(
        self,
        layer: Layer,
        use: Use,
        paired: Pairing,
        places: tuple[Frontier, Frontier],
        weights: dict[str, NDArray[Any]],
        empty: Callable[[], JointSum],
    ) -> tuple[Sums, tuple[Frontier, Frontier]]:
        """Sum over the samples at one use; also return the frontiers before it."""
        original, compressed = places
        crossing = original.crossing(use.node), compressed.crossing(use.node)
        stores = Store(), Store()
        right = original.taps([*crossing[0], use.output])
        left = compressed.taps([*crossing[1], use.data], weights)
        patch = patch_of(self._model, layer, use)
        most = enough_positions(patch, self._samples, VECTORS)

        def add_up(part: list[Seeded]) -> tuple[JointSum, list[list[Feeds]]]:
            total = empty()
            moved = []
            for pair, seeds in part:
                given, read = right.run(pair[0]), left.run(pair[1])
                chosen = choose_positions(patch, read[use.data], seeds, most)
                wanted = finite_outputs(given[use.output])
                for vectors, outputs in paired(read[use.data], wanted, chosen):
                    total.add(vectors, outputs, chosen.each, chosen.share)
                values = zip((given, read), crossing, strict=True)
                moved.append([{name: found[name] for name in names} for found, names in values])
            return total, moved

        totals = empty(), empty()
        pairs = zip(original.batches(), compressed.batches(), strict=True)
        seeded = zip(pairs, self._seeds, strict=True)
        # Splits of the units, in their order.
        numbers = (len(list(parts_of(split))) for split in self._split(self._seeds))
        of_split = [number for number, count in enumerate(numbers) for _ in range(count)]
        with open_pool(self._threads) as pool:
            units = (part for split in self._split(seeded) for part in parts_of(split))
            at_once = max(1, min(self._threads, SUMS // totals[0].nbytes))
            found_units = pool.map(add_up, units, at_once)
            for split, (found, moved) in zip(of_split, found_units, strict=True):
                totals[split].merge(found)
                for batch in moved:
                    for store, values in zip(stores, batch, strict=True):
                        store.put(values)
        moved_to = original.moved_to(stores[0]), compressed.moved_to(stores[1])
        return totals, moved_to

    def _split(self, batches: Iterable[Item]) -> Iterator[Iterable[Item]]:
        """Part what belongs to the calibration split's batches from what follows."""
        rest = iter(batches)
        yield itertools.islice(rest, self._made)
        yield rest
