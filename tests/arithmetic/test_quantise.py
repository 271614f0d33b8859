"""Nodes that compute in 8 bits: exactly which pairs are put where, and how near the result is."""

from __future__ import annotations

import shlex
import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx.arithmetic import saturation
from cobla_onnx.arithmetic.nodes import (
    carried_nodes,
    dynamic_nodes,
    require_opset,
    weighted_nodes,
    with_stored_weights,
)
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.arithmetic.quantise import quantised, quantised_at_run_time
from cobla_onnx.arithmetic.ranges import (
    METHODS,
    calibrated,
    stand_in_ranges,
    with_common_ranges,
)
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.order import is_sorted
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import differences, model_of, random_array, small_network


def batches(model: onnx.ModelProto, count: int = 3) -> list[dict[str, np.ndarray]]:
    (value,) = model.graph.input
    sizes = [dim.dim_value or 4 for dim in value.type.tensor_type.shape.dim]
    return [{value.name: random_array(*sizes, seed=seed)} for seed in range(count)]


def in_eight_bits(model, places=None, method="min-max"):
    weighted = weighted_nodes(model) if places is None else places
    prepared = prepare(model)
    ranges = calibrated(prepared, batches(model), method)
    return quantised(prepared, ranges, (*weighted, *carried_nodes(model, weighted)))


def test_every_pair_stands_where_it_belongs_and_the_rest_is_as_it_was():
    model = small_network()
    before = model.SerializeToString()
    result = in_eight_bits(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result)
    assert is_sorted(result.graph)
    kinds = [node.op_type for node in result.graph.node]
    # The ReLUs are in the ranges of what they follow.
    assert [k for k in kinds if "Linear" not in k] == [
        "Conv",
        "Conv",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    ]
    assert kinds.count("QuantizeLinear") == 6
    kept = {node.name: node for node in result.graph.node}
    assert kept["conv1"].doc_string == "node documentation"
    assert kept["conv2"].metadata_props[0].value == "features.2"
    assert not [d for d in differences(model, result) if d.startswith("model.")]
    # What was said about a tensor that is in no file any more is left out.
    assert not result.graph.quantization_annotation
    assert not {value.name for value in result.graph.value_info}
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    assert {stored[f"w{i}_quantized"].data_type for i in (1, 2, 3)} == {TensorProto.INT8}
    assert list(stored["w2_scale"].dims) == [24]
    assert {stored[f"b{i}_quantized"].data_type for i in (1, 3)} == {TensorProto.INT32}
    assert not {"w1", "w2", "w3"} & set(stored)
    assert stored_bytes(result) < 0.3 * stored_bytes(model) + 600


def test_only_the_nodes_that_are_named_compute_in_eight_bits():
    model = small_network()
    result = in_eight_bits(model, places=(2,))
    stored = {tensor.name for tensor in result.graph.initializer}
    assert {"w1", "b1", "w2_quantized", "w3", "b3"} <= stored
    assert "w2" not in stored
    fed = {name for node in result.graph.node for name in node.input if node.name == "conv1"}
    assert fed == {"x", "w1", "b1"}


@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_near_by_every_method(method):
    model = small_network()
    result = in_eight_bits(model, method=method)
    (feeds,) = batches(model, 1)
    (expected,) = run_session(open_session(model, 1), feeds).values()
    (found,) = run_session(open_session(result, 1, optimized=True), feeds).values()
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_the_same_ranges_come_from_one_batch_or_many():
    """Batches are handed over one by one; only their samples count."""
    model = small_network()
    prepared = prepare(model)
    parts = batches(model, 4)
    whole = [{"x": np.concatenate([part["x"] for part in parts])}]
    ways = [calibrated(prepared, given, "min-max") for given in (parts, whole)]
    first, second = ({k: v.range_value for k, v in way.items()} for way in ways)
    assert first.keys() == second.keys() >= {"x", "y1", "r2", "logits"}
    for name, (low, high) in first.items():
        np.testing.assert_allclose([low, high], second[name], rtol=1e-5)
    assert first["r1"][0] >= 0


