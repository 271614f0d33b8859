"""Advance all samples through a model node by node, without restarting from the inputs.

Layers are refitted one after another, and each depends on the new weights of those before it.
Running the model from its inputs for each would take time quadratic in their number. A
`Frontier` keeps, for every batch, the live tensors at a cut: those produced before some node
and read at or after it. The next layer starts from there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.moments import Taps
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import all_inputs
from cobla_onnx.graph.macs import infer_shapes
from cobla_onnx.graph.subgraph import make_value, prefix, reached_from
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.temporary import ArrayFile, Place, SpareFiles

__all__ = ["Frontier", "Store", "can_be_fed"]

# Most bytes on disk of the tensors at a cut; where there are more, the cut stays behind.
LIMIT = 1 << 29


def can_be_fed(values: Mapping[str, Any]) -> bool:
    """Whether the tensors of a batch can be inputs: arrays of numbers, not sequences."""
    return all(isinstance(v, np.ndarray) and v.dtype.kind in "biuf" for v in values.values())


class Store:
    """Tensors of a sequence of batches, in an unnamed temporary file.

    Parameters
    ----------
    limit : int
        Most bytes.
    spare : SpareFiles, optional
        Gives the file, and gets it back.
    """

    def __init__(self, limit: int = LIMIT, spare: SpareFiles | None = None) -> None:
        self._file = ArrayFile(spare)
        self._limit = limit
        self._places: list[dict[str, Place]] | None = []

    @property
    def whole(self) -> bool:
        """Whether all batches that were put in were kept."""
        return self._places is not None

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep a batch, unless it is too large, or not numeric."""
        if self._places is None:
            return
        room = self._limit - self._file.size
        if not can_be_fed(values) or sum(array.nbytes for array in values.values()) > room:
            self._places = None
            self._file.clear()
            return
        self._places.append({name: self._file.put(array) for name, array in values.items()})

    def batches(self, begin: int = 0) -> Iterator[Feeds]:
        """Yield the batches in order, from one of them on; their arrays cannot be changed."""
        assert self._places is not None
        for places in self._places[begin:]:
            yield {name: self._file.view(place) for name, place in places.items()}


class Frontier:
    """All samples, advanced to a cut of a model's graph.

    Where onnxruntime does not open the part after the cut, the samples go back to the model's
    inputs: users did not write that part, and should not see its errors.

    Parameters
    ----------
    model : ModelProto
        Its nodes are in topological order. Some weights may be missing.
    batches : callable
        Gives a fresh iterator over the model's inputs.
    """

    def __init__(self, model: onnx.ModelProto, batches: Callable[[], Iterable[Feeds]]) -> None:
        self._model = model
        self._batches = _from(batches)
        self._producer = {n: i for i, node in enumerate(model.graph.node) for n in node.output}
        self._last_reader = {
            name: i for i, node in enumerate(model.graph.node) for name in all_inputs(node)
        }
        # An output may be wanted after any cut.
        self._last_reader |= {value.name: len(model.graph.node) for value in model.graph.output}
        first = next(iter(batches()))
        # Tensors that are the same for all samples are computed anew, not kept for each.
        self._varying = reached_from(model, first)
        self._shapes = infer_shapes(model, {})
        self._given = {name: self._declared(name, value) for name, value in first.items()}
        self._start = self._batches, self._given

    @property
    def at_start(self) -> bool:
        """Whether the samples are where they came in."""
        return self._given is self._start[1]

    def batches(self, begin: int = 0) -> Iterator[Feeds]:
        """Yield the live tensors of each batch from one of them on, as inputs for `taps`."""
        return iter(self._batches(begin))

    def crossing(self, node: int) -> list[str]:
        """Live tensors at the cut before a node, which lies after the present cut."""
        return sorted(
            name
            for name in self._varying
            if self._producer.get(name, -1) < node <= self._last_reader.get(name, -1)
        )

    def taps(
        self,
        names: Iterable[str],
        weights: Mapping[str, NDArray[Any]] | None = None,
        *,
        inputs: Mapping[str, np.dtype[Any]] | None = None,
        threads: int = 1,
    ) -> Taps:
        """Open the part of the model from the present cut to the tensors `names`.

        Parameters
        ----------
        weights : mapping of str to array, optional
            The weights that the model lacks; further ones are allowed.
        inputs : mapping of str to numpy dtype, optional
            Weights that are given with each batch instead.
        """
        fed = {name: make_value(name, dtype) for name, dtype in (inputs or {}).items()}
        try:
            return self._open(list(names), weights or {}, fed, threads)
        except ModelError:
            if self.at_start:
                raise
        self._batches, self._given = self._start
        return self._open(list(names), weights or {}, fed, threads)

    def _open(
        self,
        names: list[str],
        weights: Mapping[str, NDArray[Any]],
        fed: Mapping[str, onnx.ValueInfoProto],
        threads: int,
    ) -> Taps:
        piece = prefix(self._model, names, {**self._given, **fed})
        read = {name for node in piece.graph.node for name in all_inputs(node)}
        missing = {name: array for name, array in weights.items() if name in read}
        return Taps(piece, names, threads, missing)

    def _declared(self, name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
        """Declare a live tensor with the most specific shape that holds for all batches.

        onnxruntime's own inference goes wrong in the readers of a tensor without a known rank, or
        of a computed shape without a known length.
        """
        known = self._shapes.get(name, ())
        if len(known) != array.ndim:
            known = (None,) * array.ndim
        return make_value(name, array.dtype, known)

    def moved_to(self, store: Store, begin: int = 0) -> Frontier:
        """Return the frontier at the cut whose tensors are stored; itself if some are missing.

        Those of batches before `begin` are not asked for.
        """
        if not store.whole:
            return self
        return self.at(next(store.batches(begin)), store.batches)

    def at(self, first: Feeds, batches: Callable[[int], Iterable[Feeds]] | None = None) -> Frontier:
        """Return the frontier at the cut to which the tensors of a first batch belong.

        Without `batches` it consists of this batch alone, and cannot go back to the inputs.
        """
        moved = copy.copy(self)
        moved._batches = batches or (lambda begin: [first][begin:])
        moved._given = {name: self._declared(name, value) for name, value in first.items()}
        if batches is None:
            moved._start = moved._batches, moved._given
        return moved


def _from(batches: Callable[[], Iterable[Feeds]]) -> Callable[[int], Iterable[Feeds]]:
    """Return what yields the batches of a fresh iterator from one of them on."""
    return lambda begin: itertools.islice(batches(), begin, None)
