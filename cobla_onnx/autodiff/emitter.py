"""Write ONNX nodes as expressions: ``g.mul(a, g.exp(b))`` instead of lists of protos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.io.model_file import unique_name

__all__ = ["Emitter", "Operand"]

Operand: TypeAlias = "str | float"
"""A tensor by its name, or a number of the graph's floating type."""


class Emitter:
    """Collects nodes and constants with names that nobody else uses.

    Parameters
    ----------
    taken : set of str
        Tensor names in use; the emitter adds its own.
    element_type : int
        Floating type of the graph, FLOAT or DOUBLE, as in TensorProto.

    Attributes
    ----------
    nodes : list of NodeProto
        In the order in which they were written, which is topological.
    initializers : list of TensorProto
    """

    def __init__(self, taken: set[str], element_type: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.element_type = element_type
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(element_type)
        self._taken = taken
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}

    def name(self, wanted: str) -> str:
        """Return a new tensor name like `wanted`."""
        # Counted here, since trying wanted_2, wanted_3, ... anew would be quadratic.
        number = self._counts.get(wanted, 0) + 1
        self._counts[wanted] = number
        return unique_name(wanted if number == 1 else f"{wanted}_{number}", self._taken)

    def op(self, op_type: str, *inputs: Operand, **attributes: Any) -> str:
        """Write a node of one output and return the output's name; "" is an absent input."""
        return self.ops(op_type, inputs, 1, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[Operand], outputs: int, **attributes: Any
    ) -> list[str]:
        """Write a node of several outputs and return their names."""
        names = [self.name(f"grad/{op_type}") for _ in range(outputs)]
        operands = [self.number(x) if not isinstance(x, str) else x for x in inputs]
        self.nodes.append(onnx.helper.make_node(op_type, operands, names, names[0], **attributes))
        return names

    def named(self, name: str, tensor: str) -> None:
        """Give a tensor a second name, which must be free."""
        self.nodes.append(onnx.helper.make_node("Identity", [tensor], [name], name))

    def constant(self, array: NDArray[Any]) -> str:
        """Store an array, equal ones once, and return its name."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            self._stored[key] = self.name("grad/constant")
            self.initializers.append(onnx.numpy_helper.from_array(array, self._stored[key]))
        return self._stored[key]

    def number(self, value: float) -> str:
        """Store a scalar of the graph's floating type."""
        return self.constant(np.array(value, dtype=self.dtype))

    def integers(self, values: Sequence[int]) -> str:
        """Store a vector of int64, as shapes, axes and pads are."""
        return self.constant(np.array(values, dtype=np.int64))

    def add(self, a: Operand, b: Operand) -> str:
        """Write a + b."""
        return self.op("Add", a, b)

    def sub(self, a: Operand, b: Operand) -> str:
        """Write a - b."""
        return self.op("Sub", a, b)

    def mul(self, a: Operand, b: Operand) -> str:
        """Write a * b."""
        return self.op("Mul", a, b)

    def div(self, a: Operand, b: Operand) -> str:
        """Write a / b."""
        return self.op("Div", a, b)

    def neg(self, a: str) -> str:
        """Write -a."""
        return self.op("Neg", a)

    def square(self, a: str) -> str:
        """Write a * a."""
        return self.op("Mul", a, a)

    def float(self, a: str) -> str:
        """Cast to the graph's floating type."""
        return self.op("Cast", a, to=self.element_type)

    def masked(self, a: str, condition: str) -> str:
        """Write `a` where the boolean `condition` holds and 0 elsewhere.

        As a product: seven times faster in onnxruntime than Where.
        """
        return self.mul(a, self.float(condition))

    def matmul(self, a: str, b: str) -> str:
        """Write a @ b."""
        return self.op("MatMul", a, b)

    def transpose(self, a: str, order: Sequence[int]) -> str:
        """Permute axes, or return `a` where the order is as it was."""
        order = list(order)
        return a if order == sorted(order) else self.op("Transpose", a, perm=order)

    def swap(self, a: str, rank: int) -> str:
        """Swap the last two of `rank` axes: the matrix transpose."""
        return self.transpose(a, [*range(rank - 2), rank - 1, rank - 2])

    def reshape(self, a: str, shape: Sequence[int]) -> str:
        """Reshape; sizes are meant as they are, but for one -1."""
        allow = {"allowzero": 1} if 0 in shape else {}
        return self.op("Reshape", a, self.integers(shape), **allow)

    def expand(self, a: str, shape: Sequence[int]) -> str:
        """Broadcast to a shape."""
        return self.op("Expand", a, self.integers(shape))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        """Join along an axis."""
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def sum(self, a: str, axes: Sequence[int], *, keep: bool = False) -> str:
        """Sum over axes; without axes return the tensor itself."""
        if not axes:
            return a
        return self.op("ReduceSum", a, self.integers(axes), keepdims=int(keep))

    def mean(self, a: str, axes: Sequence[int], *, keep: bool = False) -> str:
        """Mean over axes; without axes return the tensor itself."""
        if not axes:
            return a
        return self.op("ReduceMean", a, self.integers(axes), keepdims=int(keep))

    def sum_to(self, a: str, shape: Sequence[int], target: Sequence[int]) -> str:
        """Sum a tensor of `shape` over the axes along which `target` was broadcast.

        The adjoint of broadcasting: every copy's gradient counts.
        """
        if tuple(shape) == tuple(target):
            return a
        lead = len(shape) - len(target)
        axes = [i for i, n in enumerate(shape) if i < lead or (target[i - lead] == 1 and n != 1)]
        return self.reshape(self.sum(a, axes, keep=True), target)

    def total(self, terms: Sequence[str]) -> str:
        """Add tensors of equal shape."""
        if len(terms) == 1:
            return terms[0]
        return self.op("Add" if len(terms) == 2 else "Sum", *terms)

    def slice(
        self,
        a: str,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> str:
        """Cut a block out, with positive steps."""
        given = [self.integers(v) for v in (starts, ends, axes, *([steps] if steps else []))]
        return self.op("Slice", a, *given)

    def flip(self, a: str, axes: Sequence[int]) -> str:
        """Reverse the order along axes."""
        if not axes:
            return a
        minus = [-1] * len(axes)
        lowest = [int(np.iinfo(np.int64).min)] * len(axes)
        return self.slice(a, minus, lowest, axes, minus)

    def frame(
        self, a: str, shape: Sequence[int], begins: Sequence[int], ends: Sequence[int]
    ) -> str:
        """Pad with zeros where a number is positive, cut off where it is negative."""
        cut = [i for i in range(len(shape)) if begins[i] < 0 or ends[i] < 0]
        if cut:
            starts = [max(0, -begins[i]) for i in cut]
            stops = [shape[i] - max(0, -ends[i]) for i in cut]
            a = self.slice(a, starts, stops, cut)
        pads = [max(0, n) for n in (*begins, *ends)]
        return self.op("Pad", a, self.integers(pads)) if any(pads) else a
