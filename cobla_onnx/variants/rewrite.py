"""Replace nodes by pairs of factor nodes, on a copy of the model; nothing else changes.

The factor nodes are built with onnx-graphsurgeon in a scratch graph and their protos are
transplanted, since exporting a whole model through graph-surgeon loses fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.external import mapped_tensor
from cobla_onnx.graph.io.model_file import copy_without_initializers, subgraphs, unique_name
from cobla_onnx.graph.layers import Layer, Use, attributes
from cobla_onnx.text import quoted
from cobla_onnx.variants.low_rank.matricisation import ConvScheme, Scheme, TransposedConvScheme
from cobla_onnx.variants.low_rank.svd import Factorization
from cobla_onnx.wording import either

__all__ = ["Replacement", "factor_nodes", "make_replacement", "rewrite"]


@dataclass(frozen=True)
class Replacement:
    """A layer and the factors that replace its weight, in the type in which it was stored.

    Attributes
    ----------
    layer : Layer
    scheme : Scheme
    first, second : array
        Weights of the two factor nodes.
    bias : array or None
        Replaces ``layer.bias``; None leaves it as it is.
    """

    layer: Layer
    scheme: Scheme
    first: NDArray[Any]
    second: NDArray[Any]
    bias: NDArray[Any] | None = None

    def dense(self) -> NDArray[Any]:
        """Multiply the factors to the weight that they stand for, shape ``layer.shape``."""
        # Half precision is multiplied in single precision; double would double the memory.
        wide = np.result_type(self.first.dtype, np.float32)
        left, right = self.scheme.unfold(
            self.first.astype(wide, copy=False), self.second.astype(wide, copy=False)
        )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.layer.type)
        result: NDArray[Any] = self.scheme.weight(left @ right).astype(dtype, copy=False)
        return result


def make_replacement(
    layer: Layer, scheme: Scheme, factors: Factorization, bias: NDArray[Any] | None = None
) -> Replacement:
    """Convert factors to the weights of the two nodes, in the types of what they replace.

    Raises
    ------
    ModelError
        If a factor or the bias overflows its type.
    """
    stored = onnx.helper.tensor_dtype_to_np_dtype(layer.stored_type)
    first, second = scheme.fold(factors.left, factors.right)
    return Replacement(
        layer,
        scheme,
        _narrow(layer, first, stored, "a factor of its weight"),
        _narrow(layer, second, stored, "a factor of its weight"),
        None
        if bias is None
        else _narrow(layer, bias, onnx.helper.tensor_dtype_to_np_dtype(layer.type), "its bias"),
    )


def _narrow(layer: Layer, array: NDArray[Any], dtype: np.dtype[Any], what: str) -> NDArray[Any]:
    # bfloat16 has the range of single precision, and numpy does not have it.
    limits = np.finfo(dtype if dtype.kind == "f" else np.float32)
    if float(np.abs(array).max(initial=0.0)) > float(limits.max):
        name = quoted(layer.name)
        option = either(python=f"exclude=[{name}]", command=f"--exclude {name}")
        raise ModelError(f"node {name}: {what} overflows {dtype}; leave it out by {option}")
    return np.ascontiguousarray(array.astype(dtype))


def rewrite(model: onnx.ModelProto, replacements: Sequence[Replacement]) -> onnx.ModelProto:
    """Return a copy of `model` in which each layer is computed by its two factors.

    Weights that are no longer read are left out, as are the Identity, Transpose, Cast and
    Constant nodes before them. Everything else is as it was, in the same order. The
    second factor node keeps the name, the output and the documentation of the original.
    """
    sources = {name for replacement in replacements for name in _replaced(replacement)}
    result = copy_without_initializers(model, sources)
    graph = result.graph
    names = _Names(model)
    built: dict[int, list[onnx.NodeProto]] = {}
    for replacement in replacements:
        nodes, weights = _build(replacement, model, names)
        built.update(nodes)
        graph.initializer.extend(weights)
        if model.ir_version < 4:
            # Before IR version 4 every initializer is also an input of the graph.
            graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights
            )
    dead = _dead_nodes(model, replacements)
    kept = []
    for index, node in enumerate(model.graph.node):
        if index not in dead:
            kept.extend(built.get(index, [node]))
    del graph.node[:]
    graph.node.extend(kept)
    gone = sources | {name for index in dead for name in model.graph.node[index].output}
    _drop(graph.input, lambda item: item.name in gone)
    _drop(graph.value_info, lambda item: item.name in gone)
    _drop(graph.quantization_annotation, lambda item: item.tensor_name in gone)
    return result


def _replaced(replacement: Replacement) -> list[str]:
    """Names of the stored tensors that a replacement makes superfluous."""
    layer = replacement.layer
    return [layer.source] + ([layer.bias] if replacement.bias is not None and layer.bias else [])


def _drop(items: Any, unwanted: Any) -> None:
    kept = [item for item in items if not unwanted(item)]
    if len(kept) < len(items):
        del items[:]
        items.extend(kept)


class _Names:
    """Names in use, so that new ones are unique."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.tensors: set[str] = set()
        self.nodes: set[str] = set()
        stack = [model.graph]
        while stack:
            graph = stack.pop()
            for items in (graph.initializer, graph.input, graph.output, graph.value_info):
                self.tensors.update(item.name for item in items)
            for node in graph.node:
                self.nodes.add(node.name)
                self.tensors.update(node.input, node.output)
                stack.extend(subgraphs(node))


