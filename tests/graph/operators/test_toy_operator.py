"""An operator that the package does not know: everything about it stands in this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx import Budget, compress, inspect
from cobla_onnx.autodiff.vjp.registry import RULES
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.operators import base
from cobla_onnx.graph.operators.patches import DensePatch, cut
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.matricisation import SCHEMES
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from tests.builders import FLOAT, model_of, random_array

EQUATION = "bi,oi->bo"


@dataclass(frozen=True)
class Rows(DensePatch):
    """The rows of a matrix."""

    data: str
    size: int
    groups: int = 1

    def positions(self, data: np.ndarray) -> int:
        return len(data)

    def vectors(
        self, data: np.ndarray, chosen: np.ndarray | None = None, each: int = 1
    ) -> Iterator[np.ndarray]:
        rows = data if chosen is None else data[chosen]
        for part in cut(len(rows), self.size, each):
            yield rows[part].T[None]

    def outputs(self, output: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        return output.T[None] if chosen is None else output[chosen].T[None]


class Einsum:
    """ONNX's Einsum, where it is a product of the data's rows with a weight's."""

    kind = "einsum"
    op_types = ("Einsum",)
    domain = ""
    weight_inputs = (1,)
    incidental = False

    def reading(self, node):
        return {"equation": helper.get_node_attr_value(node, "equation").decode()}

    def check(self, node, shape, label):
        if self.reading(node)["equation"] == EQUATION:
            base.check_axes(node, shape, label, 2, 2)

    def refusal(self, layer, shapes):
        equation = layer.attributes["equation"]
        return None if equation == EQUATION else Refusal(Reason.OPERATOR, equation)

    def output_axis(self, layer):
        return base.OutputAxis(-1, layer.shape[0])

    def adds_bias(self, node):
        return False

    def macs(self, node, shapes):
        return base.elements(shapes.get(node.output[0]), (shapes.get(node.input[1]) or (None,))[1:])

    def patch(self, node, layer, use):
        return Rows(use.data, layer.shape[1])


class Dense(Einsum):
    """A product of somebody's own domain, which a function of the model computes."""

    kind = "dense"
    op_types = ("Dense",)
    domain = "somebody.own"

    def reading(self, node):
        return {}

    def check(self, node, shape, label):
        base.check_axes(node, shape, label, 2, 2)

    def refusal(self, layer, shapes):
        return None

    def patch(self, node, layer, use):
        return Refusal(Reason.UNREADABLE, "nobody wrote how")


def rows_scheme(layer, wanted):
    """The weight is stored as Gemm with transB reads it; the last factor stays the operator's."""
    return (ProductScheme("matrix", layer.shape, 1, transposed=True, data_left=True),)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toys = Einsum(), Dense()
    for operator in toys:
        base.register(operator)
        monkeypatch.setitem(SCHEMES, operator.kind, rows_scheme)
    yield
    for operator in toys:
        base.OPERATORS.pop(operator.op_types[0])


def weight(outputs: int, inputs: int, seed: int) -> np.ndarray:
    """A weight of few large singular values."""
    left, right = random_array(outputs, 6, seed=seed), random_array(6, inputs, seed=seed + 1)
    return (left @ right + 0.1 * random_array(outputs, inputs, seed=seed + 2)) / np.sqrt(inputs)


def network(op_type: str, **values: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node(op_type, ["x", "w1"], ["a"], "first", **values),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node(op_type, ["r", "w2"], ["y"], "second", **values),
    ]
    weights = {"w1": weight(32, 24, 1), "w2": weight(20, 32, 5)}
    inputs: dict[str, list[int | str]] = {"x": ["N", 24]}
    return model_of(nodes, {n: w.astype("float32") for n, w in weights.items()}, inputs, ["y"])


