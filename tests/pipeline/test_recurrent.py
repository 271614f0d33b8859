"""Models with recurrent layers, compressed from end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress, errors, inspect
from cobla_onnx.calibration.patches import has_products
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.pipeline.proof import tolerance
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.storage.family import StorageFamily
from tests.builders import random_array
from tests.recurrent_models import sequence_model

STORAGE = StorageFamily()
READ, STATE = ("first/W", "second/W"), ("first/R", "second/R")
# Inputs that lie near a subspace: only data tell what the first layers need not keep.
MIX = np.geomspace(1, 0.01, 24) * np.linalg.qr(random_array(24, 24, seed=77))[0]


def samples(count: int, seed: int) -> np.ndarray:
    return np.asarray(random_array(count, 12, 24, seed=seed) @ MIX.T * 3, np.float32)


def decisions(result: Any) -> dict[str, str]:
    return {layer.name: layer.decision for layer in result.report.layers}


def error(result: Any, model: onnx.ModelProto) -> float:
    feeds = {"x": samples(30, seed=200)}
    whole, less = (run_session(open_session(m, 1), feeds)["y"] for m in (model, result.model))
    return float(np.linalg.norm(less - whole) / np.linalg.norm(whole))


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bits", [(8, 3), (4, 8), (8, 8)])
@pytest.mark.parametrize("at_once", [1, 1 << 29])
def test_both_weights_of_a_node_are_proved_together(monkeypatch, op, bits, at_once):
    """Whether or not one alone reads DequantizeLinear, and however little fits into memory."""
    monkeypatch.setattr("cobla_onnx.pipeline.proof.DENSE_AT_ONCE", at_once)
    names = [(READ[0], bits[0]), (STATE[0], bits[1]), (READ[1], bits[1]), (STATE[1], bits[0])]
    plan = Plan(tuple(Decision(name, "stored", each) for name, each in names))
    for storage in ("qdq", "cast"):
        result = compress(sequence_model(op), plan=plan, storage=storage, threads=1)
        assert result.report.verification.rewrite_max_error < 1e-5
        assert {decisions(result)[name] for name, _ in names} == {"stored in fewer bits"}


def test_inspect_lists_both_weights():
    found = inspect(sequence_model("GRU"))
    assert [layer.name for layer in found.layers] == ["before", *READ, "after"]
    assert {item.name: item.reason for item in found.left_alone} == dict.fromkeys(
        STATE, Reason.UNASKED.value
    )
    layers = sum(layer.macs or 0 for layer in found.layers)
    # The product with the state is in the model's MACs, whether or not R can be changed.
    assert found.mac_total == layers + 12 * 16 * (2 * 48 + 48)


@pytest.mark.parametrize("budget", [Budget(mem=0.6), Budget(mac=0.6)])
@pytest.mark.parametrize("given", [False, True])
def test_ranks_alone(budget, given):
    model = sequence_model("LSTM")
    result = compress(model, budget, data={"x": samples(30, 1)} if given else None, threads=1)
    found = decisions(result)
    assert {found[name] for name in READ} == {"factorised"}
    assert {found[name] for name in STATE} == {"skipped"}
    (name,) = (n for n in ("mem", "mac") if getattr(budget, n) is not None)
    assert result.report.budget[name].reached <= 0.6
    assert error(result, model) < 0.3


@pytest.mark.parametrize(
    ("op", "outputs"), [("LSTM", ("steps",)), ("GRU", ("last",)), ("RNN", ("steps",))]
)
def test_both_weights_in_few_bits(op, outputs):
    model = sequence_model(op, outputs=outputs)
    result = compress(
        model, Budget(mem=0.3), data={"x": samples(30, 1)}, precision="auto", threads=1
    )
    found = decisions(result)
    assert {found[name] for name in STATE} == {"stored in fewer bits"}
    assert {found[name] for name in READ} <= {"stored in fewer bits", "factorised in fewer bits"}
    assert result.report.budget["mem"].reached <= 0.3
    assert error(result, model) < 0.15


def test_data_tell_what_a_recurrent_layer_need_not_keep():
    model = sequence_model("LSTM")
    budget = Budget(mem=0.5)
    blind = compress(model, budget, threads=1)
    seeing = compress(model, budget, data={"x": samples(30, 1)}, threads=1)
    assert error(seeing, model) < 0.7 * error(blind, model)


def test_layers_before_a_recurrent_one_have_no_gradient_and_stay():
    model = sequence_model("GRU")
    data = {"x": samples(30, 1)}
    result = compress(model, Budget(mem=0.6), data=data, objective="loss", threads=1)
    (note,) = (note for note in result.report.notes if "no gradient" in note)
    assert note.startswith("3 layers have no gradient and stay")
    assert "GRU node 'second': there is no derivative rule for this operator" in note
    assert decisions(result)["first/W"] == "factorised"


def test_nothing_is_fitted_to_outputs_of_recurrent_layers():
    model = sequence_model("LSTM")
    fitted = {layer.name: has_products(model, layer) for layer in find_layers(model).layers}
    assert fitted == {"before": True, "after": True, **dict.fromkeys((*READ, *STATE), False)}


def test_recurrent_layers_may_amplify_rounding_as_a_network_may():
    model = sequence_model("LSTM")
    wanted = {"first/W": 3e-3, "first/R": 3e-3, "after": 1e-4}
    for layer in find_layers(model).layers:
        if layer.name in wanted:
            (form,) = STORAGE.forms(layer)
            made = STORAGE.from_weights(layer, form, 8, read_weight(model, layer), None)
            found = tolerance(model, STORAGE.replace(layer, form, made))
            assert found == pytest.approx(wanted[layer.name])


def test_a_state_that_no_output_shows_is_left_where_data_decide():
    model = sequence_model("LSTM", outputs=("last",))
    second = next(node for node in model.graph.node if node.name == "second")
    second.output[:] = ["", "", "last"]
    budget, data = Budget(mem=0.6), {"x": samples(30, 1)}
    result = compress(model, budget, data=data, precision="auto", threads=1)
    (layer,) = (x for x in result.report.layers if x.name == "second/R")
    assert (layer.decision, layer.reason) == (
        "skipped",
        f"{Reason.UNREADABLE.value} (the node gives out no state)",
    )
    assert decisions(result)["first/R"] == "stored in fewer bits"
    blind = compress(model, Budget(mem=0.3), precision="auto", threads=1)
    assert decisions(blind)["second/R"] == "stored in fewer bits"


def test_a_plan_cannot_factorise_the_weight_of_the_state():
    model = sequence_model("LSTM")
    names = [layer.name for layer in find_layers(model).layers]

    def plan(scheme: str, rank: int) -> Plan:
        ranks = {"first/W": ("matrix", 4), "first/R": (scheme, rank)}
        return Plan(tuple(Decision(name, *ranks.get(name, ())) for name in names))

    result = compress(model, plan=plan("stored", 8), threads=1)
    assert decisions(result)["first/R"] == "stored in fewer bits"
    kinds = [node.op_type for node in result.model.graph.node]
    assert kinds[:5] == ["MatMul", "Transpose", "Decode8", "MatMul", "LSTM"]
    with pytest.raises(errors.UsageError, match="there is no layer 'first/R' to compress"):
        compress(model, plan=plan("matrix", 4), threads=1)
