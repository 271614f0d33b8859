"""Two factor nodes whose weights are decoded from few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer
from cobla_onnx.variants.coded_factors.form import CodedScheme
from cobla_onnx.variants.coded_factors.pair import RoundedPair, arranged
from cobla_onnx.variants.low_rank.nodes import FIRST, SECOND, FactorPair, Pair
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Place, narrowed_bias
from cobla_onnx.variants.storage.tensor import (
    StoredTensor,
    coded_tensor,
    half_tensor,
    tensor_bytes,
)
from cobla_onnx.variants.writing import DEQUANTIZE, FUSED, Writing

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StoredPair", "pair_bytes", "stored_pair"]


def pair_bytes(layer: Layer, form: CodedScheme, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of both factors of each rank, with all that decodes them; never too few."""
    scheme, axes = form.scheme, len(layer.shape)
    groups, rows, columns = scheme.matrix_shape()
    if not scheme.inputs_first:
        rows, columns = columns, rows
    first = tensor_bytes(groups * ranks * rows, groups * ranks, axes, form.bits)
    outputs = np.full_like(ranks, groups * columns // scheme.offsets)
    return first + tensor_bytes(groups * ranks * columns, outputs, axes, form.bits)


@dataclass(frozen=True)
class StoredPair(Pair):
    """Two factors in few bits.

    Attributes
    ----------
    layer, bias, scheme, folded
        As those of `Pair`.
    arrays : mapping of str to array
        Those of both tensors, by ``first_factor/...`` and ``second_factor/...``.
    tensors : mapping of str to StoredTensor
        In the shapes that `Scheme.fold` gives.
    """

    tensors: Mapping[str, StoredTensor]

    def moved(self, place: Place) -> Self:
        """Return the same with equal arrays; they are the tensors'."""
        made = super().moved(place)
        tensors = {
            factor: replace(tensor, arrays=_of(factor, made.arrays))
            for factor, tensor in self.tensors.items()
        }
        return replace(made, tensors=tensors)

    @property
    def learnable(self) -> Mapping[str, NDArray[Any]]:
        """Those of both tensors."""
        return {
            f"{factor}/{part}": array
            for factor, tensor in self.tensors.items()
            for part, array in tensor.learnable.items()
        }

    def _with_parts(self, parts: Mapping[str, NDArray[Any]]) -> Self:
        tensors = {
            factor: tensor.with_parts(self.layer, _of(factor, parts))
            for factor, tensor in self.tensors.items()
        }
        return replace(self, arrays=_arrays(tensors), tensors=tensors)

    def decoded(self) -> FactorPair:
        """Return both factors as they are decoded."""
        values = {factor: tensor.values for factor, tensor in self.tensors.items()}
        return FactorPair(self.layer, values, self.bias, self.scheme, folded=self.folded)

    def read_from(self, part: str) -> str:
        """Name the factor of which a part is one."""
        return part.partition("/")[0]

    def as_read(self, parts: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Round the factors that the parts stand for."""
        return {
            factor: tensor.as_read(its)
            for factor, tensor in self.tensors.items()
            if (its := _of(factor, parts))
        }

    def pulled_back(
        self, parts: Mapping[str, NDArray[Any]], gradients: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Return derivatives by the parts, from those by the factors."""
        return {
            f"{factor}/{part}": array
            for factor, gradient in gradients.items()
            for part, array in self.tensors[factor]
            .pulled_back(_of(factor, parts), gradient)
            .items()
        }

    @property
    def nibbles(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parts that are UINT4."""
        found = {factor: tensor.nibbles for factor, tensor in self.tensors.items()}
        return {f"{f}/{part}": shape for f, each in found.items() for part, shape in each.items()}

    @property
    def optimized_tolerance(self) -> float | None:
        """Tolerance of products in 8 bits, if a factor is dequantised."""
        dequantized = any(tensor.way == DEQUANTIZE for tensor in self.tensors.values())
        return FUSED if dequantized else None

    def written(self, writing: Writing) -> StoredPair:
        """Choose the types and the operators of both factors."""
        tensors = {factor: tensor.written(writing) for factor, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, arrays=_arrays(tensors))

    def dense(self) -> NDArray[Any]:
        """Multiply the decoded factors to the weight that they stand for."""
        left, right = self.scheme.unfold(self.tensors[FIRST].values, self.tensors[SECOND].values)
        return self.scheme.weight(left @ right)

    def stored_factors(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that decode both factors, once for all uses."""
        nodes: list[onnx.NodeProto] = []
        operands = {}
        for factor, tensor in self.tensors.items():
            its = {part: stored[f"{factor}/{part}"] for part in tensor.arrays}
            decoding, operands[factor] = tensor.decode(its, f"{self.layer.name}/{factor}", names)
            nodes += decoding
        return nodes, operands


def stored_pair(layer: Layer, pair: RoundedPair) -> StoredPair:
    """Store both factors in the shapes in which their nodes read them.

    Raises
    ------
    ModelError
        If a number of them overflows half precision.
    """
    scheme = pair.scheme
    if pair.first is None or pair.second is None:
        folded = scheme.fold(pair.factors.left, pair.factors.right)
        made = [half_tensor(layer, each, "a factor of its weight") for each in folded]
    else:
        levels = pair.first.levels, pair.second.levels
        codes = scheme.fold(*arranged(scheme, pair.first.codes, pair.second.codes))
        scales = scheme.fold(*arranged(scheme, pair.first.each_scale(), pair.second.each_scale()))
        made = [coded_tensor(*each) for each in zip(codes, levels, scales, strict=True)]
    tensors = dict(zip((FIRST, SECOND), made, strict=True))
    bias = narrowed_bias(layer, pair.bias)
    return StoredPair(layer, _arrays(tensors), bias, scheme, tensors)


def _of(factor: str, parts: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the parts of one factor, by the names that its tensor has for them."""
    pairs = ((name.partition("/"), array) for name, array in parts.items())
    return {part: array for (whose, _, part), array in pairs if whose == factor}


def _arrays(tensors: Mapping[str, StoredTensor]) -> dict[str, NDArray[Any]]:
    return {f"{f}/{part}": a for f, tensor in tensors.items() for part, a in tensor.arrays.items()}
