"""Bring a private copy of a model into the form that the derivative rules expect.

One floating type, a recent operator set, fixed dimensions, weights as inputs, no local
functions, no operators without a rule that are made of operators with one; and what is
known of every tensor: type, shape, and value where it is a small constant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray

from cobla_onnx.autodiff.casting import cast_model
from cobla_onnx.autodiff.constants import known_values
from cobla_onnx.autodiff.vjp import FLAT, RULES
from cobla_onnx.autodiff.vjp.registry import Sizes
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.inlining import inlined
from cobla_onnx.graph.io.model_file import (
    MAPPED_FROM,
    copy_without_initializers,
    unique_name,
)
from cobla_onnx.graph.layers import all_inputs
from cobla_onnx.graph.macs import Shape, fixed_input_shapes, infer_tensors
from cobla_onnx.graph.opset import lifted
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.runtime.session import open_session, random_feeds, run_session

__all__ = ["OPSET", "Prepared", "Substitutes", "prepare"]

OPSET = 18
"""Operator set of the gradient graph, unless the model's own is newer."""

# Operators whose results have as many elements as the data says.
DATA_SHAPED = {
    "Compress",
    "If",
    "Loop",
    "NonMaxSuppression",
    "NonZero",
    "Scan",
    "StringSplit",
    "Unique",
}


@dataclass(frozen=True)
class Substitutes:
    """Nodes to run in place of others.

    Attributes
    ----------
    nodes : dict of str to list of NodeProto
        By the name of the tensor whose node they replace.
    inputs : dict of str to tuple of int
        Shapes of the inputs that they need.
    constants : list of TensorProto
        Initializers that they need.
    """

    nodes: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    inputs: dict[str, Sizes] = field(default_factory=dict)
    constants: list[onnx.TensorProto] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A model ready to be differentiated.

    Attributes
    ----------
    model : ModelProto
        Without its large weights, which are inputs; so are the exposed tensors.
    stored : dict of str to TensorProto
        The large weights, as the original stores them.
    inputs : tuple of str
        Names of the original's inputs.
    shapes : dict of str to tuple of int
        Of all tensors but those whose shape depends on the data.
    types : dict of str to int
        TensorProto data types.
    constants : dict of str to array
        Small tensors that depend on nothing.
    """

    model: onnx.ModelProto
    stored: dict[str, onnx.TensorProto]
    inputs: tuple[str, ...]
    shapes: dict[str, Sizes]
    types: dict[str, int]
    constants: dict[str, NDArray[Any]]


def prepare(
    model: onnx.ModelProto,
    exposed: Sequence[str],
    input_shapes: Mapping[str, Sequence[int]],
    element_type: int,
    threads: int,
    substitutes: Substitutes | None = None,
) -> Prepared:
    """Prepare a copy of `model` in which the tensors `exposed` are inputs.

    Nodes are replaced by their `substitutes`, whose inputs are inputs of the copy.

    Raises
    ------
    UsageError
        If a name or a shape is not the model's, or the shape of an input is not known.
    ModelError
        If the model cannot be brought to operator set 18 or does not run.
    """
    sizes = _input_sizes(model, input_shapes)
    light, stored = _lighten(model, exposed, sizes)
    if substitutes is not None:
        _substitute(light.graph, substitutes)
    if light.functions:
        light = inlined(light)
    # Before the cast, so that operators in place of legacy ones are cast, too.
    light = lifted(light, OPSET)
    cast_model(light, element_type)
    light = _expand(light)
    given: dict[str, Shape] = {
        value.name: sizes.get(value.name) or tuple(d.dim_value for d in _dims(value))
        for value in light.graph.input
        if value.type.HasField("tensor_type")
    }
    for value in light.graph.input:
        if value.name in given:
            shape = onnx.helper.make_tensor_value_info(value.name, 1, given[value.name])
            value.type.tensor_type.shape.CopyFrom(shape.type.tensor_type.shape)
    shapes, types = infer_tensors(light, given)
    known = {n: tuple(d for d in s if d is not None) for n, s in shapes.items() if None not in s}
    _measure(light, known, types, threads)
    constants = known_values(light, known)
    return Prepared(light, stored, tuple(sizes), known, types, constants)


def _substitute(graph: onnx.GraphProto, substitutes: Substitutes) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.extend(substitutes.nodes.get(next(iter(node.output), ""), [node]))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    graph.initializer.extend(substitutes.constants)
    for name, shape in substitutes.inputs.items():
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        graph.input.append(value)


def _dims(value: onnx.ValueInfoProto) -> Sequence[Any]:
    dims: Sequence[Any] = value.type.tensor_type.shape.dim
    return dims


def _input_sizes(model: onnx.ModelProto, given: Mapping[str, Sequence[int]]) -> dict[str, Sizes]:
    sizes: dict[str, Sizes] = {}
    for name, shape in fixed_input_shapes(model, given).items():
        if any(size is None for size in shape):
            text = ",".join("?" if size is None else str(size) for size in shape)
            raise UsageError(f"input {name!r} has shape ({text}); give all its sizes")
        sizes[name] = tuple(size for size in shape if size is not None)
    return sizes


def _lighten(
    model: onnx.ModelProto, exposed: Collection[str], sizes: Mapping[str, Sizes]
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Copy a model; large weights and the tensors `exposed` become inputs."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    out = {n for n, t in initializers.items() if tensor_bytes(t) > MAPPED_FROM or n in exposed}
    light = copy_without_initializers(model, out)
    # Before IR version 4 initializers would have to be inputs.
    light.ir_version = max(light.ir_version, 4)
    graph = light.graph
    inputs = [value for value in graph.input if value.name not in initializers]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(inputs)
    value_info = onnx.helper.make_tensor_value_info
    for name in out:
        graph.input.append(value_info(name, initializers[name].data_type, initializers[name].dims))
    present = {value.name for value in graph.input}
    computed = [name for name in dict.fromkeys(exposed) if name not in present]
    if computed:
        shapes, types = infer_tensors(model, dict(sizes))
        for name in computed:
            shape = shapes.get(name)
            if shape is None or None in shape:
                raise UsageError(
                    f"tensor {name!r}: the model has none of that name and of known shape; "
                    "name an initializer, an input or the output of a node"
                )
            graph.input.append(value_info(name, types[name], shape))
            _cut_producer(graph, name)
    for output in graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    return light, {name: initializers[name] for name in out if name not in exposed}


def _cut_producer(graph: onnx.GraphProto, name: str) -> None:
    """Give the result of a node another name, so that `name` can be an input."""
    taken = {output for node in graph.node for output in node.output}
    for node in graph.node:
        for place, output in enumerate(node.output):
            if output == name:
                node.output[place] = unique_name(f"{name}/replaced", taken)


def _expand(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline operators that are defined by others and have no rule."""
    version = next(entry.version for entry in model.opset_import if not entry.domain)
    # A function may be made of other functions, a few levels deep.
    for _ in range(4):
        functions = {
            ("", node.op_type)
            for node in model.graph.node
            if not node.domain
            and node.op_type not in RULES
            and node.op_type not in FLAT
            and _has_body(node.op_type, version)
        }
        if not functions:
            break
        model = onnx.inliner.inline_selected_functions(
            model, sorted(functions), inline_schema_functions=True
        )
    return model


