"""Error message for a part of a graph that onnxruntime cannot load by itself."""

from __future__ import annotations

import onnx
import onnxruntime

from cobla_onnx.errors import PartError
from cobla_onnx.text import quoted
from cobla_onnx.wording import either, option_name

__all__ = ["part_error"]


def part_error(model: onnx.ModelProto, part: str, text: str) -> PartError:
    """Say that a part does not load, and near which node.

    Parameters
    ----------
    model : ModelProto
        The part.
    part : str
        What it is for.
    text : str
        What onnxruntime says.
    """
    named = [node.name for node in model.graph.node if node.name and node.name in text]
    nodes = named or [node.name or node.op_type for node in model.graph.node[-1:]]
    where = (
        ""
        if not nodes
        else f" at node {quoted(nodes[0])}"
        if named
        else f", up to node {quoted(nodes[0])}"
    )
    return PartError(
        f"onnxruntime {onnxruntime.__version__} does not load the part of the graph that "
        f"cobla-onnx cut out for {part}{where}: {text}; the file is not at fault, it loads as a "
        f"whole: leave out {option_name('data')}, and report this with "
        f"{either(python='the traceback', command='what --debug shows')}"
    )