class _Variables(dict[str, Any]):
    """One graph-surgeon variable for each name, made when it is first asked for."""

    def __missing__(self, name: str) -> Any:
        self[name] = gs.Variable(name)
        return self[name]


def _build(
    replacement: Replacement, model: onnx.ModelProto, names: _Names
) -> tuple[dict[int, list[onnx.NodeProto]], list[onnx.TensorProto]]:
    """Build the nodes that replace each use, by node index, and their initializers."""
    layer = replacement.layer
    weights = [
        gs.Constant(unique_name(f"{layer.name}/{part}_factor", names.tensors), values)
        for part, values in (("first", replacement.first), ("second", replacement.second))
    ]
    casts, operands = [], list(weights)
    if layer.type != layer.stored_type:
        operands = [gs.Variable(unique_name(f"{w.name}_cast", names.tensors)) for w in weights]
        casts = [
            gs.Node(
                "Cast", unique_name(f"{w.name}_cast", names.nodes), {"to": layer.type}, [w], [o]
            )
            for w, o in zip(weights, operands, strict=True)
        ]
    if replacement.bias is not None:
        name = unique_name(f"{layer.name}/bias", names.tensors)
        operands = [*operands, gs.Constant(name, replacement.bias)]
    scratch = gs.Graph(nodes=list(casts), opset=_opset(model))
    variables = _Variables()
    for use in layer.uses:
        node = model.graph.node[use.node]
        pair = _pair(replacement.scheme, node, use, operands, names, variables)
        scratch.nodes.extend(pair)
    exported = gs.export_onnx(scratch, do_type_check=False).graph
    nodes = list(exported.node)
    result: dict[int, list[onnx.NodeProto]] = {}
    for number, use in enumerate(layer.uses):
        first, second = nodes[len(casts) + 2 * number : len(casts) + 2 * number + 2]
        kept = onnx.NodeProto()
        kept.CopyFrom(model.graph.node[use.node])
        del kept.input[:], kept.attribute[:]
        kept.input.extend(second.input)
        kept.attribute.extend(second.attribute)
        result[use.node] = [first, kept]
    result[layer.uses[0].node] = nodes[: len(casts)] + result[layer.uses[0].node]
    arrays = {
        w.name: v for w, v in zip(weights, (replacement.first, replacement.second), strict=True)
    }
    initializers = [
        (mapped_tensor(t.name, arrays[t.name]) if t.name in arrays else None) or t
        for t in exported.initializer
    ]
    return result, initializers


