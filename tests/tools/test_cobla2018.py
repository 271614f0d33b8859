"""The method of 2018: within the budget, and better than where it starts."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx.allocation import Budget, Choice
from cobla_onnx.allocation.objective import masks_of
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline.analysis import analyse
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import small_network
from tests.calibration.evaluation.test_probe import samples


@pytest.fixture
def method(tools):
    return method_of(tools("cobla2018"))


def method_of(module):
    model = small_network()
    analysis = analyse(
        model,
        asked=Asked("channel", EVERY_RANK),
        macs_needed=True,
    )
    data = samples(24)["x"]
    calibration = Probe(model, analysis.layers, [{"x": data[:16]}], "auto", 1)
    selection = Probe(model, analysis.layers, [{"x": data[16:]}], "auto", 1)
    return module.Cobla2018(model, analysis, calibration, selection, 1)


@pytest.mark.parametrize("budget", [Budget(mem=0.6), Budget(mac=0.5), Budget(mem=0.6, mac=0.6)])
def test_budgets_hold_and_the_model_runs(method, budget):
    constraints = method.analysis.constraints(budget)
    replacements = method.compress(constraints)
    model = rewrite(method.model, replacements)
    if budget.mem is not None:
        assert stored_bytes(model) <= budget.mem * stored_bytes(method.model)
    macs = dict(zip([x.name for x in method.analysis.layers], method.analysis.macs, strict=True))
    after = method.analysis.mac_total
    for made in replacements:
        index = [x.name for x in method.analysis.layers].index(made.layer.name)
        first, second = made.arrays.values()
        rank = second.shape[1] if made.layer.op == "Conv" else first.shape[-1]
        unit = method.analysis.curves[index].curves[0].per_level["mac"]
        after += rank * unit - macs[made.layer.name]
    if budget.mac is not None:
        assert after <= budget.mac * method.analysis.mac_total
    assert run_session(open_session(model, 1), samples(2))


def test_the_relaxed_loss_is_below_that_of_the_start(method, tools):
    baselines = tools("baselines")
    constraints = method.analysis.constraints(Budget(mem=0.6))
    start = baselines.greedy_energy_product(method.analysis.curves, constraints)
    masks = method._relax(constraints, start, set())
    before = method._loss.value(masks_of(method.analysis.curves, start))
    assert method._loss.value(masks) < before


def test_the_search_sees_the_network_that_the_ranks_make(method):
    """Biases included: the loss at masks of 0 and 1 is that of the truncated weights."""
    curves = method.analysis.curves
    assert any(layer.bias is not None for layer in method.analysis.layers)
    choices = [Choice(0, int(layer.curves[0].levels[-1])) for layer in curves]
    made = method._factorised(choices, {})
    truncated = {index: (method._dense(index, factors), None) for index, factors in made}
    expected = method.calibration.loss(truncated)
    assert expected > 0
    assert method._loss.value(masks_of(curves, choices)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mem", [0.8, 0.6, 0.4])
def test_the_result_is_not_worse_than_the_start_on_held_back_samples(method, tools, mem):
    baselines = tools("baselines")
    curves = method.analysis.curves
    constraints = method.analysis.constraints(Budget(mem=mem))
    start = method._factorised(baselines.greedy_energy_product(curves, constraints), {})
    before = method.selection.loss({i: (method._dense(i, made), None) for i, made in start})
    names = [layer.name for layer in method.analysis.layers]
    after = {}
    for made in method.compress(constraints):
        index = names.index(made.layer.name)
        scheme = method.analysis.forms[index][0]
        after[index] = scheme.weight(np.matmul(*scheme.unfold(*made.arrays.values()))), None
    assert method.selection.loss(after) <= before


def test_out_of_reach_is_refused(method):
    with pytest.raises(BudgetError):
        method.compress(method.analysis.constraints(Budget(mem=0.01)))
