"""Units of work on layers, and what low rank makes of them, against the parts they use."""

from __future__ import annotations

import pickle
from contextlib import closing

import numpy as np
import pytest

from cobla_onnx.allocation.problem import LayerCurves, VariantCurve
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.layers import Reason, find_layers, read_weight
from cobla_onnx.graph.macs import fixed_input_shapes
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.pipeline.select import Selection, selected, without_unmeasured
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.runtime.shapes import model_costs
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, LayerCosts
from cobla_onnx.variants.coded_factors.family import CodedFactorsFamily
from cobla_onnx.variants.coded_factors.from_data import PairsFromData
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.curve import relative_errors
from cobla_onnx.variants.low_rank.family import LowRankFamily
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankGrid, RankRule
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.low_rank.units import ValuesUnit
from cobla_onnx.variants.work import approximations_of, replacements_of, weight_curves
from tests.builders import random_array, small_network

SHAPES = {"x": (1, 3, 12, 12)}


def wanted(model, rank=2):
    layers = find_layers(model).layers
    return [(layer, form, rank) for layer in layers for form in LowRankFamily().forms(layer)]


@pytest.mark.parametrize("threads", [1, 3])
def test_weights_are_approximated_and_replaced_in_order(threads):
    model = small_network()
    with open_pool(threads) as pool:
        context = RunContext(threads, pool)
        made = list(approximations_of(model, wanted(model), context))
        replaced = list(replacements_of(model, wanted(model), context))
    for (layer, form, rank), found, other in zip(wanted(model), made, replaced, strict=True):
        factors = factorize(form.matrix(read_weight(model, layer)), rank)
        np.testing.assert_array_equal(found.weight, form.weight(factors.left @ factors.right))
        assert other.layer == layer
        np.testing.assert_allclose(other.dense(), found.weight, rtol=1e-4, atol=1e-5)


def test_curves_of_the_weights_are_those_of_an_analysis_without_data():
    model = small_network()
    analysis = analyse(model, input_shapes=SHAPES)
    found = weight_curves(model, analysis.variants, RunContext())
    for ours, its in zip(found, analysis.curves, strict=True):
        for one, other in zip(ours.curves, its.curves, strict=True):
            np.testing.assert_array_equal(one.errors, other.errors)
            np.testing.assert_array_equal(one.spectrum, other.spectrum)


def test_a_unit_travels_and_measures_the_same():
    model = small_network()
    layer = find_layers(model).layers[1]
    weight = read_weight(model, layer)
    unit = ValuesUnit(tuple(LowRankFamily().forms(layer)), Carried(weight, False), None)
    for found in (unit.measure(), pickle.loads(pickle.dumps(unit)).measure()):
        for form, errors, values in zip(unit.schemes, found.errors, found.spectra, strict=True):
            expected = np.linalg.svd(form.matrix(weight)[0].astype(float), compute_uv=False)
            np.testing.assert_allclose(values, expected, atol=1e-6)
            np.testing.assert_array_equal(errors, relative_errors(values))


def test_each_family_makes_its_own_from_data():
    model = small_network()
    data = [{"x": random_array(8, 3, 12, 12, seed=5)}]
    layers = find_layers(model).layers
    with closing(Seen(model, layers, lambda: iter(data))) as seen:
        both = FromData(seen)
        assert both.maker(LowRankFamily()) is both.maker(LowRankFamily())
        # One decomposition serves factors as they are and rounded ones.
        pairs = both.maker(CodedFactorsFamily())
        assert isinstance(pairs, PairsFromData)
        assert pairs._factors is both.maker(LowRankFamily())
        for layer, form, rank in wanted(model):
            (found,) = both.approximate(layer, form, [rank])
            (other,) = FactorsFromData(seen).approximate(layer, form, [rank])
            np.testing.assert_array_equal(found.weight, other.weight)
            assert (found.bias is None) == (layer.bias is None)


def test_another_bias_keeps_the_weight_that_was_multiplied_out():
    model = small_network()
    layer, form, _ = wanted(model)[0]
    made = LowRankWeight(form, factorize(form.matrix(read_weight(model, layer)), 2), None)
    before = made.weight
    moved = made.with_bias(np.ones(3))
    assert moved.weight is before
    assert made.bias is None
    assert moved.bias.tolist() == [1, 1, 1]


def test_low_rank_says_why_it_proposes_nothing():
    model = small_network()
    layer = find_layers(model).layers[1]
    shapes, macs, _ = model_costs(model, fixed_input_shapes(model, SHAPES), True, 1)
    assert macs is not None
    costs = LayerCosts(macs[layer.uses[0].node], shapes)
    family = LowRankFamily()
    (first, *_) = family.propose(layer, costs, Asked("auto", EVERY_RANK))
    assert family.macs(layer, first.form, int(first.levels[-1]), costs) <= costs.macs
    coarse = Asked("auto", RankRule(RankGrid(1000), RankGrid(1000)))
    assert family.propose(layer, costs, coarse) == Refusal(
        Reason.NOT_FASTER, "ranks are multiples of 1000"
    )
    # One MAC is less than any two factors have.
    refused = family.propose(layer, LayerCosts(1, shapes), coarse)
    assert refused == Refusal(Reason.NO_GAIN)


def test_a_curve_is_cut_with_all_its_costs():
    levels = np.array([2, 4, 6])
    curve = VariantCurve("f", "s", levels, {"mem": 10 * levels}, np.linspace(1, 0, 9))
    assert curve.most == 8
    cut = curve.with_cost("latency", np.array([5, 6, 7])).only(np.array([True, False, True]))
    assert cut.levels.tolist() == [2, 6]
    assert {name: cost.tolist() for name, cost in cut.costs.items()} == {
        "mem": [20, 60],
        "latency": [5, 7],
    }
    assert LayerCurves("a", {"mem": 100}, (cut,)).curves[0] is cut


def test_layers_are_selected_by_name_and_size():
    inventory = find_layers(small_network())
    names = [layer.name for layer in inventory.layers]
    kept = selected(inventory, Selection(include=("conv*",), exclude=("conv2",)))
    assert [layer.name for layer in kept.layers] == ["conv1"]
    left = {item.name: item.reason for item in kept.skipped}
    assert {left[name] for name in names if name != "conv1"} == {Reason.EXCLUDED}
    assert not selected(inventory, Selection(min_size=10**9)).layers
    blind = without_unmeasured(inventory, {"fc"})
    assert [item.reason for item in blind.skipped if item.name == "fc"] == [Reason.UNMEASURED]
    with pytest.raises(UsageError, match=r"\['cnv1'\]: matches no layer; did you mean conv1"):
        selected(inventory, Selection(exclude=("cnv1",)))
