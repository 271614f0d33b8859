"""Cut out of a layer's data the vectors that its weight is multiplied with.

A convolution multiplies each im2col patch, a product each row (or column) of its data.
The order of a vector's entries is that of the weight's input side: (C / group, *kernel)
for a convolution, so that a weight of shape (N, C / group, *kernel) reshaped to rows times
a patch gives an output position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer, Use, attributes

__all__ = ["ConvPatch", "OutputPatch", "Patch", "ProductPatch", "patch_of"]

# Elements of a chunk of vectors, so that unfolding never multiplies the memory of a batch.
CHUNK = 1 << 22


@dataclass(frozen=True)
class ConvPatch:
    """How a convolution reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor, of shape (batch, group * channels, *sizes).
    group, channels : int
        Groups, and channels in each.
    kernel, strides, dilations : tuple of int
    pads : tuple of int or str
        Begins then ends, or ``auto_pad``.
    """

    data: str
    group: int
    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return self.group

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return self.channels * math.prod(self.kernel)

    def vectors(self, data: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yield chunks of patches, each of shape (groups, size, positions)."""
        windows = self._windows(data)
        spatial = len(self.kernel)
        # (batch, group, channels, *positions, *kernel) to (group, channels, *kernel, batch, ...)
        order = (1, 2, *range(3 + spatial, 3 + 2 * spatial), 0, *range(3, 3 + spatial))
        per_sample = self.group * self.size * math.prod(windows.shape[3 : 3 + spatial])
        samples = max(1, CHUNK // max(per_sample, 1))
        rows = max(1, CHUNK // max(per_sample // windows.shape[3], 1)) if samples == 1 else None
        for start in range(0, len(windows), samples):
            block = windows[start : start + samples]
            step = rows or block.shape[3]
            for row in range(0, block.shape[3], step):
                part = block[:, :, :, row : row + step].transpose(order)
                yield part.reshape(self.group, self.size, -1)

    def outputs(self, output: NDArray[Any]) -> NDArray[Any]:
        """Outputs at the positions of the patches, shape (groups, N / group, positions)."""
        grouped = output.reshape(len(output), self.group, -1, math.prod(output.shape[2:]))
        return grouped.transpose(1, 2, 0, 3).reshape(self.group, grouped.shape[2], -1)

    def _windows(self, data: NDArray[Any]) -> NDArray[Any]:
        padded = np.pad(data, [(0, 0), (0, 0), *self._padding(data.shape[2:])])
        axes = tuple(range(2, padded.ndim))
        span = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=axes)
        steps = [slice(None, None, s) for s in self.strides]
        taps = [slice(None, None, d) for d in self.dilations]
        windows = windows[(slice(None), slice(None), *steps, *taps)]
        grouped: NDArray[Any] = windows.reshape(
            len(data), self.group, self.channels, *windows.shape[2:]
        )
        return grouped

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        if not isinstance(self.pads, str):
            half = len(self.kernel)
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        if self.pads == "VALID":
            return [(0, 0)] * len(sizes)
        result = []
        for size, k, s, d in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            result.append((small, large) if self.pads == "SAME_UPPER" else (large, small))
        return result


@dataclass(frozen=True)
class ProductPatch:
    """How a Gemm or MatMul reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor.
    columns : bool
        Whether the vectors are its columns (the weight stands on the left, or Gemm
        transposes its data) and not its rows.
    batch : tuple of int
        Leading axes of the weight: a moment for each matrix of the stack.
    size : int
        Entries of a vector.
    output_columns : bool
        Whether each output vector is a column of the output.
    """

    data: str
    columns: bool
    batch: tuple[int, ...]
    size: int
    output_columns: bool

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return math.prod(self.batch)

    def vectors(self, data: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (groups, size, positions)."""
        stack = self._stack(data if data.ndim > 1 else data[None], self.columns and data.ndim > 1)
        step = max(1, CHUNK // max(self.groups * self.size, 1))
        for start in range(0, stack.shape[2], step):
            yield stack[:, :, start : start + step]

    def outputs(self, output: NDArray[Any]) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (groups, outputs, positions)."""
        columns = self.output_columns and output.ndim > 1
        return self._stack(output if output.ndim > 1 else output[None], columns)

    def _stack(self, array: NDArray[Any], columns: bool) -> NDArray[Any]:
        if not columns:
            array = array.swapaxes(-1, -2)
        shape = np.broadcast_shapes(array.shape[:-2], self.batch)
        array = np.broadcast_to(array, (*shape, *array.shape[-2:]))
        lead = len(shape) - len(self.batch)
        # (*others, *batch, size, positions) to (groups, size, others and positions)
        order = (
            *range(lead, lead + len(self.batch)),
            -2 % array.ndim,
            *range(lead),
            array.ndim - 1,
        )
        return array.transpose(order).reshape(self.groups, array.shape[-2], -1)


@dataclass(frozen=True)
class OutputPatch:
    """What a layer gives instead of what it reads, for layers that read too wide vectors.

    Attributes
    ----------
    data : str
        Name of the layer's output.
    read : ConvPatch or ProductPatch
    size : int
        Outputs of each group.
    """

    data: str
    read: ConvPatch | ProductPatch
    size: int

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return self.read.groups

    def vectors(self, data: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yield the outputs at all positions, shape (groups, size, positions)."""
        yield self.read.outputs(data)


Patch = ConvPatch | ProductPatch | OutputPatch


def patch_of(model: onnx.ModelProto, layer: Layer, use: Use) -> ConvPatch | ProductPatch:
    """Return how a use of a layer reads its data."""
    values = attributes(model.graph.node[use.node])
    if layer.op == "Conv":
        kernel = layer.shape[2:]
        ones = (1,) * len(kernel)
        automatic = values.get("auto_pad", b"NOTSET").decode()
        pads = tuple(values.get("pads", (0,) * 2 * len(kernel)))
        return ConvPatch(
            use.data,
            layer.attributes["group"],
            layer.shape[1],
            kernel,
            tuple(values.get("strides", ones)),
            tuple(values.get("dilations", ones)),
            pads if automatic == "NOTSET" else automatic,
        )
    right = layer.weight_input == 1
    flipped = bool(values.get("transA" if right else "transB", 0))
    transposed = bool(values.get("transB" if right else "transA", 0))
    size = layer.shape[-2] if right != transposed else layer.shape[-1]
    return ProductPatch(use.data, right == flipped, layer.shape[:-2], size, not right)
