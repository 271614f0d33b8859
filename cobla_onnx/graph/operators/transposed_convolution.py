"""Transposed convolution: its weight of shape (C, N / group, *kernel) spreads each input out.

It is a convolution with its kernel turned round, over data with zeros inserted, so that its
vectors are exact at the edges, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.inventory import Layer, Reason, Refusal, Use
from cobla_onnx.graph.operators.base import OutputAxis, Shape, elements
from cobla_onnx.graph.operators.convolution import Convolution, ConvPatch, geometry_of
from cobla_onnx.graph.operators.patches import ReadPatch

__all__ = ["TransposedConvolution", "TransposedPatch"]


class TransposedConvolution(Convolution):
    """ONNX's ConvTranspose: attributes, bias and checks are those of a convolution."""

    kind: ClassVar[str] = "transposed convolution"
    op_types: ClassVar[tuple[str, ...]] = ("ConvTranspose",)

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Refuse groups, which neither the matricisations nor the patches take apart."""
        group = layer.attributes["group"]
        return None if group == 1 else Refusal(Reason.GROUPED, f"group {group}")

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Return the axis of the channels."""
        return OutputAxis(1, layer.shape[1] * layer.attributes["group"])

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Count the weight's axes but the first for each element of the data."""
        weight = shapes.get(node.input[1])
        return elements(shapes.get(node.input[0]), weight[1:] if weight else None)

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> ReadPatch | Refusal:
        """Return the patches of the convolution that it is."""
        values, kernel = attributes(node), layer.shape[2:]
        more = tuple(values.get("output_padding", (0,) * len(kernel)))
        wanted = tuple(values["output_shape"]) if "output_shape" in values else None
        moves = geometry_of(node, kernel)
        return TransposedPatch(use.data, layer.shape[0], kernel, *moves, more, wanted)


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
        ``output_shape``, which determines the padding if given.
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
        return self._plain.positions(self._spread_out(data[:, :1]))

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (1, size, positions).

        The parameters are those of `Patch.vectors`.
        """
        for part in self._plain.vectors(self._spread_out(data), chosen, each):
            turned = part.reshape(self.channels, *self.kernel, -1)
            turned = np.flip(turned, tuple(range(1, 1 + len(self.kernel))))
            yield turned.reshape(1, self.size, -1)

    def outputs(
        self, output: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (1, outputs, positions)."""
        return self._plain.outputs(output, chosen)

    @property
    def parts(self) -> tuple[NDArray[np.int64], ...]:
        """Entries of a vector that hold data, for each phase of its position; the others are 0.

        With a stride of s, data is at every s-th place of the spread array, so that no entry
        belongs to two phases.
        """
        numbers = np.arange(self.size).reshape(self.channels, *self.kernel)
        axes = []
        for length, stride, step in zip(self.kernel, self.strides, self.dilations, strict=True):
            places = np.arange(length) * step
            # The kernel is turned round.
            axes.append(
                [length - 1 - np.flatnonzero((q + places) % stride == 0) for q in range(stride)]
            )
        return tuple(
            np.sort(numbers[np.ix_(np.arange(self.channels), *taken)].ravel())
            for taken in itertools.product(*axes)
        )

    def phases(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Index in `parts` of each vector, shape (positions,)."""
        spread = self._spread_out(data[:1, :1])
        spans = [(k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True)]
        lengths = [size - span for size, span in zip(spread.shape[2:], spans, strict=True)]
        begins = [begin for begin, _ in self._padding(data.shape[2:])]
        axes = [
            (np.arange(length) - begin) % stride
            for length, begin, stride in zip(lengths, begins, self.strides, strict=True)
        ]
        one = np.ravel_multi_index(np.ix_(*axes), self.strides).ravel()
        return np.tile(one, len(data)) if chosen is None else one[chosen % len(one)]

    @property
    def _plain(self) -> ConvPatch:
        ones = (1,) * len(self.kernel)
        pads = (0,) * 2 * len(self.kernel)
        return ConvPatch(self.data, 1, self.channels, self.kernel, ones, self.dilations, pads)

    def _spread_out(self, data: NDArray[Any]) -> NDArray[Any]:
        """Data with zeros inserted and around, over which the turned kernel moves."""
        sizes = data.shape[2:]
        rows = zip(sizes, self.strides, self._padding(sizes), strict=True)
        lengths, places, cuts = [], [], []
        for size, stride, (begin, end) in rows:
            # With negative padding, part of the data is not read.
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
        """Numbers of zeros before and after, by ONNX's rules for the padding of the output."""
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
                # A requested shape is always reached, if need be with zeros.
                more += 0 if self.wanted is None else max(target - whole, 0)
            else:
                begin, end = (
                    (0, 0)
                    if isinstance(self.pads, str)
                    else (self.pads[axis], self.pads[axis + half])
                )
            result.append((span - begin, span - end + more))
        return result
