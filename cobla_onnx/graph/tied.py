"""Tied weights: a stored matrix that nodes read in several ways is one layer.

An embedding that is also the output layer, through a Transpose or Gemm's transB; a matrix that one
product reads as it is and another one transposed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cobla_onnx.graph.inventory import Layer
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.graph.operators.product import Product

__all__ = ["Steps", "tied"]

Steps = Sequence[tuple[str, tuple[int, ...]]]
"""What moves the elements of a weight on its way to its nodes; see `Origin.steps`."""

# Kinds of operators that read matrices.
KINDS = (Lookup.kind, Product.kind)


def tied(
    found: Iterable[tuple[Layer, str, Steps]], shapes: Mapping[str, tuple[int, ...]]
) -> list[Layer]:
    """Put layers together that read the same stored matrix in different ways.

    Parameters
    ----------
    found : iterable of (Layer, str, Steps)
        Each with the kind of its operator. A layer alone, and layers that do not go together, come
        back as they are.
    shapes : mapping of str to tuple of int
        Shapes of the stored tensors.

    Returns
    -------
    list of Layer
        In the order of their first nodes.
    """
    groups: dict[str, list[tuple[Layer, str, Steps]]] = defaultdict(list)
    for entry in found:
        groups[entry[0].source].append(entry)
    result: list[Layer] = []
    for source, its in groups.items():
        one = _together(its, shapes[source]) if len(its) > 1 else None
        result.extend([layer for layer, _, _ in its] if one is None else [one])
    return sorted(result, key=lambda layer: layer.uses[0].place)


def _together(its: Sequence[tuple[Layer, str, Steps]], shape: tuple[int, ...]) -> Layer | None:
    """Return the one layer of several readings; None if they do not go together."""
    first = its[0][0]
    if len(shape) != 2 or len({layer.type for layer, _, _ in its}) > 1:
        return None
    readings = []
    for layer, kind, steps in its:
        turns = [turn == (1, 0) for step, turn in steps if step == "Transpose"]
        transposed = sum(turns) % 2 == 1
        # A lookup along columns would count them, and not the rows.
        if kind not in KINDS or len(turns) < len(steps) or (kind == Lookup.kind and transposed):
            return None
        readings.append(replace(layer, bias=None, transposed=transposed))
    uses = sorted((use for each in readings for use in each.uses), key=lambda use: use.node)
    return replace(
        first,
        op="+".join(dict.fromkeys(layer.op for layer in readings)),
        shape=shape,
        uses=tuple(uses),
        attributes={},
        bias=None,
        readings=tuple(readings),
    )
