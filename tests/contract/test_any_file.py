"""Weights of every type, wherever a model keeps them: compressed rightly, or left with a reason."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx import Budget, Result, compress
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.opening import opened
from tests.builders import FLOAT, differences, model_of, random_array, small_network

node = helper.make_node
value = helper.make_tensor_value_info


def compressed(model: onnx.ModelProto, mem: float = 0.75) -> Result:
    """Compress, and see that something was, within budget, and that the model is sound."""
    before = model.SerializeToString()
    result = compress(model, Budget(mem=mem), threads=1)
    assert model.SerializeToString() == before
    assert not result.report.unchanged
    assert result.report.budget["mem"].reached <= mem
    onnx.checker.check_model(result.model, full_check=True)
    return result


def reasons(model: onnx.ModelProto) -> dict[str, str]:
    return {item.name: str(item) for item in find_layers(opened(model)).skipped}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_half_and_double_precision_stay_what_they_are(dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [node("MatMul", ["x", "w"], ["a"], "one"), node("Gemm", ["a", "v", "b"], ["y"], "two")]
    weights = {
        "w": random_array(32, 32, dtype=dtype),
        "v": random_array(32, 32, seed=1, dtype=dtype),
        "b": random_array(32, dtype=dtype),
    }
    result = compressed(model_of(nodes, weights, {"x": ["N", 32]}, ["y"], elem_type=kind), 0.5)
    assert {t.data_type for t in result.model.graph.initializer} == {kind}


def test_bfloat16_weights_behind_a_cast_are_written_back_as_such():
    bfloat16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    weight = random_array(32, 32).astype(bfloat16)
    nodes = [node("Cast", ["w"], ["w32"], "cast", to=FLOAT), node("MatMul", ["x", "w32"], ["y"])]
    result = compressed(model_of(nodes, {"w": weight}, {"x": ["N", 32]}, ["y"]))
    stored = result.model.graph.initializer
    assert {tensor.data_type for tensor in stored} == {TensorProto.BFLOAT16}
    assert result.report.verification.outputs[0].cosine > 0.8


def test_half_precision_factors_that_would_overflow_are_refused():
    weight = (random_array(16, 16) * 1e4).clip(-6e4, 6e4).astype(np.float16)
    model = model_of(
        [node("MatMul", ["x", "w"], ["y"], "m")],
        {"w": weight},
        {"x": [2, 16]},
        ["y"],
        elem_type=TensorProto.FLOAT16,
    )
    # Singular values are shared between the factors, so that each keeps to the range.
    result = compress(model, Budget(mem=0.8), threads=1)
    for tensor in result.model.graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all()


@pytest.mark.parametrize(("sizes", "allowzero"), [([32, 16], 0), ([-1, 16], 0), ([0, 16], 0)])
def test_weights_behind_reshape(sizes, allowzero):
    nodes = [
        node("Reshape", ["w", "sizes"], ["r"], "reshape", allowzero=allowzero),
        node("Transpose", ["r"], ["t"], "turn", perm=[1, 0]),
        node("MatMul", ["x", "t"], ["y"], "product"),
    ]
    weights = {"w": random_array(32, 4, 4), "sizes": np.array(sizes, np.int64)}
    model = model_of(nodes, weights, {"x": ["N", 16]}, ["y"])
    (layer,) = find_layers(model).layers
    np.testing.assert_array_equal(read_weight(model, layer), weights["w"].reshape(32, 16).T)
    result = compressed(model)
    assert [n.op_type for n in result.model.graph.node] == ["MatMul", "MatMul"]


@pytest.mark.parametrize("sizes", [[7, -1], [-1, -1], [-5, 16], [0, 0, 0, 2]])
def test_a_reshape_that_does_not_fit_is_not_followed(sizes):
    nodes = [node("Reshape", ["w", "s"], ["r"]), node("MatMul", ["x", "r"], ["y"], "product")]
    weights = {"w": random_array(16, 16), "s": np.array(sizes, np.int64)}
    model = helper.make_model(
        helper.make_graph(
            nodes, "g", [value("x", FLOAT, [2, 16])], [value("y", FLOAT, None)],
            [numpy_helper.from_array(a, n) for n, a in weights.items()],
        )
    )  # fmt: skip
    assert reasons(model) == {"product": Reason.NOT_CONSTANT.value}


def test_weights_that_are_not_stored_as_they_are_read_have_their_reason():
    nodes = [
        node("ConstantOfShape", ["sizes"], ["filled"]),
        node("MatMul", ["x", "filled"], ["a"], "filled"),
        node("DequantizeLinear", ["q", "scale"], ["real"]),
        node("MatMul", ["x", "real"], ["b"], "quantised"),
        node("MatMul", ["x", "sparse"], ["c"], "sparse"),
        node("FusedMatMul", ["x", "w"], ["d"], "fused", domain="com.microsoft"),
        node("MatMul", ["x", "w"], ["e"], "shared with it"),
    ]
    weights = {
        "sizes": np.array([8, 8], np.int64),
        "q": np.ones((8, 8), np.int8),
        "scale": np.float32(0.1),
        "w": random_array(8, 8),
    }
    outputs = [value(name, FLOAT, None) for name in "abcde"]
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", [value("x", FLOAT, [2, 8])], outputs, tensors)
    data = numpy_helper.from_array(np.ones(2, np.float32), "sparse")
    places = numpy_helper.from_array(np.array([1, 9], np.int64))
    graph.sparse_initializer.append(helper.make_sparse_tensor(data, places, [8, 8]))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    assert reasons(helper.make_model(graph, opset_imports=imports)) == {
        "filled": "weight is one number, repeated (ConstantOfShape)",
        "quantised": "weight is quantised (DequantizeLinear)",
        "sparse": "weight is stored sparse (sparse)",
        "fused": "operator is not factorised (com.microsoft)",
        "shared with it": "weight has other readers (fused)",
    }


def test_weights_that_the_training_information_refers_to_stay():
    model = small_network()
    training = model.training_info.add()
    training.algorithm.node.append(node("Add", ["w2", "w2"], ["w2_new"]))
    training.update_binding.add(key="w2", value="w2_new")
    assert reasons(model) == {
        "conv2": "weight has other readers (the training information refers to it)"
    }
    result = compress(model, Budget(mem=0.99), threads=1)
    assert result.model.training_info == model.training_info


def inner_graph(name: str, weight: str) -> onnx.GraphProto:
    """A body that reads a weight of the graph around it, and one of its own."""
    return helper.make_graph(
        [
            node("MatMul", ["x", weight], [f"{name}_a"], f"{name}_outer"),
            node("MatMul", [f"{name}_a", f"{name}_own"], [f"{name}_y"], f"{name}_inner"),
        ],
        name,
        [],
        [value(f"{name}_y", FLOAT, None)],
        [numpy_helper.from_array(random_array(16, 16, seed=5), f"{name}_own")],
    )


def test_weights_that_bodies_of_if_capture_are_layers_with_all_their_readers():
    nodes = [
        node("MatMul", ["x", "w"], ["m"], "captured"),
        node("MatMul", ["m", "v"], ["n"], "free"),
        node("If", ["c"], ["i"], "choice", then_branch=inner_graph("then", "w"),
             else_branch=inner_graph("else", "w")),
        node("Add", ["n", "i"], ["y"]),
    ]  # fmt: skip
    weights = {"w": random_array(16, 16), "v": random_array(16, 16, seed=2)}
    model = model_of(nodes, weights, {"x": [2, 16]}, ["y"])
    model.graph.input.append(value("c", TensorProto.BOOL, []))
    result = compressed(model, 0.95)
    assert not reasons(model)
    assert {d.layer for d in result.plan.decisions} == {
        "captured",
        "free",
        "choice.then_branch/then_inner",
        "choice.else_branch/else_inner",
    }
    (left,) = [n for n in result.model.graph.node if n.op_type == "If"]
    assert left.output == model.graph.node[2].output


def test_functions_of_the_model_that_hold_layers_are_opened():
    model = small_network()
    body = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(random_array(10, 10))),
        node("MatMul", ["a", "w"], ["b"], "within"),
    ]
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "Twice", ["a"], ["b"], body, imports))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(node("Twice", ["before"], ["logits"], "call", domain="mine"))
    result = compressed(model)
    assert not reasons(model)
    # As the inliner calls the node.
    assert "within__1" in {d.layer for d in result.plan.decisions}
    assert not result.model.functions


def test_sequence_and_optional_outputs_are_compared():
    nodes = [
        node("MatMul", ["x", "w"], ["y"], "m"),
        node("SequenceConstruct", ["y", "y"], ["s"]),
        node("Optional", ["y"], ["o"]),
    ]
    model = model_of(nodes, {"w": random_array(16, 16)}, {"x": [2, 16]}, ["y"], opset=18)
    kind = helper.make_tensor_type_proto(FLOAT, None)
    sequence, optional = (
        helper.make_sequence_type_proto(kind),
        helper.make_optional_type_proto(kind),
    )
    model.graph.output.append(helper.make_value_info("s", sequence))
    model.graph.output.append(helper.make_value_info("o", optional))
    # An optional that holds a tensor is a tensor to onnxruntime.
    assert [o.name for o in compressed(model).report.verification.outputs] == ["y", "s", "o"]


def test_a_sequence_of_several_shapes_and_nan_that_is_meant():
    nodes = [
        node("MatMul", ["x", "w"], ["y"], "m"),
        node("Slice", ["y", "zero", "one", "one"], ["part"]),
        node("SequenceConstruct", ["y", "part"], ["s"]),
        node("Greater", ["y", "none"], ["above"]),
        node("Where", ["above", "y", "nan"], ["z"]),
    ]
    weights = {
        "w": random_array(16, 16), "zero": np.array([0]), "one": np.array([1]),
        "none": np.float32(0), "nan": np.float32(np.nan),
    }  # fmt: skip
    model = model_of(nodes, weights, {"x": [2, 16]}, ["z"], opset=18)
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    model.graph.output.append(helper.make_value_info("s", sequence))
    assert [o.name for o in compressed(model).report.verification.outputs] == ["z", "s"]


def test_nodes_without_names_and_unused_weights():
    model = small_network()
    for item in model.graph.node:
        item.name = ""
    model.graph.initializer.append(numpy_helper.from_array(random_array(600), "nobody reads me"))
    result = compressed(model)
    assert [layer.name for layer in find_layers(model).layers] == ["Conv_0", "Conv_2", "Gemm_6"]
    assert "nobody reads me" in {t.name for t in result.model.graph.initializer}


def test_products_alone_with_a_symbolic_sequence():
    nodes = [
        node("MatMul", ["x", "q"], ["a"], "query"),
        node("MatMul", ["x", "k"], ["b"], "key"),
        node("Transpose", ["b"], ["bt"], perm=[0, 2, 1]),
        node("MatMul", ["a", "bt"], ["scores"], "scores"),
        node("Softmax", ["scores"], ["p"], axis=-1),
        node("MatMul", ["p", "x"], ["mixed"], "mix"),
        node("MatMul", ["mixed", "o"], ["y"], "out"),
    ]
    weights = {name: random_array(32, 32, seed=i) / 6 for i, name in enumerate("qko")}
    model = model_of(nodes, weights, {"x": ["batch", "sequence", 32]}, ["y"])
    result = compressed(model, 0.6)
    assert {item.name for item in find_layers(model).skipped} == {"scores", "mix"}
    assert result.model.graph.output == model.graph.output
    listed = {"-node", "+node", "-initializer", "+initializer"}
    assert {line.split()[0] for line in differences(model, result.model)} == listed


def test_old_models_with_weights_among_the_inputs_are_warned_about():
    nodes = [node("MatMul", ["x", "w"], ["y"], "m")]
    model = model_of(
        nodes, {"w": random_array(16, 16)}, {"x": [2, 16]}, ["y"], opset=7, ir_version=3
    )
    result = compressed(model)
    assert any("also listed as graph inputs" in note for note in result.report.notes)
    stored = {tensor.name for tensor in result.model.graph.initializer}
    assert stored <= {item.name for item in result.model.graph.input}


def test_transposed_convolutions_are_factorised_without_data_and_with_it():
    nodes = [
        node("Conv", ["x", "w"], ["a"], "down", strides=[2, 2]),
        node("Relu", ["a"], ["r"]),
        node("ConvTranspose", ["r", "v", "b"], ["y"], "up", strides=[2, 2], output_padding=[1, 1]),
    ]
    weights = {
        "w": random_array(16, 8, 3, 3),
        "v": random_array(16, 8, 3, 3, seed=1),
        "b": random_array(8),
    }
    model = model_of(nodes, weights, {"x": [4, 8, 9, 9]}, ["y"])
    result = compressed(model, 0.5)
    assert {d.layer for d in result.plan.decisions if d.scheme} == {"down", "up"}
    data = {"x": random_array(40, 8, 9, 9, seed=3)}
    seen = compress(model, Budget(mem=0.5), data=data, batch=4, threads=1)
    assert "up" in {layer.name for layer in seen.report.layers if layer.scheme}
    assert seen.report.budget["mem"].reached <= 0.5


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (np.zeros((8, 6), np.float32), "all samples are zeros"),
        (np.ones((8, 6), np.float32), "all samples are the same"),
        (random_array(3, 6), "only 3 different samples"),
        (random_array(8, 6), ""),
    ],
)
def test_samples_that_tell_nothing_are_noted(data, note):
    nodes = [
        node("MatMul", ["x", "v"], ["a"], "one"),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "w"], ["y"], "two"),
    ]
    weights = {"v": random_array(6, 30), "w": random_array(30, 20, seed=2)}
    model = model_of(nodes, weights, {"x": ["N", 6]}, ["y"])
    result = compress(model, Budget(mem=0.6), data={"x": data}, threads=1)
    found = [text for text in result.report.notes if "too little to judge by" in text]
    assert bool(found) == bool(note)
    assert note in "".join(found)
