"""Equal constants become one: which, which not, and the model computes the same bytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress
from cobla_onnx.graph.duplicates import deduplicated
from cobla_onnx.graph.io.model_file import load_model, stored_bytes
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.transposed_copies import transposed_copies, transposed_on_the_way
from tests.builders import model_of, random_array
from tests.tied import VOCABULARY, WIDTH, decoder, sentences

SIZE = 24
OPTIONS = ort.SessionOptions()
OPTIONS.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def run(model: onnx.ModelProto, data: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), OPTIONS)
    return list(session.run(None, {"x": data}))


def chain(weights: dict[str, np.ndarray], op: str = "MatMul", **options: int) -> onnx.ModelProto:
    """An operation with each weight, one after the other."""
    nodes, name = [], "x"
    for number, weight in enumerate(weights):
        nodes.append(helper.make_node(op, [name, weight], [f"y{number}"], f"n{number}"))
        name = f"y{number}"
    return model_of(nodes, weights, {"x": ["N", SIZE]}, [name], **options)


def square(seed: int, dtype: str = "float32") -> np.ndarray:
    return random_array(SIZE, SIZE, seed=seed, dtype=dtype) / np.asarray(5, dtype)


@settings(max_examples=25, deadline=None)
@given(seeds=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_each_content_is_stored_once_and_nothing_else_changes(seeds):
    model = chain({f"w{i}": square(seed) for i, seed in enumerate(seeds)})
    before = model.SerializeToString(deterministic=True)
    found = deduplicated(model)
    assert model.SerializeToString(deterministic=True) == before
    assert found.count == len(seeds) - len(set(seeds))
    assert found.nbytes == stored_bytes(model) - stored_bytes(found.model)
    assert len(found.model.graph.initializer) == len(set(seeds))
    assert (found.model is model) == (found.count == 0)
    data = random_array(3, SIZE, seed=9)
    for left, right in zip(run(model, data), run(found.model, data), strict=True):
        assert left.tobytes() == right.tobytes()
    assert sum(len(x.uses) for x in find_layers(found.model).layers) == len(seeds)
    assert deduplicated(found.model).count == 0


def test_type_shape_and_the_sign_of_zero_tell_constants_apart():
    one = np.zeros((SIZE, SIZE), np.float32)
    model = chain({"a": one, "b": -one, "c": one.reshape(1, SIZE, SIZE)})
    model.graph.initializer.append(onnx.numpy_helper.from_array(one.view(np.int32), "d"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(one.ravel(), "e"))
    assert deduplicated(model).model is model


def test_the_form_in_which_numbers_are_stored_makes_no_difference():
    weight = square(1)
    model = chain({"a": weight, "b": weight})
    plain = helper.make_tensor("b", TensorProto.FLOAT, weight.shape, weight.ravel())
    model.graph.initializer[1].CopyFrom(plain)
    assert deduplicated(model).count == 1


def test_what_others_refer_to_stays():
    weight = square(1)
    names = ("first", "input", "output", "annotated", "copy")
    model = chain(dict.fromkeys(names, weight))
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("input", TensorProto.FLOAT, weight.shape))
    graph.output.append(helper.make_tensor_value_info("output", TensorProto.FLOAT, weight.shape))
    graph.quantization_annotation.add(tensor_name="annotated")
    found = deduplicated(model)
    assert {t.name for t in found.model.graph.initializer} == {*names[:4]}
    onnx.checker.check_model(found.model)
    # Before IR version 4 all initializers are inputs, which nobody may replace; they stay as well.
    assert deduplicated(chain({"a": weight, "b": weight}, ir_version=3)).count == 0


def test_bodies_keep_the_names_that_they_read():
    weight = square(1)
    nothing = helper.make_tensor_value_info("then", TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["then"])], "body", [], [nothing]
    )
    model = chain({"w0": weight, "inner": weight, "w2": weight}, "Add")
    branch = helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)
    model.graph.node.append(branch)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    found = deduplicated(model)
    assert found.count == 2
    assert {t.name for t in found.model.graph.initializer} == {"inner", "yes"}
    data = random_array(SIZE, SIZE, seed=3)
    for left, right in zip(run(model, data), run(found.model, data), strict=True):
        assert np.array_equal(left, right)
    # A layer's weight that a body reads could not be replaced.
    for node in model.graph.node[:3]:
        node.op_type = "MatMul"
    assert deduplicated(model).count == 0


def test_biases_and_small_constants_stay():
    """A layer changes its bias only where nobody else reads it."""
    wide = 512
    nodes = [
        helper.make_node("Gemm", ["x", f"w{i}", f"b{i}"], [f"y{i}"], f"n{i}") for i in range(2)
    ]
    bias = np.zeros(wide, np.float32)
    weights = {"b0": bias, "b1": bias, "s0": np.ones(4, "f4"), "s1": np.ones(4, "f4")}
    weights |= {f"w{i}": random_array(SIZE, wide, seed=i) for i in range(2)}
    model = model_of(nodes, weights, {"x": ["N", SIZE]}, ["y0", "y1"])
    assert deduplicated(model).count == 0
    assert [layer.bias for layer in find_layers(model).layers] == ["b0", "b1"]


def test_weights_stay_apart_where_one_layer_could_not_have_them():
    """Convolutions of other groups read the same numbers as other matrices."""
    kernel = random_array(16, 4, 3, 3)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["y0"], "four", pads=[1, 1, 1, 1], group=4),
        helper.make_node("Conv", ["z", "w1"], ["y1"], "one", pads=[1, 1, 1, 1]),
    ]
    inputs = {"x": ["N", 16, 8, 8], "z": ["N", 4, 8, 8]}
    model = model_of(nodes, {"w0": kernel, "w1": kernel}, inputs, ["y0", "y1"])
    assert len(find_layers(model).layers) == 2
    assert deduplicated(model).model is model


def test_data_beside_the_model_is_compared_and_stays_there(tmp_path):
    weight = np.tile(square(1), (1, 64))
    other = weight.copy()
    other[SIZE // 2, 700] += 1  # far from both ends
    model = chain({"a": square(2), "b": square(2)})
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name)
        for name, array in (("c", weight), ("d", other), ("e", weight))
    )
    for name in "cde":
        model.graph.node.add(op_type="Identity", input=[name], output=[f"{name}_out"])
        info = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, weight.shape)
        model.graph.output.append(info)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=1024)
    found = deduplicated(load_model(path))
    assert {t.name for t in found.model.graph.initializer} == {"a", "c", "d"}
    places = [t.data_location for t in found.model.graph.initializer if t.name in "cd"]
    assert places == [TensorProto.EXTERNAL] * 2


def test_budgets_are_of_the_model_as_it_was_given(tmp_path):
    weight = square(1)
    model = chain({"a": weight, "b": weight, "c": weight, "d": square(2)})
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    whole = stored_bytes(model)
    result = compress(path, Budget(mem=0.5))
    memory = result.report.budget["mem"]
    assert (memory.before, memory.after) == (whole, whole // 2)
    assert not result.report.unchanged
    assert any("2 constants are stored once" in note for note in result.report.notes)
    result.save(tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    assert stored_bytes(written) == whole // 2
    data = random_array(2, SIZE, seed=4)
    assert np.array_equal(run(model, data)[0], run(written, data)[0])

    result = compress(model, Budget(mem=0.3))
    assert result.report.budget["mem"].after <= 0.3 * whole
    assert [layer.name for layer in result.report.layers] == ["n0", "n3"]
    assert len({n.input[1] for n in result.model.graph.node if n.op_type == "MatMul"}) < 8

    apart = compress(model, Budget(mem=1.0), deduplicate=False)
    assert apart.report.unchanged
    assert apart.model is model
    assert len(apart.report.layers) == 4


@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_reports_of_all_kinds_show_it(tmp_path, budget):
    weight = square(1)
    result = compress(chain({"a": weight, "b": weight, "c": square(2)}), Budget(mem=budget))
    for name in ("r.json", "r.html", "r.md"):
        result.save_report(tmp_path / name)
        assert "stored once in place of more than once" in (tmp_path / name).read_text()


def test_a_transposed_copy_of_a_table_is_computed_from_it(tmp_path):
    model, data = decoder("copy"), sentences(4)
    found = deduplicated(model)
    table = 4 * VOCABULARY * WIDTH
    assert (found.count, found.nbytes) == (1, table)
    assert transposed_copies(model, ()) == {"copy": "table"}
    assert find_layers(found.model).layers[0].op == "Gather+MatMul"
    session = ort.InferenceSession(found.model.SerializeToString(), OPTIONS)
    whole = ort.InferenceSession(model.SerializeToString(), OPTIONS)
    assert session.run(None, data)[0].tobytes() == whole.run(None, data)[0].tobytes()

    result = compress(model, Budget(mem=0.3))
    assert result.report.budget["mem"].before == stored_bytes(model)
    assert stored_bytes(result.model) <= 0.3 * stored_bytes(model)
    onnx.checker.check_model(result.model, full_check=True)
    # Another number, in a chunk of its own.
    changed = onnx.numpy_helper.to_array(model.graph.initializer[4]).copy()
    changed[-1, -1] += 1
    model.graph.initializer[4].CopyFrom(onnx.numpy_helper.from_array(changed, "copy"))
    assert deduplicated(model).model is model


def test_a_transposed_copy_that_makes_no_layer_stays():
    weight = random_array(SIZE, 2 * SIZE)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y0"], "n0"),
        helper.make_node("Add", ["y0", "c"], ["y1"], "sum"),
        helper.make_node("Add", ["z", "b"], ["y2"], "other"),
    ]
    weights = {"a": weight, "b": np.ascontiguousarray(weight.T), "c": random_array(2 * SIZE)}
    inputs = {"x": [3, SIZE], "z": [2 * SIZE, SIZE]}
    model = model_of(nodes, weights, inputs, ["y1", "y2"])
    assert transposed_copies(model, ()) == {"b": "a"}
    assert transposed_on_the_way(model, {"b": "a"}) == (model, {})
    assert deduplicated(model).model is model
    assert transposed_copies(model, {"a"}) == {}
