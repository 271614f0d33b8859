"""Infer the shapes of a model's tensors, and count the MACs of its nodes from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx

from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.bodies import all_nodes, body_graphs, placed_nodes
from cobla_onnx.graph.foldable import foldable_nodes
from cobla_onnx.graph.index import node_label
from cobla_onnx.graph.io.model_file import without_weights
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.operators.base import Shape, elements, operator_of, operators_of_node
from cobla_onnx.graph.operators.counted import is_counted, macs_of_other
from cobla_onnx.graph.protos import given_inputs
from cobla_onnx.graph.tensors import constant_value
from cobla_onnx.text import quoted
from cobla_onnx.wording import either, option_name

__all__ = [
    "MOST_ELEMENTS",
    "Shape",
    "fixed_input_shapes",
    "has_macs",
    "infer_shapes",
    "infer_tensors",
    "layer_macs",
    "node_macs",
]

# Tensors that a node may make at most, in numbers.
MOST_ELEMENTS = 2**31 - 1
# How messages show a shape whose first axis is not empty, though another is.
EMPTY_PAST = either(python="{'past': (1, 2, 0, 16)}", command="past:1,2,0,16")


def fixed_input_shapes(
    model: onnx.ModelProto, given: Mapping[str, Sequence[int]]
) -> dict[str, Shape]:
    """Shapes of the model's inputs, with a symbolic batch (first axis) counted as 1.

    Parameters
    ----------
    given : mapping of str to sequence of int
        Shapes that the user states, by input name.

    Raises
    ------
    UsageError
        If a name is not an input, or a shape contradicts the model.
    """
    inputs = given_inputs(model.graph)
    for name in given:
        if name not in inputs:
            known = ", ".join(inputs) or "none"
            option = either(python=f"input_shapes[{name!r}]", command=f"--input-shape {name}")
            raise UsageError(f"{option}: the model has no such input; it has {known}")
    shapes: dict[str, Shape] = {}
    for name, value in inputs.items():
        if not value.type.HasField("tensor_type"):
            continue
        declared: list[int | None] | None = None
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            declared = [d.dim_value if d.HasField("dim_value") else None for d in dims]
            declared = [d if d is None or d > 0 else None for d in declared]
        if name in given:
            shapes[name] = _agreed(name, tuple(given[name]), declared)
        elif declared is not None:
            if declared and declared[0] is None:
                declared[0] = 1
            shapes[name] = tuple(declared)
    return shapes


def _agreed(name: str, given: tuple[int, ...], declared: list[int | None] | None) -> Shape:
    if given[:1] == (0,) or any(size < 0 for size in given):
        raise UsageError(
            f"{option_name('input_shapes', {name: given})}: its first axis has to be at least "
            f"1, others 0; write e.g. {EMPTY_PAST} for an empty past"
        )
    if any(size > MOST_ELEMENTS for size in given):
        raise UsageError(
            f"{option_name('input_shapes', {name: given})}: no tensor has so many numbers; give "
            "the shape of one sample"
        )
    if declared is not None:
        fits = len(given) == len(declared) and all(
            d is None or d == g for g, d in zip(given, declared, strict=True)
        )
        if not fits:
            want = ",".join("?" if d is None else str(d) for d in declared)
            raise UsageError(
                f"{option_name('input_shapes', {name: given})}: the model declares {name}:{want}"
            )
    return given


def infer_shapes(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Infer the shapes of all tensors, see `infer_tensors`."""
    return infer_tensors(model, inputs)[0]


def infer_tensors(
    model: onnx.ModelProto, inputs: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, int]]:
    """Infer the shapes and types of all tensors by ONNX's own shape inference.

    The weights are not copied: a large one becomes an input of the same type and shape.
    Tensors of which nothing is known are left out; unknown axes are None. Those of bodies are
    among them, under the names that the main graph leaves free.

    Raises
    ------
    ModelError
        If a node makes a tensor that no memory holds.
    """
    skeleton = without_weights(model)
    graph = skeleton.graph
    del graph.value_info[:]
    for value in graph.input:
        if value.name in inputs:
            del value.type.tensor_type.shape.dim[:]
            for size in inputs[value.name]:
                dim = value.type.tensor_type.shape.dim.add()
                if size is not None:
                    dim.dim_value = size
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        # The caller sees shapes missing and measures or reports them.
        inferred = graph
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    graphs = [*body_graphs(inferred.node), inferred]
    for value in (v for g in graphs for v in (*g.value_info, *g.input, *g.output)):
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = kind.elem_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            shapes[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim
            )
    stored = [*(b.initializer for b in body_graphs(model.graph.node)), model.graph.initializer]
    constants = [(tensor.name, tensor) for tensors in stored for tensor in tensors]
    for node in reversed(all_nodes(model.graph)):
        tensor_value = constant_value(node)
        if tensor_value is not None:
            constants.append((node.output[0], tensor_value))
    for name, tensor in constants:
        shapes[name], types[name] = tuple(tensor.dims), tensor.data_type
    _refuse_giants(model, shapes)
    return shapes, types


def _refuse_giants(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
    for index, node in enumerate(model.graph.node):
        for name in node.output:
            size = elements(shapes.get(name))
            if size is not None and size > MOST_ELEMENTS:
                raise ModelError(
                    f"node {quoted(node_label(node, index))}: makes a tensor of shape "
                    f"{list(shapes[name])}, more than {MOST_ELEMENTS} numbers; "
                    f"give smaller inputs by {option_name('input_shapes')}, or export the model "
                    "again"
                )


def has_macs(node: onnx.NodeProto) -> bool:
    """Whether MACs of a node are counted: it multiplies data, in whatever format."""
    return bool(operators_of_node(node)) or is_counted(node)


def node_macs(
    model: onnx.ModelProto, shapes: Mapping[str, Shape]
) -> tuple[dict[int, int], list[str]]:
    """MACs of every node that `has_macs`, those in bodies once; of one that is folded none.

    Additions of a bias are not counted; neither are other operators and functions.

    Returns
    -------
    macs : dict of int to int
        By index in `bodies.all_nodes`, where the shapes are known.
    unknown : list of str
        Names of the nodes whose shapes are not.
    """
    macs: dict[int, int] = {}
    unknown: list[str] = []
    folded = foldable_nodes(model)
    for index, (node, label, _) in enumerate(placed_nodes(model.graph)):
        if not has_macs(node):
            continue
        if index in folded:
            count: int | None = 0
        elif operators := operators_of_node(node):
            count = _total(operator.macs(node, shapes) for operator in operators)
        else:
            count = macs_of_other(node, shapes)
        if count is None:
            unknown.append(label)
        else:
            macs[index] = count
    return macs, unknown


def layer_macs(
    nodes: Sequence[onnx.NodeProto],
    layer: Layer,
    shapes: Mapping[str, Shape],
    macs: Mapping[int, int],
) -> int | None:
    """MACs with the weight of a layer, over all its uses; None where shapes are not known.

    They are a part of its nodes' where these hold other weights, too.

    Parameters
    ----------
    nodes : sequence of NodeProto
        All of the model, see `bodies.all_nodes`.
    macs : mapping of int to int
        Theirs, see `node_macs`.
    """
    operator = operator_of(layer)
    run = [use.node for use in layer.uses if macs.get(use.node) != 0]
    return _total(operator.macs(nodes[index], shapes) for index in run)


def _total(counts: Iterable[int | None]) -> int | None:
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total
