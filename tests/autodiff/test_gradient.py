"""The whole: registry, losses, what becomes an input, what is blocked, what is prepared."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from cobla_onnx.autodiff.gradient import differentiate, gradient_graph
from cobla_onnx.autodiff.vjp.registry import FLAT, RULES, flat, vjp
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.runtime.session import open_session, run_session
from tests.autodiff.differences import check, normal
from tests.builders import model_of, random_array, small_network

node = helper.make_node

# The operators that the method promises.
PROMISED = (
    "Conv ConvTranspose Gemm MatMul MaxPool AveragePool GlobalAveragePool GlobalMaxPool "
    "BatchNormalization LayerNormalization InstanceNormalization Relu LeakyRelu PRelu Clip "
    "Sigmoid Tanh Erf Gelu HardSigmoid HardSwish Softplus Softmax LogSoftmax Add Sub Mul Div "
    "Sum Mean Pow Sqrt Exp Log Neg Abs Concat Split Slice Pad Reshape Flatten Transpose "
    "Squeeze Unsqueeze Expand Gather ReduceMean ReduceSum Resize Identity Cast Dropout Where "
    "Max Min LRN"
)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run_session(open_session(model, 1, optimized=True), feeds)


def test_promised_operators_have_rules():
    assert [name for name in PROMISED.split() if name not in RULES] == []
    assert not RULES.keys() & FLAT.keys()


def test_a_second_rule_is_an_error():
    with pytest.raises(ValueError, match="Relu has a rule already"):
        vjp("Relu")(lambda g, step: ())
    with pytest.raises(ValueError, match="Sign has a rule already"):
        flat("why", "Sign")


KINDS = ["probabilities", "logits", "mse", "ce-probabilities", "ce-logits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [(), (2, 3)])
def test_losses_are_those_of_calibration(kind, positions):
    shape = (3, 4, *positions)
    y = np.abs(random_array(*shape, seed=1)) + 0.1
    target = np.abs(random_array(*shape, seed=2)) + 0.1
    if kind.startswith("ce"):
        best = target.max(axis=1, keepdims=True)
        target = (target == best).astype(np.float32)
    if kind.endswith("probabilities"):
        y /= y.sum(axis=1, keepdims=True)
        target = target / target.sum(axis=1, keepdims=True)
    model = model_of([node("Identity", ["x"], ["y"])], {}, {"x": list(shape)}, ["y"])
    graph = differentiate(model, {"y": kind}, ["x"])
    feeds = {"x": y, "target/y": target}
    if kind == "mse":
        feeds["power/y"] = np.array(np.square(target).mean())
    results = run(graph.model, feeds)
    expected = sample_losses({"y": kind}, {"y": target}, {"y": y})
    np.testing.assert_allclose(results["loss"], expected, rtol=1e-5)
    step, direction = 1e-6, random_array(*shape, seed=3).astype(float)
    ends = [
        sample_losses({"y": kind}, {"y": target}, {"y": y + s * step * direction}).sum()
        for s in (1, -1)
    ]
    found = (results["gradient/x"] * direction).sum()
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-5)


def test_several_outputs_are_added_up():
    nodes = [node("Identity", ["x"], ["y"]), node("ReduceMean", ["x", "all"], ["z"], keepdims=0)]
    model = model_of(nodes, {"all": np.array([0, 1])}, {"x": [3, 2]}, ["y", "z"], opset=18)
    graph = differentiate(model, {"y": "mse", "z": "mse"}, ["x"])
    x = random_array(3, 2)
    feeds = {"x": x, "target/y": x + 1, "target/z": np.array(0, np.float32)}
    feeds |= {"power/y": np.array(2, np.float32), "power/z": np.array(4, np.float32)}
    results = run(graph.model, feeds)
    # The second counts as one sample of its own, and all have one loss then.
    assert graph.samples == 1
    np.testing.assert_allclose(results["loss"], [0.5 + x.mean() ** 2 / 4], rtol=1e-5)
    expected = 2 * -1 / (2 * 2) / 3 + 2 * x.mean() / 4 / 6
    np.testing.assert_allclose(results["gradient/x"], np.full((3, 2), expected), rtol=1e-4)


def test_weights_may_be_stored_given_or_computed():
    nodes = [
        node("Transpose", ["w"], ["turned"]),
        node("MatMul", ["x", "turned"], ["a"]),
        node("MatMul", ["a", "given"], ["b"]),
        node("Add", ["b", "bias"], ["y"]),
    ]
    weights = {"w": random_array(4, 3), "bias": random_array(2)}
    model = model_of(nodes, weights, {"x": [5, 3], "given": [4, 2]}, ["y"])
    before = model.SerializeToString()
    graph = gradient_graph(model, {"y": "mse"}, ["turned", "given", "bias"])
    assert model.SerializeToString() == before
    onnx.checker.check_model(graph, full_check=True)
    assert {v.name for v in graph.graph.input} == {
        "x",
        "given",
        "turned",
        "bias",
        "target/y",
        "power/y",
    }
    assert not graph.graph.initializer or "w" not in {t.name for t in graph.graph.initializer}
    x, given, target = random_array(5, 3), random_array(4, 2, seed=1), random_array(5, 2, seed=2)
    feeds = {"x": x, "given": given, "turned": weights["w"].T.copy(), "bias": weights["bias"]}
    results = run(graph, {**feeds, "target/y": target, "power/y": np.array(1, np.float32)})
    dy = x @ weights["w"].T @ given + weights["bias"] - target
    np.testing.assert_allclose(results["gradient/bias"], dy.sum(0), rtol=1e-4)
    np.testing.assert_allclose(results["gradient/turned"], x.T @ dy @ given.T, rtol=1e-3)


def test_shared_weights_sum_their_uses():
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    check(nodes, {"x": normal(2, 3), "w": normal(3, 3, seed=1)})


def blocked_model() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("TopK", ["a", "k"], ["top", "index"], "select"),
        node("MatMul", ["a", "w2"], ["b"]),
        node("Add", ["b", "top"], ["c"]),
        node("MatMul", ["c", "w3"], ["y"]),
    ]
    weights = {f"w{i}": random_array(4, 4, seed=i) for i in (1, 2, 3)}
    weights["k"], weights["unused"] = np.array([4]), random_array(2)
    return model_of(nodes, weights, {"x": [2, 4]}, ["y"])


def test_a_weight_behind_an_unknown_operator_is_named():
    model = blocked_model()
    graph = differentiate(model, {"y": "logits"}, ["w1", "w2", "w3", "unused"])
    # Another path leads to w1, but what comes along it alone is not its gradient.
    assert set(graph.gradients) == {"w2", "w3"}
    assert "TopK node 'select'" in graph.blocked["w1"]
    assert graph.blocked["unused"] == "no gradient reaches it"
    with pytest.raises(ModelError, match="'w1': TopK node 'select'"):
        gradient_graph(model, {"y": "logits"}, ["w1", "w2"])
    inputs = [v.name for v in graph.model.graph.input]
    assert inputs == ["x", "w1", "w2", "w3", "unused", "target/y"]


def test_a_subgraph_is_in_the_way():
    branch = [
        helper.make_graph(
            [node(op, ["a"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", 1, [2, 4])],
        )
        for op in ("Relu", "Neg")
    ]
    choose = node("If", ["c"], ["y"], "choose", then_branch=branch[0], else_branch=branch[1])
    nodes = [node("MatMul", ["x", "w"], ["a"]), choose]
    weights = {"w": random_array(4, 4), "c": np.array(True)}
    model = model_of(nodes, weights, {"x": [2, 4]}, ["y"])
    graph = differentiate(model, {"y": "mse"}, ["w"])
    assert "If node 'choose'" in graph.blocked["w"]


@pytest.mark.parametrize(
    ("loss", "weights", "shapes", "message"),
    [
        ({}, ["w1"], {}, "no output has a loss"),
        ({"z": "mse"}, ["w1"], {}, "no output 'z'"),
        ({"logits": "l1"}, ["w1"], {}, "no loss 'l1'"),
        ({"logits": "mse"}, ["nothing"], {}, "'nothing'"),
        ({"logits": "mse"}, ["w1"], {"z": [1]}, "no such input"),
    ],
)
def test_wrong_use_is_told(loss, weights, shapes, message):
    with pytest.raises(UsageError, match=message):
        gradient_graph(small_network(), loss, weights, input_shapes=shapes)


def test_integer_tensors_have_no_gradient():
    with pytest.raises(UsageError, match="not of floating type"):
        differentiate(blocked_model(), {"y": "mse"}, ["k"])


def test_half_precision_and_initializers_listed_as_inputs():
    model = small_network()
    for tensor in model.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
        shape = tensor.dims
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, 10, shape))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    model.ir_version = 3
    half = differentiate(
        model, {"logits": "logits"}, ["w1", "w3"], input_shapes={"x": [2, 3, 12, 12]}
    )
    types = {v.type.tensor_type.elem_type for v in half.model.graph.input}
    assert types == {TensorProto.FLOAT}
    assert not half.blocked
    onnx.checker.check_model(half.model, full_check=True)
    open_session(half.model, 1, optimized=True)


def test_what_nobody_reads_any_more_is_no_input_of_ir_version_3():
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])]
    weights = {"w": random_array(3, 4), "v": random_array(4, 5), "two": np.array(2, np.float32)}
    feeds = {"x": random_array(2, 3), "v": weights["v"]}
    feeds |= {"target/y": np.zeros((2, 5), np.float32), "power/y": np.array(1, np.float32)}
    found = []
    for ir_version in (3, 8):
        model = model_of(nodes, weights, {"x": [2, 3]}, ["y"], opset=18, ir_version=ir_version)
        graph = differentiate(model, {"y": "mse"}, ["v"])
        found.append(run(graph.model, feeds)["gradient/v"])
    assert np.all(found[0] != 0)
    np.testing.assert_array_equal(*found)


def test_functions_are_written_out():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18, "local": 1]>
        g (float[2, 4, 3] x, float[4] scale, float[4] bias) => (float[2, 4, 3] y) {
            a = local.twice(x)
            y = GroupNormalization<num_groups = 2>(a, scale, bias)
        }
        <domain: "local", opset_import: ["": 18]>
        twice (x) => (y) { y = Add(x, x) }""")
    # Of opset 21, where scale and bias have one element for each channel.
    model.opset_import[0].version = 21
    model.functions[0].opset_import[0].version = 21
    graph = differentiate(model, {"y": "mse"}, ["x", "scale"])
    assert not graph.blocked
    open_session(graph.model, 1, optimized=True)


