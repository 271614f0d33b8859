"""Extract from a layer's input the vectors that its weight is multiplied with.

A convolution multiplies each im2col patch, a product each row (or column) of its data.
The order of a vector's entries is that of the weight's input side: (C / group, *kernel)
for a convolution, so that a weight of shape (N, C / group, *kernel) reshaped to rows times
a patch gives an output position. A transposed convolution is one with its kernel turned
round, over data with zeros inserted, so that its vectors are exact at the edges, too.

Vectors are ordered by sample first: those of the first sample of a batch, then the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer, Use, attributes
from cobla_onnx.graph.operators.convolution import ConvPatch, cut
from cobla_onnx.graph.operators.product import ProductPatch
from cobla_onnx.graph.operators.transposed_convolution import TransposedPatch

__all__ = [
    "ConvPatch",
    "OutputPatch",
    "Patch",
    "ProductPatch",
    "ReadPatch",
    "TransposedPatch",
    "finite_outputs",
    "patch_of",
]


@dataclass(frozen=True)
class OutputPatch:
    """A layer's outputs in place of its inputs, for layers whose input vectors are too wide.

    Attributes
    ----------
    data : str
        Name of the layer's output.
    read : ReadPatch
    size : int
        Outputs of each group.
    """

    data: str
    read: ReadPatch
    size: int

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return self.read.groups

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        return int(self.read.outputs(data).shape[2])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield the outputs, shape (groups, size, positions), as `ConvPatch.vectors` does."""
        outputs = finite_outputs(self.read.outputs(data))
        count = outputs.shape[2] if chosen is None else len(chosen)
        for part in cut(count, self.groups * self.size, each):
            yield outputs[:, :, part if chosen is None else chosen[part]]


def finite_outputs(output: NDArray[Any]) -> NDArray[Any]:
    """Return a layer's output, with 0 where an infinite bias suppresses it."""
    finite = np.isfinite(output)
    return output if finite.all() else np.where(finite, output, output.dtype.type(0))


ReadPatch = ConvPatch | TransposedPatch | ProductPatch
Patch = ReadPatch | OutputPatch


def patch_of(model: onnx.ModelProto, layer: Layer, use: Use) -> ReadPatch:
    """Return how a use of a layer reads its data."""
    values = attributes(model.graph.node[use.node])
    if layer.op in ("Conv", "ConvTranspose"):
        return _convolution(values, layer, use)
    right = layer.weight_input == 1
    flipped = bool(values.get("transA" if right else "transB", 0))
    transposed = bool(values.get("transB" if right else "transA", 0))
    size = layer.shape[-2] if right != transposed else layer.shape[-1]
    return ProductPatch(use.data, right == flipped, layer.shape[:-2], size, not right)


def _convolution(values: dict[str, Any], layer: Layer, use: Use) -> ConvPatch | TransposedPatch:
    kernel = layer.shape[2:]
    ones = (1,) * len(kernel)
    automatic = values.get("auto_pad", b"NOTSET").decode()
    pads = tuple(values.get("pads", (0,) * 2 * len(kernel)))
    strides = tuple(values.get("strides", ones))
    dilations = tuple(values.get("dilations", ones))
    padding = pads if automatic == "NOTSET" else automatic
    if layer.op == "Conv":
        group, channels = layer.attributes["group"], layer.shape[1]
        return ConvPatch(use.data, group, channels, kernel, strides, dilations, padding)
    more = tuple(values.get("output_padding", (0,) * len(kernel)))
    wanted = tuple(values["output_shape"]) if "output_shape" in values else None
    return TransposedPatch(
        use.data, layer.shape[0], kernel, strides, dilations, padding, more, wanted
    )
