"""Constants that a model stores more than once are stored once: same type, shape and bytes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.graph.index import GraphIndex
from cobla_onnx.graph.io.external import external_bytes, is_external
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.graph.layers import Layer, find_layers
from cobla_onnx.graph.order import captured_names
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.graph.tensors import subgraphs, tensor_array
from cobla_onnx.graph.transposed_copies import transposed_copies, transposed_on_the_way
from cobla_onnx.text import quoted

__all__ = ["Deduplicated", "deduplicated"]

# Smaller constants are shapes, axes and scalars: nothing is gained, and graphs become harder to
# read.
SMALLEST = 1024
# Bytes at both ends that are compared first.
END = 4096
# Bytes that are hashed at a time: of a file that is mapped no more need be in memory.
CHUNK = 1 << 24

Copies: TypeAlias = "dict[str, list[str]]"
"""Names of equal constants by that of the one that stays."""


@dataclass(frozen=True)
class Deduplicated:
    """A model in which equal constants are one.

    Attributes
    ----------
    model : ModelProto
        The very object that was given, if there is nothing to do.
    count : int
        Constants that are gone.
    nbytes : int
        What they took.
    """

    model: onnx.ModelProto
    count: int = 0
    nbytes: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know."""
        if not self.count:
            return ()
        what = "1 constant is" if self.count == 1 else f"{self.count} constants are"
        return (
            f"{what} stored once in place of more than once: {self.nbytes} bytes less; budgets are "
            "fractions of the model as it was given",
        )


def deduplicated(model: onnx.ModelProto) -> Deduplicated:
    """Let all readers of equal initializers read the first of them; the model is not changed.

    What a caller may replace (inputs of the graph), or refers to by name (outputs, training,
    quantisation annotations), stays; and of what a body reads from outside, the name. Biases of
    layers stay, since a layer may give a bias new values only if nobody else reads it. Weights
    that would no longer be layers, since they are read in ways that do not go together, stay.

    A matrix that is stored once more, transposed, becomes a Transpose of the other where both are
    then one layer (`cobla_onnx.graph.tied`): exporters fold the Transpose before an output layer.

    Raises
    ------
    ModelError
        If data is damaged or cannot be read.
    """
    copies, turned = _equal(model), transposed_copies(model, _held_names(model))
    if not copies and not turned:
        return Deduplicated(model)
    layers = find_layers(model).layers
    biases = {layer.bias for layer in layers}
    copies = {first: kept for first, its in copies.items() if (kept := _without(its, biases))}
    copies = _kept_layers(model, layers, copies)
    merged = _merged(model, copies) if copies else model
    gone = {name for its in copies.values() for name in its}
    turned = {name: first for name, first in turned.items() if gone.isdisjoint((name, first))}
    merged, turned = transposed_on_the_way(merged, turned)
    gone |= set(turned)
    if not gone:
        return Deduplicated(model)
    sizes = (tensor_bytes(tensor) for tensor in model.graph.initializer if tensor.name in gone)
    return Deduplicated(merged, len(gone), sum(sizes))


def _kept_layers(model: onnx.ModelProto, layers: Sequence[Layer], copies: Copies) -> Copies:
    """Leave out the copies without which a weight would no longer be a layer."""
    if not copies:
        return copies
    found = {layer.source for layer in find_layers(_merged(model, copies)).layers}
    lost = {layer.source for layer in layers if _first(layer.source, copies) not in found}
    return {first: its for first, its in copies.items() if lost.isdisjoint([first, *its])}


def _without(names: Sequence[str], kept: set[str | None]) -> list[str]:
    return [name for name in names if name not in kept]


def _first(name: str, copies: Copies) -> str:
    return next((first for first, its in copies.items() if name in its), name)


def _equal(model: onnx.ModelProto) -> Copies:
    """Find the constants that may be left out, each under the one that it is equal to."""
    alike: dict[tuple[object, ...], list[onnx.TensorProto]] = defaultdict(list)
    held = _held_names(model)
    for tensor in model.graph.initializer:
        if tensor.name in held or tensor.data_type == onnx.TensorProto.STRING:
            continue
        if tensor_bytes(tensor) >= SMALLEST:
            alike[tensor.data_type, tuple(tensor.dims)].append(tensor)
    alike = _parted(alike.values(), _ends)
    bodies = (graph for node in model.graph.node for graph in subgraphs(node))
    by_name = set().union(*map(captured_names, bodies))
    found: Copies = {}
    for group in _parted(alike.values(), _digest).values():
        names = [tensor.name for tensor in group]
        first = next((name for name in names if name in by_name), names[0])
        others = [name for name in names if name != first and name not in by_name]
        if others:
            found[first] = others
    return found


def _parted(
    groups: Iterable[Sequence[onnx.TensorProto]], by: Callable[[onnx.TensorProto], object]
) -> dict[tuple[object, ...], list[onnx.TensorProto]]:
    """Part groups of tensors further; those that are alone are left out, unseen."""
    found: dict[tuple[object, ...], list[onnx.TensorProto]] = defaultdict(list)
    for number, group in enumerate(groups):
        for tensor in group if len(group) > 1 else ():
            found[number, by(tensor)].append(tensor)
    return {key: its for key, its in found.items() if len(its) > 1}


def _held_names(model: onnx.ModelProto) -> set[str]:
    """Names that something beside the nodes refers to."""
    names = {*GraphIndex(model).kept, *(value.name for value in model.graph.input)}
    for annotation in model.graph.quantization_annotation:
        names.add(annotation.tensor_name)
        names.update(entry.value for entry in annotation.quant_parameter_tensor_names)
    return names


def _ends(tensor: onnx.TensorProto) -> tuple[bytes, bytes]:
    """First and last bytes of a tensor, which tell most apart without reading them."""
    data = _bytes(tensor)
    return data[:END].tobytes(), data[-END:].tobytes()


def _digest(tensor: onnx.TensorProto) -> str:
    """Hash a tensor's bytes, of a file chunk by chunk."""
    state, data = hashlib.sha256(), _bytes(tensor)
    for start in range(0, len(data), CHUNK):
        state.update(np.ascontiguousarray(data[start : start + CHUNK]).data)
    return state.hexdigest()


def _bytes(tensor: onnx.TensorProto) -> NDArray[np.uint8]:
    label = f"initializer {quoted(tensor.name)}"
    if is_external(tensor):
        return external_bytes(tensor, label)
    return np.ascontiguousarray(tensor_array(tensor, label)).reshape(-1).view(np.uint8)


def _merged(model: onnx.ModelProto, copies: Mapping[str, Iterable[str]]) -> onnx.ModelProto:
    """Copy a model without some constants; who read them reads what they are equal to."""
    first = {name: kept for kept, its in copies.items() for name in its}
    result = copy_without_initializers(model, first)
    for node in result.graph.node:
        for place, name in enumerate(node.input):
            if name in first:
                node.input[place] = first[name]
    infos = [value for value in result.graph.value_info if value.name not in first]
    del result.graph.value_info[:]
    result.graph.value_info.extend(infos)
    return result
