"""Which nodes of a model can compute in 8 bits, and which of the others go with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.index import all_inputs, attributes, inputs_of_bodies
from cobla_onnx.graph.io.external import is_external
from cobla_onnx.graph.io.model_file import copy_without_initializers, is_weight
from cobla_onnx.graph.protos import is_standard, opset_of
from cobla_onnx.graph.tensors import constant_value
from cobla_onnx.wording import option_name

__all__ = [
    "BIAS",
    "BY_CHANNEL",
    "CARRIED",
    "MOVED",
    "PASSED",
    "WEIGHTED",
    "carried_nodes",
    "data_inputs",
    "dynamic_nodes",
    "is_pooled",
    "reader_counts",
    "require_opset",
    "sole_readers",
    "tensor_names",
    "units",
    "weighted_nodes",
    "with_stored_weights",
]

# Operators whose weights are stored in 8 bits; all have the weight as their second input.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Where the bias is among the inputs of Conv, ConvTranspose and Gemm.
BIAS = 2
# Operators that onnxruntime computes in 8 bits, or that move numbers without computing.
CARRIED = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Dropout",
    "Flatten",
    "GlobalAveragePool",
    "Identity",
    "LeakyRelu",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
# Those of them that onnxruntime leaves out as it opens the model, pairs of equal ranges on either
# side together.
PASSED = ("Dropout", "Identity")
# Those that onnxruntime's quantiser gives a range of its own on either side, although they hand on
# the numbers that they read.
MOVED = ("Concat", *PASSED)
# Those that it leaves out: what they read has their range from then on, and their name.
CUTTING = ("Clip", "Relu")
# Those past which onnxruntime takes DequantizeLinear as it opens a model. Where nothing but a body
# reads what they give, it ends the process.
PASSED_ON = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
# From here on, a number is there to take away others: masks are made of it.
MASKING = 1e9
# Share of matrix products among the nodes with weights from which on ranges are those of each run.
PRODUCTS = 0.9
# DequantizeLinear has a scale for each channel from it on.
BY_CHANNEL = 13


def require_opset(model: onnx.ModelProto) -> None:
    """Refuse a model whose operators cannot have a scale for each channel.

    Raises
    ------
    ModelError
        With the command that lifts it.
    """
    found = opset_of(model)
    if found < BY_CHANNEL:
        raise ModelError(
            f"{option_name('arithmetic', 'int8')}: the model has opset {found}, and weights in 8 "
            f"bits have a scale for each channel from {BY_CHANNEL} on; lift it by "
            'python -c "import onnx; from cobla_onnx.graph.opset import lifted; '
            "onnx.save(lifted(onnx.load('IN.onnx'), 17), 'LIFTED.onnx')\""
        )


def with_stored_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose weights are initializers where they were in Constant nodes.

    The quantiser stores nothing else in 8 bits. It is the model itself if there are none.
    """
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTED]
    read = {name for node in nodes for name in node.input[1:3]}
    found = {}
    for node in model.graph.node:
        value = constant_value(node)
        if value is not None and node.output[0] in read and is_weight(value):
            found[node.output[0]] = value
    if not found:
        return model
    result = copy_without_initializers(model, ())
    kept = [node for node in result.graph.node if not found.keys() & set(node.output)]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    for name, value in found.items():
        tensor = result.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = name
    return result


def weighted_nodes(model: onnx.ModelProto, spared: Collection[str] = ()) -> tuple[int, ...]:
    """Return the places of the nodes that can compute in 8 bits with a stored weight.

    The weight must be an initializer in single precision: what a layer's weight in fewer bits is
    decoded from stays as it is, and so does the layer. Nothing else may read it. What a node gives
    must not be moved, and then read in a body; and what it reads must not be both an input and an
    output of the model, which onnxruntime's quantiser would define twice.

    Parameters
    ----------
    spared : collection of str
        Outputs of nodes that stay in floating point.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    moved = _moved(model.graph, set[str]().union(*map(inputs_of_bodies, model.graph.node)))
    passed = {v.name for v in model.graph.input} & {v.name for v in model.graph.output}
    found = tuple(
        place
        for place, node in enumerate(model.graph.node)
        if is_standard(node)
        and node.op_type in WEIGHTED
        and node.output[0] not in spared
        and node.output[0] not in moved
        and node.input[0] not in passed
        and _is_float(stored.get(node.input[1]))
        and not _is_float(stored.get(node.input[0]))
        and 0 not in stored[node.input[1]].dims
        and _takes_bias(node, stored)
    )
    return sole_readers(model, found)


def _is_float(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT


def _takes_bias(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether onnxruntime's quantiser stores the bias right; it leaves one that is computed.

    It rounds a bias in the scales of the weight: one for each number, or one for all. Of a grouped
    ConvTranspose all groups have the same scales. A Gemm's beta is lost (see `with_plain_gemms`).
    """
    bias = stored.get(node.input[BIAS]) if len(node.input) > BIAS else None
    if bias is None:
        return True
    values = attributes(node)
    if node.op_type == "ConvTranspose":
        return bool(values.get("group", 1) == 1 or stored[node.input[1]].dims[1] == 1)
    if node.op_type == "Gemm":
        return values.get("beta", 1.0) == 1.0 and list(bias.dims) == [units(node, stored)]
    return True


