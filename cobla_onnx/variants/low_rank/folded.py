"""Two factors that are multiplied out when a session opens: the layer's own node, its weight made.

All inputs of these nodes are constants, so that onnxruntime computes the weight once. The layer
then takes the time, and the memory, that it took before; what is saved is the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.errors import UsageError
from cobla_onnx.graph.layers import Layer
from cobla_onnx.text import quoted
from cobla_onnx.variants.low_rank.matricisation import ConvScheme, Scheme, TransposedConvScheme
from cobla_onnx.variants.low_rank.recurrent_scheme import RecurrentScheme
from cobla_onnx.variants.names import INTEGER_CONSTANTS, Names

__all__ = ["FOLDED_FROM", "can_fold", "no_faster", "product_nodes"]

# Shapes are constants.
FOLDED_FROM = INTEGER_CONSTANTS

# Properties of onnxruntime's CPU kernels, measured (docs/experiments.md): convolutions compute
# channels in blocks of 16, also where a rank is no multiple; two of them take the time of one from
# this fraction of its MACs on, counted in whole blocks. Two matrix products are faster than one as
# soon as they have fewer MACs.
BLOCK, SHARE = 16, 0.75


def can_fold(layer: Layer, scheme: Scheme) -> bool:
    """Whether a few nodes make the weight from both factors.

    Not where the second factor of a grouped convolution moves over positions, whose product has one
    axis more than ONNX's MatMul can broadcast in the order of the weight; nor in half precision,
    in which not every processor has a product; nor where a weight is read in several ways, or by a
    recurrent node.
    """
    if layer.type != TensorProto.FLOAT or layer.readings or isinstance(scheme, RecurrentScheme):
        return False
    return not isinstance(scheme, ConvScheme) or scheme.group == 1 or scheme.offsets == 1


def no_faster(
    layer: Layer, rank: int | NDArray[np.int64], macs_per_rank: int, macs: int
) -> NDArray[np.bool_]:
    """Whether two nodes of a rank are likely to take as long as the layer's own one.

    Parameters
    ----------
    rank : int or int64 array
    macs_per_rank : int
        Of both nodes.
    macs : int
        Of the layer's own.
    """
    if layer.op == "Conv" and len(layer.shape) == 4:
        return np.asarray(-(-rank // BLOCK) * BLOCK * macs_per_rank > SHARE * macs)
    return np.asarray(rank * macs_per_rank > macs)


def product_nodes(
    layer: Layer, scheme: Scheme, factors: tuple[str, str], names: Names
) -> tuple[list[onnx.NodeProto], str]:
    """Build the nodes that make a layer's weight, and name it.

    Parameters
    ----------
    factors : tuple of str
        Tensors of both factors, in the shapes that `Scheme.fold` gives.

    Raises
    ------
    UsageError
        If the model's opset is below `FOLDED_FROM`.
    AssertionError
        If it cannot be folded, see `can_fold`.
    """
    assert can_fold(layer, scheme)
    if names.opset < FOLDED_FROM:
        raise UsageError(
            f"plan: layer {quoted(layer.name)} cannot be folded in a model of opset {names.opset}; "
            'leave out "folded"'
        )
    nodes = _Nodes(f"{layer.name}/folded", names)
    first, second = factors
    if isinstance(scheme, ConvScheme):
        return nodes.made, _convolution(scheme, first, second, nodes)
    if scheme.inputs_first != scheme.data_left:
        first = nodes.transposed(first, _swapped(len(scheme.shape)))
    left, right = (first, second) if scheme.inputs_first else (second, first)
    return nodes.made, nodes.add("MatMul", [left, right])


def _convolution(scheme: ConvScheme, first: str, second: str, nodes: _Nodes) -> str:
    """Multiply the factors of a convolution, of shapes (group * rank, C, *) and (N, rank, *)."""
    transposed = isinstance(scheme, TransposedConvScheme)
    if transposed:
        ends = [1, 0, *range(2, len(scheme.shape))]
        first, second = (nodes.transposed(each, ends) for each in (first, second))
    outputs, _, *kernel = scheme.shape
    groups, rows, _ = scheme.matrix_shape()
    stack = [groups] if groups > 1 else []
    # Of a length that is not given, -1, there is one.
    first = nodes.reshaped(first, [*stack, -1, rows])
    if scheme.offsets == 1:
        second = nodes.reshaped(second, [*stack, outputs // groups, -1])
    else:
        second = nodes.reshaped(second, [outputs, -1, scheme.offsets])
        second = nodes.transposed(second, _swapped(3))
    product = nodes.add("MatMul", [second, first])
    # Of the weight's axes the product has the outputs, those over which the second factor moves,
    # the inputs, and the others.
    spatial = range(len(kernel))
    moved = [a for a in spatial if a not in scheme.first_axes]
    order = [0, *(2 + a for a in moved), 1, *(2 + a for a in scheme.first_axes)]
    product = nodes.reshaped(product, [scheme.shape[axis] for axis in order])
    wanted = [1, 0] if transposed else [0, 1]
    wanted += [2 + a for a in spatial]
    return nodes.transposed(product, [order.index(axis) for axis in wanted])


def _swapped(axes: int) -> list[int]:
    """All axes in order, but for the last two."""
    return [*range(axes - 2), axes - 1, axes - 2]


@dataclass
class _Nodes:
    """Nodes that are made one after the other.

    Shapes are Constant nodes: they belong to the graph, and are not counted as weights.
    """

    label: str
    names: Names
    made: list[onnx.NodeProto] = field(default_factory=list)

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = self.names.tensor(f"{self.label}/{op.lower()}")
        name = self.names.node(f"{self.label}/{op.lower()}")
        self.made.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def reshaped(self, tensor: str, shape: Sequence[int]) -> str:
        """Add a Reshape."""
        value = numpy_helper.from_array(np.array(shape, np.int64))
        return self.add("Reshape", [tensor, self.add("Constant", [], value=value)])

    def transposed(self, tensor: str, order: Sequence[int]) -> str:
        """Add a Transpose, unless all axes stay where they are."""
        if list(order) == sorted(order):
            return tensor
        return self.add("Transpose", [tensor], perm=order)
