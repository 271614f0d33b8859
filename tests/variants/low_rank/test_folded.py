"""Factors that are multiplied out when a session opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx import Budget, Plan, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.model_file import stored_bytes as model_bytes
from cobla_onnx.graph.layers import Layer, find_layers, read_weight
from cobla_onnx.plan import Decision
from cobla_onnx.variants.base import Asked, LayerCosts
from cobla_onnx.variants.low_rank.folded import (
    FOLDED_FROM,
    can_fold,
    no_faster,
    product_nodes,
)
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.registry import forms_of, require_family
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import model_of, random_array

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
# Operator, attributes, weight and input: every way in which a weight lies in its tensor.
LAYERS: list[tuple[str, dict[str, Any], tuple[int, ...], list[int]]] = [
    ("Conv", {"pads": [1, 1, 1, 0]}, (7, 5, 3, 2), [2, 5, 6, 6]),
    ("Conv", {}, (7, 6, 1, 1), [2, 6, 4, 4]),
    ("Conv", {"group": 2}, (6, 3, 2, 2), [1, 6, 5, 5]),
    ("Conv", {}, (6, 4, 3), [1, 4, 9]),
    ("Conv", {}, (5, 4, 2, 2, 2), [1, 4, 3, 3, 3]),
    ("ConvTranspose", {"strides": [2, 2]}, (5, 6, 2, 3), [1, 5, 4, 4]),
    ("MatMul", {}, (9, 7), [3, 9]),
    ("MatMul", {}, (2, 9, 7), [2, 3, 9]),
    ("Gemm", {"transB": 1}, (7, 9), [3, 9]),
    ("Gemm", {"transA": 1}, (9, 7), [9, 3]),
]
FORMATS = ("", "@16", "@8", "@5", "@4")


def network(case: int) -> onnx.ModelProto:
    op, attributes, shape, inputs = LAYERS[case]
    biased = op in ("Conv", "Gemm")
    node = helper.make_node(
        op, ["x", "w", *(["b"] if biased else [])], ["y"], "layer", **attributes
    )
    weights = {"w": random_array(*shape, seed=case)}
    if biased:
        count = shape[1] if op == "Gemm" and not attributes.get("transB") else shape[0]
        weights["b"] = random_array(count, seed=9)
    return model_of([node], weights, {"x": inputs}, ["y"])


def pair_of(model: onnx.ModelProto, name: str, rank: int) -> Replacement:
    (layer,) = find_layers(model).layers
    form, family = forms_of(layer)[name], require_family(name)
    rank = min(rank, family.most(layer, form))
    made = family.from_weights(layer, form, rank, read_weight(model, layer), None)
    return family.replace(layer, form, made)


def opened(model: onnx.ModelProto, level: Any, written: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    if written is not None:
        options.optimized_model_filepath = str(written)
    return ort.InferenceSession(model.SerializeToString(), options)


def foldable() -> list[tuple[int, str]]:
    found = []
    for case in range(len(LAYERS)):
        (layer,) = find_layers(network(case)).layers
        found += [(case, s.name) for s in schemes_for(layer) if can_fold(layer, s)]
    return found


@settings(deadline=None, max_examples=30)
@given(
    which=st.sampled_from(foldable()),
    bits=st.sampled_from(FORMATS),
    rank=st.integers(1, 5),
    functions=st.booleans(),
    opset=st.sampled_from((FOLDED_FROM, 13, 17)),
)
def test_a_folded_pair_is_the_layer_with_the_same_weight_at_every_level(
    which: tuple[int, str], bits: str, rank: int, functions: bool, opset: int
) -> None:
    case, scheme = which
    model = network(case)
    model.opset_import[0].version = opset
    model.ir_version = 8 if functions else 7
    pair = pair_of(model, scheme + bits, rank)
    folded = pair.as_folded()
    np.testing.assert_array_equal(folded.dense(), pair.dense())
    result, two_nodes = rewrite(model, [folded]), rewrite(model, [pair])
    onnx.checker.check_model(result, full_check=True)
    assert model_bytes(result) == model_bytes(two_nodes)
    dense = network(case)
    dense.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(pair.dense(), "w"))
    feeds = {"x": random_array(*LAYERS[case][3], seed=1)}
    (expected,) = opened(dense, LEVELS[0]).run(None, feeds)
    for level in LEVELS:
        (found,) = opened(result, level).run(None, feeds)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", ["", "@4"])
@pytest.mark.parametrize(("case", "scheme"), foldable())
def test_onnxruntime_makes_the_weight_once(
    case: int, scheme: str, bits: str, tmp_path: Path
) -> None:
    model = network(case)
    result = rewrite(model, [pair_of(model, scheme + bits, 2).as_folded()])
    opened(result, LEVELS[1], tmp_path / "open.onnx")
    kept = onnx.load(tmp_path / "open.onnx").graph.node
    assert [node.op_type for node in kept] == [LAYERS[case][0]]


@pytest.mark.parametrize(("case", "scheme"), [(0, "spatial-hw"), (2, "channel"), (5, "input")])
def test_the_reference_agrees(case: int, scheme: str) -> None:
    model = network(case)
    result = rewrite(model, [pair_of(model, scheme, 3).as_folded()])
    feeds = {"x": random_array(*LAYERS[case][3], seed=1)}
    (expected,) = opened(result, LEVELS[0]).run(None, feeds)
    (found,) = ReferenceEvaluator(result).run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_product_that_no_matmul_broadcasts_stays_two_nodes() -> None:
    model = network(2)
    (layer,) = find_layers(model).layers
    assert {s.name for s in schemes_for(layer) if not can_fold(layer, s)} == {
        "input",
        "spatial-hw",
        "spatial-wh",
    }
    half = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
        {"w": random_array(9, 7, dtype="float16")},
        {"x": [3, 9]},
        ["y"],
        elem_type=onnx.TensorProto.FLOAT16,
    )
    (layer,) = find_layers(half).layers
    (scheme,) = schemes_for(layer)
    assert not can_fold(layer, scheme)
    with pytest.raises(AssertionError):
        product_nodes(layer, scheme, ("first", "second"), Names(half))


def convolution(size: int = 64) -> tuple[onnx.ModelProto, Layer]:
    """A 3 x 3 convolution of 64 channels, at 64 positions."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "layer", pads=[1, 1, 1, 1])
    weight = random_array(size, size, 3, 3)
    model = model_of([node], {"w": weight}, {"x": [1, size, 8, 8]}, ["y"])
    (layer,) = find_layers(model).layers
    return model, layer


