"""Who makes and who reads each tensor; what is quantised is called that, however it is made."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.index import GraphIndex, all_inputs, node_label
from cobla_onnx.graph.layers import Reason, find_layers, read_weight
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array

INTEGERS = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
WEIGHTS = {
    "q": INTEGERS,
    "u": INTEGERS.view(np.uint8),
    "zero": np.int8(3),
    "scale": np.full((1, 16), 0.01, np.float32),
    "zero_float": np.float32(3),
    "large": random_array(16, 16),
}


def cast(name: str, to: str = "f") -> object:
    return helper.make_node("Cast", [name], [to], to, to=TensorProto.FLOAT)


@pytest.mark.parametrize(
    "nodes",
    [
        [cast("q"), helper.make_node("Mul", ["f", "scale"], ["w"], "mul")],
        [cast("u"), helper.make_node("Mul", ["scale", "f"], ["w"], "mul")],
        [
            cast("q"),
            cast("zero", "z"),
            helper.make_node("Sub", ["f", "z"], ["s"], "sub"),
            helper.make_node("Mul", ["s", "scale"], ["m"], "mul"),
            helper.make_node("Transpose", ["m"], ["w"], "turn"),
        ],
        [
            helper.make_node("Sub", ["q", "zero"], ["s"], "sub"),
            cast("s"),
            helper.make_node("Div", ["f", "scale"], ["w"], "div"),
        ],
        [cast("q", "w")],
    ],
    ids=["mul", "unsigned", "sub mul", "sub first", "cast alone"],
)
def test_integers_made_into_weights_are_quantised(nodes: list[object]) -> None:
    model = model_of(
        [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
        WEIGHTS,
        {"x": ["N", 16]},
        ["y"],
    )
    found = find_layers(model)
    assert not found.layers
    assert [item.reason for item in found.skipped] == [Reason.QUANTISED]
    with pytest.raises(BudgetError, match="compress the model before it is quantised"):
        compress(model, Budget(mem=0.5))


def test_arithmetic_on_other_constants_and_on_data_is_not() -> None:
    for name in ("large", "x"):
        nodes = [
            helper.make_node("Mul", [name, "scale"], ["w"], "mul"),
            helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
        ]
        found = find_layers(model_of(nodes, WEIGHTS, {"x": [16, 16]}, ["y"]))
        assert [item.reason for item in found.skipped] == [Reason.NOT_CONSTANT]


def test_half_precision_that_is_cast_is_a_layer() -> None:
    weights = {"h": random_array(16, 16).astype(np.float16)}
    nodes = [cast("h", "w"), helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    model = model_of(nodes, weights, {"x": ["N", 16]}, ["y"])
    (layer,) = find_layers(model).layers
    assert layer.stored_type == TensorProto.FLOAT16
    result = compress(model, Budget(mem=0.5))
    stored = {t.data_type for t in result.model.graph.initializer}
    assert stored == {TensorProto.FLOAT16}


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Nodes that read any tensors before them, also twice, and some from within an If."""
    known, nodes = ["x", "c"], []
    for number in range(draw(st.integers(1, 8))):
        read = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        made = [f"t{number}_{i}" for i in range(draw(st.integers(1, 2)))]
        name = draw(st.sampled_from(["", f"node {number}"]))
        if draw(st.booleans()):
            nodes.append(helper.make_node("Toy", read, made, name))
        else:
            inner = helper.make_node("Toy", read, [f"inner{number}"])
            result = [helper.make_tensor_value_info(f"inner{number}", TensorProto.FLOAT, None)]
            branch = helper.make_graph([inner], "branch", [], result)
            both = {"then_branch": branch, "else_branch": branch}
            nodes.append(helper.make_node("If", ["c"], made, name, **both))
        known += made
    given_ = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "c")]
    made_last = [helper.make_tensor_value_info(known[-1], TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(nodes, "any", given_, made_last))


@given(graphs())
def test_producers_and_readers_agree_with_the_nodes(model: onnx.ModelProto) -> None:
    index = GraphIndex(model)
    nodes = all_nodes(model.graph)
    assert list(index.nodes) == nodes
    assert nodes[: len(model.graph.node)] == list(model.graph.node)
    # Both branches of each If are the same here: the first counts as the producer.
    first = {name: i for i, n in reversed(list(enumerate(nodes))) for name in n.output}
    assert index.producer == first
    reads = {(name, i) for i, n in enumerate(nodes) for name in n.input}
    found = [(name, i) for name, readers in index.readers.items() for i in readers]
    # A node that reads a tensor twice reads it once.
    assert len(found) == len(set(found))
    assert set(found) == reads
    for readers in index.readers.values():
        assert readers == sorted(readers)
    for i, each in enumerate(model.graph.node):
        for name in all_inputs(each):
            assert name.startswith("inner") or i in map(index.place, index.readers[name])
    made_inside = {n.output[0] for n in nodes[len(model.graph.node) :]}
    assert set(index.kept) == {model.graph.output[0].name, *made_inside}


@given(graphs())
def test_labels_are_names_or_places(model: onnx.ModelProto) -> None:
    labels = [node_label(each, i) for i, each in enumerate(model.graph.node)]
    assert len(set(labels)) == len(labels)
    for i, (each, label) in enumerate(zip(model.graph.node, labels, strict=True)):
        assert label == (each.name or f"{each.op_type}_{i}")


def test_a_constant_is_followed_through_what_only_moves_it() -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(INTEGERS)),
        helper.make_node("Transpose", ["k"], ["turned"], "turn"),
        helper.make_node("Identity", ["turned"], ["same"], "same"),
        cast("same", "w"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    index = GraphIndex(model_of(nodes, {}, {"x": ["N", 16]}, ["y"]))
    origin = index.origin("w")
    assert not isinstance(origin, str)
    assert (origin.source, origin.chain, origin.type) == ("k", (1, 2, 3), TensorProto.FLOAT)
    assert origin.steps == (("Transpose", (1, 0)),)
    assert origin.shape == (16, 16)
    assert index.origin("x") == ""
    assert index.origin("y") == "MatMul"


def rearranged(parts: list[tuple[int, int]], opset: int, axis: int = 0) -> onnx.ModelProto:
    """A recurrent layer whose gates are put in order, and given a direction, in the graph."""
    weights = {"w": random_array(12, 5), "R": random_array(1, 12, 4, seed=1)}
    nodes = []
    for number, bounds in enumerate(parts):
        name = f"part{number}"
        if opset < 10:
            values = dict(zip(("starts", "ends"), ([b] for b in bounds), strict=True))
            nodes.append(helper.make_node("Slice", ["w"], [name], axes=[axis], **values))
            continue
        given = {f"{name}/{k}": np.array([v]) for k, v in zip("sea", (*bounds, axis), strict=True)}
        weights |= given
        nodes.append(helper.make_node("Slice", ["w", *given], [name]))
    names = [f"part{number}" for number in range(len(parts))]
    nodes.append(helper.make_node("Concat", names, ["turned"], axis=axis))
    if opset < 13:
        nodes.append(helper.make_node("Unsqueeze", ["turned"], ["W"], axes=[0]))
    else:
        weights["first"] = np.array([0])
        nodes.append(helper.make_node("Unsqueeze", ["turned", "first"], ["W"]))
    nodes.append(helper.make_node("GRU", ["x", "W", "R"], ["y"], "rnn", hidden_size=4))
    model = model_of(nodes, weights, {"x": [3, 2, 5]}, ["y"], opset=opset)
    model.graph.output.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, None))
    return model


