"""Walk the samples through the original and the compressed model, from layer to layer.

At each layer the moments of its inputs after compression with the original's outputs are summed,
over the calibration split and over the samples held back. What layers behind it become does not
matter yet, so that each layer's weight can be decided when the samples are there.

Layers that do not depend on each other, such as those that read one tensor, are seen in one go.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store, can_be_fed
from cobla_onnx.calibration.evaluation.probe import Weights
from cobla_onnx.calibration.moment import Joint
from cobla_onnx.calibration.moments import Taps, parts_of
from cobla_onnx.calibration.patches import Patch, patch_of
from cobla_onnx.calibration.positions import (
    Chosen,
    choose_positions,
    enough_positions,
    sample_seeds,
)
from cobla_onnx.calibration.sums import JointSum
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.graph.subgraph import expose, reached_from
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.temporary import SpareFiles

__all__ = ["Request", "VectorPair", "Walk"]

Pairing: TypeAlias = Callable[[NDArray[Any], NDArray[Any], Chosen], "Iterator[VectorPair]"]
"""Yields a layer's input vectors beside its outputs, from one batch of both tensors."""

VectorPair: TypeAlias = tuple[NDArray[Any], NDArray[Any]]
"""Input and output vectors at the same positions, shapes (groups, size or outputs, positions)."""

Item = TypeVar("Item")

Joints: TypeAlias = tuple[Joint, Joint]
"""Over the calibration split, and over the samples held back."""

Seeded: TypeAlias = tuple[tuple[Feeds, Feeds], tuple[int, ...]]
"""A batch's tensors in the original and in the compressed model, and its samples' seeds."""

# Vectors for each of a layer's inputs that a regression gets, over all samples: the excess error
# of least squares is about 1 / `VECTORS`.
VECTORS = 32
# Most bytes of sums in all units of work together, beside those of the units that are done.
SUMS = 1 << 28


@dataclass(frozen=True)
class Request:
    """What the regression of a layer needs.

    Attributes
    ----------
    layer : Layer
    pairing : sequence of callable
        For each use.
    shape : tuple of int
        Groups, outputs and entries of the input vectors that `pairing` yields.
    exact : bool
        As for `JointSum`.
    """

    layer: Layer
    pairing: Sequence[Pairing]
    shape: tuple[int, int, int]
    exact: bool

    def empty(self) -> JointSum:
        """Return a sum of nothing."""
        groups, outputs, size = self.shape
        return JointSum(groups, size, outputs, self.exact)


@dataclass(frozen=True)
class _Sight:
    """A use of a layer, and what is summed there."""

    request: Request
    use: Use
    patch: Patch
    most: int
    pairing: Pairing

    def add(self, total: JointSum, given: Feeds, read: Feeds, seeds: Sequence[int]) -> None:
        """Add a batch's tensors in the original and in the compressed model."""
        data = read[self.use.data]
        chosen = choose_positions(self.patch, data, seeds, self.most)
        for vectors, outputs in self.pairing(data, given[self.use.output], chosen):
            total.add(vectors, outputs, chosen.each, chosen.share)


