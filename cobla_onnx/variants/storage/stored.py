"""A weight that is stored in few bits before the layer's own node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.variants.low_rank.matricisation import layout_of
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Place, Replacement, narrowed_bias, own_node
from cobla_onnx.variants.storage.coding import Coded
from cobla_onnx.variants.storage.tensor import (
    StoredTensor,
    coded_tensor,
    half_tensor,
    tensor_bytes,
)
from cobla_onnx.variants.tied import operand, with_transposes
from cobla_onnx.variants.writing import DEQUANTIZE, FUSED, Writing

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DecodedWeight", "StoredWeight", "coded_weight", "half_weight", "stored_bytes"]

WEIGHT = "weight"


def stored_bytes(layer: Layer, bits: int) -> int:
    """Bytes of a layer's weight in so many bits, with all that decodes it; never too few."""
    groups, outputs = layout_of(layer).rows_of(np.empty(layer.shape, np.bool_)).shape[:2]
    return tensor_bytes(layer.params, int(groups) * int(outputs), len(layer.shape), bits)


@dataclass(frozen=True)
class _BeforeTheNode(Replacement):
    """A weight, however it is stored, and the layer's node as it was."""

    def nodes(
        self,
        node: onnx.NodeProto,
        use: Use,
        operands: Mapping[str, str],
        rest: Sequence[str],
        names: Names,
    ) -> list[onnx.NodeProto]:
        """Return the layer's own node, which reads the decoded weight."""
        reading = self.layer.reading(use)
        weight = operand(operands, (WEIGHT, reading.transposed))
        return [own_node(node, reading.weight_input, weight, rest)]


@dataclass(frozen=True)
class DecodedWeight(_BeforeTheNode):
    """A weight as it is decoded, which is never written into a result.

    Attributes
    ----------
    layer, bias
        As those of `Replacement`.
    arrays : mapping of str to array
        ``weight``, in single precision.
    """

    def dense(self) -> NDArray[Any]:
        """Return the weight."""
        return self.arrays[WEIGHT]

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that turn the weight, where it is read so."""
        return _turned(self.layer, stored[WEIGHT], names)


@dataclass(frozen=True)
class StoredWeight(_BeforeTheNode):
    """A weight in few bits, and the layer's node as it was.

    Attributes
    ----------
    layer, arrays, bias
        As those of `Replacement`; the arrays are those of the tensor.
    tensor : StoredTensor
    """

    tensor: StoredTensor

    def moved(self, place: Place) -> Self:
        """Return the same with equal arrays; they are the tensor's."""
        made = super().moved(place)
        return replace(made, tensor=replace(self.tensor, arrays=made.arrays))

    @property
    def learnable(self) -> Mapping[str, NDArray[Any]]:
        """Those of the tensor."""
        return self.tensor.learnable

    def _with_parts(self, parts: Mapping[str, NDArray[Any]]) -> Self:
        tensor = self.tensor.with_parts(self.layer, parts)
        return replace(self, arrays=tensor.arrays, tensor=tensor)

    def decoded(self) -> Replacement:
        """Return the weight as it is decoded, before the layer's own node."""
        return DecodedWeight(self.layer, {WEIGHT: self.tensor.values}, self.bias)

    def read_from(self, part: str) -> str:
        """Name the weight: it is made of all parts."""
        return WEIGHT

    def as_read(self, parts: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Round the weight that the parts stand for."""
        return {WEIGHT: self.tensor.as_read(parts)} if parts else {}

    def pulled_back(
        self, parts: Mapping[str, NDArray[Any]], gradients: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Return derivatives by the parts, from that by the weight."""
        return self.tensor.pulled_back(parts, gradients[WEIGHT]) if gradients else {}

    @property
    def nibbles(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parts that are UINT4."""
        return self.tensor.nibbles

    @property
    def optimized_tolerance(self) -> float | None:
        """Tolerance of products in 8 bits, if the weight is dequantised."""
        return FUSED if self.tensor.way == DEQUANTIZE else None

    def written(self, writing: Writing) -> StoredWeight:
        """Choose the types and the operators of the tensor."""
        tensor = self.tensor.written(writing)
        return replace(self, tensor=tensor, arrays=tensor.arrays)

    def dense(self) -> NDArray[Any]:
        """Return the weight as it is decoded."""
        return self.tensor.values

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that decode the weight, once for all uses."""
        nodes, weight = self.tensor.decode(stored, self.layer.name, names)
        more, operands = _turned(self.layer, weight, names)
        return [*nodes, *more], operands


def _turned(layer: Layer, weight: str, names: Names) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Transpose a weight where tied layers read it so; name what the nodes read."""
    parts = [(WEIGHT, each.transposed) for each in layer.readings]
    return with_transposes({WEIGHT: weight}, parts, names)


def half_weight(layer: Layer, weight: NDArray[Any], bias: NDArray[Any] | None) -> StoredWeight:
    """Store a weight in half precision.

    Raises
    ------
    ModelError
        If a number of it overflows.
    """
    return _before(layer, half_tensor(layer, weight, "its weight"), bias)


def coded_weight(layer: Layer, coded: Coded, bias: NDArray[Any] | None) -> StoredWeight:
    """Store the codes of a weight, in the shape in which the layer's nodes read it."""
    scheme = layout_of(layer)
    scales = scheme.weight_of(coded.each_scale())
    tensor = coded_tensor(scheme.weight_of(coded.codes), coded.levels, scales)
    return _before(layer, tensor, bias)


def _before(layer: Layer, tensor: StoredTensor, bias: NDArray[Any] | None) -> StoredWeight:
    return StoredWeight(layer, tensor.arrays, narrowed_bias(layer, bias), tensor)