@given(rank=st.integers(1, 57), folding=st.booleans())
def test_pairs_fold_where_two_nodes_are_no_faster_and_have_the_macs_of_the_layer(
    rank: int, folding: bool
) -> None:
    _, layer = convolution()
    whole = 64 * 64 * 9 * 64
    costs = LayerCosts(whole, {"x": (1, 64, 8, 8), "y": (1, 64, 8, 8)}, folding)
    for name in ("channel", "channel@4"):
        form, family = forms_of(layer)[name], require_family(name)
        each = 64 * (9 * 64 + 64)
        # Blocks of 16 channels: 48 of them have 0.83 of the MACs, 32 have 0.56.
        assert family.folds(layer, form, rank, costs) == (folding and rank > 32)
        assert family.macs(layer, form, rank, costs) == (
            whole if folding and rank > 32 else rank * each
        )
        assert family.can_fold(layer, form)


def test_ranks_with_more_macs_than_the_layer_are_proposed_where_they_fold() -> None:
    """With strides the first node of `input` has four times the positions of the layer."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "layer", strides=[2, 2])
    model = model_of([node], {"w": random_array(64, 64, 2, 2)}, {"x": [1, 64, 8, 8]}, ["y"])
    (layer,) = find_layers(model).layers
    family, shapes = require_family("input"), {"x": (1, 64, 8, 8), "y": (1, 64, 4, 4)}
    asked, whole = Asked("input", EVERY_RANK), 64 * 64 * 4 * 16
    most, found = {}, {}
    for folding in (False, True):
        costs = LayerCosts(whole, shapes, folding)
        (proposal,) = family.propose(layer, costs, asked)
        most[folding] = int(proposal.levels[-1])
        found[folding] = family.curve(layer, costs, proposal, np.zeros(65), None)
    assert most == {False: 32, True: 51}
    macs, mem = found[True].costs["mac"], found[True].costs["mem"]
    two_nodes = 64 * 128 * np.arange(1, 52)
    np.testing.assert_array_equal(macs, np.where(np.arange(1, 52) <= 16, two_nodes, whole))
    np.testing.assert_array_equal(found[False].costs["mac"], two_nodes[:32])
    np.testing.assert_array_equal(mem[:32], found[False].costs["mem"])
    assert set(found[True].per_level) == {"mem"}


def test_ranks_that_are_no_faster_are_left_out_where_they_cannot_fold() -> None:
    """As in models whose opset has no constant shapes."""
    _, layer = convolution()
    shapes, whole = {"x": (1, 64, 8, 8), "y": (1, 64, 8, 8)}, 64 * 64 * 9 * 64
    family, asked = require_family("channel"), Asked("channel", EVERY_RANK, bits=(8,))
    for folding, quick, most in ((False, False, 57), (False, True, 32), (True, True, 57)):
        (proposal,) = family.propose(layer, LayerCosts(whole, shapes, folding, quick), asked)
        np.testing.assert_array_equal(proposal.levels, np.arange(1, most + 1))


def test_layers_without_blocks_fold_where_two_nodes_have_more_macs() -> None:
    (layer,) = find_layers(network(6)).layers
    assert not no_faster(layer, 4, 10, 40)
    assert no_faster(layer, 5, 10, 40)


def test_a_budget_of_bytes_alone_folds() -> None:
    model, _ = convolution()
    options: dict[str, Any] = {"precision": (16,), "threads": 1}
    bytes_alone = compress(model, Budget(mem=0.45), **options)
    (decision,) = bytes_alone.plan.decisions
    assert decision.folded
    (layer,) = bytes_alone.report.layers
    assert layer.folded
    for shown in (bytes_alone.report.to_markdown(), bytes_alone.report.to_html()):
        assert "channel, folded" in shown
    assert layer.macs.after == layer.macs.before == bytes_alone.report.budget["mac"].after
    assert [n.op_type for n in bytes_alone.model.graph.node].count("Conv") == 1
    macs_too = compress(model, Budget(mem=0.45, mac=0.9), **options)
    assert not macs_too.plan.decisions[0].folded
    assert [n.op_type for n in macs_too.model.graph.node].count("Conv") == 2
    as_it_is = compress(model, Budget(mem=0.8), threads=1)
    assert not as_it_is.plan.decisions[0].folded
    model.opset_import[0].version = FOLDED_FROM - 1
    assert not compress(model, Budget(mem=0.45), **options).plan.decisions[0].folded
    with pytest.raises(UsageError, match="layer 'layer' cannot be folded in a model of opset 8"):
        compress(model, plan=bytes_alone.plan, threads=1)


def test_a_plan_says_what_is_folded() -> None:
    model, _ = convolution()
    plan = Plan((Decision("layer", "channel@8", 8, folded=True),))
    content = json.loads(plan.to_json())["layers"]
    assert content == [
        {"layer": "layer", "scheme": "channel", "rank": 8, "bits": 8, "folded": True}
    ]
    assert Plan.from_json(plan.to_json()) == plan
    result = compress(model, plan=plan, threads=1)
    assert result.report.layers[0].macs.after == 64 * 64 * 9 * 64
    assert result.report.verification is not None
    assert result.report.verification.rewrite_max_error < 1e-4
    session = result.report.sizes.session
    assert session.before == session.after
    assert compress(model, plan=Plan((Decision("layer", "channel@8", 8),)), threads=1)


def test_what_has_no_factors_is_not_folded() -> None:
    model, _ = convolution()
    with pytest.raises(UsageError, match="layer 'layer' has no folded form of scheme 'stored'"):
        compress(model, plan=Plan((Decision("layer", "stored", 8, folded=True),)), threads=1)
    with pytest.raises(UsageError, match="layer 'layer' has no folded form of scheme 'input'"):
        compress(network(2), plan=Plan((Decision("layer", "input", 1, folded=True),)), threads=1)
