"""Let nodes of a model compute in 8 bits: onnxruntime's quantiser puts QDQ pairs around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import onnx

from cobla_onnx.arithmetic.aliases import Aliases, alias
from cobla_onnx.arithmetic.nodes import BIAS, CARRIED, PASSED, WEIGHTED, reader_counts, tensor_names
from cobla_onnx.arithmetic.prepared import Prepared, quietly
from cobla_onnx.arithmetic.ranges import Ranges, renamed_ranges, with_common_ranges
from cobla_onnx.graph.io.external import is_external, read_external
from cobla_onnx.graph.io.model_file import copy_without_initializers, unique_name
from cobla_onnx.text import quoted

__all__ = ["quantised", "quantised_at_run_time"]


def quantised(
    prepared: Prepared, ranges: Ranges, places: Collection[int], *, reduced: bool = False
) -> onnx.ModelProto:
    """Return a copy of the original in which the nodes at some places compute in 8 bits.

    Activations are unsigned, weights signed with a scale for each output channel. Nodes of the
    original keep their names, documentation and outputs, but for activations that onnxruntime's
    quantiser takes into a range.

    Parameters
    ----------
    places : collection of int
        Of the nodes in the original; at least one.
    reduced : bool
        Round weights to 7 bits, for processors whose sums of 8-bit products saturate.
    """
    from onnxruntime.quantization import QDQQuantizer

    nodes = prepared.model.graph.node
    computing = [place for place in sorted(places) if nodes[place].op_type not in PASSED]
    return _run(
        QDQQuantizer,
        _with_own_biases(prepared, computing),
        [alias(name) for name in prepared.named(computing)],
        [*WEIGHTED, *CARRIED],
        with_common_ranges(ranges, prepared.model, places),
        reduce_range=reduced,
        extra_options={},
    )


def quantised_at_run_time(
    prepared: Prepared, places: Collection[int], *, reduced: bool = False
) -> onnx.ModelProto:
    """Return a copy of the original in which matrix products compute in 8 bits, in ranges of a run.

    Parameters
    ----------
    places : collection of int
        What `dynamic_nodes` gives, or some of it.
    reduced : bool
        See `quantised`.
    """
    from onnxruntime.quantization import QuantizationMode
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

    nodes = prepared.model.graph.node
    # A Gemm becomes a product and a sum first.
    names = [
        alias(prepared.names[place]) + "_MatMul" * (nodes[place].op_type == "Gemm")
        for place in sorted(places)
    ]
    return _run(
        ONNXQuantizer,
        prepared,
        names,
        ["MatMul"],
        None,
        mode=QuantizationMode.IntegerOps,
        static=False,
        reduce_range=reduced,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _with_own_biases(prepared: Prepared, places: Sequence[int]) -> Prepared:
    """Give nodes a copy of their bias where something else reads it.

    The quantiser hands a bias that is rounded in the scales of one node to all that read it.
    """
    counts = reader_counts(prepared.model)
    stored = {tensor.name: tensor for tensor in prepared.model.graph.initializer}
    nodes = prepared.model.graph.node
    shared = [
        place
        for place in places
        if nodes[place].op_type in WEIGHTED
        and len(nodes[place].input) > BIAS
        and nodes[place].input[BIAS] in stored
        and counts[nodes[place].input[BIAS]] > 1
    ]
    if not shared:
        return prepared
    model = copy_without_initializers(prepared.model, ())
    taken = tensor_names(prepared.model)
    for place in shared:
        node = model.graph.node[place]
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(stored[node.input[BIAS]])
        tensor.name = node.input[BIAS] = unique_name(tensor.name, taken)
    return replace(prepared, model=model)


def _run(
    quantizer: Callable[..., Any],
    prepared: Prepared,
    names: Sequence[str],
    operators: Sequence[str],
    ranges: Ranges | None,
    **options: Any,
) -> onnx.ModelProto:
    """Let one of onnxruntime's quantisers work on some nodes of a copy; take back what it made.

    Nodes go by their aliases.
    """
    from onnxruntime.quantization import QuantType

    copy = _copy(prepared)
    aliases = Aliases.of(copy)
    aliases.give(copy)
    with quietly():
        made = quantizer(
            copy,
            per_channel=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            nodes_to_quantize=names,
            nodes_to_exclude=[],
            op_types_to_quantize=operators,
            tensors_range=None if ranges is None else renamed_ranges(ranges, aliases.tensors),
            **options,
        ).quantize_model()
    aliases.take_back(made)
    return prepared.taken_back(made)


def _copy(prepared: Prepared) -> onnx.ModelProto:
    """Copy the model with its weights: the quantiser saves it in a folder without external data."""
    copy = onnx.ModelProto()
    copy.CopyFrom(prepared.model)
    for tensor in filter(is_external, copy.graph.initializer):
        read_external(tensor, f"tensor {quoted(tensor.name)}")
    return copy
