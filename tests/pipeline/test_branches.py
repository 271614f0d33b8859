"""Data is followed into the branch that all samples take, and what is written keeps its If."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, Result, compress, inspect
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.opening import opened
from cobla_onnx.pipeline.branches import Followed, taken_branches
from tests.bodies import SIZE, choice, loop, model_with, weight
from tests.builders import FLOAT, random_array

NODE, VALUE = helper.make_node, helper.make_tensor_value_info
POSITIVE = {"x": np.abs(random_array(24, SIZE, seed=1))}
MIXED = {"x": POSITIVE["x"] * np.where(np.arange(24) % 2, 1, -1)[:, None].astype(np.float32)}


def compressed(data: dict[str, np.ndarray], mem: float = 0.75, **options) -> Result:
    return compress(choice("N"), Budget(mem=mem), data=data, threads=1, **options)


def reasons(result: Result) -> dict[str, str]:
    return {x.name: x.reason for x in result.report.layers if x.decision == "skipped"}


@pytest.mark.parametrize("options", [{}, {"precision": "auto"}, {"objective": "loss"}])
def test_layers_of_the_branch_that_all_samples_take_are_compressed_by_data(options):
    result = compressed(POSITIVE, **options)
    assert result.report.budget["mem"].reached <= 0.75
    assert {d.layer for d in result.plan.decisions} == {"choice.then_branch/hidden", "outer"}
    assert any(d.scheme and "then" in d.layer for d in result.plan.decisions)
    (holder,) = [n for n in result.model.graph.node if n.op_type == "If"]
    assert holder.name == "choice"
    told = reasons(result)
    assert told["choice.else_branch/hidden"] == Reason.NEVER_RUN.value
    # Both branches read its weight.
    assert told["choice.else_branch/last"].startswith(Reason.NOT_FOLLOWED.value)
    assert result.report.calibration is not None
    assert any("take the then branch of 'choice'" in note for note in result.report.notes)
    onnx.checker.check_model(result.model, full_check=True)


def test_where_samples_differ_layers_in_branches_stay_whole():
    result = compressed(MIXED, 0.9)
    assert {d.layer for d in result.plan.decisions if d.scheme} == {"outer"}
    assert set(reasons(result).values()) == {Reason.NOT_FOLLOWED.value}


def test_data_is_not_followed_into_loops_and_the_refusal_says_so():
    model = loop()
    with pytest.raises(BudgetError, match="in bodies that data is not followed into"):
        compress(model, Budget(mem=0.5), data={"x": random_array(48, SIZE)}, threads=1)


def test_bytes_of_the_other_branch_count():
    seen = inspect(choice("N"), data=POSITIVE, threads=1)
    assert seen.mem_total == inspect(choice("N"), threads=1).mem_total
    assert [layer.name for layer in seen.layers] == ["choice.then_branch/hidden", "outer"]


def deep(condition: str) -> onnx.ModelProto:
    """An If in a branch of an If, whose condition is an initializer, an input or computed."""

    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [VALUE(f"{name}_y", FLOAT, None)])

    inner = NODE(
        "If",
        [condition],
        ["a_y"],
        "inner",
        then_branch=branch("b", [NODE("MatMul", ["x", "w"], ["b_y"], "product")]),
        else_branch=branch("c", [NODE("MatMul", ["x", "v"], ["c_y"], "product")]),
    )
    outer = NODE(
        "If",
        ["stored"],
        ["y"],
        "outer",
        then_branch=branch("a", [inner]),
        else_branch=branch("d", [NODE("MatMul", ["x", "w"], ["d_y"], "product")]),
    )
    nodes = [
        NODE("ReduceMax", ["x"], ["most"], keepdims=0),
        NODE("Less", ["most", "limit"], ["computed"]),
        outer,
    ]
    weights = {"w": weight(1), "v": weight(2), "stored": np.array(True)}
    weights["limit"] = np.array(0, np.float32)
    inputs = [VALUE("x", FLOAT, ["N", SIZE]), VALUE("given", TensorProto.BOOL, [])]
    return model_with(nodes, inputs, weights)


@pytest.mark.parametrize(
    ("condition", "given", "expected"),
    [
        ("stored", [True], {"y": True, "a_y": True}),
        ("given", [False, False], {"y": True, "a_y": False}),
        ("given", [False, True], {"y": True}),
        ("computed", [True], {"y": True, "a_y": False}),
    ],
)
def test_conditions_are_read_wherever_they_come_from(condition, given, expected):
    model = opened(deep(condition))
    batches = [{"x": POSITIVE["x"], "given": np.array(value)} for value in given]
    taken = taken_branches(model, lambda: batches, 1)
    assert taken == expected
    names = [layer.name for layer in Followed(model, model).inventory.layers]
    assert names == ["outer.else_branch/product", "outer.then_branch/inner.else_branch/product"]
