"""Recurrent layers: a weight for what they read, and one for the state that they hand on.

Both products are summed inside of the node, before its activations. So its outputs are linear in
neither weight, and only the vectors that these multiply tell what their errors do: nothing is
fitted to outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.inventory import Layer, Reason, Refusal, Use
from cobla_onnx.graph.operators.base import AGAIN, OutputAxis, Shape, check_axes, elements
from cobla_onnx.graph.operators.patches import DensePatch, Patch, cut

__all__ = [
    "BIASES",
    "GATES",
    "LENGTHS",
    "PEEPHOLES",
    "STATES",
    "InputWeight",
    "RecurrentPatch",
    "StateWeight",
]

# Matrices that are stacked in a weight of each direction.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Inputs beside data and weights: the biases of both products, the lengths of the sequences, and the
# states before the first step.
BIASES, LENGTHS, STATES = 3, 4, (5, 6)
# Vectors of the state's size in the last input of an LSTM, the weights of its peepholes.
PEEPHOLES = 3


class _RecurrentWeight:
    """What both weights of ONNX's LSTM, GRU and RNN have in common."""

    op_types: ClassVar[tuple[str, ...]] = ("LSTM", "GRU", "RNN")
    domain: ClassVar[str] = ""
    incidental: ClassVar[bool] = False
    of_state: ClassVar[bool]

    def reading(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Return the directions, and the order of the data's axes."""
        values = attributes(node)
        direction = values.get("direction", b"forward").decode()
        return {"direction": direction, "layout": values.get("layout", 0)}

    def check(self, node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
        """Check the weight's axes: directions, rows of all gates, entries of a vector."""
        check_axes(node, shape, label, 3, 3)
        hidden = attributes(node).get("hidden_size", shape[1] // GATES[node.op_type])
        entries = hidden if self.of_state else shape[2]
        wanted = (_directions(node), GATES[node.op_type] * hidden, entries)
        if shape != wanted:
            raise ModelError(
                f"{label}: its weight has shape {list(shape)}, its hidden_size and direction make "
                f"that {list(wanted)}; {AGAIN}"
            )

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Refuse nothing: all that is not a weight stays as it is."""
        return None

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Return None: no output of the weight is one of the node."""
        return None

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        """Return False: input 2 is the other weight."""
        return False


class InputWeight(_RecurrentWeight):
    """The weight that multiplies each vector of a sequence."""

    kind: ClassVar[str] = "recurrent input"
    weight_inputs: ClassVar[tuple[int, ...]] = (1,)
    of_state: ClassVar[bool] = False

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Count the weight once for each vector, whether or not its sequence is shorter."""
        data = shapes.get(node.input[0])
        return elements(data, (_rows(node),))

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> Patch | Refusal:
        """Return the vectors of the sequences."""
        return RecurrentPatch(use.data, 1, layer.shape[2], _ordered(layer, "sbh"))


class StateWeight(_RecurrentWeight):
    """The weight that multiplies the state before each step."""

    kind: ClassVar[str] = "recurrent state"
    weight_inputs: ClassVar[tuple[int, ...]] = (2,)
    of_state: ClassVar[bool] = True

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Count the weight once for each step, whether or not its sequence is shorter."""
        data = shapes.get(node.input[0])
        return elements(data and data[:2], (_rows(node), attributes(node).get("hidden_size")))

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> Patch | Refusal:
        """Return the states that the node gives out, by direction: after each step, or the last.

        They stand for those before each step: only the initial state, which is mostly 0 and then
        adds nothing, is not among them. Rows of a GRU may read a state that a gate has made
        smaller; it counts as it is.
        """
        for name, axes in zip(node.output, ("sdbh", "dbh"), strict=False):
            if name:
                return RecurrentPatch(name, layer.shape[0], layer.shape[2], _ordered(layer, axes))
        return Refusal(Reason.UNREADABLE, "the node gives out no state")


def _directions(node: onnx.NodeProto) -> int:
    return 2 if attributes(node).get("direction") == b"bidirectional" else 1


def _ordered(layer: Layer, axes: str) -> str:
    """Letters of a tensor's axes, see `RecurrentPatch`; given where samples do not come first."""
    return "b" + axes.replace("b", "") if layer.attributes["layout"] else axes


def _rows(node: onnx.NodeProto) -> int | None:
    """Rows of a weight over all directions."""
    hidden = attributes(node).get("hidden_size")
    return None if hidden is None else _directions(node) * GATES[node.op_type] * hidden


@dataclass(frozen=True)
class RecurrentPatch(DensePatch):
    """Vectors that are one axis of a tensor, ordered by sample, then by step.

    Attributes
    ----------
    data : str
        Name of the tensor.
    groups : int
        Number of separate moments: 1, or one for each direction.
    size : int
        Entries of a vector.
    axes : str
        A letter for each axis of the tensor: ``s`` steps, ``d`` directions, ``b`` samples,
        ``h`` entries.
    """

    data: str
    groups: int
    size: int
    axes: str

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch, those past the ends of shorter sequences among them."""
        return int(data.size) // (self.groups * self.size)

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (groups, size, positions).

        The parameters are those of `Patch.vectors`.
        """
        missing = [axis for axis in "ds" if axis not in self.axes]
        axes = [*self.axes, *missing]
        spread = data.reshape(*data.shape, *(1 for _ in missing))
        ordered = spread.transpose([axes.index(axis) for axis in "dhbs"])
        stack = ordered.reshape(self.groups, self.size, -1)
        count = stack.shape[2] if chosen is None else len(chosen)
        for part in cut(count, self.groups * self.size, each):
            yield stack[:, :, part if chosen is None else chosen[part]]
