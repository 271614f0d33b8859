"""Weights in fewer bits, from the option to the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, Plan, advise, compress, inspect, sweep
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.model_file import stored_bytes as model_bytes
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.plan import Decision
from cobla_onnx.runtime.session import open_session, random_feeds, run_session
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import OnlyForm
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.storage.decoding import DOMAIN
from cobla_onnx.variants.storage.family import STORED, RoundingUnit, StorageFamily
from cobla_onnx.variants.storage.from_data import rounded
from cobla_onnx.variants.storage.precision import FORMATS, precision_bits
from cobla_onnx.variants.storage.stored import stored_bytes
from tests.builders import model_of, random_array, small_network

BITS = st.sampled_from(FORMATS)
# Operator, attributes, weight and input: every way in which a weight lies in its tensor.
LAYERS: list[tuple[str, dict[str, Any], tuple[int, ...], list[int]]] = [
    ("Conv", {"pads": [1, 1, 1, 1]}, (7, 5, 3, 3), [2, 5, 6, 6]),
    ("Conv", {"group": 2}, (6, 3, 2, 2), [1, 6, 5, 5]),
    ("Conv", {}, (6, 4, 3), [1, 4, 9]),
    ("ConvTranspose", {"strides": [2, 2]}, (5, 6, 2, 2), [1, 5, 4, 4]),
    ("MatMul", {}, (9, 7), [3, 9]),
    ("MatMul", {}, (2, 9, 7), [2, 3, 9]),
    ("Gemm", {"transB": 1}, (7, 9), [3, 9]),
]


def one_layer(case: int, opset: int = 13) -> onnx.ModelProto:
    op, attributes, shape, inputs = LAYERS[case]
    node = helper.make_node(op, ["x", "w"], ["y"], "layer", **attributes)
    model = model_of([node], {"w": random_array(*shape, seed=case)}, {"x": inputs}, ["y"])
    model.opset_import[0].version = opset
    return model


@settings(deadline=None, max_examples=60)
@given(case=st.integers(0, len(LAYERS) - 1), bits=BITS, function=st.booleans())
def test_the_model_computes_with_the_rounded_weight(case: int, bits: int, function: bool) -> None:
    model = one_layer(case)
    model.ir_version = 8 if function else 7
    (layer,) = find_layers(model).layers
    family, weight = StorageFamily(), read_weight(model, layer)
    made = rounded(layer, weight, bits, None)
    replacement = family.replace(layer, OnlyForm(STORED), made)
    np.testing.assert_array_equal(replacement.dense(), made.weight)
    result = rewrite(model, [replacement])
    onnx.checker.check_model(result)
    assert (len(result.functions) > 0) == (function and bits < 16)
    dense = model_of(list(model.graph.node), {"w": made.weight}, {"x": LAYERS[case][3]}, ["y"])
    session = open_session(result, 1)
    feeds = random_feeds(session, {"x": LAYERS[case][3]}, seed=0)
    found, expected = (run_session(open_session(m, 1), feeds)["y"] for m in (result, dense))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    case=st.integers(0, len(LAYERS) - 1),
    bits=BITS,
    opset=st.sampled_from((7, 8, 9, 13, 17)),
    function=st.booleans(),
)
def test_no_more_bytes_are_stored_than_counted_by_models_that_are_valid(
    case: int, bits: int, opset: int, function: bool
) -> None:
    # The bias of a Gemm may be left out from opset 11 on.
    assume(opset >= 11 or LAYERS[case][0] != "Gemm")
    model = one_layer(case, opset)
    model.ir_version = 8 if function else 7
    (layer,) = find_layers(model).layers
    made = rounded(layer, read_weight(model, layer), bits, None)
    result = rewrite(model, [StorageFamily().replace(layer, OnlyForm(STORED), made)])
    onnx.checker.check_model(result, full_check=True)
    assert model_bytes(result) <= stored_bytes(layer, bits) <= model_bytes(result) + 64


@pytest.mark.parametrize(("opset", "ir_version"), [(9, 6), (13, 6), (9, 8), (7, 10)])
def test_an_old_model_has_the_nodes_in_its_graph(opset: int, ir_version: int) -> None:
    model = one_layer(0, opset)
    model.ir_version = ir_version
    result = compress(model, plan=Plan((Decision("layer", "stored", 5),)), threads=1)
    kinds = {node.op_type for node in result.model.graph.node}
    assert {"Gather", "Div", "Conv"} <= kinds
    assert len(result.model.functions) == 0
    assert result.report.verification is not None
    assert result.report.verification.rewrite_max_error < 1e-5


def test_the_opset_counts_by_either_name_of_the_domain() -> None:
    model = one_layer(4)
    model.opset_import[0].domain = "ai.onnx"
    result = compress(model, plan=Plan((Decision("layer", "stored", 5),)), threads=1)
    assert result.model.functions[0].opset_import[0].version == 13


def test_a_model_that_is_compressed_again_keeps_its_function() -> None:
    plan = Plan((Decision("one", "stored", 4),))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("MatMul", ["a", "v"], ["y"], "two"),
    ]
    arrays = {"w": random_array(24, 24), "v": random_array(24, 24, seed=1)}
    first = compress(model_of(nodes, arrays, {"x": [3, 24]}, ["y"]), plan=plan, threads=1).model
    again = compress(first, plan=Plan((Decision("two", "stored", 4),)), threads=1).model
    assert [f.name for f in again.functions] == ["Decode4"]
    assert [entry.domain for entry in again.opset_import].count(DOMAIN) == 1


@pytest.mark.parametrize("objective", ["weights", "output"])
def test_ranks_and_bits_share_one_budget(objective: str) -> None:
    options: dict[str, Any] = {"threads": 1, "precision": "auto", "objective": objective}
    if objective == "output":
        options["data"] = {"x": random_array(40, 3, 12, 12, seed=3)}
    model = small_network()
    found = compress(model, Budget(mem=0.3), **options)
    alone = compress(model, Budget(mem=0.3), **{**options, "precision": "keep"})
    assert model_bytes(found.model) <= 0.3 * model_bytes(model)
    assert "stored" in {d.scheme for d in found.plan.decisions}
    assert "stored" not in {d.scheme for d in alone.plan.decisions}
    assert found.report.solver is not None
    assert alone.report.solver is not None
    # The same programme with more to choose from.
    assert found.report.solver.value <= alone.report.solver.value * 1.001
    text = found.plan.to_json()
    assert '"bits"' in text
    again = compress(model, plan=Plan.from_json(text), **options)
    assert again.model.SerializeToString() == found.model.SerializeToString()


def test_only_the_bits_that_are_asked_for() -> None:
    budgets = [Budget(mem=m) for m in (0.5, 0.3)]
    points = sweep(small_network(), budgets, precision=(8,), threads=1).points
    for point in points:
        assert {d.rank for d in point.plan.decisions if d.scheme == "stored"} <= {8}


def test_macs_are_not_saved_by_bits() -> None:
    result = compress(small_network(), Budget(mac=0.7), precision="auto", threads=1)
    assert "stored" not in {d.scheme for d in result.plan.decisions}


@pytest.mark.parametrize("wrong", ["some", (), (7,), (8, 1), 8, (8.0,), np.array([8]), {8: 4}])
def test_what_is_not_a_precision(wrong: Any) -> None:
    with pytest.raises(UsageError, match="give keep, auto, or some of 2, 3, 4, 5, 6, 8, 16"):
        precision_bits(wrong)


def _old_model(opset: int) -> onnx.ModelProto:
    weights = {"w": random_array(40, 40), "v": random_array(40, 8)}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], "one"),
        onnx.helper.make_node("MatMul", ["h", "v"], ["y"], "two"),
    ]
    model = model_of(nodes, weights, {"x": [3, 40]}, ["y"], opset=opset)
    model.ir_version = 3
    return model


def test_before_opset_7_there_is_half_precision_alone() -> None:
    model = _old_model(6)
    for precision in ((8,), (16, 4)):
        with pytest.raises(UsageError, match=r"of opset 7, and the model has 6; export it with"):
            compress(model, Budget(mem=0.6), precision=precision, threads=1)
    for precision in ("auto", (16,)):
        result = compress(model, Budget(mem=0.5), precision=precision, threads=1)
        assert {d.rank for d in result.plan.decisions if d.scheme == "stored"} == {16}


def test_before_opset_6_there_are_no_bits() -> None:
    model = _old_model(5)
    with pytest.raises(UsageError, match=r"the model has 5; export it with a newer one$"):
        compress(model, Budget(mem=0.6), precision=(16,), threads=1)
    note = "no layer can be stored in fewer bits: operators of opset 5 decode none"
    assert note in compress(model, Budget(mem=0.6), precision="auto", threads=1).report.notes
    found = advise(model, threads=1)
    assert note in found.notes
    assert not any("--precision" in each.command for each in found.suggestions)
    assert inspect(model, sensitivity=True, threads=1).sensitivity is not None


def test_a_model_without_single_precision_says_that_it_has_no_bits() -> None:
    weights = {"w": random_array(40, 40).astype(np.float64)}
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "one")
    model = model_of([node], weights, {"x": [3, 40]}, ["y"], elem_type=onnx.TensorProto.DOUBLE)
    note = "no layer can be stored in fewer bits: no weight is used in single precision"
    for precision in ("auto", (8,)):
        found = compress(model, Budget(mem=0.6), precision=precision, threads=1)
        assert note in found.report.notes
    assert note not in compress(model, Budget(mem=0.6), threads=1).report.notes
    assert not any("--precision" in each.command for each in advise(model, threads=1).suggestions)


def test_a_plan_with_bits_that_the_opset_cannot_decode() -> None:
    plan = Plan((Decision("one", "stored", 4),))
    with pytest.raises(UsageError, match=r"^plan: weights in fewer than 16 .* of opset 7"):
        compress(_old_model(6), plan=plan, threads=1)
    compress(_old_model(6), plan=Plan((Decision("one", "stored", 16),)), threads=1)


def test_a_plan_with_bits_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="cannot be stored in 7 bits; there are 2, 3"):
        compress(one_layer(0), plan=Plan((Decision("layer", "stored", 7),)), threads=1)


@pytest.mark.parametrize(
    ("bits", "size"), [*((bits, 1.0) for bits in FORMATS), (16, 1e-6), (16, 1e-9), (4, 1e6)]
)
def test_the_predicted_error_is_about_the_real_one(bits: int, size: float) -> None:
    model = one_layer(4)
    (layer,) = find_layers(model).layers
    weight = (size * np.random.default_rng(0).normal(size=layer.shape)).astype(np.float32)
    unit = RoundingUnit(Carried(weight, False), layer, (bits,), None, None)
    (errors,) = unit.measure().errors
    assert errors is not None
    assert np.all(np.diff(errors) <= 0)
    assert errors[0] == 1
    assert errors[-1] == 0
    lost = np.square(rounded(layer, weight, bits, None).weight - weight).sum()
    assert errors[bits] == pytest.approx(lost / np.square(weight).sum(), rel=0.5)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("precision", ["auto", (16,)])
def test_half_precision_is_not_chosen_where_it_overflows(precision: Any, seen: bool) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    model = model_of([node], {"w": 1e6 * random_array(40, 30)}, {"x": ["N", 3, 40]}, ["y"])
    data: dict[str, Any] = {"data": {"x": random_array(40, 3, 40, seed=4)}} if seen else {}
    result = compress(model, Budget(mem=0.6), precision=precision, threads=1, **data)
    (decision,) = result.plan.decisions
    assert (decision.scheme, decision.rank) != ("stored", 16)
    assert decision.scheme is not None


def depthwise_network() -> onnx.ModelProto:
    """A depthwise convolution of 512 channels, then a pointwise one that is much smaller."""
    weights = {
        "d": random_array(512, 1, 3, 3),
        "p": random_array(4, 512, 1, 1),
        "b": random_array(512, seed=1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "d", "b"], ["a"], "depthwise", group=512),
        helper.make_node("Conv", ["a", "p"], ["y"], "pointwise"),
    ]
    return model_of(nodes, weights, {"x": ["n", 512, 5, 5]}, ["y"])


@pytest.mark.parametrize("data", [False, True])
def test_depthwise_convolutions_are_stored_in_fewer_bits(data: bool) -> None:
    model = depthwise_network()
    given_data = {"data": {"x": random_array(20, 512, 5, 5, seed=3)}} if data else {}
    result = compress(model, Budget(mem=0.3), precision="auto", threads=1, **given_data)
    made = {layer.name: layer for layer in result.report.layers}
    assert made["depthwise"].scheme == "stored"
    assert result.report.budget["mem"].reached <= 0.3
    # The bits that are left take a share of the answer that is small beside it.
    feeds = {"x": random_array(3, 512, 5, 5, seed=9)}
    before, after = (run_session(open_session(m, 1), feeds)["y"] for m in (model, result.model))
    assert np.linalg.norm(after - before) < 0.15 * np.linalg.norm(before)


def test_depthwise_convolutions_have_no_ranks() -> None:
    decisions = (Decision("depthwise", "channel", 1), Decision("pointwise"))
    with pytest.raises(UsageError, match="layer 'depthwise' has no scheme 'channel'; it has"):
        compress(depthwise_network(), plan=Plan(decisions), threads=1, precision="auto")
