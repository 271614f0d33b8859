"""Evaluate the small tensors of a graph that depend on no input: axes, pads, shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from cobla_onnx.graph.layers import attributes
from cobla_onnx.graph.tensors import subgraphs

__all__ = ["known_values"]

# Elements up to which a tensor is computed: more are data, not settings.
ELEMENTS = 4096


def known_values(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    """Compute what follows from initializers, constants and the shapes of tensors.

    A node that the reference implementation does not know or refuses is left out, with
    all that follows from it.
    """
    known = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.domain or any(True for _ in subgraphs(node)):
            continue
        if node.op_type == "Shape" and node.input[0] in shapes:
            values = attributes(node)
            shape = shapes[node.input[0]][values.get("start", 0) : values.get("end")]
            known[node.output[0]] = np.array(shape, dtype=np.int64)
        elif node.op_type == "Size" and node.input[0] in shapes:
            known[node.output[0]] = np.array(math.prod(shapes[node.input[0]]), dtype=np.int64)
        elif all(name in known for name in node.input if name) and _is_small(node, shapes):
            known.update(_computed(model, node, known))
    return known


def _is_small(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
        return False
    return all(n in shapes and math.prod(shapes[n]) <= ELEMENTS for n in node.output if n)


def _computed(
    model: onnx.ModelProto, node: onnx.NodeProto, known: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    names = [name for name in dict.fromkeys(node.input) if name]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "constant",
        [
            value(n, onnx.helper.np_dtype_to_tensor_dtype(known[n].dtype), known[n].shape)
            for n in names
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
    )
    single = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    try:
        results = ReferenceEvaluator(single).run(None, {n: known[n] for n in names})
    except Exception:  # noqa: BLE001
        # The reference implementation raises whatever its numpy code raises.
        return {}
    present = [name for name in node.output if name]
    return {n: np.asarray(r) for n, r in zip(present, results, strict=True)}