@given(st.permutations([(0, 4), (4, 8), (8, 12)]), st.sampled_from([9, 17]))
def test_rows_that_are_put_in_another_order_are_a_weight(parts, opset):
    # As exporters write them: from the end, or far beyond it.
    far = 2**31 if opset > 9 else 12
    parts = [(begin, far if end == 12 else end - 12) for begin, end in parts]
    model = rearranged(parts, opset)
    shown = run_session(open_session(model, 1), {"x": random_array(3, 2, 5)})["W"]
    del model.graph.output[1:]
    read, _ = find_layers(model).layers
    assert (read.name, read.source, read.shape) == ("rnn/W", "w", (1, 12, 5))
    assert read.uses[0].chain == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(read_weight(model, read), shown)


@pytest.mark.parametrize(
    ("parts", "axis"),
    [([(0, 8), (4, 12)], 0), ([(0, 4), (0, 4), (8, 12)], 0), ([(0, 4), (5, 12)], 0),
     ([(2, 5), (0, 2)], 1)],
)  # fmt: skip
def test_other_slices_are_no_weight(parts, axis):
    model = rearranged(parts, 17, axis)
    model.graph.node[-1].input[1] = "W"
    del model.graph.output[1:]
    skipped = {item.name: item.reason for item in find_layers(model).skipped}
    assert skipped == {"rnn/W": Reason.NOT_CONSTANT}


def test_a_weight_whose_gates_are_put_in_order_is_replaced_with_what_orders_them():
    model = rearranged([(4, 8), (0, 4), (8, 12)], 17)
    del model.graph.output[1:]
    result = compress(model, Budget(mem=0.6), precision="auto", threads=1)
    kinds = {node.op_type for node in result.model.graph.node}
    assert "GRU" in kinds
    assert not kinds & {"Slice", "Concat", "Unsqueeze"}
    # With the bounds of the slices.
    read = {name for node in result.model.graph.node for name in node.input}
    assert {tensor.name for tensor in result.model.graph.initializer} <= read
    feeds = {"x": random_array(3, 2, 5)}
    whole, less = (run_session(open_session(m, 1), feeds)["y"] for m in (model, result.model))
    np.testing.assert_allclose(less, whole, atol=0.05)
