"""Cut out of a layer's data the vectors that its weight is multiplied with.

A convolution multiplies each im2col patch, a product each row (or column) of its data.
The order of a vector's entries is that of the weight's input side: (C / group, *kernel)
for a convolution, so that a weight of shape (N, C / group, *kernel) reshaped to rows times
a patch gives an output position. A transposed convolution is one with its kernel turned
round, over data with zeros put in between, so that its vectors are exact at the edges, too.

Vectors are ordered by sample first: those of the first sample of a batch, then the next.
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

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        windows = self._windows(data)
        return math.prod(windows.shape[:1] + windows.shape[3 : 3 + len(self.kernel)])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of patches, each of shape (groups, size, positions).

        Parameters
        ----------
        data : array
            A batch.
        chosen : int64 array, optional
            Numbers of the patches that are wanted, by default of all.
        each : int
            Chunks are multiples of so many patches.
        """
        windows = self._windows(data)
        spatial = len(self.kernel)
        places = (*windows.shape[:1], *windows.shape[3 : 3 + spatial])
        # (positions, group, channels, *kernel) to (group, channels, *kernel, positions)
        order = (*range(1, 3 + spatial), 0)
        if chosen is not None:
            for part in _parts(len(chosen), self.group * self.size, each):
                sample, *where = np.unravel_index(chosen[part], places)
                wanted: tuple[Any, ...] = (sample, slice(None), slice(None), *where)
                picked = windows[wanted]
                yield picked.transpose(order).reshape(self.group, self.size, -1)
            return
        # (batch, group, channels, *positions, *kernel) to (group, channels, *kernel, batch, ...)
        order = (1, 2, *range(3 + spatial, 3 + 2 * spatial), 0, *range(3, 3 + spatial))
        per_sample = math.prod(places[1:])
        for part in _parts(len(windows), self.group * self.size * per_sample, 1):
            yield windows[part].transpose(order).reshape(self.group, self.size, -1)

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

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        return int(self._inputs(data).shape[2])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (groups, size, positions).

        The parameters are those of `ConvPatch.vectors`.
        """
        stack = self._inputs(data)
        count = stack.shape[2] if chosen is None else len(chosen)
        for part in _parts(count, self.groups * self.size, each):
            yield stack[:, :, part if chosen is None else chosen[part]]

    def outputs(self, output: NDArray[Any]) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (groups, outputs, positions)."""
        columns = self.output_columns and output.ndim > 1
        return self._stack(output if output.ndim > 1 else output[None], columns)

    def _inputs(self, data: NDArray[Any]) -> NDArray[Any]:
        return self._stack(data if data.ndim > 1 else data[None], self.columns and data.ndim > 1)

    def _stack(self, array: NDArray[Any], columns: bool) -> NDArray[Any]:
        """Sort the vectors of an array by the matrix of the weight that they meet."""
        if not columns:
            array = array.swapaxes(-1, -2)
        shape = np.broadcast_shapes(array.shape[:-2], self.batch)
        array = np.broadcast_to(array, (*shape, *array.shape[-2:]))
        lead = len(shape) - len(self.batch)
        # Along an axis of 1 of the weight all of the data meets the same matrix.
        apart = [lead + axis for axis, length in enumerate(self.batch) if length != 1]
        together = [axis for axis in range(len(shape)) if axis not in apart]
        order = (*apart, array.ndim - 2, *together, array.ndim - 1)
        return array.transpose(order).reshape(self.groups, array.shape[-2], -1)


