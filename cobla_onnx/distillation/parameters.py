"""All numbers of replacements that may learn, as one flat array."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """One tensor that learns: whose it is, what it is called, and where its numbers lie."""

    replacement: int
    part: str
    name: str
    place: slice
    array: NDArray[Any]


class Parameters:
    """The factors, scales and biases of replacements that may learn.

    They learn in single precision. What is stored is their rounding, in half precision say, and
    where they are judged, it is by that.

    Parameters
    ----------
    model : ModelProto
        In which the replacements stand for layers; its outputs are compared.
    replacements : sequence of Replacement

    Attributes
    ----------
    rewritten : Rewritten
        The model with the replacements, and the names of what they store.
    """

    def __init__(self, model: onnx.ModelProto, replacements: Sequence[Replacement]) -> None:
        # A bias that stays as it is stands in the model, and would not be the replacement's.
        self._replacements = [_with_own_bias(model, each) for each in replacements]
        self.rewritten: Rewritten = rewrite_named(model, self._replacements)
        self._tensors: list[_Tensor] = []
        self.keep(name for names in self.rewritten.stored for name in names.values())

    def keep(self, names: Collection[str] | Iterator[str]) -> None:
        """Let tensors of these names alone learn, of those that may."""
        wanted, begin = set(names), 0
        self._tensors = []
        for number, replacement in enumerate(self._replacements):
            for part, array in _learnable(replacement).items():
                name = self.rewritten.stored[number][part]
                if name in wanted:
                    place = slice(begin, begin + array.size)
                    self._tensors.append(_Tensor(number, part, name, place, array))
                    begin = place.stop

    def of(self, names: Collection[str]) -> Parameters:
        """Return those of these names alone, in the same model."""
        part = copy.copy(self)
        part.keep([name for name in self.names if name in set(names)])
        return part

    def places(self, names: Collection[str]) -> NDArray[np.intp]:
        """Where the numbers of tensors of these names are, in the order in which they are."""
        wanted = [np.arange(t.place.start, t.place.stop) for t in self._tensors if t.name in names]
        return np.concatenate(wanted) if wanted else np.zeros(0, np.intp)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [tensor.name for tensor in self._tensors]

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self._tensors[-1].place.stop if self._tensors else 0

    def start(self) -> Flat:
        """Return their present values."""
        return self._flat([tensor.array for tensor in self._tensors])

    def sizes(self) -> Flat:
        """Root mean square of the tensor that each number belongs to; of all, where it is 0."""
        values = self.start()
        overall = max(_root_mean_square(values), float(np.finfo(np.float32).tiny))
        result = np.empty_like(values)
        for tensor in self._tensors:
            result[tensor.place] = _root_mean_square(values[tensor.place]) or overall
        return result

    def feeds(self, values: Flat) -> dict[str, NDArray[Any]]:
        """Return the tensors by their names; views of the flat array."""
        return {t.name: values[t.place].reshape(t.array.shape) for t in self._tensors}

    def gathered(self, tensors: Mapping[str, NDArray[Any]]) -> Flat:
        """Return tensors of these names and shapes, such as gradients, as a flat array."""
        return self._flat([tensors[tensor.name] for tensor in self._tensors])

    def replacements(self, values: Flat) -> list[Replacement]:
        """Return the replacements with other values, as they are stored.

        Raises
        ------
        ModelError
            If one overflows the type in which it is stored.
        """
        changed: list[dict[str, NDArray[Any]]] = [{} for _ in self._replacements]
        for tensor in self._tensors:
            its = values[tensor.place].reshape(tensor.array.shape)
            changed[tensor.replacement][tensor.part] = its
        return [
            replacement.with_parts(its, its.pop(BIAS, None))
            for replacement, its in zip(self._replacements, changed, strict=True)
        ]

    def _flat(self, arrays: Sequence[NDArray[Any]]) -> Flat:
        if not arrays:
            return np.zeros(0, np.float32)
        return np.concatenate([array.reshape(-1).astype(np.float32) for array in arrays])


def _with_own_bias(model: onnx.ModelProto, replacement: Replacement) -> Replacement:
    if replacement.bias is not None:
        return replacement
    stored = read_bias(model, replacement.layer)
    return replacement if stored is None else replacement.with_parts({}, stored)


def _learnable(replacement: Replacement) -> dict[str, NDArray[Any]]:
    own = {} if replacement.bias is None else {BIAS: replacement.bias}
    return {**replacement.learnable, **own}


def _root_mean_square(values: NDArray[Any]) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean())) if values.size else 0.0