@pytest.mark.parametrize("method", METHODS)
def test_values_too_far_apart_have_no_histogram(method):
    nodes = [
        helper.make_node("Mul", ["x", "lowest"], ["far"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    lowest = np.array(np.finfo(np.float32).min, np.float32)
    model = model_of(
        nodes, {"w": random_array(4, 4), "lowest": lowest}, {"x": [2, 4]}, ["y", "far"]
    )
    feeds = [{"x": np.full((2, 4), sign, np.float32)} for sign in (0.9, -0.9)]
    found = calibrated(prepare(model), feeds, method)
    assert (found is None) == (method != "min-max")
    assert calibrated(prepare(model), feeds, method, ["MatMul"]) is not None


def test_a_range_without_meaning_has_the_same_nodes_and_bytes():
    model = small_network()
    prepared = prepare(model)
    nodes = (*weighted_nodes(model), *carried_nodes(model, weighted_nodes(model)))
    stand_in = quantised(prepared, stand_in_ranges(prepared), nodes)
    real = in_eight_bits(model)
    assert stored_bytes(stand_in) == stored_bytes(real)
    assert [n.op_type for n in stand_in.graph.node] == [n.op_type for n in real.graph.node]


def test_seven_bits_leave_room_for_sums():
    model = small_network()
    prepared = prepare(model)
    ranges = stand_in_ranges(prepared)
    for reduced, most in ((False, 127), (True, 64)):
        result = quantised(prepared, ranges, weighted_nodes(model), reduced=reduced)
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.graph.initializer}
        assert np.abs(stored["w2_quantized"].astype(int)).max() == most


def test_nodes_without_names_and_with_the_same_ones_are_told_apart():
    model = small_network()
    model.graph.node[0].name = model.graph.node[1].name = ""
    model.graph.node[2].name = "fc"
    result = in_eight_bits(model, places=(0, 6))
    stored = {tensor.name for tensor in result.graph.initializer}
    assert {"w1_quantized", "w2", "w3_quantized"} <= stored
    names = [node.name for node in result.graph.node if node.op_type in ("Conv", "Gemm")]
    assert names == ["", "fc", ""]


def test_a_tensor_that_is_kept_is_there_afterwards():
    model = small_network()
    wanted = helper.make_tensor_value_info("y1", TensorProto.FLOAT, None)
    prepared = prepare(model, [wanted])
    ranges = calibrated(prepared, batches(model), "min-max")
    nodes = (*weighted_nodes(model), *carried_nodes(model, weighted_nodes(model)))
    result = quantised(prepared, ranges, nodes)
    assert any("y1" in node.output for node in result.graph.node)
    assert [value.name for value in result.graph.output] == ["logits"]
    assert "y1" not in {o for n in in_eight_bits(model).graph.node for o in n.output}


def products(*, decoded: bool = False, elem_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x w1, then the sum with a bias, a sigmoid, w2; also the product of two activations."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Add", ["a", "b"], ["s"], "sum"),
        helper.make_node("Sigmoid", ["s"], ["g"], "gate"),
        helper.make_node("MatMul", ["g", "w2"], ["c"], "second"),
        helper.make_node("MatMul", ["c", "c"], ["y"], "square"),
    ]
    dtype = "float32" if elem_type == TensorProto.FLOAT else "float16"
    weights = {
        "w1": random_array(6, 6, seed=1, dtype=dtype),
        "b": random_array(6, seed=2, dtype=dtype),
        "w2": random_array(6, 6, seed=3, dtype=dtype),
    }
    if decoded:
        nodes.insert(0, helper.make_node("Identity", ["w1"], ["w"], "decode"))
        nodes[1].input[1] = "w"
    return model_of(nodes, weights, {"x": [6, 6]}, ["y"], elem_type=elem_type)


def test_what_has_a_stored_weight_in_single_precision_can_compute_in_eight_bits():
    assert weighted_nodes(products()) == (0, 3)
    assert weighted_nodes(products(decoded=True)) == (4,)
    assert weighted_nodes(products(elem_type=TensorProto.FLOAT16)) == ()


def test_weights_in_constant_nodes_are_stored_as_others_are():
    model = small_network()
    assert with_stored_weights(model) is model
    (weight,) = (t for t in model.graph.initializer if t.name == "w2")
    node = helper.make_node("Constant", [], ["w2"], "constant", value=weight)
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, node)
    assert len(weighted_nodes(model)) == 2
    stored = with_stored_weights(model)
    assert len(weighted_nodes(stored)) == 3
    assert stored_bytes(stored) == stored_bytes(model)
    (feeds,) = batches(model, 1)
    before, after = (run_session(open_session(m, 1), feeds)["logits"] for m in (model, stored))
    np.testing.assert_array_equal(before, after)
    assert "constant" in {node.name for node in model.graph.node}


def test_a_node_goes_along_only_between_others():
    # The sum is read by a sigmoid alone, which computes in floating point.
    assert carried_nodes(products(), (0, 3)) == ()
    model = products()
    model.graph.node[2].op_type = "Relu"
    assert carried_nodes(model, (0, 3)) == (1, 2)
    assert carried_nodes(model, (3,)) == ()
    network = small_network()
    assert carried_nodes(network, (0, 2, 6)) == (1, 3, 4, 5)
    assert carried_nodes(network, (0, 2)) == (1,)