@dataclass(frozen=True)
class _Parts:
    """What runs both models from where the samples are.

    Attributes
    ----------
    original, compressed : Taps
    shared : Taps, optional
        Runs before them what is the same for both.
    """

    original: Taps
    compressed: Taps
    shared: Taps | None = None

    def run(self, pair: tuple[Feeds, Feeds]) -> tuple[Feeds, Feeds]:
        """Return the tensors of a batch in the original and in the compressed model."""
        if self.shared is not None:
            pair = (self.shared.run(pair[0]),) * 2
        return self.original.run(pair[0]), self.compressed.run(pair[1])


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
    place : Frontier
        How far the samples are in the compressed model: before the layer that was asked for, or
        before one that is seen with it. It may be set back to an earlier one.
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

        self.place = Frontier(self._exposed.model, every)
        # The original never goes back: none of its tensors depends on what layers become.
        self._original, self._line = Frontier(model, every), 0
        self._spare = SpareFiles()
        self._ahead: dict[str, Joints] = {}
        self._moved = reached_from(self._exposed.model, self._exposed.weights)

    def is_moved(self, layer: Layer) -> bool:
        """Whether any approximated layer comes before this one."""
        return any(use.data in self._moved for use in layer.uses)

    def joint(
        self,
        request: Request,
        weights: Weights,
        following: Sequence[Request] = (),
        beside: int = 0,
    ) -> Joints:
        """Moments of (inputs after compression, original outputs), over all uses of a layer.

        All samples are advanced to its first use. The second moments are of the samples held back.

        Parameters
        ----------
        request : Request
        weights : mapping of int to (array, array or None)
            Of all layers that are replaced.
        following : sequence of Request
            All those that will come, in the order of the model.
        beside : int
            How many of these may be seen in one go, where they do not depend on this layer: the
            weights that they depend on stay as they are until then.
        """
        if request.layer.name not in self._ahead:
            group = self._group(request, following[:beside])
            found = self._joints(group, weights, following[len(group) - 1 :])
            for each, joints in zip(group, found, strict=True):
                self._ahead[each.layer.name] = joints
        return self._ahead.pop(request.layer.name)

    def outputs(self, place: Frontier, weights: Weights, names: Iterable[str]) -> Iterator[Feeds]:
        """Yield outputs of the compressed model on the samples held back, from a place on."""
        taps = place.taps(names, self._feeds(weights), threads=self._threads)
        for feeds in place.batches(self._made):
            yield taps.run(feeds)

    def _group(self, request: Request, following: Sequence[Request]) -> list[Request]:
        """Return what is seen with a layer: those next ones that depend on none of the group."""
        group, size = [request], request.empty().nbytes
        for other in following:
            size += other.empty().nbytes
            if any(len(each.layer.uses) > 1 for each in (group[-1], other)):
                break
            outputs = [each.layer.uses[0].output for each in group]
            depends = other.layer.uses[0].data in reached_from(self._model, outputs)
            if depends or size * self._threads > SUMS:
                break
            group.append(other)
        return group

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

    def _joints(
        self, group: Sequence[Request], weights: Weights, following: Sequence[Request]
    ) -> list[Joints]:
        """Sum over all uses of a group's layers, which are several layers or several uses."""
        feeds = self._feeds(weights)
        places = self._original, self.place
        sums: list[list[JointSum]] = []
        for uses in zip(*(self._sights(request) for request in group), strict=True):
            last = not following and uses[0].use is group[0].layer.uses[-1]
            found, moved = self._sums_at(uses, places, feeds, following, last)
            if not sums:
                self._original, self.place = moved
                self._line = max(self._line, uses[-1].use.node + 1)
            for total, more in zip(itertools.chain(*sums), itertools.chain(*found), strict=False):
                total.merge(more)
            sums, places = sums or found, moved
        # Each sum is freed before the next moment is made of one: they may be large.
        return [(each.pop(0).joint(), each.pop(0).joint()) for each in sums]

    def _sights(self, request: Request) -> Iterator[_Sight]:
        """Yield the uses of a layer."""
        for use, pairing in zip(request.layer.uses, request.pairing, strict=True):
            patch = patch_of(self._model, request.layer, use)
            most = enough_positions(patch, self._samples, VECTORS)
            yield _Sight(request, use, patch, most, pairing)

    def _sums_at(
        self,
        sights: Sequence[_Sight],
        places: tuple[Frontier, Frontier],
        weights: dict[str, NDArray[Any]],
        following: Sequence[Request],
        last: bool,
    ) -> tuple[list[list[JointSum]], tuple[Frontier, Frontier]]:
        """Sum at some uses; also return the frontiers after them and before the first of them.

        At the last of all uses nothing is kept but what `outputs` needs.
        """
        original, compressed = places
        wanted = [sight.use.output for sight in sights]
        # The original's layers need not run again; the compressed ones will have other weights.
        line = max(self._line, sights[-1].use.node + 1)
        passed = {
            use.output for each in following for use in each.layer.uses[:1] if use.node < line
        }
        crossing = (
            [] if last else sorted(passed.union(original.crossing(line))),
            compressed.crossing(sights[0].use.node),
        )
        stores = Store(spare=self._spare), Store(spare=self._spare)
        reads = [sight.use.data for sight in sights]
        parts = self._parts(places, ([*crossing[0], *wanted], [*crossing[1], *reads]), weights)

        def add_up(part: list[Seeded]) -> tuple[list[JointSum], list[list[Feeds]]]:
            totals = [sight.request.empty() for sight in sights]
            moved = []
            for pair, seeds in part:
                given, read = parts.run(pair)
                for sight, total in zip(sights, totals, strict=True):
                    sight.add(total, given, read, seeds)
                values = zip((given, read), crossing, strict=True)
                moved.append([{name: found[name] for name in names} for found, names in values])
            return totals, moved

        totals = [[sight.request.empty(), sight.request.empty()] for sight in sights]
        size = sum(total[0].nbytes for total in totals)
        if original.at_start and compressed.at_start:
            pairs: Iterable[tuple[Feeds, Feeds]] = ((feeds, feeds) for feeds in original.batches())
        else:
            pairs = zip(original.batches(), compressed.batches(), strict=True)
        seeded = zip(pairs, self._seeds, strict=True)
        # Splits of the units, in their order.
        numbers = (len(list(parts_of(split))) for split in self._split(self._seeds))
        of_split = [number for number, count in enumerate(numbers) for _ in range(count)]
        with open_pool(self._threads) as pool:
            units = (part for split in self._split(seeded) for part in parts_of(split))
            at_once = max(1, min(self._threads, SUMS // size))
            found_units = pool.map(add_up, units, at_once)
            for split, (found, moved) in zip(of_split, found_units, strict=True):
                for total, more in zip(totals, found, strict=True):
                    total[split].merge(more)
                for batch in moved:
                    stores[0].put(batch[0])
                    stores[1].put({} if last and split == 0 else batch[1])
        if last:
            return totals, (original, compressed.moved_to(stores[1], self._made))
        return totals, (original.moved_to(stores[0]), compressed.moved_to(stores[1]))

    def _parts(
        self,
        places: tuple[Frontier, Frontier],
        names: tuple[Sequence[str], Sequence[str]],
        weights: Mapping[str, NDArray[Any]],
    ) -> _Parts:
        """Open what leads to tensors of both models; before the first layer, one for both."""
        original, compressed = places
        if original.at_start and compressed.at_start:
            begin = min(use.node for layer in self._layers.values() for use in layer.uses)
            shared = original.taps(original.crossing(begin))
            values = shared.run(next(original.batches()))
            if can_be_fed(values):
                with contextlib.suppress(ModelError):
                    right = original.at(values).taps(names[0])
                    return _Parts(right, compressed.at(values).taps(names[1], weights), shared)
        return _Parts(original.taps(names[0]), compressed.taps(names[1], weights))

    def _split(self, batches: Iterable[Item]) -> Iterator[Iterable[Item]]:
        """Part what belongs to the calibration split's batches from what follows."""
        rest = iter(batches)
        yield itertools.islice(rest, self._made)
        yield rest
