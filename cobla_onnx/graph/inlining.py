"""Open model-local functions by onnx's inliner, with the defaults of attributes that it drops."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import onnx
import onnx.inliner

from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.protos import plain_domain

__all__ = ["inlined", "inlined_functions"]

Key = tuple[str, str, str]


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Open all functions of a model; those of other operator sets are converted.

    Parameters
    ----------
    model : ModelProto
        Its calls are changed: they state the defaults of attributes.

    Raises
    ------
    RuntimeError
        If onnx cannot open a function.
    """
    _state_defaults(model)
    return onnx.inliner.inline_local_functions(model, convert_version=True)


def inlined_functions(
    model: onnx.ModelProto, chosen: Collection[tuple[str, str]]
) -> onnx.ModelProto:
    """Open functions of a model by their domains and names; see `inlined`."""
    _state_defaults(model)
    return onnx.inliner.inline_selected_functions(model, sorted(chosen))


def _state_defaults(model: onnx.ModelProto) -> None:
    defaults = {_key(f.domain, f.name, f): f.attribute_proto for f in model.functions}
    for node in chain.from_iterable(map(all_nodes, (model.graph, *model.functions))):
        stated = {attribute.name for attribute in node.attribute}
        for attribute in defaults.get(_key(node.domain, node.op_type, node), ()):
            if attribute.name not in stated:
                node.attribute.add().CopyFrom(attribute)


def _key(domain: str, name: str, proto: onnx.FunctionProto | onnx.NodeProto) -> Key:
    return plain_domain(domain), name, getattr(proto, "overload", "")