def dense_network() -> onnx.ModelProto:
    model = network("Einsum", equation=EQUATION)
    for node in model.graph.node:
        if node.op_type == "Einsum":
            node.op_type, node.domain = "Dense", "somebody.own"
            del node.attribute[:]
    body = [
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["data", "turned"], ["result"]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(
        helper.make_function("somebody.own", "Dense", ["data", "weight"], ["result"], body, opsets)
    )
    model.opset_import.append(helper.make_opsetid("somebody.own", 1))
    return model


def outputs_of(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    result: np.ndarray = run_session(open_session(model, 1), {"x": x})["y"]
    return result


def check_compressed(model: onnx.ModelProto, result: Any, op_type: str) -> None:
    """Both layers run by two nodes, the last of them the operator's, and give about the same."""
    decisions = {layer.name: layer.decision for layer in result.report.layers}
    assert decisions["first"] == decisions["second"] == "factorised"
    kinds = [node.op_type for node in result.model.graph.node]
    assert kinds == ["MatMul", op_type, "Relu", "MatMul", op_type]
    x = random_array(64, 24, seed=9)
    whole, less = outputs_of(model, x), outputs_of(result.model, x)
    assert np.linalg.norm(less - whole) < 0.4 * np.linalg.norm(whole)


def test_its_layers_are_found_and_counted():
    model = network("Einsum", equation=EQUATION)
    assert [layer.op for layer in find_layers(model).layers] == ["Einsum", "Einsum"]
    found = inspect(model)
    assert found.mac_total == 32 * 24 + 20 * 32
    others = [helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,io->bo")]
    (skipped,) = find_layers(model_of(others, {"w": weight(4, 4, 1)}, {"x": [2, 4]}, ["y"])).skipped
    assert (skipped.reason, skipped.detail) == (Reason.OPERATOR, "bi,io->bo")


@pytest.mark.parametrize("budget", [Budget(mem=0.6), Budget(mac=0.6)])
def test_its_layers_are_compressed_by_their_weights(budget):
    model = network("Einsum", equation=EQUATION)
    check_compressed(model, compress(model, budget), "Einsum")


def test_its_layers_are_compressed_by_data():
    model = network("Einsum", equation=EQUATION)
    x = random_array(40, 24, seed=3)
    result = compress(model, Budget(mem=0.6), data={"x": x})
    check_compressed(model, result, "Einsum")


def test_with_a_rule_for_its_gradient_the_loss_of_the_network_decides(monkeypatch):
    def rule(g, step):
        return [g.matmul(step.dy, step.node.input[1]), g.matmul(g.swap(step.dy, 2), step.x)]

    monkeypatch.setitem(RULES, "Einsum", rule)
    model = network("Einsum", equation=EQUATION)
    x = random_array(40, 24, seed=3)
    result = compress(model, Budget(mem=0.6), data={"x": x}, objective="loss")
    assert result.history
    check_compressed(model, result, "Einsum")


def test_an_operator_of_a_domain_of_its_own():
    model = dense_network()
    check_compressed(model, compress(model, Budget(mem=0.6)), "Dense")


def test_data_says_nothing_of_an_operator_without_patches():
    model = dense_network()
    model.graph.node.append(helper.make_node("MatMul", ["y", "w3"], ["z"], "last"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(random_array(20, 40), "w3"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", FLOAT, ["N", 40]))
    data = {"x": random_array(40, 24, seed=3)}
    result = compress(model, Budget(mem=0.9), data=data)
    states = {layer.name: (layer.decision, layer.reason) for layer in result.report.layers}
    for name in ("first", "second"):
        assert states[name] == ("skipped", f"{Reason.UNREADABLE.value} (nobody wrote how)")
    assert states["last"][0] == "factorised"


def test_an_operator_without_schemes_is_left(monkeypatch):
    monkeypatch.delitem(SCHEMES, "einsum")
    found = inspect(network("Einsum", equation=EQUATION))
    assert found.layers == ()
    assert {item.reason for item in found.left_alone} == {Reason.OPERATOR.value}
