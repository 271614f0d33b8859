"""Registry of derivative rules, and the view of a node that a rule is given.

A rule is the vector-Jacobian product of one operator: from dE/dy, the gradient
with respect to the node's output, it writes dE/dx for the requested inputs. As in HIPS/autograd
and tinygrad, all of reverse mode is this table and a short walk (`autodiff.backward`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.graph.layers import attributes
from cobla_onnx.graph.protos import is_standard

__all__ = [
    "FLAT",
    "RULES",
    "Gradients",
    "NoRuleError",
    "Rule",
    "Sizes",
    "Step",
    "find_rule",
    "flat",
    "vjp",
]

Sizes: TypeAlias = "tuple[int, ...]"
"""A shape of which every axis is known."""

Gradients: TypeAlias = "Sequence[str | None]"
"""One tensor name for each input of a node; None is a gradient of zero."""


class NoRuleError(Exception):
    """A node cannot be differentiated; the text says why. Never leaves the package."""


@dataclass(frozen=True)
class Step:
    """One node of the forward graph, as its rule sees it.

    Attributes
    ----------
    node : NodeProto
    dys : tuple of (str or None)
        Gradient with respect to each output, of its shape; None is zero.
    wanted : tuple of bool
        Which inputs need a gradient.
    shapes : mapping of str to tuple of int
        Shapes of the forward tensors.
    constants : mapping of str to array
        Forward tensors whose values are known.
    attributes : dict
    """

    node: onnx.NodeProto
    dys: tuple[str | None, ...]
    wanted: tuple[bool, ...]
    shapes: Mapping[str, Sizes]
    constants: Mapping[str, NDArray[Any]]
    attributes: dict[str, Any]

    @classmethod
    def of(
        cls,
        node: onnx.NodeProto,
        dys: Sequence[str | None],
        wanted: Sequence[bool],
        shapes: Mapping[str, Sizes],
        constants: Mapping[str, NDArray[Any]],
    ) -> Step:
        """Read the attributes, text decoded."""
        values = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in attributes(node).items()
        }
        return cls(node, tuple(dys), tuple(wanted), shapes, constants, values)

    @property
    def dy(self) -> str:
        """Gradient with respect to the only output that has one."""
        if any(dy is not None for dy in self.dys[1:]):
            raise NoRuleError("a second output is used")
        assert self.dys[0] is not None
        return self.dys[0]

    @property
    def x(self) -> str:
        """Name of the first input."""
        return str(self.node.input[0])

    @property
    def y(self) -> str:
        """Name of the first output."""
        return str(self.node.output[0])

    def has(self, index: int) -> bool:
        """Tell whether an optional input is there."""
        return index < len(self.node.input) and self.node.input[index] != ""

    def has_output(self, index: int) -> bool:
        """Tell whether an optional output is there."""
        return index < len(self.node.output) and self.node.output[index] != ""

    def wants(self, index: int) -> bool:
        """Return whether the gradient with respect to an input is requested."""
        return index < len(self.wanted) and self.wanted[index]

    def shape(self, index: int = 0) -> Sizes:
        """Shape of an input."""
        return self._shape(self.node.input[index])

    @property
    def y_shape(self) -> Sizes:
        """Shape of the first output."""
        return self._shape(self.node.output[0])

    def _shape(self, name: str) -> Sizes:
        if name not in self.shapes:
            raise NoRuleError(f"the shape of {name!r} depends on the data")
        return self.shapes[name]

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute, or its default."""
        return self.attributes.get(name, default)

    def axis(self, default: int) -> int:
        """Return the attribute ``axis``, counted from the front."""
        axis = int(self.get("axis", default))
        return axis + len(self.shape()) if axis < 0 else axis

    def constant(self, index: int) -> NDArray[Any] | None:
        """Value of an input that must be known, or None where it is absent."""
        if not self.has(index):
            return None
        name = self.node.input[index]
        if name not in self.constants:
            raise NoRuleError(f"its input {name!r} depends on the data")
        return self.constants[name]

    def integers(self, index: int) -> list[int] | None:
        """Values of an input of integers that must be known, or None where it is absent."""
        value = self.constant(index)
        return None if value is None else [int(v) for v in np.ravel(value)]


Rule: TypeAlias = "Callable[[Emitter, Step], Gradients]"

RULES: dict[str, Rule] = {}
"""Rules by operator, of ONNX's own domain."""

FLAT: dict[str, str] = {}
"""Operators with a derivative of zero almost everywhere, and why."""


def vjp(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators.

    Raises
    ------
    ValueError
        If one has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for operator in operators:
            if operator in RULES or operator in FLAT:
                raise ValueError(f"{operator} has a rule already")
            RULES[operator] = rule
        return rule

    return register


def flat(why: str, *operators: str) -> None:
    """Register operators through which no gradient flows.

    Raises
    ------
    ValueError
        If one has a rule already.
    """
    for operator in operators:
        if operator in RULES or operator in FLAT:
            raise ValueError(f"{operator} has a rule already")
        FLAT[operator] = why


def find_rule(node: onnx.NodeProto) -> Rule | None:
    """Return the rule of a node's operator, or None."""
    return RULES.get(node.op_type) if is_standard(node) else None
