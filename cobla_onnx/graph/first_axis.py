"""Tell whether the first axis of a model's input is the batch axis, from the graph alone.

Its name is considered first, then where it leads: shape inference carries a symbol in its place
through the graph, to operators that define the meaning of their axes (the first axis of a
convolution is the batch, that of an LSTM is time) or that mix values along it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Literal, TypeAlias

import onnx

from cobla_onnx.graph.io.model_file import without_weights
from cobla_onnx.graph.layers import attributes
from cobla_onnx.graph.protos import given_inputs
from cobla_onnx.graph.tensors import constant_value

__all__ = ["FirstAxis", "first_axes"]

FirstAxis: TypeAlias = Literal["batch", "other", "unknown"]
"""Samples; something else, such as time or features; or no evidence for either."""

_Shape: TypeAlias = "tuple[int | str | None, ...]"
_BATCH = re.compile(r"batch|^(n|b|bs|bsz)$", re.IGNORECASE)
_OTHER = re.compile(
    r"seq|time|frame|step|token|len|past|audio|^[tlshwc]$|height|width|channel|feature|point",
    re.IGNORECASE,
)
# What exporters write where they know no name.
_NO_NAMES = ("", "?", "None", "-1")
_BATCH_FIRST = {
    "AveragePool", "BatchNormalization", "Conv", "ConvInteger", "ConvTranspose", "DepthToSpace",
    "GlobalAveragePool", "GlobalMaxPool", "GridSample", "GroupNormalization",
    "InstanceNormalization", "LRN", "LpPool", "MaxPool", "QLinearConv", "SpaceToDepth",
    "Attention", "MultiHeadAttention",
}  # fmt: skip
_RECURRENT = {"RNN", "GRU", "LSTM"}
# Each row of the result follows from the same row alone, where the first axis stays.
_ROW_BY_ROW = {
    "Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "DequantizeLinear", "Div",
    "Dropout", "Elu", "Equal", "Erf", "Exp", "Flatten", "Floor", "Gelu", "Gemm", "Greater",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "Log", "MatMul", "Max", "Min",
    "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "QuantizeLinear", "Reciprocal",
    "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub",
    "Tanh", "ThresholdedRelu", "Where",
}  # fmt: skip
# Operators with an attribute `axis`, along which they mix.
_ALONG_AXIS = {"ArgMax", "ArgMin", "CumSum", "Hardmax", "LogSoftmax", "Softmax", "TopK"}


def first_axes(model: onnx.ModelProto) -> dict[str, FirstAxis]:
    """Return the meaning of the first axis of each input that is not an initializer.

    An axis of one is of samples unless something speaks against it, so is one of a fixed
    length that an output's first axis has, too. A scalar has none: ``other``.
    """
    inputs = {name: _declared(value) for name, value in given_inputs(model.graph).items()}
    graph = _Traced(model, {name: shape for name, shape in inputs.items() if shape})
    outputs = [shape for value in model.graph.output if (shape := _declared(value)) is not None]
    return {name: _first_axis(shape, name, graph, outputs) for name, shape in inputs.items()}


def _declared(value: onnx.ValueInfoProto) -> _Shape | None:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return tuple(
        d.dim_value
        if d.HasField("dim_value") and d.dim_value > 0
        else (None if d.dim_param in _NO_NAMES else d.dim_param)
        for d in kind.shape.dim
    )


def _first_axis(
    shape: _Shape | None, name: str, graph: _Traced, outputs: Sequence[_Shape]
) -> FirstAxis:
    if shape is None:
        return "unknown"
    if not shape:
        return "other"
    first = shape[0]
    if isinstance(first, str) and _BATCH.search(first):
        return "batch"
    if any(isinstance(size, str) and _BATCH.search(size) for size in shape[1:]):
        return "other"
    if isinstance(first, str) and _OTHER.search(first):
        return "other"
    found = graph.evidence(name)
    if found is not None:
        return found
    if isinstance(first, int):
        same = any(output[:1] == (first,) for output in outputs)
        return "batch" if first == 1 or same or graph.reaches_output(name) else "other"
    named = {size for output in outputs for size in output if isinstance(size, str)}
    if first not in named and named & {size for size in shape[1:] if isinstance(size, str)}:
        return "other"
    return "other" if len(shape) == 1 else "unknown"


class _Traced:
    """A graph through which symbols for the inputs' first axes were carried."""

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, _Shape]) -> None:
        self._nodes = model.graph.node
        self._outputs = [value.name for value in model.graph.output]
        # Inputs whose axes have one name share a symbol.
        self._symbols = {
            name: f"first axis of {shape[0] if isinstance(shape[0], str) else name}"
            for name, shape in inputs.items()
        }
        self._shapes = _carried(model, self._symbols)
        self._varying = set(inputs)
        for node in self._nodes:
            if constant_value(node) is None and not self._varying.isdisjoint(node.input):
                self._varying.update(node.output)

    def evidence(self, name: str) -> FirstAxis | None:
        """What operators say of an input's first axis; what speaks against a batch prevails."""
        symbol = self._symbols[name]
        found = {what for node in self._nodes for what in self._at(node, symbol)}
        if "other" in found or "batch" in found:
            return "other" if "other" in found else "batch"
        return "batch" if self._row_by_row(symbol) else None

    def reaches_output(self, name: str) -> bool:
        """Whether an output's first axis is the input's."""
        return any(self._place(output, self._symbols[name]) == 0 for output in self._outputs)

    def _place(self, tensor: str, symbol: str) -> int | None:
        shape = self._shapes.get(tensor, ())
        return shape.index(symbol) if symbol in shape else None

    def _at(self, node: onnx.NodeProto, symbol: str) -> Iterator[FirstAxis]:
        """Yield the evidence of a node that the symbol reaches."""
        place = self._place(node.input[0], symbol) if node.input else None
        if node.op_type in _BATCH_FIRST and place is not None:
            yield "batch" if place == 0 else "other"
        elif node.op_type in _RECURRENT:
            batch = 0 if attributes(node).get("layout", 0) else 1
            for index, tensor in enumerate(node.input):
                found = self._place(tensor, symbol)
                if found is not None and index in (0, 5, 6):
                    yield "batch" if found == batch else "other"
        elif node.op_type == "MatMul" and self._varying.issuperset(node.input):
            # A product of two activations: its leading axes are a batch, the last two are not.
            for tensor in node.input:
                found, rank = self._place(tensor, symbol), len(self._shapes.get(tensor, ()))
                if found is not None:
                    yield "other" if found >= rank - 2 else "batch"
        elif node.op_type in _ALONG_AXIS and place is not None:
            axis = attributes(node).get("axis", -1)
            if axis % len(self._shapes[node.input[0]]) == place:
                yield "other"

    def _row_by_row(self, symbol: str) -> bool:
        """Whether every row of the outputs follows from one row of the input alone."""
        for node in self._nodes:
            places = {self._place(tensor, symbol) for tensor in node.input} - {None}
            if not places:
                continue
            kept = all(self._place(tensor, symbol) == 0 for tensor in node.output if tensor)
            if places != {0} or not kept or node.op_type not in _ROW_BY_ROW:
                return False
        return any(self._place(output, symbol) == 0 for output in self._outputs)


def _carried(model: onnx.ModelProto, symbols: Mapping[str, str]) -> dict[str, _Shape]:
    """Shapes of all tensors, with symbols for the first axes of inputs."""
    skeleton = without_weights(model)
    graph = skeleton.graph
    del graph.value_info[:]
    for value in graph.input:
        if value.name in symbols:
            value.type.tensor_type.shape.dim[0].dim_param = symbols[value.name]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    # Where inference fails nothing is known beyond the inputs.
    with suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: shape for value in values if (shape := _declared(value)) is not None}
