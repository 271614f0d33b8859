"""All numbers of replacements that may learn, as one flat array."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.layers import read_bias
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import BIAS, Rewritten, rewrite_named

__all__ = ["Flat", "Parameters"]

Flat: TypeAlias = NDArray[np.float32]
"""Shape (parameters,)."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor: whose it is, what it is called there, and where its numbers lie.

    Attributes
    ----------
    name : str
        Of the tensor in the model that is made of it.
    """

    replacement: int
    part: str
    name: str
    place: slice
    shape: tuple[int, ...]


class Parameters:
    """The factors, codes, scales and biases of replacements that may learn.

    They learn in single precision, codes as numbers that are rounded to them in each step. What is
    stored is their rounding, in half precision say, and where they are judged, it is by that.

    Parameters
    ----------
    model : ModelProto
        In which the replacements stand for layers; its outputs are compared.
    replacements : sequence of Replacement

    Attributes
    ----------
    rewritten : Rewritten
        The model with the replacements, in which codes are decoded, and the names of what that
        stores.
    """

    def __init__(self, model: onnx.ModelProto, replacements: Sequence[Replacement]) -> None:
        # A bias that stays as it is stands in the model, and would not be the replacement's.
        self._replacements = [_with_own_bias(model, each) for each in replacements]
        decoded = [each.decoded() for each in self._replacements]
        self.rewritten: Rewritten = rewrite_named(model, decoded)
        self._shapes = [_shapes(each) for each in decoded]
        self._start = [_learnable(each) for each in self._replacements]
        self._tensors: list[_Tensor] = []
        self._read: list[_Tensor] = []
        self.keep(name for names in self.rewritten.stored for name in names.values())

    def keep(self, names: Collection[str] | Iterator[str]) -> None:
        """Let what tensors of these names are made of learn alone, of what may."""
        wanted = set(names)
        learned, read = [], dict[tuple[int, str], tuple[int, ...]]()
        for number, (replacement, parts) in enumerate(
            zip(self._replacements, self._start, strict=True)
        ):
            for part, array in parts.items():
                source = part if part == BIAS else replacement.read_from(part)
                if self._name(number, source) in wanted:
                    learned.append((number, part, source, array.shape))
                    read[number, source] = self._shapes[number][source]
        self._tensors = _placed((n, p, self._name(n, source), s) for n, p, source, s in learned)
        self._read = _placed((n, p, self._name(n, p), shape) for (n, p), shape in read.items())

    def _name(self, number: int, part: str) -> str:
        return self.rewritten.stored[number].get(part, "")

    def of(self, names: Collection[str]) -> Parameters:
        """Return those of these names alone, in the same model."""
        part = copy.copy(self)
        part.keep(set(names).intersection(self.names))
        return part

    def places(self, names: Collection[str]) -> NDArray[np.intp]:
        """Where the numbers behind tensors of these names are, in the order in which they are."""
        wanted = set(names)
        places = [tensor.place for tensor in self._tensors if tensor.name in wanted]
        found = [np.arange(place.start, place.stop) for place in places]
        return np.concatenate(found) if found else np.zeros(0, np.intp)

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the model."""
        return [tensor.name for tensor in self._read]

    @property
    def read_size(self) -> int:
        """How many numbers these tensors have."""
        return self._read[-1].place.stop if self._read else 0

    def start(self) -> Flat:
        """Return the present values of what learns."""
        return _flat([self._start[tensor.replacement][tensor.part] for tensor in self._tensors])

    def sizes(self) -> Flat:
        """Root mean square of the tensor that each number belongs to; of all, where it is 0."""
        values = self.start()
        overall = max(_root_mean_square(values), float(np.finfo(np.float32).tiny))
        result = np.empty_like(values)
        for tensor in self._tensors:
            result[tensor.place] = _root_mean_square(values[tensor.place]) or overall
        return result

    def feeds(self, values: Flat) -> dict[str, NDArray[Any]]:
        """Return the tensors that are made of values, by their names."""
        parts = self._parts(values)
        # Those of other blocks need not be decoded.
        made = {
            number: {
                **self._replacements[number].as_read(_without_bias(parts[number])),
                **_bias_of(parts[number]),
            }
            for number in {tensor.replacement for tensor in self._read}
        }
        return {tensor.name: made[tensor.replacement][tensor.part] for tensor in self._read}

    def gathered(self, tensors: Mapping[str, NDArray[Any]]) -> Flat:
        """Return tensors of these names and shapes, such as gradients, as a flat array."""
        return _flat([tensors[tensor.name] for tensor in self._read])

    def pulled_back(self, values: Flat, gradient: Flat) -> Flat:
        """Return derivatives by values, from those that `gathered` returns."""
        parts, by_read = self._parts(values), dict[int, dict[str, NDArray[Any]]]()
        for tensor in self._read:
            given = by_read.setdefault(tensor.replacement, {})
            given[tensor.part] = gradient[tensor.place].reshape(tensor.shape)
        found = {
            number: {
                **self._replacements[number].pulled_back(
                    _without_bias(parts[number]), _without_bias(given)
                ),
                **_bias_of(given),
            }
            for number, given in by_read.items()
        }
        return _flat([found[tensor.replacement][tensor.part] for tensor in self._tensors])

    def replacements(self, values: Flat) -> list[Replacement]:
        """Return the replacements with other values, as they are stored.

        Raises
        ------
        ModelError
            If one overflows the type in which it is stored.
        """
        return [
            replacement.with_parts(_without_bias(its), its.get(BIAS))
            for replacement, its in zip(self._replacements, self._parts(values), strict=True)
        ]

    def _parts(self, values: Flat) -> list[dict[str, NDArray[Any]]]:
        """Return the values of each replacement by part; views of the flat array."""
        found: list[dict[str, NDArray[Any]]] = [{} for _ in self._replacements]
        for tensor in self._tensors:
            its = values[tensor.place].reshape(tensor.shape)
            found[tensor.replacement][tensor.part] = its
        return found


def _placed(tensors: Iterable[tuple[int, str, str, tuple[int, ...]]]) -> list[_Tensor]:
    """Put tensors one behind the other."""
    found, begin = list[_Tensor](), 0
    for number, part, name, shape in tensors:
        place = slice(begin, begin + math.prod(shape))
        found.append(_Tensor(number, part, name, place, shape))
        begin = place.stop
    return found


def _flat(arrays: Sequence[NDArray[Any]]) -> Flat:
    if not arrays:
        return np.zeros(0, np.float32)
    return np.concatenate([array.reshape(-1).astype(np.float32) for array in arrays])


def _without_bias(parts: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {part: array for part, array in parts.items() if part != BIAS}


def _bias_of(parts: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {BIAS: parts[BIAS]} if BIAS in parts else {}


def _with_own_bias(model: onnx.ModelProto, replacement: Replacement) -> Replacement:
    if replacement.bias is not None:
        return replacement
    stored = read_bias(model, replacement.layer)
    return replacement if stored is None else replacement.with_parts({}, stored)


def _learnable(replacement: Replacement) -> dict[str, NDArray[Any]]:
    own = {} if replacement.bias is None else {BIAS: replacement.bias}
    return {**replacement.learnable, **own}


def _shapes(replacement: Replacement) -> dict[str, tuple[int, ...]]:
    own = {} if replacement.bias is None else {BIAS: replacement.bias.shape}
    return {part: array.shape for part, array in replacement.arrays.items()} | own


def _root_mean_square(values: NDArray[Any]) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean())) if values.size else 0.0
