import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx import Budget, compare, compress, inspect
from cobla_onnx.graph.foldable import foldable_nodes
from cobla_onnx.graph.macs import infer_shapes, node_macs
from cobla_onnx.plan import Decision, Plan
from tests.builders import model_of, random_array

BINARY, UNARY = ("MatMul", "Add"), ("Relu", "Transpose", "Identity")


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Square products and sums of two inputs and three weights, all results handed out."""
    names = ["x", "z", "a", "b", "c"]
    nodes = []
    for index in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(BINARY + UNARY))
        read = [draw(st.sampled_from(names)) for _ in range(2 if op in BINARY else 1)]
        nodes.append(helper.make_node(op, read, [f"t{index}"], f"n{index}"))
        names.append(f"t{index}")
    weights = {name: random_array(6, 6, seed=i) for i, name in enumerate("abc")}
    made = [node.output[0] for node in nodes]
    return model_of(nodes, weights, {"x": [6, 6], "z": [6, 6]}, made)


@settings(max_examples=60)
@given(graphs())
def test_as_many_products_have_macs_as_onnxruntime_leaves_to_a_run(tmp_path_factory, model):
    written = tmp_path_factory.mktemp("graph") / "folded.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    options.optimized_model_filepath = str(written)
    # What is computed two times is another optimisation.
    off = ["CommonSubexpressionElimination"]
    ort.InferenceSession(model.SerializeToString(), options, disabled_optimizers=off)
    left = {n.name for n in onnx.load(written).graph.node if n.op_type == "MatMul"}
    macs, unknown = node_macs(model, infer_shapes(model, {}))
    counted = {n.name for i, n in enumerate(model.graph.node) if macs.get(i)}
    assert (counted, unknown) == (left, [])


@pytest.mark.parametrize(
    ("node", "folded"),
    [
        (helper.make_node("Relu", ["a"], ["t"]), True),
        (helper.make_node("RandomNormalLike", ["a"], ["t"]), False),
        (helper.make_node("DequantizeLinear", ["q", "s"], ["t"]), False),
        (helper.make_node("Relu", ["x"], ["t"]), False),
    ],
)
def test_what_follows_from_constants_alone_and_what_does_not(node, folded):
    product = helper.make_node("MatMul", ["t", "t"], ["p"])
    last = helper.make_node("Add", ["p", "x"], ["y"])
    weights = {"a": random_array(6, 6), "s": np.float32(0.1), "q": np.ones((6, 6), np.int8)}
    model = model_of([node, product, last], weights, {"x": [6, 6]}, ["y"])
    assert foldable_nodes(model) == ({0, 1} if folded else set())
    model.graph.node[0].domain = "com.example"
    assert foldable_nodes(model) == set()


@pytest.mark.parametrize(("ir_version", "folded"), [(3, {0}), (8, set())])
def test_a_weight_that_a_run_may_replace_is_no_constant(ir_version, folded):
    nodes = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Add", ["t", "x"], ["y"])]
    model = model_of(
        nodes, {"a": random_array(6, 6)}, {"x": [6, 6]}, ["y"], ir_version=ir_version, opset=8
    )
    if ir_version == 8:
        model.graph.input.add().CopyFrom(
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [6, 6])
        )
    assert foldable_nodes(model) == folded


def test_a_body_folds_its_own_constants():
    held = numpy_helper.from_array(random_array(6, 6), "held")
    nodes = [
        helper.make_node("MatMul", ["held", "w"], ["p"]),
        helper.make_node("MatMul", ["p", "x"], ["b"]),
    ]
    made = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph(nodes, "branch", [], [made], [held])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["o"])],
        "other",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    choice = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=other)
    model = model_of([choice], {"w": random_array(6, 6)}, {"x": [6, 6]}, ["y"])
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    assert foldable_nodes(model) == {2}
    assert node_macs(model, infer_shapes(model, {}))[0] == {2: 0, 3: 216}


def test_what_one_branch_stores_another_may_compute_under_the_same_name():
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    product = helper.make_node("MatMul", ["w", "w"], ["o"])
    stores, computes = (
        helper.make_graph([*nodes, product], "branch", [], [out])
        for nodes in ([], [helper.make_node("Exp", ["x"], ["w"])])
    )
    stores.initializer.append(numpy_helper.from_array(random_array(6, 6), "w"))
    choice = helper.make_node("If", ["c"], ["y"], then_branch=stores, else_branch=computes)
    model = model_of([choice], {}, {"x": [6, 6]}, ["y"])
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    onnx.checker.check_model(model)
    assert foldable_nodes(model) == set()


def with_constant_data(opset: int = 17) -> onnx.ModelProto:
    """A table made by a layer whose data is constant, as of positions, and a layer that reads x."""
    nodes = [
        helper.make_node("Relu", ["positions"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["table"], "of constants"),
        helper.make_node("MatMul", ["x", "v"], ["h"], "of data"),
        helper.make_node("Add", ["h", "table"], ["y"]),
    ]
    names = {"positions": random_array(1, 64), "w": random_array(64, 64), "v": random_array(64, 64)}
    return model_of(nodes, names, {"x": ["n", 64]}, ["y"], opset=opset)


@pytest.mark.parametrize("opset", [8, 17])
def test_a_layer_that_is_folded_has_no_macs_before_or_after(opset, tmp_path):
    model = with_constant_data(opset)
    onnx.save(model, tmp_path / "in.onnx")
    found = inspect(tmp_path / "in.onnx")
    assert found.mac_total == 64 * 64
    result = compress(model, Budget(mem=0.6))
    assert compare(model, result.model).second.macs == result.report.budget["mac"].after


def test_compare_counts_the_macs_of_a_folded_plan_as_its_report_does():
    weight = random_array(64, 8) @ random_array(8, 64, seed=1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")]
    model = model_of(nodes, {"w": weight}, {"x": ["n", 64]}, ["y"])
    result = compress(model, plan=Plan((Decision("layer", "matrix", 40, folded=True),)))
    found = compare(model, result.model)
    assert found.second.macs == result.report.budget["mac"].after == found.first.macs == 64 * 64