def _opset(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def factor_nodes(
    model: onnx.ModelProto, layer: Layer, scheme: Scheme, first: str, second: str
) -> tuple[tuple[onnx.NodeProto, onnx.NodeProto], ...]:
    """Build, for each use of a layer, the two nodes that would take its place.

    They read their factors, in the shapes that `Scheme.fold` gives, from tensors named `first`
    and `second`.
    """
    names = _Names(model)
    scratch = gs.Graph(opset=_opset(model))
    variables = _Variables()
    for use in layer.uses:
        node, operands = model.graph.node[use.node], [variables[first], variables[second]]
        scratch.nodes.extend(_pair(scheme, node, use, operands, names, variables))
    nodes = list(gs.export_onnx(scratch, do_type_check=False).graph.node)
    return tuple(zip(nodes[::2], nodes[1::2], strict=True))


def _pair(
    scheme: Scheme,
    node: onnx.NodeProto,
    use: Use,
    weights: Sequence[Any],
    names: _Names,
    variables: _Variables,
) -> list[Any]:
    """Build the two factor nodes of one use as graph-surgeon nodes."""
    label = node.name or use.output
    between = gs.Variable(unique_name(f"{label}/lowrank", names.tensors))
    first_name = unique_name(f"{label}/first_factor", names.nodes)
    rest = weights[2:] or [variables[name] for name in node.input[2:]]
    data, output = variables[use.data], variables[use.output]
    values = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in attributes(node).items()
    }
    if isinstance(scheme, ConvScheme):
        transposed = isinstance(scheme, TransposedConvScheme)
        share_out = _transposed_attributes if transposed else _conv_attributes
        first_values, second_values = share_out(scheme, values)
        first = gs.Node(node.op_type, first_name, first_values, [data, weights[0]], [between])
        inputs = [between, weights[1], *rest]
        return [first, gs.Node(node.op_type, node.name, second_values, inputs, [output])]
    operands = [data, weights[0]] if scheme.data_left else [weights[0], data]
    first = gs.Node("MatMul", first_name, {}, operands, [between])
    inputs = [between, weights[1]] if scheme.weight_input == 1 else [weights[1], between]
    return [first, gs.Node(node.op_type, node.name, values, [*inputs, *rest], [output])]


def _conv_attributes(
    scheme: ConvScheme, values: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distribute a convolution's attributes over its factors, axis by axis."""
    axes = range(len(scheme.shape) - 2)
    first_kernel, second_kernel = scheme.kernels()
    shared = []
    for kernel, own in (
        (first_kernel, [a for a in axes if a in scheme.first_axes]),
        (second_kernel, [a for a in axes if a not in scheme.first_axes]),
    ):
        mine: dict[str, Any] = {"kernel_shape": list(kernel)}
        for name in ("strides", "dilations"):
            if name in values:
                mine[name] = [values[name][a] if a in own else 1 for a in axes]
        if own and values.get("auto_pad", "NOTSET") != "NOTSET":
            mine["auto_pad"] = values["auto_pad"]
        elif "pads" in values:
            ends = [*axes, *axes]
            mine["pads"] = [p if a in own else 0 for a, p in zip(ends, values["pads"], strict=True)]
        if scheme.group > 1:
            mine["group"] = scheme.group
        shared.append(mine)
    return shared[0], shared[1]


def _transposed_attributes(
    scheme: ConvScheme, values: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a transposed convolution's attributes to the factor that has the kernel."""
    first_kernel, second_kernel = scheme.kernels()
    point, whole = {"kernel_shape": [1] * len(first_kernel)}, dict(values)
    if scheme.first_axes:
        return {**whole, "kernel_shape": list(first_kernel)}, point
    return point, {**whole, "kernel_shape": list(second_kernel)}


def _dead_nodes(model: onnx.ModelProto, replacements: Iterable[Replacement]) -> set[int]:
    """Indices of the nodes before the replaced weights, which are no longer read.

    A layer's weight is read by the layer alone (see `find_layers`), so all of them go.
    """
    dead = {index for r in replacements for use in r.layer.uses for index in use.chain}
    sources = {name for replacement in replacements for name in _replaced(replacement)}
    dead.update(i for i, node in enumerate(model.graph.node) if set(node.output) & sources)
    return dead
