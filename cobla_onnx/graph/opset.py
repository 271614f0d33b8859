"""Bring a model to a later opset, though onnx's version converter may not know its operators."""

from __future__ import annotations

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.inlining import inlined
from cobla_onnx.graph.legacy import replace_legacy
from cobla_onnx.graph.protos import OVERRIDABLE_FROM, plain_domain, unlist_weights
from cobla_onnx.text import first_line

__all__ = ["lifted"]


def lifted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return the model with at least this version of ONNX's own operators.

    Parameters
    ----------
    model
        With its weights inside. It is changed; what is returned is the one to use, which is the
        same where it is recent enough.
    opset : int

    Raises
    ------
    ModelError
        If the version converter stops at an operator.
    """
    for entry in (*model.opset_import, *model.graph.node):
        if entry.domain != plain_domain(entry.domain):
            entry.domain = plain_domain(entry.domain)
    found = [entry.version for entry in model.opset_import if not entry.domain]
    if not found:
        model.opset_import.append(onnx.helper.make_opsetid("", opset))
    if max(found, default=opset) >= opset:
        return model
    if model.functions:
        # The converter drops them.
        model = inlined(model)
    replace_legacy(model)
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    if model.ir_version < OVERRIDABLE_FROM <= least:
        # Until then initializers are inputs, too, and constants all the same.
        unlist_weights(model.graph)
    model.ir_version = max(model.ir_version, least)
    try:
        return onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the model cannot be converted from opset {max(found)} to {opset}: "
            f"{first_line(error)}; export it with a newer opset"
        ) from error
