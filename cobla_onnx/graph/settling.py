"""Put the branch of an If that is taken in its place, in a copy of a model.

Layers and tensors keep their names, so that what is decided for the copy holds for the model.
The model must have been prepared by `cobla_onnx.graph.opening`: no name is defined twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from cobla_onnx.graph.bodies import body_graphs, node_label
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.graph.operators.base import operators_of_node
from cobla_onnx.graph.protos import copied_node, is_standard

__all__ = ["branching", "settled"]


def branching(model: onnx.ModelProto) -> dict[str, str]:
    """Ifs of the main graph with operators in them that may be layers.

    Returns
    -------
    dict of str to str
        Name of the condition by the first output of the node.
    """
    return {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "If"
        and is_standard(node)
        and any(operators_of_node(n) for body in body_graphs([node]) for n in body.node)
    }


def settled(model: onnx.ModelProto, taken: Mapping[str, bool]) -> onnx.ModelProto:
    """Return a copy of a model in which the nodes of a branch stand in place of its If.

    Parameters
    ----------
    taken : mapping of str to bool
        Whether the condition holds, by the first output of the If.
    """
    result = copy_without_initializers(model, ())
    graph = result.graph
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        choice = taken.get(node.output[0]) if node.output and node.op_type == "If" else None
        if choice is None:
            nodes.append(node)
            continue
        name = "then_branch" if choice else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == name)
        nodes.extend(_in_place(node, node_label(node, index), name, branch))
        graph.initializer.extend(branch.initializer)
        graph.sparse_initializer.extend(branch.sparse_initializer)
        graph.value_info.extend(branch.value_info)
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _in_place(
    holder: onnx.NodeProto, label: str, name: str, branch: onnx.GraphProto
) -> Iterable[onnx.NodeProto]:
    """Yield the nodes of a branch under the names that they have as layers."""
    for index, inner in enumerate(branch.node):
        node = copied_node(inner)
        node.name = f"{label}.{name}/{node_label(inner, index)}"
        yield node
    for output, value in zip(holder.output, branch.output, strict=False):
        if output:
            # A name of its own, since tensors of the branch keep theirs.
            yield onnx.helper.make_node(
                "Identity", [value.name], [output], f"{label}.{name}/output {output}"
            )