def _has_body(operator: str, version: int) -> bool:
    try:
        schema: Any = onnx.defs.get_schema(operator, version)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _rounds_up(node: onnx.NodeProto) -> bool:
    return any(a.name == "ceil_mode" and a.i for a in node.attribute)


def _measure(
    model: onnx.ModelProto, shapes: dict[str, Sizes], types: dict[str, int], threads: int
) -> None:
    """Add the types and shapes that inference does not give, as one run shows them."""
    if any(_rounds_up(node) for node in model.graph.node):
        # onnx and onnxruntime disagree on a last window that begins in the padding.
        for node in model.graph.node:
            for name in node.output:
                shapes.pop(name, None)
    missing: list[str] = []
    varying: set[str] = set()
    for node in model.graph.node:
        unknown = [name for name in node.output if name and name not in shapes]
        if node.op_type in DATA_SHAPED or varying.intersection(all_inputs(node)):
            varying.update(unknown)
        else:
            missing.extend(unknown)
    if not missing:
        return
    session = open_session(model, threads, extra_outputs=missing, part="gradients")
    results = run_session(session, random_feeds(session, dict(shapes), seed=0))
    for name in missing:
        if isinstance(results[name], np.ndarray):
            shapes[name] = results[name].shape
            types[name] = onnx.helper.np_dtype_to_tensor_dtype(results[name].dtype)
