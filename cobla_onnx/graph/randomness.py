"""Find the nodes that draw random numbers."""

from __future__ import annotations

import onnx

from cobla_onnx.graph.index import node_label
from cobla_onnx.graph.tensors import subgraphs
from cobla_onnx.text import quoted

__all__ = ["draws", "random_nodes"]

DRAWING = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


def draws(node: onnx.NodeProto) -> bool:
    """Whether a node itself draws random numbers; a Dropout does where it is told to train."""
    training = node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])
    return node.op_type in DRAWING or training


def random_nodes(model: onnx.ModelProto) -> list[str]:
    """Names and operators of the nodes that draw random numbers, sub-graphs included."""
    found = []
    graphs = [model.graph]
    while graphs:
        for index, node in enumerate(graphs.pop().node):
            if draws(node):
                found.append(f"{quoted(node_label(node, index))} ({node.op_type})")
            graphs.extend(subgraphs(node))
    return found
