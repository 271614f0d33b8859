"""Tables as two factors, with some rows as they are: a lookup of short rows, and a product."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx import Budget, Plan, compress, inspect
from cobla_onnx.calibration.frequencies import RowCounts
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.io.model_file import stored_bytes as model_bytes
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.macs import infer_shapes
from cobla_onnx.latency.single_layer import micro_graph
from cobla_onnx.pipeline.search import refit
from cobla_onnx.plan import Decision
from cobla_onnx.runtime.session import open_session, random_feeds, run_session
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, LayerCosts, OnlyForm
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from cobla_onnx.variants.low_rank.table_family import TABLE, LowRankTables
from cobla_onnx.variants.low_rank.tables import TableFactorizer, fixed_bytes
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import model_of, random_array
from tests.lookups import ROWS, WIDTH, few_directions, lookup_model, text_model, texts

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], level: Any) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@settings(max_examples=30)
@given(
    opset=st.sampled_from([9, 11, 13, 17, 21]),
    shape=st.sampled_from([[], [5], [2, 3], [1, 2, 2]]),
    size=st.sampled_from([(9, 6), (70, 64)]),
    dtype=st.sampled_from(["float32", "float16", "float64"]),
    rank=st.integers(1, 6),
    narrow=st.booleans(),
)
def test_short_rows_times_the_second_factor_are_the_rows(opset, shape, size, dtype, rank, narrow):
    rows, _ = size
    table = random_array(*size, dtype=dtype)
    kind = TensorProto.INT32 if narrow else TensorProto.INT64
    model = lookup_model(table, shape, opset=opset, kind=kind, ir_version=4 if opset < 15 else 8)
    (layer,) = find_layers(model).layers
    family, form = LowRankTables(), OnlyForm(TABLE)
    made = family.from_weights(layer, form, rank, read_weight(model, layer), None)
    replacement = family.replace(layer, form, made)
    result = rewrite(model, [replacement])
    onnx.checker.check_model(result, full_check=True)
    kinds = [node.op_type for node in result.graph.node]
    more = ["Gather", "Cast", "Gather", "Add"] * (rows == 70)
    assert kinds == ["Gather", "MatMul", *more]
    np.testing.assert_array_equal(made.best, replacement.best)
    assert len(made.best) == 2 * (rows == 70)
    layer_bytes = fixed_bytes(layer) + rank * sum(size) * table.itemsize
    assert model_bytes(result) == layer_bytes
    least = -rows if opset >= 11 else 0
    ids = np.random.default_rng(rank).integers(
        least, 9, shape, helper.tensor_dtype_to_np_dtype(kind)
    )
    tolerance = {"float32": 1e-5, "float16": 2e-2, "float64": 1e-12}[dtype]
    for level in LEVELS:
        found = run(result, {"ids": ids}, level)
        assert found.dtype == table.dtype
        np.testing.assert_allclose(found, made.weight[ids], rtol=tolerance, atol=9 * tolerance)
    np.testing.assert_array_equal(made.weight[made.best], table[made.best])
    if rank == 6 == min(size):
        np.testing.assert_allclose(made.weight, table, atol=tolerance)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=66, max_size=66), st.integers(1, 20))
def test_no_other_factors_lose_less_on_one_hot_vectors(numbers, rank):
    """By the definition: the truncated SVD of diag(f)^(1/2) T, without the rows that are kept."""
    table = random_array(66, 64).astype(np.float64)
    frequencies = RowCounts(np.array(numbers, np.float64)).frequencies()
    solver = TableFactorizer(table, frequencies)
    rest = np.sqrt(frequencies)[:, None] * table
    total = np.square(rest).sum()
    rest[solver.best] = 0
    values = np.linalg.svd(rest, compute_uv=False)
    np.testing.assert_allclose(solver.singular_values, values, atol=1e-7)
    lost = frequencies @ np.square(solver.factorize(rank).weight - table).sum(axis=1)
    assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-6)
    assert solver.errors()[rank] == pytest.approx(lost / total, rel=1e-6)


def test_the_predicted_error_is_that_of_the_rows_by_frequency():
    model, data = text_model(), texts(30)
    layers = find_layers(model).layers
    seen = Seen(model, layers, lambda: [data])
    family, form = LowRankTables(), OnlyForm(TABLE)
    maker = FromData(seen).maker(family)
    (layer, *_), table = layers, read_weight(model, layers[0]).astype(np.float64)
    counts = seen.counts(layer)
    assert counts is not None
    frequencies = counts.frequencies()
    (errors,) = family.unit(layer, [], Carried(table, False), None, maker).measure().errors
    assert np.all(np.diff(errors) <= 0)
    assert (errors[0], errors[-1]) == (1, 0)

    def lost(weight: np.ndarray) -> float:
        return float(frequencies @ np.square(weight - table).sum(axis=1))

    energy = float(frequencies @ np.square(table).sum(axis=1))
    ranks = (1, 5, 17)
    for rank, made in zip(ranks, maker.approximate(layer, form, ranks), strict=True):
        assert errors[rank] == pytest.approx(lost(made.weight) / energy, rel=1e-6)
        alone = family.from_weights(layer, form, rank, table, None)
        assert lost(made.weight) <= lost(alone.weight) * (1 + 1e-9)


def test_ranks_of_a_lookup_cost_macs_and_the_report_says_so():
    model, data = text_model(), texts(40)
    plan = Plan((Decision("tokens", "table", 6),))
    result = compress(model, plan=plan, data=data, threads=1)
    (entry,) = [layer for layer in result.report.layers if layer.name == "tokens"]
    assert (entry.macs.before, entry.macs.after) == (0, 7 * 6 * WIDTH)
    assert entry.params.after == 6 * (ROWS + WIDTH) + 3 * WIDTH
    use = result.report.budget["mac"]
    assert use.after == use.before + 7 * 6 * WIDTH
    assert result.report.verification is not None
    assert result.report.verification.rewrite_max_error < 1e-5
    for render in (result.report.to_json, result.report.to_html, result.report.to_markdown):
        assert "tokens" in render()


@pytest.mark.parametrize("objective", ["weights", "output", "loss"])
def test_a_budget_of_bytes_reaches_tables(objective):
    model, data = text_model(), texts(40)
    options: dict[str, Any] = {} if objective == "weights" else {"data": data}
    result = compress(model, Budget(mem=0.5), objective=objective, threads=1, **options)
    kinds = {layer.name: layer.decision for layer in result.report.layers}
    assert kinds["tokens"] == "factorised"
    assert result.report.budget["mem"].reached <= 0.5
    names = [node.name for node in result.model.graph.node]
    assert {"tokens/first_factor", "tokens/lowrank", "tokens/best", "tokens"} <= set(names)


@pytest.mark.parametrize("budget", [Budget(mac=0.6), Budget(mem=0.8, mac=0.7)])
def test_where_macs_are_limited_a_lookup_gets_no_ranks(budget):
    result = compress(text_model(), budget, threads=1)
    assert {d.layer for d in result.plan.decisions if d.scheme} <= {"hidden", "classes"}
    states = {layer.name: layer.reason for layer in result.report.layers}
    assert states["tokens"] == "two factors would not be faster (whole rows take no MACs)"


def test_a_lookup_is_inspected_and_timed():
    found = inspect(text_model(), threads=1)
    (tokens,) = [layer for layer in found.layers if layer.name == "tokens"]
    assert (tokens.op, tokens.macs, tokens.shape) == ("Gather", 0, (ROWS, WIDTH))
    assert tokens.schemes[0].break_even_macs is None
    model = text_model()
    shapes = infer_shapes(model, {"ids": (2, 7)})
    layer = find_layers(model).layers[0]
    alone = micro_graph(model, layer, layer.uses[0], shapes)
    for each in (alone.model, alone.replaced("table", 3)):
        session = open_session(each, 1)
        (found_rows,) = run_session(
            session, random_feeds(session, {"ids": (2, 7)}, seed=0)
        ).values()
        assert found_rows.shape == (2, 7, WIDTH)


def test_a_table_behind_a_cast_stays_half_as_large():
    table = few_directions(40, 12, 3, seed=1).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["table"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["wide", "ids"], ["y"], "embedding"),
    ]
    model = lookup_model(table, [3])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 12]))
    result = compress(model, plan=Plan((Decision("embedding", "table", 3),)), threads=1)
    assert {t.data_type for t in result.model.graph.initializer} == {TensorProto.FLOAT16}
    (first, *_) = result.model.graph.node
    assert first.op_type == "Cast"
    assert first.input[0] == "embedding/second_factor"


def test_costs_follow_from_the_shapes():
    model = text_model()
    layer = find_layers(model).layers[0]
    shapes = infer_shapes(model, {"ids": (3, 7)})
    family = LowRankTables()
    assert family.macs(layer, OnlyForm(TABLE), 4, LayerCosts(0, shapes)) == 3 * 7 * WIDTH * 4
    assert family.macs(layer, OnlyForm(TABLE), 4, LayerCosts(0, {})) is None
    (proposal,) = family.propose(layer, LayerCosts(0, shapes), Asked("auto", EVERY_RANK))
    curve = family.curve(layer, LayerCosts(0, shapes), proposal, np.zeros(WIDTH + 1), None)
    last = int(curve.levels[-1])
    assert curve.costs["mem"][-1] == fixed_bytes(layer) + 4 * last * (ROWS + WIDTH)
    assert curve.costs["mem"][-1] < layer.stored_bytes
    assert curve.costs["mem"][-1] + 4 * (ROWS + WIDTH) >= layer.stored_bytes


def test_where_the_number_of_rows_is_not_known_ranks_are_not_counted_as_free():
    layer = find_layers(text_model()).layers[0]
    family, asked = LowRankTables(), Asked("auto", EVERY_RANK)
    refused = family.propose(layer, LayerCosts(0, {}), asked)
    assert refused == Refusal(Reason.NOT_FASTER, "shapes not known")
    # Without any MACs there is nothing that they would have to be counted with.
    assert not isinstance(family.propose(layer, LayerCosts(None, {}), asked), Refusal)


@pytest.mark.parametrize("decision", [("table", 4), ("rows", 4)])
def test_two_lookups_share_what_takes_the_table_s_place(decision):
    nodes = [
        helper.make_node("Gather", ["table", name], [f"{name}_rows"], name)
        for name in ("left", "right")
    ]
    nodes.append(helper.make_node("Sub", ["left_rows", "right_rows"], ["y"], "apart"))
    inputs: dict[str, list[int | str]] = {"left": ["N", 3], "right": ["N", 3]}
    model = model_of(nodes, {"table": few_directions(80, 64, 4, seed=3)}, inputs, ["y"])
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.INT64
    drawn = np.random.default_rng(1).integers(0, 80, (2, 30, 3))
    data = {"left": drawn[0], "right": drawn[1]}
    result = compress(model, plan=Plan((Decision("left", *decision),)), data=data, threads=1)
    assert result.report.verification is not None
    assert result.report.verification.rewrite_max_error < 1e-5
    stored = [t.name for t in result.model.graph.initializer]
    assert len(stored) == len(set(stored))
    assert "table" not in stored
    assert {node.name for node in result.model.graph.node} >= {"left", "right", "apart"}


def test_numbers_of_rows_that_layers_choose_are_not_refitted_to(monkeypatch):
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["scores"], "scores"),
        helper.make_node("ArgMax", ["scores"], ["ids"], "choice", axis=-1, keepdims=0),
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embedding"),
        helper.make_node("MatMul", ["rows", "w2"], ["a"], "hidden"),
        helper.make_node("MatMul", ["scores", "w3"], ["b"], "skip"),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    weights = {
        "w1": few_directions(16, 40, 5, seed=1),
        "table": few_directions(40, 24, 5, seed=4),
        "w2": few_directions(24, 20, 5, seed=7),
        "w3": few_directions(40, 20, 5, seed=10),
    }
    model = model_of(nodes, weights, {"x": ["N", 16]}, ["y"])
    data = {"x": random_array(60, 16, seed=5)}
    refitted: list[str] = []
    made = refit._Refit.candidates

    def recorded(self: Any, joints: Any, threads: int) -> Any:
        refitted.append(self._entry.layer.name)
        return made(self, joints, threads)

    monkeypatch.setattr(refit._Refit, "candidates", recorded)
    names = ("scores", "embedding", "hidden", "skip")
    schemes = {"embedding": "table"}
    plan = Plan(tuple(Decision(name, schemes.get(name, "matrix"), 6) for name in names))
    result = compress(model, plan=plan, data=data, threads=1)
    decided = {layer.name: layer.decision for layer in result.report.layers}
    assert decided["embedding"] == "factorised"
    assert refitted == ["hidden", "skip"]
