"""Find the nodes that compute with constants alone: a session runs them once, when it opens."""

from __future__ import annotations

from collections import Counter

import onnx

from cobla_onnx.graph.bodies import all_nodes, body_graphs, defined_names
from cobla_onnx.graph.protos import OVERRIDABLE_FROM, is_standard
from cobla_onnx.graph.randomness import draws
from cobla_onnx.graph.tensors import subgraphs

__all__ = ["foldable_nodes"]

# What onnxruntime keeps for its 8-bit kernels, though all it reads is constant.
KEPT = {"DequantizeLinear", "QuantizeLinear"}


def foldable_nodes(model: onnx.ModelProto) -> set[int]:
    """Indices, in `bodies.all_nodes`, of the nodes whose results follow from constants alone.

    Nodes that onnxruntime does not fold are left out: those of other domains, with bodies, that
    draw random numbers, or that stand between codes and numbers; and so are, where several graphs
    define a name, those that read it, and in graphs that are not sorted those that stand too early.
    """
    graphs = [model.graph, *body_graphs(model.graph.node)]
    defined = Counter(name for graph in graphs for name in defined_names(graph))
    known = set[str]()
    for graph in graphs:
        known.update(tensor.name for tensor in graph.initializer)
        known.update(sparse.values.name for sparse in graph.sparse_initializer)
        if model.ir_version >= OVERRIDABLE_FROM:
            known.difference_update(value.name for value in graph.input)
    known = {name for name in known if defined[name] == 1}
    found = set[int]()
    for index, node in enumerate(all_nodes(model.graph)):
        folds = is_standard(node) and node.op_type not in KEPT and not draws(node)
        fixed = node.op_type == "Constant" or any(node.input)
        fixed &= all(name in known for name in node.input if name)
        if folds and fixed and not any(subgraphs(node)):
            found.add(index)
            known.update(name for name in node.output if defined[name] == 1)
    return found
