"""Shapes and MACs of a model; where shape inference does not reach, from one run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx

from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.layers import node_label
from cobla_onnx.graph.macs import Shape, has_macs, infer_shapes, node_macs
from cobla_onnx.graph.settling import branching, settled
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.runtime.session import measured_shapes
from cobla_onnx.text import quoted
from cobla_onnx.wording import in_flags, option_name

__all__ = ["model_costs"]


def model_costs(
    model: onnx.ModelProto, known: Mapping[str, Shape], needed: bool, threads: int
) -> tuple[dict[str, Shape], dict[int, int] | None, tuple[str, ...]]:
    """Shapes and MACs; where shape inference does not reach, from one run.

    MACs of nodes in bodies, by their index in `bodies.all_nodes`, are left out where neither
    gives them.
    """
    shapes = infer_shapes(model, known)
    macs, unknown = node_macs(model, shapes)
    if not unknown:
        return shapes, macs, _of_bodies(model, macs, unknown)
    open_inputs = [n for n, shape in known.items() if None in shape]
    if open_inputs:
        example = {n: ["?" if d is None else d for d in known[n]] for n in open_inputs}
        if needed:
            raise UsageError(
                f"{option_name('mac')}: the MACs of {len(unknown)} nodes are not known, "
                f"{unknown[0]!r} among them, since axes of the input are open; fill in the ? of "
                f"{option_name('input_shapes', example)}"
            )
        wanted = in_flags(option_name("input_shapes", example))
        return shapes, None, (f"MACs are not known; to count them fill in the ? of {wanted}",)
    try:
        shapes.update(_measured(model, known, unknown, threads))
    except ModelError as error:
        if needed:
            raise
        return shapes, None, (f"MACs are not known: {error.in_flags()}",)
    shapes.update(_in_branches(model, known, unknown, threads))
    macs, unknown = node_macs(model, shapes)
    missing = set(unknown)
    note = "shapes that ONNX shape inference does not give were read from a run in onnxruntime"
    notes = (note, *_of_bodies(model, macs, unknown))
    outside = any(node_label(node, i) in missing for i, node in enumerate(model.graph.node))
    return shapes, None if outside else macs, notes


def _of_bodies(
    model: onnx.ModelProto, macs: Mapping[int, int], unknown: Sequence[str]
) -> tuple[str, ...]:
    """Say what is counted of bodies."""
    counted = [index for index in macs if index >= len(model.graph.node) and macs[index]]
    notes = []
    if counted:
        notes.append(
            "MACs in bodies are of one pass each: of both branches of an If, and of one step of a "
            "Loop or Scan"
        )
    if unknown:
        notes.append(
            "MACs in bodies are not known, and not counted, of "
            f"{quoted(unknown[0])}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}"
        )
    return tuple(notes)


def _measured(
    model: onnx.ModelProto, known: Mapping[str, Shape], unknown: Collection[str], threads: int
) -> dict[str, Shape]:
    """Read shapes at the nodes of the main graph whose labels are given from a run."""
    wanted: list[str] = []
    for index, node in enumerate(model.graph.node):
        if has_macs(node) and node_label(node, index) in unknown:
            wanted.extend(name for name in (*node.input[:2], node.output[0]) if name)
    stored = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    names = [name for name in dict.fromkeys(wanted) if name not in stored]
    # Other parts of a branch need not run on these inputs.
    return measured_shapes(prefix(model, names), names, known, threads) if names else {}


def _in_branches(
    model: onnx.ModelProto, known: Mapping[str, Shape], unknown: Collection[str], threads: int
) -> dict[str, Shape]:
    """Read shapes in the branches of Ifs, each run in its place whatever the condition says."""
    found: dict[str, Shape] = {}
    holders = branching(model)
    for choice in (True, False) if holders else ():
        branch = settled(model, dict.fromkeys(holders, choice))
        # A branch need not run on all inputs: then what runs of it is counted, node by node.
        for some in (unknown, *([label] for label in unknown)):
            try:
                found.update(_measured(branch, known, some, threads))
            except ModelError:
                continue
            if some is unknown:
                break
    return found
