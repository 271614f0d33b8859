"""Names for the tensors, nodes and functions that a rewrite adds to a model."""

from __future__ import annotations

import onnx

from cobla_onnx.graph.io.model_file import unique_name
from cobla_onnx.graph.protos import opset_of
from cobla_onnx.graph.tensors import subgraphs

__all__ = ["INTEGER_CONSTANTS", "SLICE_BY_INPUTS", "Names"]

# IR version from which models have functions.
FUNCTIONS_FROM = 8
# The opset from which a Constant may hold whole numbers, such as a shape.
INTEGER_CONSTANTS = 9
# The opset from which Slice takes its bounds as inputs.
SLICE_BY_INPUTS = 10


class Names:
    """The names that are in use in a model; new ones are made unique, and taken.

    Parameters
    ----------
    model : ModelProto

    Attributes
    ----------
    opset : int
        The model's version of ONNX's own operators.
    takes_functions : bool
        Whether new nodes may be put into functions that tensors of any size share: whether models
        of its IR version have functions, and sizes need not be attributes.
    functions : list of FunctionProto
        Those that the new nodes call; the model may have some of them already.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = opset_of(model)
        self.takes_functions = model.ir_version >= FUNCTIONS_FROM and self.opset >= SLICE_BY_INPUTS
        self.functions: list[onnx.FunctionProto] = []
        self._functions = {(f.domain, f.name): f for f in model.functions}
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

    def function(self, wanted: onnx.FunctionProto) -> str:
        """Return the name of a function that new nodes call.

        It is the one that is wanted, with a number if the model has another function of this name,
        such as that of an earlier version of this package.
        """
        named, number = onnx.FunctionProto(), 1
        named.CopyFrom(wanted)
        while self._functions.setdefault((named.domain, named.name), named) != named:
            number += 1
            named.name = f"{wanted.name}_{number}"
        self.functions.append(named)
        return str(named.name)
