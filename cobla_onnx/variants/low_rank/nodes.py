"""Two factor nodes in place of one node: their weights, their attributes, their proof.

The nodes are built with onnx-graphsurgeon in a scratch graph and their protos are
transplanted, since exporting a whole model through graph-surgeon loses fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.layers import Layer, Use, attributes
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.variants.low_rank.folded import product_nodes
from cobla_onnx.variants.low_rank.matricisation import (
    ConvScheme,
    Scheme,
    TransposedConvScheme,
    schemes_for,
)
from cobla_onnx.variants.low_rank.svd import Factorization
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Replacement, narrowed, narrowed_bias, own_node
from cobla_onnx.variants.tied import (
    Part,
    factors_read,
    lookup_nodes,
    operand,
    with_transposes,
)

__all__ = [
    "FIRST",
    "SECOND",
    "FactorPair",
    "Pair",
    "factor_nodes",
    "make_replacement",
    "nodes_of",
    "pair_nodes",
    "parts_read",
    "stand_in",
]

FIRST, SECOND = "first_factor", "second_factor"


@dataclass(frozen=True)
class Pair(Replacement):
    """Two factors, read by two nodes, or multiplied out to the weight of one.

    Attributes
    ----------
    layer, arrays, bias
        As those of `Replacement`.
    scheme : Scheme
    """

    scheme: Scheme
    folded: bool = field(default=False, kw_only=True)

    def as_folded(self) -> Pair:
        """Return the same pair, multiplied out."""
        return replace(self, folded=True)

    def stored_factors(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that give both factors as the layer computes with them; name both."""
        return super().shared(stored, names)

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that give both factors, or the weight, once for all uses."""
        nodes, operands = self.stored_factors(stored, names)
        if not self.folded:
            turned, operands = with_transposes(operands, parts_read(self.layer), names)
            return [*nodes, *turned], operands
        pair = operands[FIRST], operands[SECOND]
        product, weight = product_nodes(self.layer, self.scheme, pair, names)
        return [*nodes, *product], {"weight": weight}

    def nodes(
        self,
        node: onnx.NodeProto,
        use: Use,
        operands: Mapping[str, str],
        rest: Sequence[str],
        names: Names,
    ) -> list[onnx.NodeProto]:
        """Build the two factor nodes of one use, of which the second has the bias; or its own."""
        if self.folded:
            return [own_node(node, self.layer.weight_input, operands["weight"], rest)]
        return nodes_of(self.layer, self.scheme, node, use, operands, rest, names)


@dataclass(frozen=True)
class FactorPair(Pair):
    """The weights of two factor nodes, in the type in which the layer's weight was stored.

    Attributes
    ----------
    layer, bias, scheme, folded
        As those of `Pair`.
    arrays : mapping of str to array
        ``first_factor`` and ``second_factor``.
    """

    @property
    def learnable(self) -> Mapping[str, NDArray[Any]]:
        """Both factors."""
        return self.arrays

    def dense(self) -> NDArray[Any]:
        """Multiply the factors to the weight that they stand for, shape ``layer.shape``."""
        first, second = self.arrays[FIRST], self.arrays[SECOND]
        # Half precision is multiplied in single precision; double would double the memory.
        wide = np.result_type(first.dtype, np.float32)
        left, right = self.scheme.unfold(
            first.astype(wide, copy=False), second.astype(wide, copy=False)
        )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.layer.type)
        result: NDArray[Any] = self.scheme.weight(left @ right).astype(dtype, copy=False)
        return result


def parts_read(layer: Layer) -> list[Part]:
    """Return how the readings of a tied weight read its factors; nothing of any other layer."""
    return [part for each in layer.readings for part in factors_read(each, SECOND, FIRST)]


def nodes_of(
    layer: Layer,
    scheme: Scheme,
    node: onnx.NodeProto,
    use: Use,
    operands: Mapping[str, str],
    rest: Sequence[str],
    names: Names,
) -> list[onnx.NodeProto]:
    """Build the two nodes of one use, for a tied weight as its reading has them."""
    if not layer.readings:
        return pair_nodes(scheme, node, use, (operands[FIRST], operands[SECOND]), rest, names)
    reading = layer.reading(use)
    first, second = (operand(operands, part) for part in factors_read(reading, SECOND, FIRST))
    if operator_of(reading).kind == Lookup.kind:
        return lookup_nodes(node, use, (first, second), names)
    return pair_nodes(schemes_for(reading)[0], node, use, (first, second), rest, names)


def make_replacement(
    layer: Layer, scheme: Scheme, factors: Factorization, bias: NDArray[Any] | None = None
) -> FactorPair:
    """Convert factors to the weights of the two nodes, in the types of what they replace.

    Raises
    ------
    ModelError
        If a factor or the bias overflows its type.
    """
    stored = onnx.helper.tensor_dtype_to_np_dtype(layer.stored_type)
    first, second = scheme.fold(factors.left, factors.right)
    what = "a factor of its weight"
    pair = {
        FIRST: narrowed(layer, first, stored, what),
        SECOND: narrowed(layer, second, stored, what),
    }
    return FactorPair(layer, pair, narrowed_bias(layer, bias), scheme)


def stand_in(layer: Layer, scheme: Scheme, rank: int) -> FactorPair:
    """Return factors of the right shapes and random content, which take the same time.

    They keep the size of numbers about as it is, so that none of them becomes so small
    that the CPU slows down.
    """
    groups, rows, columns = scheme.matrix_shape()
    generator = np.random.default_rng(0)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(layer.stored_type)

    def numbers(*shape: int, scale: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        uniform = generator.random(shape, dtype=np.float32)
        return (uniform - np.float32(0.5)) * np.float32(scale)

    # Uniform numbers between -1/2 and 1/2 have the variance 1/12.
    left = numbers(groups, rows, rank, scale=math.sqrt(12 / rows))
    right = numbers(groups, rank, columns, scale=math.sqrt(12 / rank))
    first, second = (np.ascontiguousarray(f.astype(dtype)) for f in scheme.fold(left, right))
    return FactorPair(layer, {FIRST: first, SECOND: second}, None, scheme)


def factor_nodes(
    model: onnx.ModelProto, layer: Layer, scheme: Scheme, first: str, second: str
) -> tuple[tuple[onnx.NodeProto, onnx.NodeProto], ...]:
    """Build, for each use of a layer, the two nodes that would take its place.

    They read their factors, in the shapes that `Scheme.fold` gives, from tensors named `first`
    and `second`.
    """
    names = Names(model)
    pairs = []
    nodes = all_nodes(model.graph)
    for use in layer.uses:
        node = nodes[use.node]
        before, after = pair_nodes(scheme, node, use, (first, second), node.input[2:], names)
        pairs.append((before, after))
    return tuple(pairs)


class _Variables(dict[str, Any]):
    """One graph-surgeon variable for each name, made when it is first asked for."""

    def __missing__(self, name: str) -> Any:
        self[name] = gs.Variable(name)
        return self[name]


def pair_nodes(
    scheme: Scheme,
    node: onnx.NodeProto,
    use: Use,
    factors: tuple[str, str],
    rest: Sequence[str],
    names: Names,
) -> list[onnx.NodeProto]:
    """Build the two factor nodes of one use."""
    variables = _Variables()
    label = node.name or use.output
    between = variables[names.tensor(f"{label}/lowrank")]
    first_name = names.node(f"{label}/{FIRST}")
    weights = [variables[name] for name in factors]
    others = [variables[name] for name in rest]
    data, output = variables[use.data], variables[use.output]
    values = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in attributes(node).items()
    }
    if isinstance(scheme, ConvScheme):
        transposed = isinstance(scheme, TransposedConvScheme)
        share_out = _transposed_attributes if transposed else _conv_attributes
        first_values, second_values = share_out(scheme, values)
        first = gs.Node(node.op_type, first_name, first_values, [data, weights[0]], [between])
        inputs = [between, weights[1], *others]
        second = gs.Node(node.op_type, node.name, second_values, inputs, [output])
    else:
        operands = [data, weights[0]] if scheme.data_left else [weights[0], data]
        first = gs.Node("MatMul", first_name, {}, operands, [between])
        inputs = [between, weights[1]] if scheme.weight_input == 1 else [weights[1], between]
        second = gs.Node(node.op_type, node.name, values, [*inputs, *others], [output])
    return list(gs.export_onnx(gs.Graph([first, second]), do_type_check=False).graph.node)


def _conv_attributes(
    scheme: ConvScheme, values: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distribute a convolution's attributes over its factors, axis by axis."""
    axes = range(len(scheme.shape) - 2)
    first_kernel, second_kernel = scheme.kernels()
    shared = []
    for kernel, own in (
        (first_kernel, [a for a in axes if a in scheme.first_axes]),
        (second_kernel, [a for a in axes if a not in scheme.first_axes]),
    ):
        mine: dict[str, Any] = {"kernel_shape": list(kernel)}
        for name in ("strides", "dilations"):
            if name in values:
                mine[name] = [values[name][a] if a in own else 1 for a in axes]
        if own and values.get("auto_pad", "NOTSET") != "NOTSET":
            mine["auto_pad"] = values["auto_pad"]
        elif "pads" in values:
            ends = [*axes, *axes]
            mine["pads"] = [p if a in own else 0 for a, p in zip(ends, values["pads"], strict=True)]
        if scheme.group > 1:
            mine["group"] = scheme.group
        shared.append(mine)
    return shared[0], shared[1]


def _transposed_attributes(
    scheme: ConvScheme, values: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a transposed convolution's attributes to the factor that has the kernel."""
    first_kernel, second_kernel = scheme.kernels()
    point, whole = {"kernel_shape": [1] * len(first_kernel)}, dict(values)
    if scheme.first_axes:
        return {**whole, "kernel_shape": list(first_kernel)}, point
    return point, {**whole, "kernel_shape": list(second_kernel)}