def test_a_shortcut_without_weights_stays_in_eight_bits():
    """As in residual networks that halve the picture: every other pixel, padded channels, a sum."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first"),
        helper.make_node("Slice", ["a", "starts", "ends", "axes", "steps"], ["s"], "half"),
        helper.make_node("Pad", ["s", "pads"], ["p"], "channels"),
        helper.make_node("Conv", ["a", "v"], ["b"], "second", strides=[2, 2]),
        helper.make_node("Add", ["b", "p"], ["c"], "sum"),
        helper.make_node("Conv", ["c", "u"], ["y"], "third"),
    ]
    weights = {
        "w": random_array(4, 3, 1, 1, seed=1),
        "v": random_array(8, 4, 1, 1, seed=2),
        "u": random_array(2, 8, 1, 1, seed=3),
        "starts": np.array([0, 0]),
        "ends": np.array([8, 8]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
        "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
    }
    model = model_of(nodes, weights, {"x": [1, 3, 8, 8]}, ["y"])
    assert carried_nodes(model, weighted_nodes(model)) == (1, 2, 4)
    result = in_eight_bits(model)
    (feeds,) = batches(model, 1)
    expected, found = (
        run_session(open_session(m, 1, optimized=True), feeds)["y"] for m in (model, result)
    )
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def branches(read_twice: bool) -> onnx.ModelProto:
    """Two convolutions side by side, the second ten times as large, joined and dropped out."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one"),
        helper.make_node("Conv", ["x", "v"], ["b"], "two"),
        helper.make_node("Concat", ["a", "b"], ["c"], "join", axis=1),
        helper.make_node("Dropout", ["c"], ["d"], "drop"),
        helper.make_node("Conv", ["d", "u"], ["y"], "last"),
        *[helper.make_node("Conv", ["a", "t"], ["z"], "again")] * read_twice,
    ]
    weights = {
        "w": random_array(4, 3, 1, 1, seed=1),
        "v": 10 * random_array(4, 3, 1, 1, seed=2),
        "u": random_array(2, 8, 1, 1, seed=3),
    }
    if read_twice:
        weights["t"] = random_array(2, 4, 1, 1, seed=4)
    return model_of(nodes, weights, {"x": [1, 3, 8, 8]}, ["y", "z"][: 1 + read_twice])


def test_what_is_only_moved_is_rounded_once():
    """Or it would be rounded to the scale of one branch, and again to that of both together."""
    for read_twice in (False, True):
        model = branches(read_twice)
        assert carried_nodes(model, weighted_nodes(model)) == (2, 3)
        result = in_eight_bits(model)
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.graph.initializer}
        scales = {name: float(stored[f"{name}_scale"]) for name in "abcd"}
        assert scales["b"] == scales["c"] == scales["d"]
        # What another node reads keeps the range that is its own.
        assert scales["a"] < 0.5 * scales["b"] if read_twice else scales["a"] == scales["b"]
        (feeds,) = batches(model, 1)
        expected, found = (
            run_session(open_session(m, 1, optimized=True), feeds) for m in (model, result)
        )
        for name in expected:
            error = np.abs(found[name] - expected[name]).max()
            assert error < 0.1 * np.abs(expected[name]).max()


@pytest.mark.parametrize("method", METHODS)
def test_common_ranges_hold_what_each_of_them_held(method):
    model = branches(False)
    prepared = prepare(model)
    before = calibrated(prepared, batches(model), method)
    after = with_common_ranges(before, prepared.model, (0, 1, 2, 3, 4))
    lowest, highest = after["c"].range_value
    for name in "abcd":
        assert after[name].range_value == (lowest, highest)
        assert lowest <= before[name].range_value[0]
        assert highest >= before[name].range_value[1]
    for name in ("x", "y"):
        assert after[name].range_value == before[name].range_value
    assert with_common_ranges(before, prepared.model, (0, 1, 4))["a"] is before["a"]
    # A body reads what is around it by its name.
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["inner"])], "body", [],
        [onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )  # fmt: skip
    bodies = {"then_branch": body, "else_branch": body}
    prepared.model.graph.node.append(onnx.helper.make_node("If", ["c"], ["more"], **bodies))
    again = with_common_ranges(before, prepared.model, (0, 1, 2, 3, 4))
    assert again["a"] is before["a"]
    assert again["b"].range_value == again["c"].range_value


