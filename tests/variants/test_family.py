"""A family of variants that only this test knows takes part from proposal to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, Plan, compress, inspect, sweep
from cobla_onnx.allocation import VariantCurve
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import Reason, find_layers, read_bias, read_weight
from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes
from cobla_onnx.latency.single_layer import micro_graph
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.runtime.session import open_session, random_feeds, run_session
from cobla_onnx.variants.base import Measured, Proposal, VariantFamily
from cobla_onnx.variants.registry import FAMILIES, family_of
from cobla_onnx.variants.replacement import Replacement
from tests.builders import model_of, random_array, small_network


@dataclass(frozen=True)
class Form:
    name: str = "half"


@dataclass(frozen=True)
class Rounded:
    """A weight in half precision."""

    weight: np.ndarray
    bias: np.ndarray | None


def rounded(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float16).astype(np.float64)


@dataclass(frozen=True)
class Unit:
    weight: Any

    def measure(self) -> Measured:
        whole = self.weight.array.astype(np.float64)
        lost = np.square(whole - rounded(whole)).sum() / np.square(whole).sum()
        return Measured([np.array([1.0, lost, 0.0])], [None], [])


@dataclass(frozen=True)
class FromSamples:
    seen: Any

    def approximate(self, layer, form, levels: Sequence[int]) -> list[Rounded]:
        weight, bias = read_weight(self.seen.model, layer), read_bias(self.seen.model, layer)
        return [Rounded(rounded(weight), bias) for _ in levels]


@dataclass(frozen=True)
class Stored(Replacement):
    """Half the bytes, a Cast that all uses share, and the node as it was."""

    def dense(self) -> np.ndarray:
        return self.arrays["half"].astype(np.float32)

    def shared(self, stored: Mapping[str, str], names):
        wide = names.tensor(f"{self.layer.name}/wide")
        name = names.node(f"{self.layer.name}/widen")
        node = helper.make_node("Cast", [stored["half"]], [wide], name, to=TensorProto.FLOAT)
        return [node], {"wide": wide}

    def nodes(self, node, use, operands, rest, names) -> list[onnx.NodeProto]:
        result = onnx.NodeProto()
        result.CopyFrom(node)
        result.input[self.layer.weight_input] = operands["wide"]
        return [result]


class Half(VariantFamily):
    name, level, outcome = "half", "grade", "stored in half precision"
    schemes = ("half",)
    refits = False

    def forms(self, layer):
        return (Form(),)

    def most(self, layer, form) -> int:
        return 2

    def propose(self, layer, costs, asked):
        if layer.stored_type != TensorProto.FLOAT:
            return Refusal(Reason.TYPE)
        return [Proposal(Form(), np.array([1]), 2)]

    def curve(self, layer, costs, proposal, errors, spectrum) -> VariantCurve:
        found = {"mem": np.array([layer.stored_bytes // 2])}
        if costs.macs is not None:
            found["mac"] = np.array([costs.macs])
        return VariantCurve("half", "half", proposal.levels, found, errors, nested=False)

    def params(self, layer, form, level) -> int:
        return layer.params

    def macs(self, layer, form, level, costs):
        return costs.macs

    def unit(self, layer, proposals, weight, cache, maker) -> Unit:
        return Unit(weight)

    def maker(self, seen) -> FromSamples:
        return FromSamples(seen)

    def from_weights(self, layer, form, level, weight, cache) -> Rounded:
        return Rounded(rounded(weight), None)

    def replace(self, layer, form, approximation) -> Stored:
        return Stored(layer, {"half": approximation.weight.astype(np.float16)}, None)

    def stand_in(self, layer, form, level) -> Stored:
        return Stored(layer, {"half": np.ones(layer.shape, np.float16)}, None)


@pytest.fixture(autouse=True)
def half(monkeypatch):
    monkeypatch.setitem(FAMILIES, "half", Half())


def shared_weight() -> onnx.ModelProto:
    """Two products by one weight."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], "two"),
    ]
    return model_of(nodes, {"w": random_array(24, 24)}, {"x": [3, 24]}, ["y"])


