"""Logits in place of class distributions, on which decisions overfit less.

The Kullback-Leibler divergence of a few hundred samples hangs on the few whose classes are
close to each other: ranks that please these do not please other samples. At a temperature T
logits are divided by T before the softmax, and as T grows the divergence becomes the squared
distance of the logits, centred for each sample, to which all samples contribute alike
(Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 2.1).
That limit is what decisions follow; the divergence itself is what the report states.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from cobla_onnx.autodiff.losses import TINY, LossKind
from cobla_onnx.graph.model_file import copy_without_initializers, unique_name

__all__ = ["soften"]


def soften(model: onnx.ModelProto, kinds: Mapping[str, LossKind]) -> onnx.ModelProto:
    """Copy a model so that its class outputs are logits whose mean over classes is 0.

    Parameters
    ----------
    model : ModelProto
    kinds : mapping of str to str
        How each output is compared; only ``logits`` and ``probabilities`` are changed, the
        latter by way of their logarithms.
    """
    result = copy_without_initializers(model, ())
    graph = result.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for value in graph.output:
        kind = kinds.get(value.name)
        if kind not in ("logits", "probabilities"):
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)

        def new(suffix: str, source: str = value.name) -> str:
            return unique_name(f"{source}/{suffix}", taken)

        logits = value.name
        if kind == "probabilities":
            least = max(TINY, float(np.finfo(dtype).tiny))
            bounded, logits = new("bounded"), new("logarithm")
            if version < 8:
                # Max does not broadcast yet.
                clip = onnx.helper.make_node("Clip", [value.name], [bounded], min=least)
                graph.node.append(clip)
            else:
                floor = new("least")
                graph.initializer.append(
                    onnx.numpy_helper.from_array(np.array(least, dtype), floor)
                )
                graph.node.add(op_type="Max", input=[value.name, floor], output=[bounded])
            graph.node.add(op_type="Log", input=[bounded], output=[logits])
        mean, centred = new("mean"), new("centred")
        if version < 18:
            node = onnx.helper.make_node("ReduceMean", [logits], [mean], axes=[1], keepdims=1)
        else:
            axes = new("axes")
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), axes))
            node = onnx.helper.make_node("ReduceMean", [logits, axes], [mean], keepdims=1)
        graph.node.append(node)
        graph.node.add(op_type="Sub", input=[logits, mean], output=[centred])
        value.name = centred
    return result
