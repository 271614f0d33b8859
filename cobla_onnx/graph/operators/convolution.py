"""Convolution: its weight of shape (N, C / group, *kernel) multiplies im2col patches.

The order of a patch's entries is that of the weight's input side, (C / group, *kernel), so that
the weight reshaped to rows times a patch gives an output position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.inventory import Layer, Refusal, Use
from cobla_onnx.graph.operators.base import AGAIN, OutputAxis, Shape, check_axes, elements
from cobla_onnx.graph.operators.patches import DensePatch, ReadPatch, cut

__all__ = ["ConvPatch", "Convolution", "Geometry", "geometry_of", "is_depthwise"]

# Steps, sizes and paddings above this cannot be meant, and overflow in other libraries.
LARGEST = 2**31 - 1


class Convolution:
    """ONNX's Conv."""

    kind: ClassVar[str] = "convolution"
    op_types: ClassVar[tuple[str, ...]] = ("Conv",)
    domain: ClassVar[str] = ""
    weight_inputs: ClassVar[tuple[int, ...]] = (1,)
    incidental: ClassVar[bool] = False

    def reading(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Return the number of groups."""
        return {"group": attributes(node).get("group", 1)}

    def check(self, node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
        """Check the weight's axes, and what the node says of its kernel."""
        check_axes(node, shape, label, 3, 16)
        _check_kernel(attributes(node), shape, label)

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Return None: all of them can be read, and stored otherwise."""
        return None

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Return the axis of the channels."""
        return OutputAxis(1, layer.shape[0])

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        """Return True: there is no factor before it."""
        return True

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Count a sum over the weight's axes but the first for each element of the output."""
        weight = shapes.get(node.input[1])
        return elements(shapes.get(node.output[0]), weight[1:] if weight else None)

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> ReadPatch | Refusal:
        """Return the im2col patches, by group."""
        group, channels, kernel = layer.attributes["group"], layer.shape[1], layer.shape[2:]
        return ConvPatch(use.data, group, channels, kernel, *geometry_of(node, kernel))


def is_depthwise(layer: Layer) -> bool:
    """Whether each channel of a convolution meets kernels of its own: vectors, of rank 1."""
    return layer.op == "Conv" and layer.attributes["group"] > 1 and layer.shape[1] == 1


class Geometry(NamedTuple):
    """How a kernel moves: steps, distances between its entries, padding (see `ConvPatch`)."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str


def geometry_of(node: onnx.NodeProto, kernel: tuple[int, ...]) -> Geometry:
    """Read how the kernel of a convolution moves, with the defaults filled in."""
    values = attributes(node)
    ones = (1,) * len(kernel)
    automatic = values.get("auto_pad", b"NOTSET").decode()
    pads = tuple(values.get("pads", (0,) * 2 * len(kernel)))
    return Geometry(
        tuple(values.get("strides", ones)),
        tuple(values.get("dilations", ones)),
        pads if automatic == "NOTSET" else automatic,
    )


def _check_kernel(values: Mapping[str, Any], shape: tuple[int, ...], label: str) -> None:
    """Check groups, kernel, steps and padding of a convolution of either direction."""
    group = values.get("group", 1)
    if group < 1 or shape[0] % group:
        raise ModelError(
            f"{label}: group {group} does not divide the {shape[0]} channels of its weight; {AGAIN}"
        )
    kernel = values.get("kernel_shape")
    if kernel is not None and list(kernel) != list(shape[2:]):
        raise ModelError(
            f"{label}: kernel_shape says {list(kernel)}, its weight has {list(shape[2:])}; {AGAIN}"
        )
    axes = len(shape) - 2
    for name, length, least in (
        ("strides", axes, 1),
        ("dilations", axes, 1),
        ("pads", 2 * axes, -LARGEST),
        ("output_padding", axes, 0),
        ("output_shape", axes, 0),
    ):
        sizes = values.get(name)
        if sizes is None:
            continue
        if len(sizes) != length or not all(least <= size <= LARGEST for size in sizes):
            raise ModelError(
                f"{label}: {name} {list(sizes)[:16]} do not fit a kernel of {axes} axes; {AGAIN}"
            )


@dataclass(frozen=True)
class ConvPatch(DensePatch):
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

    @property
    def spans(self) -> tuple[int, ...]:
        """Entries of the data from the first to the last that the kernel meets, in each axis."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return tuple((length - 1) * step + 1 for length, step in pairs)

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch, from the shape of the data alone."""
        sizes = data.shape[2:]
        moves = zip(sizes, self._padding(sizes), self.spans, self.strides, strict=True)
        steps = [(size + sum(pads) - span) // step + 1 for size, pads, span, step in moves]
        return math.prod((len(data), *(max(each, 0) for each in steps)))

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of patches, each of shape (groups, size, positions); see `Patch`."""
        windows = self._windows(data)
        spatial = len(self.kernel)
        places = (*windows.shape[:1], *windows.shape[3 : 3 + spatial])
        # (positions, group, channels, *kernel) to (group, channels, *kernel, positions)
        order = (*range(1, 3 + spatial), 0)
        if chosen is not None:
            for part in cut(len(chosen), self.group * self.size, each):
                sample, *where = np.unravel_index(chosen[part], places)
                wanted: tuple[Any, ...] = (sample, slice(None), slice(None), *where)
                picked = windows[wanted]
                yield picked.transpose(order).reshape(self.group, self.size, -1)
            return
        # (batch, group, channels, *positions, *kernel) to (group, channels, *kernel, batch, ...)
        order = (1, 2, *range(3 + spatial, 3 + 2 * spatial), 0, *range(3, 3 + spatial))
        per_sample = math.prod(places[1:])
        for part in cut(len(windows), self.group * self.size * per_sample, 1):
            yield windows[part].transpose(order).reshape(self.group, self.size, -1)

    def outputs(
        self, output: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """Outputs at the positions of the patches, shape (groups, N / group, positions)."""
        places = math.prod(output.shape[2:])
        grouped = output.reshape(len(output), self.group, -1, places)
        if chosen is not None:
            # Of a large map this reads a few places alone, and copies the rest nowhere.
            return grouped[chosen // places, :, :, chosen % places].transpose(1, 2, 0)
        return grouped.transpose(1, 2, 0, 3).reshape(self.group, grouped.shape[2], -1)

    def _windows(self, data: NDArray[Any]) -> NDArray[Any]:
        pads = self._padding(data.shape[2:])
        padded = np.pad(data, [(0, 0), (0, 0), *pads]) if any(map(any, pads)) else data
        axes = tuple(range(2, padded.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.spans, axis=axes)
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
