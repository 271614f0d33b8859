"""Outputs that only hand on what a decoder has seen: they do not count beside what it says."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from cobla_onnx.calibration.evaluation.output_choice import OutputChoice
from cobla_onnx.calibration.evaluation.tracing import FLOATING
from cobla_onnx.graph.layers import all_inputs
from cobla_onnx.text import quoted

__all__ = ["without_caches"]


def without_caches(
    choices: Mapping[str, OutputChoice], model: onnx.ModelProto
) -> tuple[dict[str, OutputChoice], tuple[str, ...]]:
    """Ignore caches that the user did not name, and say so.

    A cache is an input joined with what is new, which the model itself reads on: whatever is
    wrong with it is wrong with the other outputs, of this step and of those after it, and is
    weighed there by what it does. As values of their own, its keys and values would count as
    much as the outputs that a user sees.

    Returns
    -------
    choices : dict of str to OutputChoice
        As they were where no other output of floating type would count.
    notes : tuple of str
    """
    caches = [name for name in _caches(model) if name not in choices]
    others = [
        value.name
        for value in model.graph.output
        if value.type.tensor_type.elem_type in FLOATING.values()
        and value.name not in caches
        and choices.get(value.name, OutputChoice(value.name)).how != "ignore"
    ]
    if not caches or not others:
        return dict(choices), ()
    more = f" and {len(caches) - 1} more" if len(caches) > 1 else ""
    note = (
        f"output {quoted(caches[0])}{more}: a cache, whose errors the other outputs show; it does "
        f"not count beside them, --output {caches[0]}=values lets it"
    )
    return {**choices, **{name: OutputChoice(name, "ignore") for name in caches}}, (note,)


def _caches(model: onnx.ModelProto) -> list[str]:
    """Outputs that join an input with something and that further nodes read."""
    given = {value.name for value in model.graph.input}
    given -= {tensor.name for tensor in model.graph.initializer}
    joined, read = set[str](), set[str]()
    for node in model.graph.node:
        read.update(all_inputs(node))
        if node.op_type == "Concat" and given.intersection(node.input):
            joined.update(node.output)
    return [value.name for value in model.graph.output if value.name in joined & read]
