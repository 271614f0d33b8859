"""Names of tensors and nodes while onnxruntime's quantiser works: what it makes has none of them.

It calls the scale of ``w`` ``w_scale``, whatever else has that name, and then one of the two is
taken for the other; and so it does with nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from cobla_onnx.graph.bodies import body_graphs, defined_names
from cobla_onnx.graph.io.model_file import unique_name
from cobla_onnx.graph.opening import rename_tensors

__all__ = ["Aliases", "alias"]


def alias(name: str) -> str:
    """Return a name that nothing has which is called after something: that ends otherwise."""
    return f"<{name}>"


def _without_brackets(name: str) -> str:
    return name.replace("<", "").replace(">", "")


@dataclass(frozen=True)
class Aliases:
    """Names in a model, to be replaced and to be given back.

    Attributes
    ----------
    tensors : mapping of str to str
        Aliases by the names that any of its graphs defines.
    nodes : frozenset of str
        Names of the nodes of the main graph, all different.
    """

    tensors: Mapping[str, str]
    nodes: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Aliases:
        """Name all tensors of a model, those of bodies too, and the nodes of its main graph."""
        graphs = (model.graph, *body_graphs(model.graph.node))
        names = dict.fromkeys(name for graph in graphs for name in defined_names(graph))
        nodes = frozenset(node.name for node in model.graph.node)
        return cls({name: alias(name) for name in names}, nodes)

    @property
    def names(self) -> dict[str, str]:
        """The names by their aliases."""
        return {given: name for name, given in self.tensors.items()}

    def give(self, model: onnx.ModelProto) -> None:
        """Rename all of them, in place."""
        rename_tensors(model.graph, self.tensors)
        for node in model.graph.node:
            node.name = alias(node.name)

    def take_back(self, quantised: onnx.ModelProto) -> None:
        """Give what is in a quantised model its name again, in place.

        What was made is called as the quantiser would have called it, or with a number after that.
        """
        names = self.names
        taken = set(self.tensors)
        for graph in (quantised.graph, *body_graphs(quantised.graph.node)):
            for name in defined_names(graph):
                if name not in names:
                    names[name] = unique_name(_without_brackets(name), taken)
        rename_tensors(quantised.graph, names)
        named, known = {alias(name): name for name in self.nodes}, set(self.nodes)
        for node in quantised.graph.node:
            if node.name in named:
                node.name = named[node.name]
            elif node.name:
                # onnxruntime opens no model with two nodes of one name.
                node.name = unique_name(_without_brackets(node.name), known)
