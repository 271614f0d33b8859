"""The reverse pass: propagate gradients from a graph's outputs back to its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.prepare import Prepared
from cobla_onnx.autodiff.vjp import FLAT, NoRuleError, Step, find_rule
from cobla_onnx.graph.layers import all_inputs, node_label
from cobla_onnx.graph.protos import STORED_TYPES

__all__ = ["Backward", "backward"]


@dataclass(frozen=True)
class Backward:
    """Gradients with respect to tensors.

    Attributes
    ----------
    gradients : dict of str to str
        For each tensor, the name of the gradient with respect to it.
    blocked : dict of str to str
        For each tensor without one, why: a path from it to the loss passes a node that
        cannot be differentiated, or there is no path. What flows along other paths would be
        a wrong gradient, so none is given.
    """

    gradients: dict[str, str]
    blocked: dict[str, str]


def backward(
    g: Emitter, forward: Prepared, seeds: Mapping[str, str], wanted: Collection[str]
) -> Backward:
    """Write the gradients with respect to the tensors `wanted`.

    Walks the nodes between `wanted` and the seeds once, in reverse; what several nodes give
    to one tensor is added up.

    Parameters
    ----------
    seeds : mapping of str to str
        Gradients by some tensors of the graph, to start from.
    wanted : collection of str
        Inputs, initializers or results of nodes.
    """
    active = _reached(forward, wanted)
    terms: dict[str, list[str]] = {name: [seed] for name, seed in seeds.items()}
    blocked: dict[str, str] = {}

    def gradient(name: str) -> str | None:
        if name not in terms:
            return None
        terms[name] = [g.total(terms[name])]
        return terms[name][0]

    nodes = forward.model.graph.node
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if not active.intersection(node.output):
            continue
        reason = next((blocked[name] for name in node.output if name in blocked), None)
        if reason is None:
            dys = [gradient(name) for name in node.output]
            if not any(dys):
                continue
            reason = _differentiate(g, forward, node, index, dys, active, terms)
        if reason is not None:
            for name in active.intersection(all_inputs(node)):
                blocked.setdefault(name, reason)
    gradients: dict[str, str] = {}
    for name in wanted:
        found = None if name in blocked else gradient(name)
        if found is not None:
            gradients[name] = found
    why = {name: blocked.get(name, "no gradient reaches it") for name in wanted}
    return Backward(gradients, {n: reason for n, reason in why.items() if n not in gradients})


def _differentiate(
    g: Emitter,
    forward: Prepared,
    node: onnx.NodeProto,
    index: int,
    dys: list[str | None],
    active: set[str],
    terms: dict[str, list[str]],
) -> str | None:
    """Apply a node's rule and hand its gradients on, or say why there is none."""
    rule = find_rule(node)
    label = f"{node.op_type} node {node_label(node, index)!r}"
    if rule is None:
        domain = f" of domain {node.domain}" if node.domain else ""
        return f"{label}: there is no derivative rule for this operator{domain}"
    wanted = [name in active for name in node.input]
    step = Step.of(node, dys, wanted, forward.shapes, forward.constants)
    try:
        results = rule(g, step)
    except NoRuleError as error:
        return f"{label}: {error}"
    assert len(results) == len(node.input), f"the rule of {node.op_type} forgets an input"
    for name, is_wanted, result in zip(node.input, wanted, results, strict=True):
        if is_wanted and result is not None:
            terms.setdefault(name, []).append(result)
    return None


def _reached(forward: Prepared, wanted: Iterable[str]) -> set[str]:
    """Tensors of floating type that depend on `wanted` otherwise than by flat operators."""
    reached = set(wanted)
    for node in forward.model.graph.node:
        if node.op_type in FLAT and not node.domain:
            continue
        if reached.intersection(all_inputs(node)):
            reached.update(name for name in node.output if name and _is_floating(forward, name))
    return reached


def _is_floating(forward: Prepared, name: str) -> bool:
    # A type that nobody knows may be floating: then the operator's rule decides.
    return forward.types.get(name, onnx.TensorProto.FLOAT) in STORED_TYPES
