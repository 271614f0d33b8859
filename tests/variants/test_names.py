"""Names of what a rewrite adds."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from cobla_onnx.variants.names import Names
from tests.builders import model_of, random_array


def test_names_in_use_anywhere_are_not_given_again():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["inside"], "hidden")],
        "then",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
        helper.make_node("If", ["flag"], ["z"], "if", then_branch=inner, else_branch=inner),
    ]
    model = model_of(nodes[:1], {"w": random_array(2, 2)}, {"x": [2, 2]}, ["y"])
    model.graph.node.append(nodes[1])
    names = Names(model)
    for taken in ("x", "w", "y", "z", "flag", "inside"):
        assert names.tensor(taken) == f"{taken}_2"
    for taken in ("product", "if", "hidden"):
        assert names.node(taken) == f"{taken}_2"
    # Tensors and nodes may be called the same, and what was given is taken.
    assert names.node("x") == "x"
    assert [names.tensor("new") for _ in range(3)] == ["new", "new_2", "new_3"]


def test_a_function_is_shared_with_the_model_unless_it_is_another_one():
    def function(op: str) -> onnx.FunctionProto:
        nodes = [helper.make_node(op, ["a"], ["b"])]
        return helper.make_function("own", "Same", ["a"], ["b"], nodes, [])

    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": random_array(2, 2)}, {"x": [2]}, "y"
    )
    model.functions.append(function("Relu"))
    names = Names(model)
    given = [names.function(function(op)) for op in ("Relu", "Abs", "Relu", "Neg", "Abs")]
    assert given == ["Same", "Same_2", "Same", "Same_3", "Same_2"]
    assert {f.name for f in names.functions} == set(given)
