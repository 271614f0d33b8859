"""Models without a weight that can be compressed: said so, and never copied as a success."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress, errors
from cobla_onnx.graph.holders import bytes_elsewhere
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.operators.base import operator_names
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.pipeline.budget_errors import explain
from cobla_onnx.pipeline.select import Selection
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankGrid, RankRule
from tests.builders import model_of, random_array, small_network
from tests.cli.test_command import run, run_here

node = helper.make_node
TREES = 50


def forest(regressor: bool = False) -> onnx.ModelProto:
    """Trees of one split each, as converters of scikit-learn write them."""
    generator = np.random.default_rng(0)
    table = {
        "nodes_treeids": np.repeat(np.arange(TREES), 3).tolist(),
        "nodes_nodeids": [0, 1, 2] * TREES,
        "nodes_featureids": [int(f) for i in range(TREES) for f in (i % 4, 0, 0)],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"] * TREES,
        "nodes_values": [float(v) for t in generator.normal(size=TREES) for v in (t, 0, 0)],
        "nodes_truenodeids": [1, 0, 0] * TREES,
        "nodes_falsenodeids": [2, 0, 0] * TREES,
    }
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    if regressor:
        made = node(
            "TreeEnsembleRegressor", ["x"], ["y"], "forest", domain="ai.onnx.ml", n_targets=1,
            target_treeids=np.repeat(np.arange(TREES), 2).tolist(),
            target_nodeids=[1, 2] * TREES, target_ids=[0, 0] * TREES,
            target_weights=generator.normal(size=2 * TREES).tolist(), **table,
        )  # fmt: skip
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])]
    else:
        made = node(
            "TreeEnsembleClassifier", ["x"], ["label", "probabilities"], "forest",
            domain="ai.onnx.ml", class_treeids=np.repeat(np.arange(TREES), 2).tolist(),
            class_nodeids=[1, 2] * TREES, class_ids=[0, 1] * TREES,
            class_weights=[1 / TREES] * (2 * TREES), classlabels_int64s=[0, 1], **table,
        )  # fmt: skip
        outputs = [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2]),
        ]
    graph = helper.make_graph([made], "forest", [x], outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def no_weights() -> onnx.ModelProto:
    return model_of([node("Relu", ["x"], ["y"])], {}, {"x": ["n", 4]}, ["y"])


def test_trees_hold_their_bytes_in_attributes():
    model = forest(regressor=True)
    # Of each tree 3 rows of 5 integers and a float, 10 + 4 + 4 letters, and 2 of 3 and 1.
    # A number alone, such as n_targets, is none of them.
    size = TREES * (3 * (5 * 8 + 4) + 18 + 2 * (3 * 8 + 4))
    assert stored_bytes(model) == size
    assert bytes_elsewhere(model, []) == {"TreeEnsembleRegressor": size}


@pytest.mark.parametrize("regressor", [False, True])
def test_the_command_says_which_operator_holds_the_bytes(tmp_path, regressor):
    name = "TreeEnsembleRegressor" if regressor else "TreeEnsembleClassifier"
    path, out = tmp_path / "forest.onnx", tmp_path / "out.onnx"
    onnx.save(forest(regressor), path)
    np.savez(tmp_path / "data.npz", x=random_array(12, 4))
    data = ("--data", tmp_path / "data.npz")
    found = " ".join(run_here("inspect", path).stdout.split())
    assert f"nothing can be compressed: only {operator_names()} with constant weights" in found
    assert f"k in {name}" in found
    assert "least reachable: --mem 1 " in found
    assert "spectrum" not in found
    asked = [
        ("compress", path, out, "--mem", 0.5),
        ("compress", path, out, "--mem", 0.5, *data),
        ("compress", path, out, "--mac", 0.5),
        ("compress", path, out, "--max-drop", 0.1, *data),
        ("sweep", path, "--mem", "0.4:0.6:2"),
    ]
    for number, arguments in enumerate(asked):
        done = (run_here if number else run)(*arguments)
        assert done.returncode == 4, done.stderr
        message = " ".join(done.stderr.split())
        assert "no layer can be compressed" in message
        assert f"k in {name}" in message
        assert not out.exists()
    # What asks for nothing is no lie.
    assert run_here("compress", path, out, "--mem", 1).returncode == 0
    assert out.read_bytes() == path.read_bytes()


def test_a_budget_of_nothing_is_refused():
    for budget in (Budget(mem=0.5), Budget(mac=0.5), Budget(mem=0.9, mac=0.9)):
        with pytest.raises(errors.BudgetError, match="none can be saved") as caught:
            compress(no_weights(), budget)
        assert set(caught.value.least.values()) == {1.0}
    assert compress(no_weights(), Budget(mem=1, mac=1)).report.unchanged


def test_a_budget_that_is_too_tight_does_not_deny_the_layers():
    """Nodes that are left alone are no reason where others can be cut."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], "one"),
        node("DequantizeLinear", ["q", "s"], ["d"]),
        node("MatMul", ["a", "d"], ["y"], "two"),
    ]
    weights = {
        "w": random_array(32, 32),
        "q": np.ones((32, 4), np.int8),
        "s": np.array(1, np.float32),
    }
    model = model_of(nodes, weights, {"x": ["n", 32]}, ["y"])
    with pytest.raises(errors.BudgetError, match="below the least reachable") as caught:
        compress(model, Budget(mem=0.001))
    assert "no layer" not in str(caught.value)


