"""Lookup: rows of a table, chosen by integers; the product of one-hot vectors with the table.

The vectors are never made where it matters: all that errors depend on is how often each row is read
(`cobla_onnx.calibration.frequencies`).
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
from cobla_onnx.graph.operators.base import AGAIN, OutputAxis, Shape
from cobla_onnx.graph.operators.patches import DensePatch, ReadPatch, cut

__all__ = ["Lookup", "LookupPatch"]


class Lookup:
    """ONNX's Gather, where it takes whole rows of a stored matrix: embeddings, positions, types."""

    kind: ClassVar[str] = "lookup"
    op_types: ClassVar[tuple[str, ...]] = ("Gather",)
    domain: ClassVar[str] = ""
    weight_inputs: ClassVar[tuple[int, ...]] = (0,)
    incidental: ClassVar[bool] = True

    def reading(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Return the axis."""
        return {"axis": attributes(node).get("axis", 0)}

    def check(self, node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
        """Check that the weight has the axis."""
        axis = attributes(node).get("axis", 0)
        if not -len(shape) <= axis < len(shape):
            raise ModelError(
                f"{label}: takes entries along axis {axis} of a tensor of shape {list(shape)}; "
                f"{AGAIN}"
            )

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Refuse what does not choose among whole rows of a matrix."""
        axis = layer.attributes["axis"]
        if len(layer.shape) > 2 or layer.shape[0] < 2:
            return Refusal(Reason.NOT_A_MATRIX, f"shape {list(layer.shape)}")
        return None if axis in (0, -2) else Refusal(Reason.COLUMNS, f"axis {axis}")

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Return the last axis, along which rows lie."""
        return OutputAxis(-1, layer.shape[1])

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        """Return False: there is no third input."""
        return False

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Return 0: rows are copied."""
        return 0

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> ReadPatch | Refusal:
        """Return the numbers of rows, as one-hot vectors."""
        return LookupPatch(use.data, layer.shape[0])


@dataclass(frozen=True)
class LookupPatch(DensePatch):
    """How a lookup reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor, of integers; negative ones count from the end.
    size : int
        Rows of the table.
    """

    data: str
    size: int

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return 1

    def rows(self, data: NDArray[Any]) -> NDArray[np.int64]:
        """Numbers of the rows that are read, from 0 on, in order."""
        found = np.asarray(data).reshape(-1).astype(np.int64)
        return np.where(found < 0, found + self.size, found)

    def positions(self, data: NDArray[Any]) -> int:
        """Rows that a batch reads."""
        return int(np.size(data))

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of one-hot vectors, each of shape (1, size, positions).

        The parameters are those of `Patch.vectors`.
        """
        rows = self.rows(data)
        rows = rows if chosen is None else rows[chosen]
        for part in cut(len(rows), self.size, each):
            count = len(rows[part])
            hot = np.zeros((1, self.size, count), np.float32)
            hot[0, rows[part], np.arange(count)] = 1.0
            yield hot

    def outputs(
        self, output: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """Rows that were read, shape (1, width, positions)."""
        rows = output.reshape(-1, output.shape[-1])
        return (rows if chosen is None else rows[chosen]).T[None]
