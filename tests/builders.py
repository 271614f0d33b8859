"""Small models for tests, and a field-by-field comparison of protos."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, list[int | str]],
    outputs: Iterable[str],
    *,
    opset: int = 17,
    ir_version: int = 8,
    elem_type: int = FLOAT,
) -> onnx.ModelProto:
    """Return a model of the given nodes; outputs get their inferred shape."""
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    values = [helper.make_tensor_value_info(n, elem_type, s) for n, s in inputs.items()]
    if ir_version < 4:
        values += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(
        nodes,
        "test",
        values,
        [helper.make_tensor_value_info(name, elem_type, None) for name in outputs],
        tensors,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    for value, known in zip(model.graph.output, inferred, strict=True):
        value.type.CopyFrom(known.type)
    return model


def random_array(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def small_network() -> onnx.ModelProto:
    """A network of two convolutions and a Gemm, with all the optional fields set."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["y1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["y2"], "conv2", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["y2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "fc", transB=1),
    ]
    weights = {
        "w1": random_array(16, 3, 3, 3, seed=1),
        "b1": random_array(16, seed=2),
        "w2": random_array(24, 16, 3, 3, seed=3) / 12,
        "w3": random_array(10, 24, seed=4),
        "b3": random_array(10, seed=5),
    }
    model = model_of(nodes, weights, {"x": ["N", 3, 12, 12]}, ["logits"])
    model.doc_string, model.producer_name, model.model_version = "documented", "test", 7
    helper.set_model_props(model, {"names": "a,b", "stride": "2"})
    model.graph.doc_string = "graph documentation"
    model.graph.node[0].doc_string = "node documentation"
    model.graph.node[2].metadata_props.add(key="scope", value="features.2")
    model.graph.value_info.append(helper.make_tensor_value_info("y1", FLOAT, ["N", 16, 12, 12]))
    annotation = model.graph.quantization_annotation.add(tensor_name="y1")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b1")
    model.opset_import.append(helper.make_opsetid("some.domain", 3))
    return model


def differences(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Every field of the model and its graph that differs, nodes and tensors by name."""
    found = []
    for name in before.DESCRIPTOR.fields_by_name:
        if name != "graph" and getattr(before, name) != getattr(after, name):
            found.append(f"model.{name}")
    for name in before.graph.DESCRIPTOR.fields_by_name:
        old, new = getattr(before.graph, name), getattr(after.graph, name)
        if name in ("node", "initializer"):
            kept_old = [item for item in old if item in new]
            kept_new = [item for item in new if item in old]
            found += [f"-{name} {i.name}" for i in old if i not in new]
            found += [f"+{name} {i.name}" for i in new if i not in old]
            if kept_old != kept_new:
                found.append(f"order of {name}")
        elif old != new:
            found.append(f"graph.{name}")
    return found
