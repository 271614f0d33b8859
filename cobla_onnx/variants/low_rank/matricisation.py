"""Matricisations: how a weight unfolds into a matrix, and how factors fold back into nodes.

A weight of shape (N, C, h, w) can be unfolded in several ways; a matrix factorisation of
each is a pair of cheaper nodes:

=============  ===================  =============================================  =========
scheme         matrix               nodes                                          source
=============  ===================  =============================================  =========
``channel``    N x (C h w)          h x w convolution to r channels, then 1 x 1    Zhang 2015
``input``      C x (N h w)          1 x 1 to r channels, then h x w
``spatial-hw`` (C h) x (N w)        h x 1 to r channels, then 1 x w                Tai 2016
``spatial-wh`` (C w) x (N h)        1 x w to r channels, then h x 1
``matrix``     the weight itself    two matrix products, or two 1 x 1 convolutions
=============  ===================  =============================================  =========

The first factor carries stride, dilation and padding along the axes it moves over, the
second those of the others, and the bias. Grouped convolutions and batched matrices are
stacks of matrices with equal ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.graph.operators.base import Shape, elements, operator_of
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from cobla_onnx.variants.low_rank.recurrent_scheme import RecurrentScheme

__all__ = [
    "SCHEMES",
    "ConvScheme",
    "Scheme",
    "TransposedConvScheme",
    "has_layout",
    "largest_rank",
    "layout_of",
    "schemes_for",
]


@dataclass(frozen=True)
class ConvScheme:
    """A matricisation of a convolution's weight, of shape (N, C / group, *kernel).

    Attributes
    ----------
    name : str
    shape : tuple of int
        Shape of the weight.
    group : int
    first_axes : tuple of int
        Spatial axes over which the first factor moves; the second moves over the others.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    first_axes: tuple[int, ...]

    @property
    def _kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    def kernels(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel shapes of the first and the second factor."""
        first = tuple(k if a in self.first_axes else 1 for a, k in enumerate(self._kernel))
        second = tuple(1 if a in self.first_axes else k for a, k in enumerate(self._kernel))
        return first, second

    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of (group, N / group, C / group, *kernel) that become rows and columns."""
        spatial = range(len(self._kernel))
        rows = (2, *(3 + a for a in spatial if a in self.first_axes))
        columns = (1, *(3 + a for a in spatial if a not in self.first_axes))
        return rows, columns

    def _grouped_shape(self) -> tuple[int, ...]:
        return (self.group, self.shape[0] // self.group, *self.shape[1:])

    def matrix_shape(self) -> tuple[int, int, int]:
        """Groups, rows (inputs of the first factor) and columns (outputs of the second)."""
        rows, columns = self._axes()
        sizes = self._grouped_shape()
        return (
            self.group,
            math.prod(sizes[a] for a in rows),
            math.prod(sizes[a] for a in columns),
        )

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Unfold a weight into a stack of matrices, shape `matrix_shape`."""
        rows, columns = self._axes()
        grouped = weight.reshape(self._grouped_shape())
        return grouped.transpose((0, *rows, *columns)).reshape(self.matrix_shape())

    def weight(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Fold a stack of matrices back into a weight: the inverse of `matrix`."""
        rows, columns = self._axes()
        order = (0, *rows, *columns)
        sizes = self._grouped_shape()
        grouped = matrix.reshape([sizes[a] for a in order])
        return grouped.transpose(np.argsort(order)).reshape(self.shape)

    def fold(self, left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Turn matrix factors into the weights of the two convolutions.

        Parameters
        ----------
        left : array, shape (groups, rows, rank)
        right : array, shape (groups, rank, columns)
        """
        rank = left.shape[2]
        first_kernel, second_kernel = self.kernels()
        inputs = self.shape[1]
        first = left.transpose(0, 2, 1).reshape(self.group * rank, inputs, *first_kernel)
        outputs = self.shape[0] // self.group
        second = right.reshape(self.group, rank, outputs, -1).transpose(0, 2, 1, 3)
        return first, second.reshape(self.shape[0], rank, *second_kernel)

    def unfold(
        self, first: NDArray[Any], second: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Turn the weights of the two convolutions back into matrix factors."""
        groups, rows, columns = self.matrix_shape()
        rank = second.shape[1]
        left = first.reshape(groups, rank, rows).transpose(0, 2, 1)
        right = second.reshape(groups, self.shape[0] // groups, rank, -1)
        return left, right.transpose(0, 2, 1, 3).reshape(groups, rank, columns)

    inputs_first = True

    def rows_of(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Reshape a weight to one row for each output, shape (groups, outputs, size)."""
        return weight.reshape(self.group, self.shape[0] // self.group, -1)

    def weight_of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Turn one row for each output back into a weight: the inverse of `rows_of`."""
        return rows.reshape(self.shape)

    @property
    def offsets(self) -> int:
        """Positions over which the second factor moves."""
        return math.prod(self.kernels()[1])

    def split_moment(self, second: NDArray[Any]) -> NDArray[Any]:
        """Rearrange the second moment of patches by the axes that each factor moves over.

        Parameters
        ----------
        second : array, shape (groups, size, size)
            Moment of patches with entries in the order (C / group, *kernel).

        Returns
        -------
        array, shape (groups, rows, offsets, rows, offsets)
        """
        spatial = len(self._kernel)
        sizes = self._grouped_shape()[2:]
        first, moved = self._axes()
        order = (*(a - 1 for a in first), *(a - 1 for a in moved[1:]))
        order = (0, *order, *(a + 1 + spatial for a in order))
        grouped = second.reshape(self.group, *sizes, *sizes).transpose(order)
        rows = self.matrix_shape()[1]
        return grouped.reshape(self.group, rows, self.offsets, rows, self.offsets)

    def params_per_rank(self) -> int:
        """Weights of both factors for each unit of rank."""
        groups, rows, columns = self.matrix_shape()
        return groups * (rows + columns)

    def macs_per_rank(self, use: Use, shapes: Mapping[str, Shape]) -> int | None:
        """MACs of both factors for each unit of rank, or None where shapes are unknown.

        The first factor moves over its own axes only, so its output has output size along
        these and input size along the others.
        """
        data, output = shapes.get(use.data), shapes.get(use.output)
        if data is None or output is None or {len(data), len(output)} != {len(self.shape)}:
            return None
        between = [
            output[2 + a] if a in self.first_axes else data[2 + a] for a in range(len(self._kernel))
        ]
        samples, first, second = output[0], elements(between), elements(output[2:])
        if samples is None or first is None or second is None:
            return None
        groups, rows, columns = self.matrix_shape()
        return samples * groups * (rows * first + columns * second)


@dataclass(frozen=True)
class TransposedConvScheme(ConvScheme):
    """A matricisation of a transposed convolution's weight, of shape (C, N, *kernel).

    With the first two axes swapped it is the weight of a convolution: `shape` is (N, C, *kernel),
    and the matrices are the same. Both factors are transposed convolutions, one of them 1 x 1.
    """

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Unfold a weight into a matrix, shape `matrix_shape`."""
        return super().matrix(weight.swapaxes(0, 1))

    def weight(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Fold a matrix back into a weight: the inverse of `matrix`."""
        return super().weight(matrix).swapaxes(0, 1)

    def fold(self, left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Turn matrix factors into the weights of the two transposed convolutions."""
        first, second = super().fold(left, right)
        return first.swapaxes(0, 1), second.swapaxes(0, 1)

    def unfold(
        self, first: NDArray[Any], second: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Turn the weights of the two transposed convolutions back into matrix factors."""
        return super().unfold(first.swapaxes(0, 1), second.swapaxes(0, 1))

    def rows_of(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Reshape a weight to one row for each output, shape (1, outputs, size)."""
        return super().rows_of(weight.swapaxes(0, 1))

    def weight_of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Turn one row for each output back into a weight: the inverse of `rows_of`."""
        return super().weight_of(rows).swapaxes(0, 1)

    def macs_per_rank(self, use: Use, shapes: Mapping[str, Shape]) -> int | None:
        """MACs of both factors for each unit of rank, or None where shapes are unknown.

        A transposed convolution multiplies each input position with its whole kernel.
        """
        data, output = shapes.get(use.data), shapes.get(use.output)
        between = output if self.first_axes else data
        if data is None or between is None or None in (*data, *between):
            return None
        if {len(data), len(between)} != {len(self.shape)}:
            return None
        _, rows, columns = self.matrix_shape()
        positions = [math.prod(size or 0 for size in shape[2:]) for shape in (data, between)]
        return (data[0] or 0) * (rows * positions[0] + columns * positions[1])


Scheme = ConvScheme | ProductScheme


def largest_rank(layer: Layer, scheme: Scheme) -> int:
    """Largest rank at which two factors take fewer bytes than the whole layer; may be 0."""
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(layer.stored_type).itemsize
    fewer = (layer.stored_bytes - 1) // (scheme.params_per_rank() * itemsize)
    return min(*scheme.matrix_shape()[1:], fewer)


def _convolution(layer: Layer, wanted: str) -> tuple[Scheme, ...]:
    return _by_kernel(ConvScheme, layer.shape, layer.attributes["group"], wanted, spatial=True)


def _transposed(layer: Layer, wanted: str) -> tuple[Scheme, ...]:
    shape = (layer.shape[1], layer.shape[0], *layer.shape[2:])
    return _by_kernel(TransposedConvScheme, shape, 1, wanted, spatial=False)


def _by_kernel(
    kind: type[ConvScheme], shape: tuple[int, ...], group: int, wanted: str, *, spatial: bool
) -> tuple[Scheme, ...]:
    kernel = shape[2:]
    every = tuple(range(len(kernel)))
    if math.prod(kernel) == 1:
        return (kind("matrix", shape, group, every),)
    axes = {"channel": every, "input": ()}
    if spatial and len(kernel) == 2 and min(kernel) > 1:
        axes |= {"spatial-hw": (0,), "spatial-wh": (1,)}
    chosen = [name for name in axes if wanted in ("auto", name.split("-")[0])]
    return tuple(kind(name, shape, group, axes[name]) for name in chosen)


def _product(layer: Layer, wanted: str) -> tuple[Scheme, ...]:
    side = layer.weight_input
    flags = [bool(layer.attributes.get(flag, 0)) for flag in ("transA", "transB")]
    data_left = (side == 1) != flags[1 - side]
    return (ProductScheme("matrix", layer.shape, side, flags[side], data_left),)


def _tied(layer: Layer, wanted: str) -> tuple[Scheme, ...]:
    """Read the stored matrix as Gemm's transB does: each of its rows is an output."""
    return (ProductScheme("matrix", layer.shape, 1, transposed=True, data_left=False),)


def _transposed_product(kind: type[ProductScheme], layer: Layer) -> Scheme:
    """Return the matrices of a weight of shape (..., outputs, inputs)."""
    return kind("matrix", layer.shape, 1, transposed=True, data_left=True)


SCHEMES: dict[str, Callable[[Layer, str], tuple[Scheme, ...]]] = {
    "convolution": _convolution,
    "transposed convolution": _transposed,
    "product": _product,
    "tied": _tied,
    "recurrent input": lambda layer, wanted: (_transposed_product(RecurrentScheme, layer),),
}
"""By the kind of a layer's operator, what makes its schemes; see `schemes_for`."""

LAYOUTS: dict[str, Callable[[Layer], Scheme]] = {
    "recurrent state": lambda layer: _transposed_product(ProductScheme, layer),
}
"""By the kind of an operator without schemes, how the rows of its weight lie; see `layout_of`."""


def schemes_for(layer: Layer, wanted: str = "auto") -> tuple[Scheme, ...]:
    """Return the schemes that apply to a layer; none if its operator is not in `SCHEMES`.

    Parameters
    ----------
    layer : Layer
    wanted : {'auto', 'spatial', 'channel', 'input'}
        Restricts convolutions to one kind. Where all kinds are the same, as for 1 x 1
        convolutions and matrix products, it makes no difference.
    """
    make = SCHEMES.get(operator_of(layer).kind)
    return () if make is None else make(layer, wanted)


def has_layout(layer: Layer) -> bool:
    """Whether a layer's weight is known to have a row for each output."""
    kind = operator_of(layer).kind
    return kind in SCHEMES or kind in LAYOUTS


def layout_of(layer: Layer) -> Scheme:
    """Return how the rows of a layer's weight lie: a matricisation, also where no factors fit.

    A part of a recurrent layer's weight lies inside of the node, where no product can come before
    it.
    """
    make = LAYOUTS.get(operator_of(layer).kind)
    return schemes_for(layer)[0] if make is None else make(layer)
