"""Nodes of tied weights: what is stored once is read by each reading in its own way.

Factors A (rows, rank) and B (rank, columns) stand for a stored matrix E. A lookup takes rows of A
and multiplies them by B; a product with E^T multiplies by B^T, then by A^T. Transposes are of
constants, so that onnxruntime computes them when it opens the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.graph.operators.base import Shape, elements, operator_of
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from cobla_onnx.variants.names import Names

__all__ = ["Part", "factors_read", "lookup_nodes", "macs_per_rank", "operand", "with_transposes"]

Part = tuple[str, bool]
"""A stored part, and whether it is read transposed."""


def factors_read(reading: Layer, left: str, right: str) -> tuple[Part, Part]:
    """Return how a reading reads the factors of its weight, in the order of its nodes.

    Parameters
    ----------
    left, right : str
        Parts whose product is the tied weight.
    """
    turned = reading.transposed
    factors = ((right, True), (left, True)) if turned else ((left, False), (right, False))
    if operator_of(reading).kind == Lookup.kind:
        return factors
    (scheme,) = schemes_for(reading)
    assert isinstance(scheme, ProductScheme)
    first, second = factors if scheme.inputs_first else factors[::-1]
    if scheme.inputs_first != scheme.data_left:
        first = (first[0], not first[1])
    return first, second


def macs_per_rank(reading: Layer, use: Use, shapes: Mapping[str, Shape]) -> int | None:
    """MACs of both factors in one use, for each unit of rank; None where shapes are unknown."""
    if operator_of(reading).kind == Lookup.kind:
        return elements(shapes.get(use.output))
    return schemes_for(reading)[0].macs_per_rank(use, shapes)


def operand(operands: Mapping[str, str], part: Part) -> str:
    """Name the tensor that holds a part, as `with_transposes` has made it."""
    name, transposed = part
    return operands[f"{name}^T"] if transposed else operands[name]


def with_transposes(
    operands: Mapping[str, str], parts: Sequence[Part], names: Names
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Transpose those of the parts that are read so, each once; return the nodes and all names."""
    nodes, found = [], dict(operands)
    for name in dict.fromkeys(name for name, transposed in parts if transposed):
        label = f"{operands[name]}_transposed"
        found[f"{name}^T"] = names.tensor(label)
        nodes.append(
            helper.make_node(
                "Transpose",
                [operands[name]],
                [found[f"{name}^T"]],
                names.node(label),
                perm=[1, 0],
            )
        )
    return nodes, found


def lookup_nodes(
    node: onnx.NodeProto, use: Use, factors: tuple[str, str], names: Names
) -> list[onnx.NodeProto]:
    """Build a lookup of short rows, and the product with the second factor."""
    label = node.name or use.output
    rows = names.tensor(f"{label}/first_factor")
    return [
        helper.make_node("Gather", [factors[0], use.data], [rows], names.node(rows), axis=0),
        helper.make_node("MatMul", [rows, factors[1]], [use.output], node.name),
    ]
