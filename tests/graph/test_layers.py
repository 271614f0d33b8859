"""Which nodes are taken, which are not and why, and what they cost."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.holders import bytes_elsewhere
from cobla_onnx.graph.io.model_file import load_model, stored_bytes
from cobla_onnx.graph.layers import Reason, find_layers, read_weight
from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes, node_macs
from cobla_onnx.graph.sizes import tensor_bytes
from tests.builders import FLOAT, model_of, random_array, small_network


def matmul(*inputs: str, output: str = "y", name: str = "matmul") -> onnx.NodeProto:
    return helper.make_node("MatMul", list(inputs), [output], name)


def test_layers_of_a_network():
    inventory = find_layers(small_network())
    assert [layer.name for layer in inventory.layers] == ["conv1", "conv2", "fc"]
    assert [layer.params for layer in inventory.layers] == [432, 3456, 240]
    assert inventory.skipped == ()


def test_weights_are_found_behind_identity_transpose_cast_and_constant():
    weight = random_array(8, 6)
    nodes = [
        helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(weight.astype(np.float16))
        ),
        helper.make_node("Cast", ["c"], ["c32"], to=FLOAT),
        helper.make_node("Identity", ["c32"], ["same"]),
        helper.make_node("Transpose", ["same"], ["t"], perm=[1, 0]),
        matmul("x", "t"),
    ]
    (layer,) = find_layers(model_of(nodes, {}, {"x": [2, 6]}, ["y"])).layers
    assert layer.shape == (6, 8)
    assert (layer.stored_type, layer.type) == (TensorProto.FLOAT16, FLOAT)
    assert layer.uses[0].chain == (1, 2, 3)
    read = read_weight(model_of(nodes, {}, {"x": [2, 6]}, ["y"]), layer)
    np.testing.assert_array_equal(read, weight.astype(np.float16).astype(np.float32).T)


def test_nodes_that_share_a_weight_are_one_layer():
    nodes = [
        matmul("x", "w", output="a", name="first"),
        helper.make_node("Identity", ["w"], ["tied"]),
        matmul("a", "tied", output="y", name="second"),
    ]
    (layer,) = find_layers(model_of(nodes, {"w": random_array(6, 6)}, {"x": [2, 6]}, ["y"])).layers
    assert layer.name == "first"
    assert [use.node for use in layer.uses] == [0, 2]


@pytest.mark.parametrize(
    ("nodes", "weights", "reason"),
    [
        ([matmul("x", "x2")], {}, Reason.NOT_CONSTANT),
        ([matmul("w", "w2")], {"w": (6, 6), "w2": (6, 6)}, Reason.BOTH_CONSTANT),
        ([matmul("x", "w")], {"w": (6,)}, Reason.NOT_A_MATRIX),
        ([matmul("x", "w")], {"w": (6, 0)}, Reason.EMPTY),
        (
            [matmul("x", "w", output="z"), helper.make_node("Add", ["z", "w"], ["y"])],
            {"w": (6, 6)},
            Reason.SHARED,
        ),
        (
            [helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", group=2)],
            {"w": (6, 4, 3, 3)},
            Reason.GROUPED,
        ),
    ],
)
def test_every_node_not_taken_has_a_reason(nodes, weights, reason):
    arrays = {name: random_array(*shape) for name, shape in weights.items()}
    sizes = [1, 6, 9, 9] if nodes[0].op_type.startswith("Conv") else [6, 6]
    inventory = find_layers(model_of(nodes, arrays, {"x": sizes, "x2": [6, 6]}, ["y"]))
    assert inventory.layers == ()
    assert [item.reason for item in inventory.skipped] == [reason]


def test_a_weight_that_is_also_an_output_stays():
    model = model_of([matmul("x", "w")], {"w": random_array(6, 6)}, {"x": [2, 6]}, ["y"])
    model.graph.output.append(helper.make_tensor_value_info("w", FLOAT, [6, 6]))
    assert find_layers(model).skipped[0].reason is Reason.SHARED


def test_a_weight_read_inside_a_subgraph_stays_and_inner_nodes_are_named():
    branch = helper.make_graph(
        [matmul("x", "w", output="inner", name="hidden")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    nodes = [
        matmul("x", "w", output="a", name="outer"),
        helper.make_node("If", ["c"], ["b"], "choice", then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    model = model_of(nodes, {"w": random_array(6, 6)}, {"x": [2, 6]}, ["y"])
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    inventory = find_layers(model)
    assert inventory.layers == ()
    reasons = {item.name: item.reason for item in inventory.skipped}
    assert reasons["outer"] is Reason.SHARED
    # Both branches use the same names, until the model is prepared.
    assert reasons["choice.then_branch/hidden"] is Reason.SUBGRAPH
    assert reasons["choice.else_branch/hidden"] is Reason.SUBGRAPH


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_refused(value):
    weight = random_array(6, 6)
    weight[2, 3] = value
    model = model_of([matmul("x", "w")], {"w": weight}, {"x": [2, 6]}, ["y"])
    with pytest.raises(ModelError, match="'w' of node 'matmul' holds NaN or infinity"):
        read_weight(model, find_layers(model).layers[0])
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([600, 600])
    with pytest.raises(ModelError, match="does not fit its shape"):
        read_weight(model, find_layers(model).layers[0])


def test_macs_count_a_symbolic_batch_as_one():
    model = small_network()
    shapes = infer_shapes(model, fixed_input_shapes(model, {}))
    macs, unknown = node_macs(model, shapes)
    assert not unknown
    assert macs == {0: 432 * 144, 2: 3456 * 36, 6: 240}


def test_input_shapes_must_fit_the_model():
    model = small_network()
    assert fixed_input_shapes(model, {"x": (4, 3, 12, 12)})["x"][0] == 4
    with pytest.raises(UsageError, match="the model declares x:"):
        fixed_input_shapes(model, {"x": (4, 1, 12, 12)})
    with pytest.raises(UsageError, match="no such input; it has x"):
        fixed_input_shapes(model, {"X": (4, 3, 12, 12)})


def test_stored_bytes_agree_with_an_independent_reader():
    model = small_network()
    tensors = gs.import_onnx(model).tensors().values()
    constants = [t for t in tensors if isinstance(t, gs.Constant)]
    assert stored_bytes(model) == sum(t.values.nbytes for t in constants)


def test_weights_in_other_attributes_of_constant_nodes_are_counted():
    model = small_network()
    before = stored_bytes(model)
    values = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    places = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [3], [0, 5, 9])
    sparse = onnx.helper.make_sparse_tensor(values, places, [10])
    made = [
        ({"value_floats": [1.0] * 40}, 160),
        ({"value_floats": [1.0, 2.0]}, 0),
        ({"value_float": 1.0}, 0),
        ({"value_ints": [1] * 40}, 0),
        ({"sparse_value": sparse}, 3 * 4 + 3 * 8),
    ]
    for number, (attribute, size) in enumerate(made):
        model.graph.node.append(
            onnx.helper.make_node("Constant", [], [f"c{number}"], f"c{number}", **attribute)
        )
        assert stored_bytes(model) == before + size
        before += size
    assert sum(bytes_elsewhere(model, []).values()) == before


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint8", "bool", "float16"])
def test_bytes_of_a_tensor_are_those_of_its_array(dtype):
    array = np.ones((3, 5), dtype)
    assert tensor_bytes(numpy_helper.from_array(array)) == array.nbytes


def test_narrow_types_are_packed():
    for kind, expected in ((TensorProto.INT4, 8), (TensorProto.UINT4, 8)):
        assert tensor_bytes(TensorProto(data_type=kind, dims=[3, 5])) == expected


def test_files_that_are_not_models(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(tmp_path / "missing.onnx")
    with pytest.raises(UsageError, match="not a regular file"):
        load_model(tmp_path)
    file = tmp_path / "text.onnx"
    file.write_bytes(b"this is no protobuf at all" * 9)
    with pytest.raises(ModelError, match="not an ONNX model"):
        load_model(file)
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="no graph"):
        load_model(file)


def test_external_data_is_read_and_only_from_beside_the_model(tmp_path):
    model = small_network()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = load_model(path)
    assert stored_bytes(loaded) == stored_bytes(small_network())
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"'w\.bin' cannot be read"):
        load_model(path)
    outside = onnx.load(path, load_external_data=False)
    for entry in outside.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../w.bin"
    path.write_bytes(outside.SerializeToString())
    with pytest.raises(ModelError, match="is outside the model's folder"):
        load_model(path)
