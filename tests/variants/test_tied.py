"""A decoder with a tied table: exact at full rank, one stored form, at budgets, at all levels."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from cobla_onnx import Budget, compress, inspect
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.variants.registry import forms_of, require_family
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.tied import factors_read, operand
from tests.tied import HEADS, VOCABULARY, WIDTH, decoder, sentences

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")
BOTH = ("transpose", "gemm")


def run(model: onnx.ModelProto, data: dict[str, np.ndarray], level: str = LEVELS[-1]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(model.SerializeToString(), options).run(None, data)[0]


def forms() -> list[tuple[str, int]]:
    return [("matrix", WIDTH), ("matrix", 3), ("stored", 4), ("stored", 16), ("matrix@8", WIDTH)]


@pytest.mark.parametrize("head", BOTH)
@pytest.mark.parametrize(("name", "level"), forms())
def test_one_stored_form_stands_for_the_weight_in_all_readings(head, name, level):
    model, data = decoder(head), sentences(4)
    (layer, *_) = find_layers(model).layers
    form, family = forms_of(layer)[name], require_family(name)
    weight = read_weight(model, layer)
    made = family.from_weights(layer, form, level, weight, None)
    replacement = family.replace(layer, form, made)
    changed = rewrite(model, [replacement])
    onnx.checker.check_model(changed, full_check=True)
    assert "table" not in {tensor.name for tensor in changed.graph.initializer}

    dense = onnx.ModelProto()
    dense.CopyFrom(model)
    for tensor in dense.graph.initializer:
        if tensor.name == "table":
            tensor.CopyFrom(onnx.numpy_helper.from_array(replacement.dense(), "table"))
    if (name, level) == ("matrix", WIDTH):
        np.testing.assert_allclose(replacement.dense(), weight, atol=1e-5)
    wanted = run(dense, data)
    for setting in LEVELS:
        found = run(changed, data, setting)
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_the_same_in_half_precision_and_in_old_opsets():
    model, data = decoder("transpose", opset=11, ir_version=4), sentences(2)
    result = compress(model, Budget(mem=0.3), precision="auto")
    assert run(result.model, data).shape == (2, 6, VOCABULARY)
    model = decoder()
    for tensor in model.graph.initializer:
        if tensor.name == "table":
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, "half"))
    model.graph.node.insert(
        0, onnx.helper.make_node("Cast", ["half"], ["table"], to=TensorProto.FLOAT)
    )
    result = compress(model, Budget(mem=0.4))
    assert "Gather+MatMul" in {layer.op for layer in result.report.layers if layer.replaced}


@pytest.mark.parametrize("head", BOTH)
@pytest.mark.parametrize("options", [{}, {"precision": "auto"}], ids=["ranks", "bits"])
@pytest.mark.parametrize(
    "known", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["weights", "data"]
)
def test_budgets_are_met_and_the_result_is_verified(head, options, known):
    model = decoder(head)
    if known:
        options = {**options, "data": sentences(16), "refit": False}
    result = compress(model, Budget(mem=0.3), **options)
    (site, *_) = result.report.layers
    assert site.name == "tokens"
    assert site.replaced
    assert stored_bytes(result.model) <= 0.3 * stored_bytes(model)
    assert result.report.verification is not None
    # A lookup of short rows costs MACs; the output layer saves more.
    if site.scheme == "matrix":
        assert site.macs.after < site.macs.before
    if not known:
        again = compress(model, plan=result.plan, **options)
        assert again.model.SerializeToString() == result.model.SerializeToString()


def test_data_makes_a_decoder_better_than_the_weights_alone():
    model, unseen = decoder(), sentences(60, seed=3)
    wanted = run(model, unseen)
    budget = Budget(mem=0.3)
    lost = [
        np.square(run(compress(model, budget, **options).model, unseen) - wanted).mean()
        for options in ({}, {"data": sentences(60)})
    ]
    assert lost[1] < 0.8 * lost[0]


def test_the_loss_of_the_network_leaves_the_level_of_a_tied_weight_to_the_programme():
    data = sentences(24)
    result = compress(decoder(), Budget(mem=0.4), data=data, objective="loss")
    assert result.report.budget["mem"].reached <= 0.4


def test_a_tied_weight_is_left_where_time_is_limited():
    model = decoder()
    plan = Plan((Decision("tokens", "matrix", 4),))
    result = compress(model, plan=plan, measure_latency=True)
    assert result.report.latency is not None
    assert "tokens" not in {layer.name for layer in result.report.latency.layers}


def test_inspect_shows_one_layer():
    found = inspect(decoder())
    assert found.layers[0].name == "tokens"
    assert found.layers[0].op == "Gather+MatMul"


def test_how_readings_read_factors():
    (layer, *_) = find_layers(decoder()).layers
    lookup, product = layer.readings
    assert factors_read(lookup, "A", "B") == (("A", False), ("B", False))
    assert factors_read(product, "A", "B") == (("B", True), ("A", True))
    assert operand({"A": "a", "A^T": "t"}, ("A", True)) == "t"
    assert len(HEADS) == 3