def units(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> int:
    """Channels of what a Gemm gives; a bias of one number for all of them has fewer."""
    return int(stored[node.input[1]].dims[0 if attributes(node).get("transB", 0) else 1])


def reader_counts(model: onnx.ModelProto) -> Counter[str]:
    """Count the readers of each tensor: nodes, those in bodies too, and outputs of the model."""
    counts = Counter(name for node in model.graph.node for name in all_inputs(node))
    counts.update(value.name for value in model.graph.output)
    return counts


def tensor_names(model: onnx.ModelProto) -> set[str]:
    """Return the names that tensors of the main graph have, those that nothing reads too."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return stored.union(reader_counts(model), *(node.output for node in model.graph.node))


def sole_readers(model: onnx.ModelProto, places: Collection[int]) -> tuple[int, ...]:
    """Return those of some nodes whose weights nothing but these nodes reads.

    The quantiser hands rounded weights to every reader, also to those that should stay in floating
    point. It has one scale for each row or for each column: where one node needs these and another
    those, onnxruntime takes one for the other.

    Parameters
    ----------
    places : collection of int
        Of nodes with weights, in order.
    """
    nodes = model.graph.node
    counts = reader_counts(model)
    counts.subtract(nodes[place].input[1] for place in places)
    turned: dict[str, set[bool]] = {}
    for place in places:
        turned.setdefault(nodes[place].input[1], set()).add(_by_rows(nodes[place]))
    names = {name for name, ways in turned.items() if counts[name] == 0 and len(ways) == 1}
    return tuple(place for place in places if nodes[place].input[1] in names)


def _by_rows(node: onnx.NodeProto) -> bool:
    """Whether channels of the output are along the first axis of the weight."""
    if node.op_type == "Gemm":
        return bool(attributes(node).get("transB", 0))
    return node.op_type == "Conv"


def carried_nodes(model: onnx.ModelProto, weighted: Collection[int]) -> tuple[int, ...]:
    """Return the places of nodes between those that compute in 8 bits, which go with them.

    All that such a node reads is in 8 bits already, and something in 8 bits reads what it writes:
    no pair of QuantizeLinear and DequantizeLinear is added for it alone. What a body reads is not
    looked at by onnxruntime's quantiser: nodes that write it stay, and a Relu or Clip stays behind
    what is read in front of it, too.
    """
    nodes = model.graph.node
    inside = set[str]().union(*map(inputs_of_bodies, nodes))
    seen = inside.union(value.name for value in model.graph.output)
    kept_out = inside | _moved(model.graph, inside)
    stored = {t.name: t for t in model.graph.initializer}
    stored |= {node.output[0]: constant_value(node) for node in nodes if node.op_type == "Constant"}
    narrow = {name for place in weighted for name in nodes[place].output}
    found = []
    for place, node in enumerate(nodes):
        if node.op_type not in CARRIED or not is_standard(node):
            continue
        inputs = data_inputs(node)
        cuts = node.op_type in CUTTING and node.input[0] in seen
        masks = any(_is_masking(stored.get(name)) for name in inputs)
        if cuts or masks or not kept_out.isdisjoint(node.output):
            continue
        read = [name for name in inputs if name not in stored]
        if read and all(name in narrow for name in read):
            narrow.update(node.output)
            found.append(place)
    wanted = {nodes[place].input[0] for place in weighted}
    kept = []
    for place in reversed(found):
        if any(name in wanted for name in nodes[place].output):
            wanted.update(data_inputs(nodes[place]))
            kept.append(place)
    return tuple(reversed(kept))


def _is_masking(tensor: onnx.TensorProto | None) -> bool:
    """Whether numbers are so large that nothing is left of others in a range with them."""
    if tensor is None or not _is_float(tensor) or is_external(tensor):
        return False
    values = onnx.numpy_helper.to_array(tensor)
    return bool(np.abs(values).max(initial=0.0) >= MASKING)


def _moved(graph: onnx.GraphProto, names: Collection[str]) -> set[str]:
    """Return what nodes of `PASSED_ON`, one or several in a row, make some tensors of."""
    makers = {node.output[0]: node for node in graph.node if node.op_type in PASSED_ON}
    found, left = set[str](), list(names)
    while left:
        node = makers.get(left.pop())
        if node is not None and node.input[0] not in found:
            found.add(node.input[0])
            left.append(node.input[0])
    return found


def is_pooled(model: onnx.ModelProto, place: int) -> bool:
    """Whether what a node writes goes through MaxPool before anything else computes with it.

    onnxruntime takes QuantizeLinear to the front of MaxPool. Where the convolution before it is in
    floating point, it then pools bytes in a layout in which that takes longer than the rest.
    """
    names = set(model.graph.node[place].output)
    for node in model.graph.node:
        if is_standard(node) and node.op_type in CARRIED and not names.isdisjoint(node.input):
            if node.op_type == "MaxPool":
                return True
            names.update(node.output)
    return False


def dynamic_nodes(model: onnx.ModelProto, weighted: Collection[int]) -> tuple[int, ...]:
    """Return the matrix products of a model that is made of them; else none.

    What a transformer computes lies far apart, differently for every input: the range that a
    sample has by itself loses less than one for all samples, and onnxruntime's product of such is
    quicker. Convolutions of such inputs are slow, and products of stacked matrices it cannot
    compute. A Gemm that stays as it is, or that is more than a product and a sum, is against it,
    since onnxruntime's quantiser writes them all out.
    """
    nodes = model.graph.node
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = tuple(
        place
        for place in weighted
        if nodes[place].op_type in ("MatMul", "Gemm") and nodes[place].input[1] in matrices
    )
    if len(products) < PRODUCTS * len(weighted):
        return ()
    gemms = {place for place, node in enumerate(nodes) if node.op_type == "Gemm"}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    for place in gemms:
        values = attributes(nodes[place])
        if any(values.get(name, usual) != usual for name, usual in plain.items()):
            return ()
    return products if gemms <= set(products) else ()


def data_inputs(node: onnx.NodeProto) -> list[str]:
    """Inputs that hold numbers to compute with, not a shape, an axis or sizes."""
    several = node.op_type in ("Add", "Concat", "Mul")
    return [name for name in (node.input if several else node.input[:1]) if name]
