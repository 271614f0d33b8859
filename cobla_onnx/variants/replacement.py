"""What is stored in place of a layer's weight, and the nodes that read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.graph.protos import copied_node
from cobla_onnx.text import quoted
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.writing import Writing
from cobla_onnx.wording import either

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ROUNDING", "Place", "Replacement", "narrowed", "narrowed_bias", "own_node"]

# Tolerance for float rounding in one layer, relative to its largest output, by type.
ROUNDING = {np.dtype(np.float16): 2e-2, np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-10}


Place: TypeAlias = Callable[[str, NDArray[Any]], NDArray[Any]]
"""Takes the name of an array and the array; returns an equal one that lies elsewhere."""


@dataclass(frozen=True)
class Replacement(ABC):
    """What is stored in place of a layer's weight, and the nodes that read it.

    Attributes
    ----------
    layer : Layer
    arrays : mapping of str to array
        What is stored, by the name of the part, in the types in which it is stored.
    bias : array or None
        Replaces ``layer.bias``; None leaves it as it is.
    """

    layer: Layer
    arrays: Mapping[str, NDArray[Any]]
    bias: NDArray[Any] | None

    @property
    def nibbles(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the arrays that hold two numbers of a UINT4 tensor in a byte, by part."""
        return {}

    @property
    def optimized_tolerance(self) -> float | None:
        """The same as `tolerance` once onnxruntime has optimised the nodes; None if it is that."""
        return None

    def written(self, writing: Writing) -> Replacement:
        """Return the same as it is written into a model."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored in place of the weight."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def held(self) -> int:
        """Bytes of memory that it takes."""
        return self.nbytes

    def moved(self, place: Place) -> Self:
        """Return the same with the arrays that `place` gives for them."""
        return replace(self, arrays={part: place(part, each) for part, each in self.arrays.items()})

    @property
    def tolerance(self) -> float:
        """Most by which the nodes may differ from the dense weight, of the largest output."""
        return ROUNDING[onnx.helper.tensor_dtype_to_np_dtype(self.layer.type)]

    def as_folded(self) -> Replacement:
        """Return the same with nodes that make the layer's weight from what is stored.

        Their inputs are all constant, so that onnxruntime computes the weight once, when it opens
        the model, and runs the layer's own node.
        """
        raise NotImplementedError(type(self).__name__)

    @property
    def learnable(self) -> Mapping[str, NDArray[Any]]:
        """Numbers that may take other values, each whatever the others hold; by default none."""
        return {}

    def with_parts(self, parts: Mapping[str, NDArray[Any]], bias: NDArray[Any] | None) -> Self:
        """Return the same with other values, in the types in which they are stored.

        Parameters
        ----------
        parts : mapping of str to array
            For some of `learnable`, of the same shapes.
        bias : array or None
            None leaves it as it is.

        Raises
        ------
        ModelError
            If a value overflows its type.
        """
        own = self.bias if bias is None else narrowed_bias(self.layer, bias)
        return replace(self._with_parts(parts), bias=own)

    def _with_parts(self, parts: Mapping[str, NDArray[Any]]) -> Self:
        """Return the same with other values; by default each is an array of this name."""
        what = "what is stored for its weight"
        changed = {
            part: narrowed(self.layer, array, self.arrays[part].dtype, what)
            for part, array in parts.items()
        }
        return replace(self, arrays={**self.arrays, **changed})

    def decoded(self) -> Replacement:
        """Return the same with the numbers that codes stand for in their place; by default this."""
        return self

    def read_from(self, part: str) -> str:
        """Name the array of `decoded` that is made of a part of `learnable`."""
        return part

    def as_read(self, parts: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of `decoded` that values of `learnable` stand for, once rounded."""
        return parts

    def pulled_back(
        self, parts: Mapping[str, NDArray[Any]], gradients: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Return derivatives by values of `learnable`, from those by the arrays of `as_read`."""
        return gradients

    @abstractmethod
    def dense(self) -> NDArray[Any]:
        """Return the weight that the arrays stand for, shape ``layer.shape``."""

    @abstractmethod
    def nodes(
        self,
        node: onnx.NodeProto,
        use: Use,
        operands: Mapping[str, str],
        rest: Sequence[str],
        names: Names,
    ) -> list[onnx.NodeProto]:
        """Build the nodes of one use of the layer; the last one writes ``use.output``.

        Parameters
        ----------
        node : NodeProto
            The node that they replace.
        use : Use
        operands : mapping of str to str
            For each part, the tensor that holds it; see `shared`.
        rest : sequence of str
            The node's inputs after data and weight, such as its bias.
        names : Names
        """

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that all uses share, and name the tensors that the uses read.

        These are casts to the type in which the layer computes, where it is stored in another.

        Parameters
        ----------
        stored : mapping of str to str
            For each part, the name of its initializer.
        names : Names
        """
        if self.layer.type == self.layer.stored_type:
            return [], dict(stored)
        operands = {part: names.tensor(f"{name}_cast") for part, name in stored.items()}
        casts = [
            onnx.helper.make_node(
                "Cast", [name], [operands[part]], names.node(f"{name}_cast"), to=self.layer.type
            )
            for part, name in stored.items()
        ]
        return casts, operands


def own_node(
    node: onnx.NodeProto, weight_input: int, weight: str, rest: Sequence[str]
) -> onnx.NodeProto:
    """Copy a layer's own node, to read its weight from another tensor.

    Parameters
    ----------
    rest : sequence of str
        The inputs after the first two.
    """
    result = copied_node(node)
    del result.input[2:]
    result.input.extend(rest)
    result.input[weight_input] = weight
    return result


def narrowed(
    layer: Layer, array: NDArray[Any], dtype: np.dtype[Any], what: str
) -> NDArray[np.generic]:
    """Convert an array to the type in which it is stored.

    What is below the normal numbers of single precision becomes 0: it loses nothing, and processors
    multiply it a hundred times slower. Channels that training gave up hold such.

    Parameters
    ----------
    what : str
        What the array is, for the error.

    Raises
    ------
    ModelError
        If a value overflows the type.
    """
    # bfloat16 has the range of single precision, and numpy does not have it.
    limits = np.finfo(dtype if dtype.kind == "f" else np.float32)
    if float(np.abs(array).max(initial=0.0)) > float(limits.max):
        name = quoted(layer.name)
        option = either(python=f"exclude=[{name}]", command=f"--exclude {name}")
        raise ModelError(f"node {name}: {what} overflows {dtype}; leave it out by {option}")
    result = np.ascontiguousarray(array.astype(dtype))
    if dtype == np.float32:
        result[(result < limits.tiny) & (result > -limits.tiny)] = 0.0
    return result


def narrowed_bias(layer: Layer, bias: NDArray[Any] | None) -> NDArray[np.generic] | None:
    """Convert a layer's new bias, if there is one, to the type in which the layer computes.

    Raises
    ------
    ModelError
        If a value overflows the type.
    """
    if bias is None:
        return None
    return narrowed(layer, bias, onnx.helper.tensor_dtype_to_np_dtype(layer.type), "its bias")