def perceptron(**attributes) -> onnx.ModelProto:
    """A product, two plain Gemms, the second with a transposed weight, and a product of inputs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "v", "b"], ["c"], "two"),
        helper.make_node("Gemm", ["c", "u"], ["d"], "three", transB=1, **attributes),
        helper.make_node("Transpose", ["d"], ["t"], "turn"),
        helper.make_node("MatMul", ["d", "t"], ["y"], "inner"),
    ]
    weights = {
        "w": random_array(6, 8, seed=1),
        "v": random_array(8, 8, seed=2),
        "b": random_array(8, seed=3),
        "u": random_array(5, 8, seed=4),
    }
    return model_of(nodes, weights, {"x": [4, 6]}, ["y"])


def test_matrix_products_take_the_range_of_each_run():
    model = perceptron()
    weighted = weighted_nodes(model)
    assert dynamic_nodes(model, weighted) == weighted == (0, 2, 3)
    before = model.SerializeToString()
    result = quantised_at_run_time(prepare(model), weighted)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result)
    assert is_sorted(result.graph)
    kinds = [node.op_type for node in result.graph.node]
    assert kinds.count("MatMulInteger") == 3
    # The product of two activations.
    assert kinds.count("MatMul") == 1
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    assert stored["w_quantized"].data_type == TensorProto.INT8
    assert list(stored["w_scale"].dims) == [8]
    assert not {"w", "v", "u"} & set(stored)
    # However large a run's numbers are: no range is stored.
    for scale in (1e-3, 1.0, 1e3):
        feeds = {"x": (scale * random_array(4, 6)).astype(np.float32)}
        expected, found = (run_session(open_session(m, 1), feeds)["y"] for m in (model, result))
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_what_is_no_chain_of_plain_products_has_ranges_of_samples():
    for model in (small_network(), perceptron(alpha=2.0), perceptron(transA=1)):
        assert dynamic_nodes(model, weighted_nodes(model)) == ()
    # A Gemm that stays in floating point would be written out as well.
    assert dynamic_nodes(perceptron(), (0,)) == ()
    assert dynamic_nodes(perceptron(), ()) == ()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 9), st.integers(1, 9))
def test_rounding_of_a_product_stays_within_half_steps(seed, inputs, outputs):
    """Of input, weight and output: what 8 bits lose is bounded, whatever the numbers."""
    weight, x = random_array(inputs, outputs, seed=seed), random_array(5, inputs, seed=seed + 1)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    model = model_of([node], {"w": weight}, {"x": [5, inputs]}, ["y"])
    prepared = prepare(model)
    result = quantised(prepared, calibrated(prepared, [{"x": x}], "min-max"), (0,))
    (found,) = run_session(open_session(result, 1), {"x": x}).values()
    steps = np.ptp(np.append(x, 0)) / 255, np.abs(weight).max(axis=0) / 127
    lost = steps[0] / 2 * np.abs(weight).sum(axis=0) + steps[1] / 2 * np.abs(x).sum(axis=1)[:, None]
    lost = lost + inputs * steps[0] * steps[1] / 4 + np.ptp(np.append(x @ weight, 0)) / 255
    assert (np.abs(found - x @ weight) <= 1.01 * lost + 1e-5).all()


def test_old_opsets_are_refused_with_a_command_that_lifts_them(tmp_path):
    model = small_network()
    require_opset(model)
    model.opset_import[0].version = 12
    with pytest.raises(ModelError, match=r"opset 12.*from 13 on.*LIFTED") as caught:
        require_opset(model)
    onnx.save(model, tmp_path / "IN.onnx")
    python, *command = shlex.split(caught.value.in_flags().split("lift it by ")[1])
    assert python == "python"
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
    require_opset(onnx.load(tmp_path / "LIFTED.onnx"))


def test_a_processor_whose_sums_stop_at_sixteen_bits_is_seen(monkeypatch):
    """Its name is not asked: the sum of the largest products is, as it comes out."""
    monkeypatch.setattr(saturation, "open_session", lambda *args, **options: None)
    for value, saturated in ((100, False), (51, True)):
        sums = {"y": np.full((1, 64, 8, 8), value, np.uint8)}
        monkeypatch.setattr(saturation, "run_session", lambda *args, sums=sums: sums)
        assert saturation.sums_saturate.__wrapped__() is saturated


def test_the_largest_sums_are_right_or_stop_at_sixteen_bits():
    """Two products of 255 and 127 are 64770; in 16 bits with a sign there is room for 32767."""
    model = saturation._largest_sums()
    (found,) = run_session(open_session(model, 1), saturation._inputs()).values()
    assert set(np.unique(found)) <= ({51} if saturation.sums_saturate() else {100})
