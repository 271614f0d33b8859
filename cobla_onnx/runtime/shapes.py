"""Shapes and MACs of a model; where shape inference does not reach, from one run."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.layers import node_label
from cobla_onnx.graph.macs import Shape, infer_shapes, node_macs
from cobla_onnx.graph.operators.base import operators_of_node
from cobla_onnx.runtime.session import measured_shapes
from cobla_onnx.wording import option_name

__all__ = ["model_costs"]


def model_costs(
    model: onnx.ModelProto, known: Mapping[str, Shape], needed: bool, threads: int
) -> tuple[dict[str, Shape], dict[int, int] | None, tuple[str, ...]]:
    """Shapes and MACs; where shape inference does not reach, from one run."""
    shapes = infer_shapes(model, known)
    macs, unknown = node_macs(model, shapes)
    if not unknown:
        return shapes, macs, ()
    open_inputs = [n for n, shape in known.items() if None in shape]
    if open_inputs:
        if needed:
            example = {n: ["?" if d is None else d for d in known[n]] for n in open_inputs}
            raise UsageError(
                f"{option_name('mac')}: the MACs of {len(unknown)} nodes are not known, "
                f"{unknown[0]!r} among them, since axes of the input are open; fill in the ? of "
                f"{option_name('input_shapes', example)}"
            )
        return shapes, None, ("MACs are not known; give --input-shape to count them",)
    missing = set(unknown)
    wanted: list[str] = []
    for index, node in enumerate(model.graph.node):
        if operators_of_node(node) and node_label(node, index) in missing:
            wanted.extend(name for name in (*node.input[:2], node.output[0]) if name)
    stored = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    names = [name for name in dict.fromkeys(wanted) if name not in stored]
    try:
        shapes.update(measured_shapes(model, names, known, threads))
    except ModelError as error:
        if needed:
            raise
        return shapes, None, (f"MACs are not known: {error.in_flags()}",)
    macs, unknown = node_macs(model, shapes)
    note = "shapes that ONNX shape inference does not give were read from a run in onnxruntime"
    return shapes, None if unknown else macs, (note,)
