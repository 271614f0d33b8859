"""Samples on their way through the blocks of a model, the original and the compressed one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import onnx

from cobla_onnx.distillation.lessons import Taught, in_shards, joined
from cobla_onnx.graph.layers import all_inputs
from cobla_onnx.graph.protos import given_inputs
from cobla_onnx.graph.subgraph import make_value, prefix
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import Rows, Shelf

__all__ = ["Chosen", "Stream", "kept", "names_of"]


@dataclass(frozen=True)
class Stream:
    """Samples at a cut, each as a batch of its own.

    Attributes
    ----------
    inputs : sequence of dict
        The model's inputs: what crosses a cut and is the same in both models is made of them.
    most : int
        Samples that may run at a time, where the tensors at both ends join.
    joined : collection of str
        Tensors of which samples join along the first axis.
    at : str
        The tensor at the cut; empty at the model's inputs.
    original, compressed : sequence of dict
        What it is in both models, by its name.
    expected : sequence of dict, optional
        Targets of the model's outputs; those that the original gives for `inputs` by default.
    """

    inputs: Sequence[Feeds]
    most: int
    joined: Collection[str] = ()
    at: str = ""
    original: Sequence[Feeds] = ()
    compressed: Sequence[Feeds] = ()
    expected: Sequence[Feeds] | None = None

    def width(self, end: str) -> int:
        """Samples that may run at a time from here to another cut, or to the model's outputs."""
        return self.most if all(not name or name in self.joined for name in (self.at, end)) else 1

    def read(
        self, chosen: Sequence[int], tensors: Sequence[Feeds], names: Collection[str]
    ) -> Feeds:
        """Put some samples together: of these names, with one of the two tensors at the cut."""
        found = joined(self.inputs, chosen) if set(names) - {self.at} else {}
        at_cut = joined(tensors, chosen) if self.at in names else {}
        return {name: array for name, array in {**found, **at_cut}.items() if name in names}

    def targets(self, taught: Taught, end: str, pool: Pool) -> Sequence[Feeds]:
        """Return what the original makes of each sample at the next cut, or in the end."""
        if end:
            return self._through(taught.model, end, [end], self.original, pool)
        if self.expected is not None:
            return self.expected
        made = self._through(taught.model, end, list(taught.measures), self.original, pool)
        pairs = zip(self.inputs, made, strict=True)
        targets = (taught.single.targets(feeds, outputs) for feeds, outputs in pairs)
        return kept(targets, self.width(end))

    def moved(
        self, end: str, targets: Sequence[Feeds], compressed: onnx.ModelProto, pool: Pool
    ) -> Stream:
        """Return the samples at the next cut, where the original gives the targets."""
        made = self._through(compressed, end, [end], self.compressed, pool)
        return replace(self, at=end, original=targets, compressed=made)

    def _through(
        self,
        model: onnx.ModelProto,
        end: str,
        outputs: Sequence[str],
        tensors: Sequence[Feeds],
        pool: Pool,
    ) -> Sequence[Feeds]:
        # An output that stands at the cut is known.
        known = {self.at}.intersection(outputs)
        part = self.part(model, [name for name in outputs if name not in known])
        taken = names_of(part)
        session = open_session(part, 1, optimized=True, part="a block")

        def run(chosen: Sequence[int]) -> Feeds:
            feeds = self.read(chosen, tensors, taken | known)
            made = run_session(session, {name: feeds[name] for name in taken})
            return {**made, **{name: feeds[name] for name in known}}

        width = self.width(end)
        shards = in_shards(range(len(self.inputs)), width)
        return kept(pool.map(run, shards), width)

    def part(self, model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
        """Cut out what makes tensors of the one at the cut, and of the model's inputs."""
        given = {value.name: value for value in model.graph.input if value.name in self.inputs[0]}
        if self.at:
            array = self.original[0][self.at]
            # Samples that run one at a time may be of several shapes.
            sizes = array.shape[1:] if self.width(self.at) > 1 else (None,) * max(array.ndim - 1, 0)
            given[self.at] = make_value(self.at, array.dtype, (None, *sizes)[: array.ndim])
        part = prefix(model, outputs, given)
        read = {name for node in part.graph.node for name in all_inputs(node)}
        inputs = [value for value in part.graph.input if value.name in read]
        del part.graph.input[:]
        part.graph.input.extend(inputs)
        return part


class Chosen(Sequence[Feeds]):
    """Some of a sequence of batches, which are read when they are asked for."""

    def __init__(self, batches: Sequence[Feeds], places: Sequence[int]) -> None:
        self._batches, self._places = batches, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen: ...
    def __getitem__(self, index: int | slice) -> Feeds | Chosen:
        if isinstance(index, slice):
            return Chosen(self._batches, self._places[index])
        return self._batches[self._places[index]]


def kept(batches: Iterable[Feeds], width: int) -> Sequence[Feeds]:
    """Keep samples that run as many at a time."""
    return Shelf(batches) if width == 1 else Rows(batches)


def names_of(part: onnx.ModelProto) -> set[str]:
    """Names of what a part of the model has to be given."""
    return set(given_inputs(part.graph))
