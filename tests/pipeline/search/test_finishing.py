"""Factors of a plan that was made without the data."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from cobla_onnx import Plan, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.plan import Decision
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


def test_weights_of_a_plan_are_those_of_its_layers_in_their_types():
    evidence = evidence_for(small_network(), 20)
    finisher: Finisher = evidence.finisher()
    layers = evidence.analysis.layers
    forms = evidence.analysis.forms
    decisions = tuple(
        Decision(layer.name, form[0].name, 2) for layer, form in zip(layers, forms, strict=True)
    )
    found = finisher.weights(Plan(decisions))
    assert sorted(found) == list(range(len(layers)))
    for entry in finisher.chosen(Plan(decisions)):
        weight, bias = found[entry.index]
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, entry.approximation.weight.astype(np.float32))
        assert (bias is None) == (entry.layer.bias is None)
