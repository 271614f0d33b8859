"""What the package needs to know of an operator that holds a weight, and the registry of these.

Everything that differs from operator to operator is a method of its object; all that walks,
counts, checks or calibrates asks the registry. What only one room knows about an operator is
kept there by its `kind`: the matricisations of its weight, for instance, in `variants`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.inventory import Layer, Refusal, Use
from cobla_onnx.graph.operators.patches import Patch
from cobla_onnx.graph.protos import plain_domain

__all__ = [
    "OPERATORS",
    "OutputAxis",
    "Shape",
    "WeightOperator",
    "check_axes",
    "elements",
    "operator_names",
    "operator_of",
    "operators_of_node",
    "register",
]

Shape: TypeAlias = "tuple[int | None, ...]"

AGAIN = "the model is damaged, export it again"


class OutputAxis(NamedTuple):
    """Where the outputs of a layer lie: the axis (from the end if negative), and their number."""

    axis: int
    size: int


class WeightOperator(Protocol):
    """An operator that multiplies data with a weight.

    Of most, the output is the product. Then inputs 0 and 1 of its nodes are the data and the
    weight, in either order; input 2, if there is one, is added to the product, and output 0 is the
    result. Of others the product is a part of what the node computes; their patches have no
    outputs, and nothing is fitted to these.

    Attributes
    ----------
    kind : str
        The name under which other rooms register what they know of it.
    op_types : tuple of str
        Types of its nodes. Other operators may share them where a node holds several weights;
        each of these is then a layer of its own.
    domain : str
        Empty for ONNX's own.
    weight_inputs : tuple of int
        Inputs that may be the weight; those of no other operator with the same nodes.
    incidental : bool
        Whether most nodes of its types hold no weight. Then those without a stored matrix of
        floating type are no concern of anybody who looks for layers, and are not mentioned.
    """

    kind: ClassVar[str]
    op_types: ClassVar[tuple[str, ...]]
    domain: ClassVar[str]
    weight_inputs: ClassVar[tuple[int, ...]]
    incidental: ClassVar[bool]

    def reading(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Attributes that fix how the weight is read, with their defaults filled in.

        Nodes that read a stored weight with the same values are one layer. Values are hashable.
        """
        ...

    def check(self, node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
        """Check the node's attributes against the shape of its weight, as the node reads it.

        Parameters
        ----------
        label : str
            What the node is called, for the message.

        Raises
        ------
        ModelError
            If they do not fit: no runtime could run the node.
        """
        ...

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Why a layer of a valid model is left as it is; None if it need not be.

        Weights that are not matrices, are empty or have other readers are refused whatever the
        operator, see `layers.find_layers`.

        Parameters
        ----------
        shapes : mapping of str to Shape, or None
            Shapes of the model's tensors; None before they are known. Layers are asked again
            afterwards.
        """
        ...

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Axis of the output with one entry for each output of the weight; None if none has.

        A bias along it can take up a change of the mean; the weights of single outputs in a
        loss lie along it.
        """
        ...

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        """Whether input 2, if there is one, is added as it is, along the axis of the outputs."""
        ...

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Multiply-accumulate operations with the weight; None if a node's shapes are not known.

        The node need not be a layer: both its operands may be computed.
        """
        ...

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> Patch | Refusal:
        """How a use of the layer, by this node, reads its data; or why data says nothing of it.

        A refused layer stays whole in all compressions with data.
        """
        ...


OPERATORS: dict[str, tuple[WeightOperator, ...]] = {}
"""The operators by the types of their nodes, in the order of their registration."""


def register(operator: WeightOperator) -> None:
    """Add an operator to the registry.

    Raises
    ------
    ValueError
        If one of its types is registered with one of its inputs.
    """
    for op_type in operator.op_types:
        known = OPERATORS.get(op_type, ())
        if any(set(other.weight_inputs) & set(operator.weight_inputs) for other in known):
            raise ValueError(f"operator {op_type} is registered already")
        OPERATORS[op_type] = (*known, operator)


def operators_of_node(node: onnx.NodeProto) -> tuple[WeightOperator, ...]:
    """Look up the operators of a node, one for each of its weights; none if it holds none."""
    domain = plain_domain(node.domain)
    return tuple(found for found in OPERATORS.get(node.op_type, ()) if found.domain == domain)


def operator_of(layer: Layer) -> WeightOperator:
    """Look up a layer's operator."""
    if layer.readings:
        return TIED
    return next(o for o in OPERATORS[layer.op] if layer.weight_input in o.weight_inputs)


class Tied:
    """What stands for the operators of a tied weight: it asks those of its readings.

    No node has it, so that it is not in the registry.
    """

    kind: ClassVar[str] = "tied"
    op_types: ClassVar[tuple[str, ...]] = ()
    domain: ClassVar[str] = ""
    weight_inputs: ClassVar[tuple[int, ...]] = ()
    incidental: ClassVar[bool] = False

    def reading(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Return nothing: attributes are those of the readings."""
        return {}

    def check(self, node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
        """Do nothing: readings have been checked."""

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Refuse what one of the readings refuses."""
        found = (operator_of(each).refusal(each, shapes) for each in layer.readings)
        return next((refusal for refusal in found if refusal is not None), None)

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Return None: readings have outputs of their own."""
        return None

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        """Return False: no bias can take up a change of all readings."""
        return False

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Return those of the node's own operator."""
        (operator,) = operators_of_node(node)
        return operator.macs(node, shapes)

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> Patch | Refusal:
        """Return how the use reads its data."""
        reading = layer.reading(use)
        return operator_of(reading).patch(node, reading, use)


TIED = Tied()


def operator_names() -> str:
    """List the types of all operators, for people."""
    *others, last = OPERATORS
    return f"{', '.join(others)} and {last}" if others else last


def check_axes(
    node: onnx.NodeProto, shape: tuple[int, ...], label: str, least: int, most: int
) -> None:
    """Check the number of axes of a node's weight.

    Raises
    ------
    ModelError
        If there are fewer than `least` or more than `most`.
    """
    if not least <= len(shape) <= most:
        raise ModelError(
            f"{label}: its weight has shape {list(shape)}, a {node.op_type}'s has "
            f"{least} axes{' or more' if most > least else ''}; {AGAIN}"
        )


def elements(*shapes: Iterable[int | None] | None) -> int | None:
    """Product of all sizes of all shapes; None if one is not known."""
    sizes: list[int] = []
    for shape in shapes:
        if shape is None:
            return None
        for size in shape:
            if size is None:
                return None
            sizes.append(size)
    return math.prod(sizes)
