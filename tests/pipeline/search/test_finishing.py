"""Factors of a plan that was made without the data."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from cobla_onnx import Plan, compress
from cobla_onnx.allocation import Choice
from cobla_onnx.errors import UsageError
from cobla_onnx.pipeline.search import finishing
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.plan import Decision, FactorsFrom
from tests.builders import model_of, random_array, small_network
from tests.pipeline.search.test_network_loss import evidence_for


def test_a_scheme_about_which_data_say_nothing_is_refused_or_follows_from_the_weights():
    """Vectors of 600 x 3 x 3 inputs are too long for their second moment."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "wide")
    model = model_of([node], {"w": random_array(32, 600, 3, 3)}, {"x": ["N", 600, 4, 4]}, ["y"])
    data = {"x": np.random.default_rng(0).normal(size=(10, 600, 4, 4)).astype(np.float32)}
    decisions = (Decision("wide", "spatial-hw", 20),)
    with pytest.raises(UsageError, match=r"'spatial-hw'.* use channel, or .factors.: .weights."):
        compress(model, plan=Plan(decisions), data=data)
    result = compress(model, plan=Plan(decisions, factors="weights"), data=data)
    assert result.plan.decisions == decisions


@pytest.fixture(scope="module")
def finisher() -> Finisher:
    return evidence_for(small_network(), 12).finisher()


@pytest.mark.parametrize("factors", ["data", "weights"])
def test_weights_are_those_of_the_chosen_layers_in_their_types(
    finisher: Finisher, factors: FactorsFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer is kept whole; the others are made one by one."""
    _, *others = finisher.analysis.curves
    choices = [None, *(Choice(0, int(layer.curves[0].levels[1])) for layer in others)]
    plan = finisher.analysis.plan(choices, factors)
    chosen = finisher.chosen(plan)
    assert [entry.index for entry in chosen] == [1, 2]
    asked: list[int] = []
    replaced = finishing.replaced_weights

    def noticed(entries, approximations):
        asked.append(len(entries))
        return replaced(entries, approximations)

    monkeypatch.setattr(finishing, "replaced_weights", noticed)
    weights = finisher.weights(plan)
    assert asked == [1, 1]
    assert list(weights) == [entry.index for entry in chosen]
    for entry in chosen:
        weight, bias = weights[entry.index]
        assert weight.dtype == helper.tensor_dtype_to_np_dtype(entry.layer.type)
        assert weight.shape == entry.layer.shape
        np.testing.assert_array_equal(weight, entry.approximation.weight.astype(weight.dtype))
        if entry.approximation.bias is None:
            assert bias is None
        else:
            np.testing.assert_array_equal(bias, entry.approximation.bias)


def test_without_a_chosen_layer_there_are_no_weights(finisher: Finisher) -> None:
    plan = finisher.analysis.plan([None] * len(finisher.analysis.layers))
    assert finisher.chosen(plan) == []
    assert finisher.weights(plan) == {}