@pytest.mark.parametrize("solver", ["slsqp", "milp"])
def test_it_is_proposed_chosen_written_and_verified(solver):
    model = small_network()
    result = compress(model, Budget(mem=0.5), solver=solver, threads=1)
    chosen = {d.layer for d in result.plan.decisions if d.scheme == "half"}
    assert chosen
    names = [node.name for node in result.model.graph.node]
    for layer in chosen:
        assert names[names.index(layer) - 1] == f"{layer}/widen"
    assert stored_bytes(result.model) <= 0.5 * stored_bytes(model)
    assert result.report.verification.rewrite_max_error < 1e-4
    for entry in result.report.layers:
        if entry.name in chosen:
            assert (entry.decision, entry.scheme, entry.rank) == (
                "stored in half precision",
                "half",
                None,
            )
            assert 0 < entry.error < 1e-3
    for render in (result.report.to_json, result.report.to_html, result.report.to_markdown):
        assert "half" in render()


def test_its_nodes_are_as_many_as_it_says():
    result = compress(shared_weight(), Budget(mem=0.5), threads=1)
    assert [node.op_type for node in result.model.graph.node] == [
        "Cast",
        "MatMul",
        "Relu",
        "MatMul",
    ]
    assert [t.data_type for t in result.model.graph.initializer] == [TensorProto.FLOAT16]


def test_a_plan_holds_it_and_gives_the_same_bytes():
    result = compress(small_network(), Budget(mem=0.5), threads=1)
    text = result.plan.to_json()
    assert '"grade": 1' in text
    again = compress(small_network(), plan=Plan.from_json(text), threads=1)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    with pytest.raises(UsageError, match="has grades 1 to 2, not 3"):
        compress(small_network(), plan=Plan.from_json(text.replace('"grade": 1', '"grade": 3')))
    with pytest.raises(UsageError, match="there is no field 'rank'"):
        Plan.from_json(text.replace('"grade": 1', '"rank": 1'))


@pytest.mark.parametrize("objective", ["output", "loss"])
def test_it_competes_on_data(objective):
    data = {"x": random_array(40, 3, 12, 12, seed=3)}
    options: dict[str, Any] = {"data": data, "threads": 1, "objective": objective}
    found = compress(small_network(), Budget(mem=0.4), **options)
    schemes = {d.scheme for d in found.plan.decisions}
    assert "half" in schemes
    assert schemes - {"half", None}, "0.4 is not within reach of half precision alone"
    assert found.report.budget["mem"].reached <= 0.4
    assert found.report.verification.rewrite_max_error < 1e-4


def test_costs_of_all_families_add_up_in_each_budget():
    budgets = [Budget(mem=0.6, mac=0.8), Budget(mem=0.55)]
    points = sweep(small_network(), budgets, threads=1).points
    for budget, point in zip(budgets, points, strict=True):
        assert point.refused is None
        assert point.mem <= budget.mem
    assert points[0].mac <= 0.8
    # Which half precision does not change.
    assert points[1].mac == 1.0
    assert {d.scheme for d in points[1].plan.decisions} <= {"half", None}


def test_other_looks_at_the_model_leave_it_out_or_show_it():
    analysis = analyse(small_network(), input_shapes={"x": (1, 3, 12, 12)})
    for variants in analysis.variants:
        assert [c.scheme for c in variants.curves.curves][-1] == "half"
        assert variants.forms[-1] == Form()
    shown = inspect(small_network(), threads=1)
    assert all(scheme.name != "half" for layer in shown.layers for scheme in layer.schemes)


def test_it_is_timed_alone():
    model = small_network()
    shapes = infer_shapes(model, fixed_input_shapes(model, {"x": (1, 3, 12, 12)}))
    layer = find_layers(model).layers[0]
    alone = micro_graph(model, layer, layer.uses[0], shapes).replaced("half", 1)
    assert [node.op_type for node in alone.graph.node] == ["Cast", "Conv"]
    session = open_session(alone, 1)
    (found,) = run_session(session, random_feeds(session, {"x": (1, 3, 12, 12)}, seed=0)).values()
    assert np.isfinite(found).all()


def test_it_is_gone_afterwards(monkeypatch):
    monkeypatch.delitem(FAMILIES, "half")
    assert family_of("half") is None
    assert family_of("channel") is FAMILIES["low-rank"]