ERROR = errors.BudgetError("mem 0.1 is below the least reachable 0.4", {"mem": 0.4}, "raise it")
COARSE = RankRule(RankGrid(8), RankGrid(8))


def explained(
    model: onnx.ModelProto,
    selection: Selection,
    rule: RankRule = EVERY_RANK,
    error: errors.BudgetError = ERROR,
) -> errors.BudgetError:
    settings = Settings(
        include=selection.include, exclude=selection.exclude, min_size=selection.min_size
    )
    return explain(error, model, analyse(model, selection), settings, rule)


def test_the_layers_that_were_left_out_are_named_with_their_share():
    model = small_network()
    share = 4 * 24 * 16 * 9 / stored_bytes(model)
    found = explained(model, Selection(exclude=["conv2"]))
    cause, advice = found.parts
    assert cause.startswith(
        f"{ERROR.parts[0]}, of which there is {share:.4g} in 1 layer left out by "
    )
    assert "exclude" in cause
    assert advice == "leave fewer layers out, or raise it"
    assert found.least == ERROR.least


def test_the_largest_group_comes_first_and_small_ones_are_not_mentioned():
    model = small_network()
    # The others hold 16 x 27 and 10 x 24 numbers.
    found = explained(model, Selection(exclude=["conv2"], min_size=500))
    cause, advice = found.parts
    assert cause.index("1 layer left out") < cause.index("2 layers below")
    assert advice.startswith("leave fewer layers out, lower ")
    # The last layer's 960 bytes are more than a tenth of 0.4 of the model, and less than of 0.9.
    last = Selection(exclude=["fc"])
    assert "1 layer left out" in explained(model, last).parts[0]
    more = errors.BudgetError("too little", {"mem": 0.9}, "raise it")
    assert explained(model, last, error=more) is more


def test_weights_that_nearly_overflow_stay_and_are_named():
    model = small_network()
    tensor = next(t for t in model.graph.initializer if t.name == "w2")
    weight = onnx.numpy_helper.to_array(tensor)
    weight = weight / np.abs(weight).max() * np.float32(3e38)
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "w2"))
    found = analyse(model)
    assert [layer.name for layer in found.layers] == ["conv1", "fc"]
    (left,) = [item for item in found.skipped if item.name == "conv2"]
    assert str(left) == "weight nearly overflows its type (numbers up to 3e+38)"
    cause, advice = explained(model, Selection()).parts
    assert "1 layer whose numbers nearly overflow their type" in cause
    assert advice.startswith("make the model's weights smaller")


def test_nothing_is_added_where_nothing_was_left_out():
    assert explained(small_network(), Selection()) is ERROR
    of_macs = errors.BudgetError("mac 0.1 is too little", {"mac": 0.4}, "raise it")
    assert explained(small_network(), Selection(exclude=["conv2"]), error=of_macs) is of_macs


def test_ranks_that_the_rule_leaves_out_are_advised():
    cause, advice = explained(small_network(), Selection(), COARSE).parts
    assert cause == ERROR.parts[0]
    assert advice.startswith("raise it, or allow more ranks by ")
    bare = errors.BudgetError("too little", {"mem": 0.4})
    assert explained(small_network(), Selection(), COARSE, bare).parts[1].startswith("allow more")


def test_without_layers_the_reasons_are_counted():
    found = explained(no_weights(), Selection())
    assert f"{ERROR.parts[0]}: no layer can be compressed" in found.parts[0]
    assert "inspect" in found.parts[1]
