"""Factors in fewer bits, from the option to the file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, Plan, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.model_file import stored_bytes as model_bytes
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.plan import Decision
from cobla_onnx.runtime.session import open_session, random_feeds, run_session
from cobla_onnx.variants.coded_factors.family import CodedFactorsFamily
from cobla_onnx.variants.coded_factors.form import CodedScheme, coded_name, split_name
from cobla_onnx.variants.coded_factors.stored import pair_bytes
from cobla_onnx.variants.coded_factors.units import beyond_half
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.storage.precision import FORMATS
from tests.builders import model_of, random_array, small_network
from tests.variants.storage.test_family import LAYERS, one_layer

FAMILY = CodedFactorsFamily()


def some_form(case: int, bits: int, pick: int) -> tuple[onnx.ModelProto, Any, CodedScheme]:
    model = one_layer(case)
    (layer,) = find_layers(model).layers
    forms = [form for form in FAMILY.forms(layer) if form.bits == bits]
    return model, layer, forms[pick % len(forms)]


@settings(deadline=None, max_examples=60)
@given(
    case=st.integers(0, len(LAYERS) - 1),
    bits=st.sampled_from(FORMATS),
    pick=st.integers(0, 3),
    rank=st.integers(1, 4),
    function=st.booleans(),
)
def test_the_model_computes_with_the_rounded_factors_in_the_bytes_that_are_stated(
    case: int, bits: int, pick: int, rank: int, function: bool
) -> None:
    model, layer, form = some_form(case, bits, pick)
    model.ir_version = 8 if function else 7
    rank = min(rank, FAMILY.most(layer, form))
    made = FAMILY.from_weights(layer, form, rank, read_weight(model, layer), None)
    replacement = FAMILY.replace(layer, form, made)
    weight = replacement.dense()
    np.testing.assert_allclose(weight, made.weight, rtol=1e-5, atol=1e-5)
    result = rewrite(model, [replacement])
    onnx.checker.check_model(result)
    assert (len(result.functions) > 0) == (function and bits < 16)
    assert model_bytes(result) <= pair_bytes(layer, form, np.array([rank]))[0]
    dense = model_of(list(model.graph.node), {"w": weight}, {"x": LAYERS[case][3]}, ["y"])
    feeds = random_feeds(open_session(dense, 1), {"x": LAYERS[case][3]}, seed=0)
    found, expected = (run_session(open_session(m, 1), feeds)["y"] for m in (result, dense))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_names_hold_scheme_and_bits() -> None:
    assert split_name(coded_name("spatial-hw", 16)) == ("spatial-hw", 16)
    assert split_name("stored") == ("stored", None)
    assert set(FAMILY.schemes) >= {"matrix@2", "input@8", "spatial-wh@16"}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("channel@4", "has no scheme 'channel' in 4 bits; it has matrix, stored$"),
        ("rows", "has no scheme 'rows'; it has matrix, stored$"),
        ("matrix@x", "has no scheme 'matrix@x'; it has"),
    ],
)
def test_a_scheme_that_a_layer_does_not_have(scheme: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress(one_layer(4), plan=Plan((Decision("layer", scheme, 2),)))


def test_a_plan_with_factors_in_bits_is_read_edited_and_applied() -> None:
    model = one_layer(4)
    text = Plan((Decision("layer", "matrix@4", 3),)).to_json()
    content = json.loads(text)
    assert content["layers"] == [{"layer": "layer", "scheme": "matrix", "rank": 3, "bits": 4}]
    content["layers"][0]["bits"] = 5
    plan = Plan.from_json(json.dumps(content))
    assert plan.decisions == (Decision("layer", "matrix@5", 3),)
    result = compress(model, plan=plan, threads=1)
    assert [f.name for f in result.model.functions] == ["Decode5Cut"]
    assert result.report.verification is not None
    assert result.report.verification.rewrite_max_error < 1e-4


def test_a_plan_with_a_rank_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="has ranks 1 to 7, not 8"):
        compress(one_layer(4), plan=Plan((Decision("layer", "matrix@4", 8),)), threads=1)


@pytest.mark.parametrize("objective", ["weights", "output", "loss"])
def test_ranks_in_bits_serve_small_budgets(objective: str) -> None:
    options: dict[str, Any] = {"threads": 1, "precision": (4, 3), "objective": objective}
    if objective != "weights":
        options["data"] = {"x": random_array(40, 3, 12, 12, seed=3)}
    model = small_network()
    found = compress(model, Budget(mem=0.1), **options)
    assert model_bytes(found.model) <= 0.1 * model_bytes(model)
    used = {(d.scheme or "")[-2:] for d in found.plan.decisions}
    assert used & {"@3", "@4"}
    again = compress(model, plan=Plan.from_json(found.plan.to_json()), **options)
    assert again.model.SerializeToString() == found.model.SerializeToString()


def test_macs_and_bytes_at_once_take_factors_in_bits() -> None:
    model = small_network()
    found = compress(model, Budget(mem=0.2, mac=0.6), precision=(8,), threads=1)
    assert model_bytes(found.model) <= 0.2 * model_bytes(model)
    assert {(d.scheme or "")[-2:] for d in found.plan.decisions} >= {"@8"}


def test_a_plan_alone_says_what_bits_are_considered() -> None:
    """Without the option that chose them: of a column, bits are all that there is."""
    model = model_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "square"),
            helper.make_node("MatMul", ["a", "v"], ["y"], "column"),
        ],
        {"w": random_array(40, 40), "v": random_array(40, 1, seed=1)},
        {"x": [3, 40]},
        ["y"],
    )
    plan = Plan((Decision("square", "matrix@8", 4), Decision("column", "stored", 8)))
    asked = compress(model, plan=plan, precision="auto", threads=1)
    alone = compress(model, plan=plan, threads=1)
    assert alone.model.SerializeToString() == asked.model.SerializeToString()
    for result in (alone, asked):
        assert result.report.layers[0].macs.after == 3 * 4 * (40 + 40)
        assert result.report.layers[0].error is not None


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("size", [1e6, 1e12])
def test_half_precision_is_not_proposed_where_a_factor_overflows(size: float, seen: bool) -> None:
    """A factor has the root of the size of its weight: the first of these fits."""
    weight = size * (random_array(40, 30) @ random_array(30, 30, seed=2))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    model = model_of([node], {"w": weight}, {"x": ["N", 3, 40]}, ["y"])
    (layer,) = find_layers(model).layers
    assert beyond_half(read_weight(model, layer)) == (size == 1e12)
    data: dict[str, Any] = {"data": {"x": random_array(40, 3, 40, seed=4)}} if seen else {}
    result = compress(model, Budget(mem=0.4), precision=(16,), threads=1, **data)
    (decision,) = result.plan.decisions
    assert decision.scheme == ("matrix" if size == 1e12 else "matrix@16")
