"""Matrix product: its weight of shape (..., rows, columns) multiplies rows or columns of data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.inventory import Layer, Reason, Refusal, Use
from cobla_onnx.graph.operators.base import OutputAxis, Shape, check_axes, elements
from cobla_onnx.graph.operators.patches import DensePatch, ReadPatch, cut

__all__ = ["Product", "ProductPatch"]


class Product:
    """ONNX's Gemm and MatMul, with the weight on either side."""

    kind: ClassVar[str] = "product"
    op_types: ClassVar[tuple[str, ...]] = ("Gemm", "MatMul")
    domain: ClassVar[str] = ""
    weight_inputs: ClassVar[tuple[int, ...]] = (0, 1)
    incidental: ClassVar[bool] = False

    def reading(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Return what Gemm transposes."""
        if node.op_type == "MatMul":
            return {}
        values = attributes(node)
        return {"transA": values.get("transA", 0), "transB": values.get("transB", 0)}

    def check(self, node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
        """Check the weight's axes."""
        least, most = (1, 16) if node.op_type == "MatMul" else (2, 2)
        check_axes(node, shape, label, least, most)

    def refusal(self, layer: Layer, shapes: Mapping[str, Shape] | None) -> Refusal | None:
        """Refuse stacks where a product of two factors might broadcast differently."""
        if shapes is None or len(layer.shape) == 2:
            return None
        if all(len(shapes.get(use.data) or ()) > 1 for use in layer.uses):
            return None
        detail = "a stack of matrices meets a vector, or data of unknown rank"
        return Refusal(Reason.NOT_A_MATRIX, detail)

    def output_axis(self, layer: Layer) -> OutputAxis | None:
        """Return the last axis, if the weight is on the right and the same for all data."""
        if layer.weight_input != 1 or any(size != 1 for size in layer.shape[:-2]):
            return None
        return OutputAxis(-1, layer.shape[-2 if layer.attributes.get("transB") else -1])

    def adds_bias(self, node: onnx.NodeProto) -> bool:
        """Return whether Gemm adds it without a factor."""
        values = attributes(node)
        return bool(values.get("alpha", 1.0) == 1.0 and values.get("beta", 1.0) == 1.0)

    def macs(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
        """Count a sum over the inner axis for each element of the output."""
        left = shapes.get(node.input[0])
        if not left:
            return None
        inner = left[0] if attributes(node).get("transA", 0) else left[-1]
        return elements(shapes.get(node.output[0]), (inner,))

    def patch(self, node: onnx.NodeProto, layer: Layer, use: Use) -> ReadPatch | Refusal:
        """Return the rows or columns of the data."""
        right = layer.weight_input == 1
        values = layer.attributes
        flipped = bool(values.get("transA" if right else "transB", 0))
        transposed = bool(values.get("transB" if right else "transA", 0))
        size = layer.shape[-2] if right != transposed else layer.shape[-1]
        return ProductPatch(use.data, right == flipped, layer.shape[:-2], size, not right)


@dataclass(frozen=True)
class ProductPatch(DensePatch):
    """How a Gemm or MatMul reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor.
    columns : bool
        Whether the vectors are its columns, not its rows (the weight is the left operand, or
        Gemm transposes its data).
    batch : tuple of int
        Leading axes of the weight; each matrix of the stack has its own moment.
    size : int
        Entries of a vector.
    output_columns : bool
        Whether each output vector is a column of the output.
    """

    data: str
    columns: bool
    batch: tuple[int, ...]
    size: int
    output_columns: bool

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return math.prod(self.batch)

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        return int(self._inputs(data).shape[2])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (groups, size, positions).

        The parameters are those of `Patch.vectors`.
        """
        stack = self._inputs(data)
        count = stack.shape[2] if chosen is None else len(chosen)
        for part in cut(count, self.groups * self.size, each):
            yield stack[:, :, part if chosen is None else chosen[part]]

    def outputs(
        self, output: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (groups, outputs, positions)."""
        columns = self.output_columns and output.ndim > 1
        stack = self._stack(output if output.ndim > 1 else output[None], columns)
        return stack if chosen is None else stack[:, :, chosen]

    def _inputs(self, data: NDArray[Any]) -> NDArray[Any]:
        return self._stack(data if data.ndim > 1 else data[None], self.columns and data.ndim > 1)

    def _stack(self, array: NDArray[Any], columns: bool) -> NDArray[Any]:
        """Group the vectors of an array by the matrix of the weight that multiplies them."""
        if not columns:
            array = array.swapaxes(-1, -2)
        shape = np.broadcast_shapes(array.shape[:-2], self.batch)
        array = np.broadcast_to(array, (*shape, *array.shape[-2:]))
        lead = len(shape) - len(self.batch)
        # Along an axis of length 1 of the weight, all data is multiplied with the same matrix.
        apart = [lead + axis for axis, length in enumerate(self.batch) if length != 1]
        together = [axis for axis in range(len(shape)) if axis not in apart]
        order = (*apart, array.ndim - 2, *together, array.ndim - 1)
        return array.transpose(order).reshape(self.groups, array.shape[-2], -1)
