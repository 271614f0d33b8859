"""On how many samples layers are measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx import Budget
from cobla_onnx.allocation import Choice, LayerCurves, VariantCurve, allocate
from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
from cobla_onnx.errors import ModelError
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.point_losses import PointLosses
from cobla_onnx.pipeline.search.sensitivity import (
    LEAST_SAMPLES,
    MANY,
    MOST_LOSS,
    PASSES,
    PROBE_SAMPLES,
    SHAPED,
    TARGETS,
    Response,
    Sensitivity,
    affordable_samples,
)
from tests.builders import small_network
from tests.pipeline.search.test_network_loss import evidence_for


@given(layers=st.integers(MANY + 1, 2000), samples=st.integers(2, 100_000))
def test_samples_of_deep_models_cost_no_more_than_the_passes_that_are_stated(
    layers: int, samples: int
) -> None:
    found = affordable_samples(layers, samples)
    assert LEAST_SAMPLES <= found <= PROBE_SAMPLES
    points = SHAPED * len(TARGETS) + layers - SHAPED
    if found > LEAST_SAMPLES:
        assert found * points / 2 <= PASSES * samples
    if found < PROBE_SAMPLES:
        assert (found + 1) * points / 2 > PASSES * samples


def test_a_model_of_few_layers_is_not_measured_by_cost(monkeypatch) -> None:
    """Until it counts as one of many."""
    module = "cobla_onnx.pipeline.search.evidence"
    few = evidence_for(small_network(), 40)
    monkeypatch.setattr(f"{module}.affordable_samples", lambda layers, samples: 5)
    before = few.probe_samples
    monkeypatch.setattr(f"{module}.MANY", 2)
    many: Evidence = evidence_for(small_network(), 40)
    assert len(many.probe_samples) == 5
    assert len(before) > 5
    assert np.isin(many.probe_samples, many.dataset.calibration).all()


def samples_by_call(monkeypatch, evidence: Evidence, **options) -> list[int]:
    """Numbers of samples of the losses that are measured, first to last."""
    numbers = []
    before = SpreadProbe.mean_losses

    def mean_losses(self, wanted):
        numbers.append(self.original()[1])
        return before(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(SpreadProbe, "mean_losses", mean_losses)
        constraints = evidence.analysis.constraints(Budget(mem=0.6))
        sensitivity = evidence.sensitivity(constraints, **options)
        curves = evidence.analysis.curves
        sensitivity.refine(allocate(curves, sensitivity.objective(), constraints).choices)
    return numbers


def test_fewer_samples_are_enough_until_something_is_chosen(monkeypatch) -> None:
    module = "cobla_onnx.pipeline.search.evidence"
    evidence = evidence_for(small_network(), 40)
    every = len(evidence.probe_samples)
    monkeypatch.setattr(f"{module}.FIRST_SAMPLES", every - 5)
    assert samples_by_call(monkeypatch, evidence) == [every - 5, every]
    assert samples_by_call(monkeypatch, evidence, final=True) == [every, every]
    monkeypatch.setattr(f"{module}.MANY", 2)
    assert len(evidence.analysis.curves) > 2
    many = evidence_for(small_network(), 40)
    few = len(many.probe_samples)
    monkeypatch.setattr(f"{module}.FIRST_SAMPLES", few - 1)
    assert samples_by_call(monkeypatch, many) == [few, few]


@given(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e30, np.inf, np.nan]), min_size=1, max_size=4))
def test_losses_that_are_not_finite_count_as_the_largest(losses) -> None:
    response = Response()
    for number, loss in enumerate(losses):
        response.add(0.01 * 2.0**number, loss)
    found = response(np.array([0.0, 1e-12, 0.005, 0.01, 0.015, 0.04, 1.0, 1e6]))
    assert ((found >= 0) & (found <= MOST_LOSS)).all()
    assert (np.diff(found) >= 0).all()


def losses_of(monkeypatch, name: str) -> Evidence:
    """Evidence in which each approximation of a layer makes the loss infinite, or of all."""
    evidence = evidence_for(small_network(), 40)
    layers = [layer.name for layer in evidence.analysis.layers]
    before = SpreadProbe.mean_losses

    def mean_losses(self, wanted):
        wanted = list(wanted)
        for (index, _), found in zip(wanted, before(self, wanted), strict=True):
            yield [np.inf for _ in found] if name in ("all", layers[index]) else found

    monkeypatch.setattr(SpreadProbe, "mean_losses", mean_losses)
    return evidence


def test_a_layer_whose_loss_is_infinite_is_avoided(monkeypatch) -> None:
    evidence = losses_of(monkeypatch, "conv2")
    constraints = evidence.analysis.constraints(Budget(mem=0.9))
    objective = evidence.sensitivity(constraints).objective()
    choices = allocate(evidence.analysis.curves, objective, constraints).choices
    chosen = zip(evidence.analysis.layers, choices, strict=True)
    assert {layer.name for layer, choice in chosen if choice is None} == {"conv2"}


def test_an_infinite_loss_of_all_layers_is_refused(monkeypatch) -> None:
    evidence = losses_of(monkeypatch, "all")
    with pytest.raises(ModelError, match=r"not finite wherever a layer .* node 'conv1', since"):
        evidence.sensitivity(evidence.analysis.constraints(Budget(mem=0.9)))


def test_a_second_point_is_measured_where_much_of_the_loss_is(monkeypatch) -> None:
    evidence = evidence_for(small_network(), 40)
    curves = evidence.analysis.curves
    sensitivity = evidence.sensitivity(evidence.analysis.constraints(Budget(mem=0.6)))
    asked: list[set[int]] = []
    before = SpreadProbe.mean_losses

    def mean_losses(self, wanted):
        entries = list(wanted)
        asked.append({index for index, _ in entries})
        return before(self, entries)

    monkeypatch.setattr(SpreadProbe, "mean_losses", mean_losses)

    def at(place: int) -> list[Choice | None]:
        return [Choice(0, int(layer.curves[0].levels[place])) for layer in curves]

    every = set(range(len(curves)))
    assert sensitivity.refine(at(0))
    assert asked.pop() == every
    # Above nine tenths of all no layer's loss is, whatever it is.
    monkeypatch.setattr("cobla_onnx.pipeline.search.sensitivity.SMALL", 0.9)
    assert not sensitivity.copy().refine(at(1))
    monkeypatch.setattr("cobla_onnx.pipeline.search.sensitivity.SMALL", 0.0)
    assert sensitivity.refine(at(1))
    assert asked.pop() == every


BITS = np.array([2, 3, 4, 5, 6, 8])


def of_few_bits(by_bits: list[float], nested: bool) -> tuple[Sensitivity, list[tuple[int, ...]]]:
    """Sensitivity of a layer with such losses, and the levels that are asked for."""
    errors = 4.0 ** -np.arange(33.0)
    errors[-1] = 0.0
    curve = VariantCurve("stored", "stored", BITS, {"mem": 100 * BITS}, errors, nested=nested)
    layers = LayerCurves("layer", {"mem": 3200}, (curve,))
    asked: list[tuple[int, ...]] = []

    def at(points):
        for point in points:
            asked.append(point.levels)
            yield [dict(zip(BITS.tolist(), by_bits, strict=True))[each] for each in point.levels]

    losses = SimpleNamespace(variants=[SimpleNamespace(curves=layers)], at=at, samples=8)
    sensitivity = Sensitivity(cast("PointLosses", losses))
    sensitivity.measure(Budget(mem=0.2).constraints([layers], {"mem": 3200}))
    return sensitivity, asked


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("chosen", "beside"), [(8, (6,)), (6, (5, 8))])
def test_bits_beside_those_that_lose_something_else_than_predicted_are_measured(
    nested: bool, chosen: int, beside: tuple[int, ...]
) -> None:
    """The small outputs are lost between 8 bits and 6, which the errors do not say."""
    losses = dict(zip(BITS.tolist(), [0.13, 0.09, 0.08, 0.07, 0.06, 1e-5], strict=True))
    sensitivity, asked = of_few_bits(list(losses.values()), nested)
    asked.clear()
    assert sensitivity.refine([Choice(0, chosen)])
    known = sensitivity.objective().curve(0, 0)
    if nested:
        assert asked == [(chosen,)]
    else:
        assert asked == [(chosen,), beside]
        assert [known[level] for level in beside] == pytest.approx([losses[b] for b in beside])


@given(st.floats(0.4, 2.5))
def test_bits_that_lose_what_is_predicted_are_measured_where_they_are_chosen(more: float) -> None:
    losses = 0.3 * 4.0**-BITS
    losses[-1] *= more
    sensitivity, asked = of_few_bits(losses.tolist(), False)
    asked.clear()
    assert sensitivity.refine([Choice(0, 8)])
    assert asked == [(8,)]


@pytest.mark.parametrize(("opening", "apart"), [(1e9, False), (0, True)])
def test_sessions_are_shared_where_opening_them_takes_longer_than_layers(
    monkeypatch, opening: float, apart: bool
) -> None:
    asked = []
    before = SpreadProbe.__init__

    def noticed(self, *arguments, **options):
        before(self, *arguments, **options)
        asked.append(self._apart)

    monkeypatch.setattr("cobla_onnx.pipeline.search.evidence.OPENING", opening)
    monkeypatch.setattr(SpreadProbe, "__init__", noticed)
    evidence = evidence_for(small_network(), 40)
    evidence.sensitivity(evidence.analysis.constraints(Budget(mem=0.6)))
    assert set(asked) == {apart}
