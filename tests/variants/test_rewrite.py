"""Only the factorised nodes change; what they compute does not."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.errors import ModelError, VerificationError
from cobla_onnx.graph.layers import Layer, find_layers, read_weight
from cobla_onnx.graph.macs import fixed_input_shapes
from cobla_onnx.pipeline.verification import verify
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import BIAS, rewrite, rewrite_named
from tests.builders import FLOAT, differences, model_of, random_array, small_network


def replacement(model: onnx.ModelProto, layer: Layer, rank: int) -> Replacement:
    scheme = schemes_for(layer)[-1]
    return make_replacement(
        layer, scheme, factorize(scheme.matrix(read_weight(model, layer)), rank)
    )


def replacements_of(model: onnx.ModelProto, *names: str, rank: int = 2) -> list[Replacement]:
    return [
        replacement(model, layer, rank)
        for layer in find_layers(model).layers
        if not names or layer.name in names
    ]


def test_nothing_but_the_factorised_node_changes():
    model = small_network()
    before = model.SerializeToString(deterministic=True)
    result = rewrite(model, replacements_of(model, "conv2"))
    assert model.SerializeToString(deterministic=True) == before
    assert differences(model, result) == [
        "-node conv2",
        "+node conv2/first_factor",
        "+node conv2",
        "-initializer w2",
        "+initializer conv2/first_factor",
        "+initializer conv2/second_factor",
    ]
    names = [node.name for node in result.graph.node]
    assert names.index("conv2/first_factor") + 1 == names.index("conv2")
    (kept,) = [node for node in result.graph.node if node.name == "conv2"]
    assert kept.metadata_props == model.graph.node[2].metadata_props
    assert list(kept.output) == ["y2"]


def test_what_is_stored_is_told_by_its_names():
    model = small_network()
    first, second = replacements_of(model, "conv1", "conv2")
    first = first.with_parts({}, random_array(16, seed=9))
    result, stored = rewrite_named(model, [first, second])
    tensors = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    for each, names in zip((first, second), stored, strict=True):
        wanted = dict(each.arrays) | ({} if each.bias is None else {BIAS: each.bias})
        assert names.keys() == wanted.keys()
        for part, array in wanted.items():
            np.testing.assert_array_equal(tensors[names[part]], array)


def test_other_values_are_stored_in_the_same_types():
    (made,) = replacements_of(small_network(), "conv2")
    part, array = next(iter(made.learnable.items()))
    other = made.with_parts({part: array.astype(np.float64) + 1e-3}, None)
    assert other.arrays[part].dtype == array.dtype
    np.testing.assert_array_equal(other.arrays[part], (array.astype(np.float64) + 1e-3).astype("f"))
    assert np.abs(other.dense() - made.dense()).max() > 0
    assert other.bias is made.bias is None
    with pytest.raises(ModelError, match="overflows float32"):
        made.with_parts({part: np.full(array.shape, 1e300)}, None)


def test_no_layer_chosen_gives_identical_bytes():
    model = small_network()
    assert rewrite(model, []).SerializeToString() == model.SerializeToString()


def test_fields_unknown_to_this_onnx_are_kept():
    content = small_network().SerializeToString() + b"\xfa\x3e\x03abc"
    model = onnx.ModelProto.FromString(content)
    result = rewrite(model, replacements_of(model, "fc"))
    assert b"\xfa\x3e\x03abc" in result.SerializeToString()


def test_old_models_list_their_new_weights_as_inputs():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")]
    weights = {"w": random_array(8, 8)}
    model = model_of(nodes, weights, {"x": [2, 8]}, ["y"], opset=7, ir_version=3)
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    onnx.checker.check_model(result)
    assert [v.name for v in result.graph.input] == [
        "x",
        "matmul/first_factor",
        "matmul/second_factor",
    ]
    verify(model, result, replacements, fixed_input_shapes(model, {}))


def test_names_are_unique_even_where_ours_are_taken():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m/lowrank"], "m"),
        helper.make_node("Relu", ["m/lowrank"], ["m/first_factor"], "m/first_factor"),
        helper.make_node("MatMul", ["m/first_factor", "v"], ["y"]),
    ]
    weights = {"w": random_array(6, 6), "v": random_array(6, 6, seed=1)}
    model = model_of(nodes, weights, {"x": [2, 6]}, ["y"])
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    onnx.checker.check_model(result, full_check=True)
    verify(model, result, replacements, fixed_input_shapes(model, {}))


def test_a_shared_cast_and_transposed_weight_stays_shared_and_narrow():
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=FLOAT),
        helper.make_node("Transpose", ["w32"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["a"], "one"),
        helper.make_node("MatMul", ["a", "t"], ["y"], "two"),
    ]
    model = model_of(nodes, {"w": random_array(8, 8, dtype="float16")}, {"x": [2, 8]}, ["y"])
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    onnx.checker.check_model(result, full_check=True)
    assert [node.op_type for node in result.graph.node] == ["Cast", "Cast"] + ["MatMul"] * 4
    assert [t.data_type for t in result.graph.initializer] == [TensorProto.FLOAT16] * 2
    verify(model, result, replacements, fixed_input_shapes(model, {}))


def test_many_uses_of_one_weight_and_one_input_are_quiet(capfd):
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"], f"m{i}") for i in range(3)]
    model = model_of(nodes, {"w": random_array(8, 8)}, {"x": [2, 8]}, ["y0", "y1", "y2"])
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    onnx.checker.check_model(result, full_check=True)
    verify(model, result, replacements, fixed_input_shapes(model, {}))
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_constant_node_that_nobody_reads_any_more_goes():
    value = onnx.numpy_helper.from_array(random_array(8, 8))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("MatMul", ["x", "c"], ["y"], "matmul"),
    ]
    model = model_of(nodes, {}, {"x": [2, 8]}, ["y"])
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    assert [node.op_type for node in result.graph.node] == ["MatMul", "MatMul"]
    verify(model, result, replacements, fixed_input_shapes(model, {}))


def test_a_factor_that_overflows_its_type_is_refused():
    weight = (random_array(4, 4, dtype="float64") * 1e30).astype(np.float32)
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")], {"w": weight}, {"x": [2, 4]}, ["y"]
    )
    (layer,) = find_layers(model).layers
    object.__setattr__(layer, "stored_type", TensorProto.FLOAT16)
    with pytest.raises(ModelError, match="overflows float16"):
        replacement(model, layer, 2)


def scale(model: onnx.ModelProto, name: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def poison(model: onnx.ModelProto, name: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.flat[0] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def flip(model: onnx.ModelProto, name: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array[..., ::-1].copy(), name))


def drop_bias(model: onnx.ModelProto, name: str) -> None:
    for node in model.graph.node:
        if node.name == name:
            del node.input[2:]


def rewire(model: onnx.ModelProto, name: str) -> None:
    for node in model.graph.node:
        if node.name == name:
            node.input[0] = "y1"


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (scale, "conv2/first_factor"),
        (scale, "fc/second_factor"),
        (poison, "conv1/second_factor"),
        (flip, "conv1/first_factor"),
        (flip, "fc/first_factor"),
        (drop_bias, "fc"),
        (drop_bias, "conv1"),
        (rewire, "conv2/first_factor"),
        (scale, "b3"),
    ],
)
def test_verification_catches_injected_faults(fault, name):
    model = small_network()
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    shapes = fixed_input_shapes(model, {})
    verify(model, result, replacements, shapes)
    broken = copy.deepcopy(result)
    fault(broken, name)
    assert broken != result
    with pytest.raises(VerificationError):
        verify(model, broken, replacements, shapes)


def test_verification_catches_swapped_factors():
    model = model_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
            helper.make_node("MatMul", ["a", "v"], ["y"], "two"),
        ],
        {"w": random_array(6, 6), "v": random_array(6, 6, seed=1)},
        {"x": ["N", 6]},
        ["y"],
    )
    replacements = replacements_of(model)
    result = rewrite(model, replacements)
    names = {"one/first_factor": "two/first_factor", "two/first_factor": "one/first_factor"}
    for tensor in result.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    with pytest.raises(VerificationError):
        verify(model, result, replacements, fixed_input_shapes(model, {}))