@dataclass(frozen=True)
class TransposedPatch:
    """How a transposed convolution of one group reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor, of shape (batch, channels, *sizes).
    channels : int
    kernel, strides, dilations : tuple of int
    pads : tuple of int or str
        Begins then ends, or ``auto_pad``.
    more : tuple of int
        ``output_padding``.
    wanted : tuple of int or None
        ``output_shape``, from which the padding follows where it is given.
    """

    data: str
    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str
    more: tuple[int, ...]
    wanted: tuple[int, ...] | None

    groups = 1

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return self.channels * math.prod(self.kernel)

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch: one for each position of the output."""
        return self._plain.positions(self._spread_out(data))

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (1, size, positions).

        The parameters are those of `ConvPatch.vectors`.
        """
        for part in self._plain.vectors(self._spread_out(data), chosen, each):
            turned = part.reshape(self.channels, *self.kernel, -1)
            turned = np.flip(turned, tuple(range(1, 1 + len(self.kernel))))
            yield turned.reshape(1, self.size, -1)

    def outputs(self, output: NDArray[Any]) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (1, outputs, positions)."""
        return self._plain.outputs(output)

    @property
    def _plain(self) -> ConvPatch:
        ones = (1,) * len(self.kernel)
        pads = (0,) * 2 * len(self.kernel)
        return ConvPatch(self.data, 1, self.channels, self.kernel, ones, self.dilations, pads)

    def _spread_out(self, data: NDArray[Any]) -> NDArray[Any]:
        """Data with zeros in between and around, over which the turned kernel moves."""
        sizes = data.shape[2:]
        rows = zip(sizes, self.strides, self._padding(sizes), strict=True)
        lengths, places, cuts = [], [], []
        for size, stride, (begin, end) in rows:
            # A padding below 0 means that part of the data is not read.
            length = begin + max(size - 1, 0) * stride + 1 + end
            first = max(0, -(begin // stride)) if begin < 0 else 0
            kept = len(range(begin + first * stride, min(length, begin + size * stride), stride))
            start = begin + first * stride
            lengths.append(max(length, 0))
            places.append(slice(start, start + max(kept, 0) * stride, stride))
            cuts.append(slice(first, first + max(kept, 0)))
        result = np.zeros((*data.shape[:2], *lengths), data.dtype)
        into: tuple[Any, ...] = (..., *places)
        out: tuple[Any, ...] = (..., *cuts)
        result[into] = data[out]
        return result

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """Zeros before and after, by ONNX's rules for the padding of the output."""
        half = len(self.kernel)
        result = []
        for axis, size in enumerate(sizes):
            stride, more = self.strides[axis], self.more[axis]
            span = (self.kernel[axis] - 1) * self.dilations[axis]
            whole = (size - 1) * stride + span + 1 + more
            if self.wanted is not None or self.pads in ("SAME_UPPER", "SAME_LOWER"):
                target = size * stride if self.wanted is None else self.wanted[axis - half]
                total = max(whole - target, 0)
                small = total // 2
                begin = small if self.pads == "SAME_UPPER" else total - small
                end = total - begin
                # A shape that is asked for is reached, if by zeros.
                more += 0 if self.wanted is None else max(target - whole, 0)
            else:
                begin, end = (
                    (0, 0)
                    if isinstance(self.pads, str)
                    else (self.pads[axis], self.pads[axis + half])
                )
            result.append((span - begin, span - end + more))
        return result


@dataclass(frozen=True)
class OutputPatch:
    """What a layer gives instead of what it reads, for layers that read too wide vectors.

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
        for part in _parts(count, self.groups * self.size, each):
            yield outputs[:, :, part if chosen is None else chosen[part]]


def finite_outputs(output: NDArray[Any]) -> NDArray[Any]:
    """Return a layer's output with 0 for what an infinite bias suppresses: no matter what else."""
    finite = np.isfinite(output)
    return output if finite.all() else np.where(finite, output, output.dtype.type(0))


ReadPatch = ConvPatch | TransposedPatch | ProductPatch
Patch = ReadPatch | OutputPatch


def _parts(count: int, size: int, each: int) -> Iterator[slice]:
    """Cut `count` vectors of some size into chunks of a multiple of `each` of them."""
    step = max(1, CHUNK // max(size * each, 1)) * each
    for start in range(0, count, step):
        yield slice(start, start + step)


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
