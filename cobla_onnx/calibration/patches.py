"""Take from a run the vectors by which a layer's errors count: what it reads, or its outputs.

How an operator reads its data is its own affair, see `cobla_onnx.graph.operators`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.inventory import Layer, Reason, Refusal, Use
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.gather import LookupPatch
from cobla_onnx.graph.operators.patches import DensePatch, Patch, ReadPatch, cut
from cobla_onnx.text import quoted

__all__ = [
    "WIDE",
    "OutputPatch",
    "Patch",
    "ReadPatch",
    "finite_outputs",
    "has_products",
    "patch_of",
    "read_patch_of",
    "unreadable",
]

# For vectors longer than this, the second moment of the outputs is used instead.
WIDE = 5000


@dataclass(frozen=True)
class OutputPatch(DensePatch):
    """A layer's outputs in place of its inputs, for layers whose input vectors are too wide.

    Attributes
    ----------
    data : str
        Name of the layer's output.
    read : ReadPatch
    size : int
        Outputs of each group.
    """

    data: str
    read: ReadPatch
    size: int

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return self.read.groups

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        return int(self.read.outputs(data).shape[2])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield the outputs, shape (groups, size, positions), as `Patch.vectors` does."""
        outputs = finite_outputs(self.read.outputs(data))
        count = outputs.shape[2] if chosen is None else len(chosen)
        for part in cut(count, self.groups * self.size, each):
            yield outputs[:, :, part if chosen is None else chosen[part]]


def finite_outputs(output: NDArray[Any]) -> NDArray[Any]:
    """Return a layer's output, with 0 where an infinite bias suppresses it."""
    finite = np.isfinite(output)
    return output if finite.all() else np.where(finite, output, output.dtype.type(0))


def patch_of(model: onnx.ModelProto, layer: Layer, use: Use) -> Patch:
    """Return how a use of a layer reads its data.

    Raises
    ------
    ModelError
        If it cannot be read as vectors; `unreadable` tells beforehand.
    """
    found = operator_of(layer).patch(model.graph.node[use.node], layer, use)
    if isinstance(found, Refusal):
        raise ModelError(
            f"node {quoted(layer.name)}: {found.reason.message} ({found.detail}); leave it out"
        )
    return found


def has_products(model: onnx.ModelProto, layer: Layer) -> bool:
    """Whether a layer's outputs are known to be products of vectors that can be read."""
    nodes, operator = all_nodes(model.graph), operator_of(layer)
    found = (operator.patch(nodes[use.node], layer, use) for use in layer.uses)
    return all(isinstance(patch, ReadPatch) for patch in found)


def read_patch_of(model: onnx.ModelProto, layer: Layer, use: Use) -> ReadPatch:
    """Return the same for a layer that `has_products`, with the outputs."""
    found = patch_of(model, layer, use)
    assert isinstance(found, ReadPatch), layer.name
    return found


def unreadable(model: onnx.ModelProto, layer: Layer) -> Refusal | None:
    """Why data says nothing of a layer's errors; None if it does."""
    nodes = model.graph.node
    found = [operator_of(layer).patch(nodes[use.node], layer, use) for use in layer.uses]
    for patch in found:
        if isinstance(patch, Refusal):
            return patch
        if layer.readings and patch.size > WIDE and not isinstance(patch, LookupPatch):
            return Refusal(Reason.UNREADABLE, f"vectors of {patch.size} entries, tied to others")
    return None
