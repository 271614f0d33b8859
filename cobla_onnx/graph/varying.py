"""Find the tensors whose shape depends on the data, not only on the shapes of the inputs.

Two facts are carried through the graph in the order of its nodes: whether a tensor's values
depend on the values of an input, and whether its shape does. A shape does where an operator
gives as many elements as its data says (NonMaxSuppression, NonZero), where sizes are computed
from data (the k of a TopK), and in everything that is made of such a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from cobla_onnx.graph.index import all_inputs
from cobla_onnx.graph.protos import given_inputs, is_standard, plain_domain
from cobla_onnx.graph.tensors import subgraphs

__all__ = ["Varying", "varying_tensors"]

# Operators that give as many elements as the values of their inputs say.
SELECTING = {"Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"}
# Inputs whose values are sizes of the output.
SIZES = {
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
# Operators whose output has the shape of their first input, whatever the others are.
LIKE_FIRST = {"Scatter", "ScatterElements", "ScatterND", "TensorScatter"}
# What reads shapes and no values.
SHAPE_READERS = {"Shape", "Size"}
KNOWN_DOMAINS = {"", "ai.onnx.ml", "com.microsoft"}


@dataclass
class Varying:
    """Where shapes that follow from the data come from.

    Attributes
    ----------
    certain : dict of str to int
        Tensors behind an operator that selects by its data; with the index of the node.
    possible : dict of str to int
        Tensors whose sizes are computed from data, or that come out of a loop, a branch or
        an operator that is not known here: their shape may be the same for all samples.
    """

    certain: dict[str, int] = field(default_factory=dict)
    possible: dict[str, int] = field(default_factory=dict)

    def cause(self, name: str) -> int | None:
        """Index of the node that makes the shape of a tensor follow from the data, if any."""
        return self.certain.get(name, self.possible.get(name))


def varying_tensors(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int | None, ...]] | None = None
) -> Varying:
    """Find the tensors of the main graph whose shape follows from the data.

    Parameters
    ----------
    model : ModelProto
        With its nodes in topological order.
    shapes : mapping of str to tuple, optional
        Shapes that were inferred for fixed shapes of the inputs; a tensor of which all sizes
        are known that way is taken by them.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    # Tensors whose values depend on those of an input.
    valued = set(given_inputs(model.graph))
    found = Varying()
    for index, node in enumerate(model.graph.node):
        names = [name for name in node.output if name]
        reads_shape = _operator(node) in SHAPE_READERS
        read = {name for name in all_inputs(node) if name}
        depends = any(found.cause(name) is not None for name in read)
        if not reads_shape:
            depends = depends or not valued.isdisjoint(read)
        if depends:
            cause = None if reads_shape else _cause(node, index, valued, found, functions)
            for name in names:
                size = (shapes or {}).get(name)
                if cause is not None and (size is None or None in size):
                    made, certain = cause
                    (found.certain if certain else found.possible)[name] = made
            valued.update(names)
    return found


def _operator(node: onnx.NodeProto) -> str:
    """Operator of the standard's main domain, or an empty text."""
    return str(node.op_type) if is_standard(node) else ""


def _cause(
    node: onnx.NodeProto,
    index: int,
    valued: set[str],
    found: Varying,
    functions: set[tuple[str, str]],
) -> tuple[int, bool] | None:
    """Which node makes the shape of a node's outputs follow from data, and if it is certain.

    The node reads something that depends on data.
    """
    operator = _operator(node)
    shaping = [node.input[0]] if operator in LIKE_FIRST else list(all_inputs(node))
    certain = [found.certain[name] for name in shaping if name in found.certain]
    if certain:
        return min(certain), True
    if operator in SELECTING:
        return index, True
    possible = [found.possible[name] for name in shaping if name in found.possible]
    if possible:
        return min(possible), False
    places = [place for place in SIZES.get(operator, ()) if place < len(node.input)]
    opaque = (
        plain_domain(node.domain) not in KNOWN_DOMAINS
        or (node.domain, node.op_type) in functions
        or next(subgraphs(node), None) is not None
    )
    if opaque or any(node.input[place] in valued for place in places):
        return index, False
    return None