def test_shape_arithmetic_is_folded_and_cut():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        g (float[N, 3, 4] x, float[4, 4] w) => (float[M, K] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] rest = {-1}>
        {
            a = MatMul(x, w)
            s = Shape(a)
            n = Slice(s, zero, one)
            t = Concat<axis = 0>(n, rest)
            y = Reshape(a, t)
        }""")
    graph = differentiate(model, {"y": "mse"}, ["w"], input_shapes={"x": [2, 3, 4]})
    assert not graph.blocked
    assert graph.samples == 2


def test_old_experimental_operators():
    nodes = [
        node("ImageScaler", ["x"], ["a"], scale=0.5, bias=[1.0, 2.0]),
        node("Crop", ["a"], ["b"], border=[1, 0, 0, 1]),
        node("Crop", ["b"], ["c"], border=[0, 1, 0, 0], scale=[2, 3]),
        node("ScaledTanh", ["c"], ["d"], alpha=1.5, beta=0.5),
        node("Affine", ["d"], ["y"], alpha=2.0, beta=1.0),
    ]
    model = model_of(nodes, {}, {"x": [1, 2, 5, 6]}, [], opset=7, ir_version=3)
    model.graph.output.append(helper.make_tensor_value_info("y", 1, None))
    graph = differentiate(model, {"y": "mse"}, ["x"])
    assert not graph.blocked
    x = random_array(1, 2, 5, 6)
    scaled = (0.5 * x + np.array([1, 2]).reshape(1, 2, 1, 1))[:, :, 1:3, 1:4]
    y = 2 * 1.5 * np.tanh(0.5 * scaled) + 1
    feeds = {"x": x, "target/y": np.zeros(y.shape, np.float32)}
    results = run(graph.model, {**feeds, "power/y": np.array(1, np.float32)})
    np.testing.assert_allclose(results["loss"], [np.square(y).mean()], rtol=1e-5)


def test_a_deep_chain_is_no_recursion():
    depth = 3000
    names = ["x", *(f"t{i}" for i in range(depth - 1)), "y"]
    nodes = [node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
    model = model_of(nodes, {}, {"x": [1, 2]}, ["y"])
    assert not differentiate(model, {"y": "mse"}, ["x"]).blocked


def test_names_in_use_are_left_alone():
    nodes = [node("MatMul", ["x", "w"], ["loss"]), node("Neg", ["loss"], ["gradient/w"])]
    weights = {"w": random_array(3, 3)}
    model = model_of(nodes, weights, {"x": [2, 3]}, ["gradient/w"])
    graph = differentiate(model, {"gradient/w": "mse"}, ["w"])
    assert graph.loss == "loss_2"
    assert graph.gradients["w"] == "gradient/w_2"
    onnx.checker.check_model(graph.model, full_check=True)
