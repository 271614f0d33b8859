"""Refit layers on the inputs that they get after compression, and keep what helps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx import Budget, compress
from cobla_onnx.allocation import Choice
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.sums import JointSum
from cobla_onnx.pipeline.search import refit
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.refit import ChosenLayer, refit_layers, replaced_weights
from cobla_onnx.pipeline.search.walk import Walk
from tests.builders import small_network
from tests.pipeline.search.test_network_loss import evidence_for


@pytest.fixture(scope="module")
def finisher() -> Finisher:
    return evidence_for(small_network(), 80).finisher()


@pytest.fixture(scope="module")
def chosen(finisher: Finisher) -> list[ChosenLayer]:
    choices = [Choice(0, int(layer.curves[0].levels[1])) for layer in finisher.analysis.curves]
    return finisher.chosen(finisher.analysis.plan(choices))


def _refitted(finisher: Finisher, chosen: list[ChosenLayer]):
    judge = finisher.judge
    return refit_layers(
        finisher.model,
        chosen,
        lambda: judge.batches(judge.dataset.calibration),
        judge.followed,
        threads=1,
    )


@given(count=st.integers(0, 40))
def test_sections_are_all_layers_in_order_and_of_about_the_same_length(count: int) -> None:
    parts = list(refit._sections(range(count)))
    assert [item for part in parts for item in part] == list(range(count))
    assert len(parts) == min(count, refit.CHECKS)
    lengths = {len(part) for part in parts}
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_refits_that_are_kept_lower_the_loss_of_the_network(
    finisher: Finisher, chosen: list[ChosenLayer]
) -> None:
    found, kept = _refitted(finisher, chosen)
    before = [entry.approximation for entry in chosen]
    assert kept == sum(new is not old for new, old in zip(found, before, strict=True)) > 0
    selection = finisher.judge.followed
    after = selection.loss(replaced_weights(chosen, found))
    assert after < selection.loss(replaced_weights(chosen, before))


def test_a_section_that_does_not_help_the_network_goes_back(
    finisher: Finisher, chosen: list[ChosenLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the samples: the layers after it are refitted as if it had never been."""
    monkeypatch.setattr(refit, "CHECKS", 2)
    loss, asked, seen = Probe.loss, [], []

    def refuse_the_first(self: Probe, weights):
        asked.append(weights)
        return np.inf if len(asked) in (2, 3) else loss(self, weights)

    joint = Walk.joint

    def noticed(self, request, *arguments):
        found = joint(self, request, *arguments)
        seen.append((request.layer.name, found[0].inputs.second))
        return found

    monkeypatch.setattr(Probe, "loss", refuse_the_first)
    monkeypatch.setattr(Walk, "joint", noticed)
    found, _ = _refitted(finisher, chosen)
    first, last = seen[0][0], seen[-1]
    changed = [e.layer.name for e, a in zip(chosen, found, strict=True) if a is not e.approximation]
    assert first not in changed
    monkeypatch.setattr(Probe, "loss", loss)
    monkeypatch.setattr(
        refit, "_refits", lambda _, entry: entry.layer.name not in {name for name, _ in seen[:-1]}
    )
    _refitted(finisher, chosen)
    assert seen[-1][0] == last[0]
    np.testing.assert_allclose(seen[-1][1], last[1], rtol=1e-5)


def test_inputs_that_never_change_have_no_covariance() -> None:
    """Rounding leaves one that is not positive definite, in single precision above all."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 20, 1)).astype(np.float32).repeat(200, axis=2)
    inputs[1] += rng.normal(size=(20, 200)).astype(np.float32)
    total = JointSum(2, 20, 3, exact=False)
    total.add(inputs, rng.normal(size=(2, 3, 200)).astype(np.float32))
    joint = total.joint()
    inner, cross = refit._centred(joint)
    assert not inner[0].any()
    assert not cross[0].any()
    np.testing.assert_array_equal(inner[1], joint.inputs.covariance()[1])
    np.testing.assert_array_equal(cross[1], joint.covariance()[1])


@pytest.mark.parametrize("precision", ["keep", "auto"])
def test_samples_of_nothing_are_refitted_without_an_error(precision: str) -> None:
    data = {"x": np.zeros((12, 3, 12, 12), np.float32)}
    result = compress(small_network(), Budget(mem=0.3), data=data, precision=precision, threads=1)
    assert result.report.budget["mem"].reached <= 0.3
