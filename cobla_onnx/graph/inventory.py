"""Result of the search for layers: the layers found, and the nodes skipped, with reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from cobla_onnx.wording import in_flags, option_name

__all__ = ["Inventory", "Layer", "Reason", "Refusal", "Skipped", "Use"]


class Reason(str, Enum):
    """Why a node is left as it is.

    Attributes
    ----------
    value : str
        As documents have it.
    message : str
        With options in both spellings, to be part of an error's message.
    """

    message: str

    def __new__(cls, text: str) -> Reason:
        """Keep a text in both ways."""
        shown = in_flags(text)
        member = str.__new__(cls, shown)
        member._value_ = shown
        member.message = text
        return member

    OPERATOR = "operator is not factorised"
    NOT_CONSTANT = "weight is not constant"
    QUANTISED = "weight is quantised"
    FILLED = "weight is one number, repeated"
    SPARSE = "weight is stored sparse"
    TOO_LARGE = "weight is over 2 GB"
    RANGE = "weight nearly overflows its type"
    BOTH_CONSTANT = "both operands are constant"
    SHARED = "weight has other readers"
    TYPE = "weight type is not supported"
    NOT_A_MATRIX = "weight is not a matrix"
    COLUMNS = "takes columns of a table, not rows"
    EMPTY = "weight has no elements"
    DEPTHWISE = "depthwise convolution"
    GROUPED = "grouped transposed convolution"
    UNREADABLE = "its data cannot be read as vectors"
    UNMEASURED = "changes no tensor that the loss can be taken at"
    SUBGRAPH = "inside a sub-graph or function"
    NOT_FOLLOWED = "data is not followed into this body"
    NEVER_RUN = "in a branch that the data never takes"
    UNCOUNTED = "in a body, its MACs are not known"
    EXCLUDED = "excluded by option"
    TOO_SMALL = f"smaller than {option_name('min_size')}"
    UNASKED = f"only fewer bits would make it smaller, see {option_name('precision')}"
    NO_GAIN = "two factors would not be smaller"
    NOT_FASTER = "two factors would not be faster"
    BUDGET = "budget is better spent elsewhere"
    MET = "budgets are met as it is"


class Refusal(NamedTuple):
    """Why something is not done, with what is particular to the case."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Use:
    """One node that reads the weight of a layer.

    Attributes
    ----------
    node : int
        Index of the node in the graph, or beyond it in `bodies.all_nodes`.
    data : str
        Name of the data that the node reads: the other operand or, of many, the first.
    output : str
        Name of the node's output or, of several, of the first that has a name.
    chain : tuple of int
        Indices of the nodes between the stored tensor and the node that move its elements or cast
        them, in order.
    holder : int or None
        Index of the main graph's node in whose body the node is, such as an If.
    """

    node: int
    data: str
    output: str
    chain: tuple[int, ...]
    holder: int | None = None

    @property
    def place(self) -> int:
        """Index of the node of the main graph that is or holds the node."""
        return self.node if self.holder is None else self.holder


@dataclass(frozen=True)
class Layer:
    """A constant weight and the nodes that read it.

    Attributes
    ----------
    name : str
        Name of the first node, or one made of its operator and index; in a body, after the
        name of the node that holds it.
    op : str
        Type of the nodes, one of `cobla_onnx.graph.operators.base.OPERATORS`.
    source : str
        Name of the stored tensor: an initializer, or the output of a Constant node.
    weight_input : int
        Which input of the nodes is the weight.
    shape : tuple of int
        Shape of the weight as the nodes read it.
    stored_type, type : int
        TensorProto data types: as stored, and as the nodes read it.
    stored_bytes : int
        Bytes of the stored tensor.
    attributes : dict
        Attributes of the nodes that fix how the weight is read, such as ``group`` or
        ``transB``, with their defaults filled in.
    uses : tuple of Use
    bias : str or None
        Name of the stored bias, if nobody but this layer's single node reads it and it is
        added as it is: one number for each output channel.
    readings : tuple of Layer
        Of a tied weight, which nodes read in several ways: each way as a layer with its own nodes.
        The weight is then the stored matrix as it is, the uses are those of all readings in the
        order of the nodes, `op` names all operators, and `weight_input` and `attributes` are
        those of the readings alone. Empty for a weight that is read in one way.
    transposed : bool
        Of a reading: whether its nodes read the transpose of the tied weight.
    """

    name: str
    op: str
    source: str
    weight_input: int
    shape: tuple[int, ...]
    stored_type: int
    type: int
    stored_bytes: int
    uses: tuple[Use, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    bias: str | None = None
    readings: tuple[Layer, ...] = ()
    transposed: bool = False

    def reading(self, use: Use) -> Layer:
        """Return the reading to which a use of a tied weight belongs; else the layer itself."""
        return next((each for each in self.readings if use in each.uses), self)

    @property
    def params(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def in_body(self) -> bool:
        """Whether a node of the layer stands in the body of another."""
        return any(use.holder is not None for use in self.uses)


@dataclass(frozen=True)
class Skipped:
    """A node that is left as it is, and why; `params` is 0 where the weight is not known."""

    name: str
    op: str
    reason: Reason
    detail: str = ""
    params: int = 0

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class Inventory:
    """What a model holds: layers that can be compressed, and nodes that can not."""

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
