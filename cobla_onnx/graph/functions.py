"""Open the model-local functions that hold layers: their nodes take the place of the calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.bodies import all_nodes, body_graphs
from cobla_onnx.graph.inlining import inlined_functions
from cobla_onnx.graph.io.model_file import copy_without_initializers, is_weight, without_weights
from cobla_onnx.graph.operators.base import operators_of_node
from cobla_onnx.graph.protos import copied_node, plain_domain
from cobla_onnx.graph.tensors import constant_value, is_given_by_calls
from cobla_onnx.text import quoted

__all__ = ["OWN_DOMAIN", "with_open_functions"]

# Functions of this domain are written by the package itself and stay as they are.
OWN_DOMAIN = "cobla_onnx"

Key = tuple[str, str]


def with_open_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the calls of functions that hold layers by the functions' nodes.

    Weights that a function stores itself are shared by all its calls: they become one constant,
    so that one decision holds for all of them. Functions of other operator sets than the model's
    stay, with all that they call.

    Returns
    -------
    ModelProto
        `model` itself if no function holds a layer, else a copy.

    Raises
    ------
    ModelError
        If onnx cannot open a function.
    """
    chosen = _holding_layers(model)
    if not chosen:
        return model
    before = {name for node in all_nodes(model.graph) for name in node.output}
    # onnx's inliner takes serialised models, which hold no more than 2 GB, and it refuses functions
    # of other operator sets, also where it need not open them.
    closed = [function for function in model.functions if _key(function) not in chosen]
    light = without_weights(model)
    functions = [function for function in model.functions if _key(function) in chosen]
    del light.functions[:]
    light.functions.extend(functions)
    try:
        opened = inlined_functions(light, chosen)
    except RuntimeError as error:
        named = ", ".join(quoted(name) for _, name in sorted(chosen))
        raise ModelError(
            f"functions {named}: onnx {onnx.__version__} cannot open them ({str(error)[:200]}); "
            "export the model again without functions"
        ) from error
    opened.functions.extend(closed)
    stored = {tensor.name for tensor in model.graph.initializer}
    declared = {value.name for value in model.graph.input}
    result = copy_without_initializers(opened, stored)
    inputs = [v for v in result.graph.input if v.name in declared or v.name not in stored]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    result.graph.initializer.extend(model.graph.initializer)
    _store_once(result.graph, before)
    return result


def _holding_layers(model: onnx.ModelProto) -> set[Key]:
    """Functions with a node of a registered operator, and those that call them."""
    nodes = {_key(function): all_nodes(function) for function in model.functions}
    calls = {k: {(n.domain, n.op_type) for n in its} & nodes.keys() for k, its in nodes.items()}
    callers = defaultdict[Key, set[Key]](set)
    for key, called in calls.items():
        for other in called:
            callers[other].add(key)
    closed = _reached(_not_opened(model), calls)
    opened = [function for function in model.functions if _key(function) not in closed]
    return _reached({_key(f) for f in opened if _holds_layer(f, nodes[_key(f)])}, callers)


def _not_opened(model: onnx.ModelProto) -> set[Key]:
    """Functions of other operator sets, of the package, and those that compute an operator.

    A node that calls one of the latter is a layer as it is.
    """
    imported = _versions(model.opset_import)
    found = set()
    for function in model.functions:
        own = _versions(function.opset_import)
        fits = all(imported.get(domain, version) == version for domain, version in own.items())
        if function.domain == OWN_DOMAIN or not fits or _is_operator(_key(function)):
            found.add(_key(function))
    return found


def _reached(keys: set[Key], following: Mapping[Key, set[Key]]) -> set[Key]:
    """Return functions with what follows them, such as what they call, and what follows that."""
    found: set[Key] = set()
    while keys:
        found |= keys
        keys = set[Key]().union(*(following[key] for key in keys)) - found
    return found


def _holds_layer(function: onnx.FunctionProto, nodes: Collection[onnx.NodeProto]) -> bool:
    given = {*function.input, *_weights(nodes)}
    return any(_may_be_layer(node, given) for node in nodes)


def _key(function: onnx.FunctionProto) -> Key:
    return function.domain, function.name


def _versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {plain_domain(i.domain): i.version for i in imports}


def _is_operator(key: Key) -> bool:
    return bool(operators_of_node(onnx.NodeProto(domain=key[0], op_type=key[1])))


def _weights(nodes: Collection[onnx.NodeProto]) -> set[str]:
    return {
        node.output[0]
        for node in nodes
        if is_given_by_calls(node)
        or ((value := constant_value(node)) is not None and is_weight(value))
    }


def _may_be_layer(node: onnx.NodeProto, given: Collection[str]) -> bool:
    """Whether a node of a function may hold a weight; most that take shapes apart do not."""
    operators = operators_of_node(node)
    positions = [p for o in operators for p in o.weight_inputs if p < len(node.input)]
    read = any(node.input[p] in given for p in positions)
    return read or any(not operator.incidental for operator in operators)


def _store_once(graph: onnx.GraphProto, before: Collection[str]) -> None:
    """Of weights in Constant nodes that are the same in several calls, keep the first.

    Calls in bodies keep their own: what one branch defines, another cannot read.
    """
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        value = constant_value(node)
        if value is not None and is_weight(value) and node.output[0] not in before:
            content = onnx.TensorProto()
            content.CopyFrom(value)
            content.ClearField("name")
            content.ClearField("doc_string")
            found = first.setdefault(content.SerializeToString(deterministic=True), node.output[0])
            if found != node.output[0]:
                same[node.output[0]] = found
                continue
        kept.append(node)
    if not same:
        return
    copies = [copied_node(node) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
    for node in all_nodes(graph):
        for position, name in enumerate(node.input):
            if name in same:
                node.input[position] = same[name]
    outputs = {value.name for value in graph.output} | {
        value.name for body in body_graphs(graph.node) for value in body.output
    }
    assert outputs.isdisjoint(same), "an inlined constant is never an output by its own name"
