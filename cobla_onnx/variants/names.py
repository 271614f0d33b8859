"""Names for the tensors and nodes that a rewrite adds to a model."""

from __future__ import annotations

import onnx

from cobla_onnx.graph.io.model_file import subgraphs, unique_name

__all__ = ["Names"]


class Names:
    """The names that are in use in a model; new ones are made unique, and taken.

    Parameters
    ----------
    model : ModelProto
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._tensors: set[str] = set()
        self._nodes: set[str] = set()
        stack = [model.graph]
        while stack:
            graph = stack.pop()
            for items in (graph.initializer, graph.input, graph.output, graph.value_info):
                self._tensors.update(item.name for item in items)
            for node in graph.node:
                self._nodes.add(node.name)
                self._tensors.update(node.input, node.output)
                stack.extend(subgraphs(node))

    def tensor(self, wanted: str) -> str:
        """Return a name for a tensor: the one that is wanted, with a number if it is taken."""
        return unique_name(wanted, self._tensors)

    def node(self, wanted: str) -> str:
        """Return a name for a node: the one that is wanted, with a number if it is taken."""
        return unique_name(wanted, self._nodes)
