"""The report's words: what it knows, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.distillation.record import Distillation
from cobla_onnx.report.in_words import in_words
from cobla_onnx.report.model import Forecast, LatencyReport, Report, Spread
from tests.builders import random_array, small_network
from tests.report.reports import HOSTILE, small_report, stored_report
from tests.report.test_html import Strict

DATA = {"x": random_array(30, 3, 12, 12, seed=3)}


@pytest.fixture(scope="module")
def measured() -> Report:
    return compress(
        small_network(), Budget(mem=0.6), data=DATA, threads=1, precision="auto", solver="milp"
    ).report


def said(report: Report) -> dict[str, str]:
    found = {p.title: "\n".join((p.text, *p.lines)) for p in in_words(report)}
    assert list(found) == [
        "What was promised", "What was measured", "What was assumed", "Where the loss comes from",
        "What to try next",
    ]  # fmt: skip
    return found


def with_quality(report: Report, **more) -> Report:
    seen = report.calibration
    return replace(report, calibration=replace(seen, quality=replace(seen.quality, **more)))


def test_without_data_nothing_is_claimed_of_answers():
    found = said(small_report())
    use = small_report().budget["mem"]
    assert "At most 50.00 % of the bytes of weights were to stay" in found["What was promised"]
    assert f"{100 * use.reached:.2f} % are left" in found["What was promised"]
    assert "multiply-accumulates" in found["What was promised"]
    assert "random inputs, which says little of real ones" in found["What was measured"]
    assert "Running time was not measured." in found["What was measured"]
    assert "nothing is known of the answers" in found["What was assumed"]
    assert "no measure of quality" in found["Where the loss comes from"]
    assert "Give --data" in found["What to try next"]
    assert not any("held-back" in text or "accuracy" in text for text in found.values())


def test_with_data_it_says_on_what_and_how_finely(measured):
    quality = measured.calibration.quality
    same = with_quality(measured, measure="agreement", after=1.0, drop=0.0, positions=6, samples=6)
    found = said(same)["What was measured"]
    assert "On 6 held-back samples" in found
    assert "accuracy was not measured" in found
    assert "One sample is 16.67 %" in found
    assert "a drop of up to 50.00 % on others" in found
    lost = said(with_quality(same, after=0.5, drop=0.5))["What was measured"]
    assert "does not exclude" not in lost
    told = said(with_quality(same, measure="accuracy", before=0.9, after=0.8, drop=0.1))
    assert (
        "the class is the label in 80.00 %, the original's in 90.00 %."
        in (told["What was measured"])
    )
    assert "No labels" not in told["What was measured"]
    values = said(with_quality(same, measure="relative error", positions=0))
    assert "relative to how much each feature varies" in values["What was measured"]
    assert "One sample is" not in values["What was measured"]
    assert quality.samples > 0


def test_losses_of_layers_add_up_to_what_the_objective_has(measured):
    replaced = [layer for layer in measured.layers if layer.replaced]
    assert replaced
    total = sum(layer.predicted_loss for layer in replaced)
    assert total == pytest.approx(measured.solver.value, rel=1e-6)
    assert all(layer.predicted_loss is None for layer in measured.layers if not layer.replaced)
    text = said(measured)["Where the loss comes from"]
    worst = max(replaced, key=lambda layer: layer.predicted_loss)
    assert text.splitlines()[1].startswith(f"{worst.name}: ")
    assert f"{worst.predicted_loss:.2g}" in text
    assert "was not measured" in text


def test_without_data_they_are_the_errors_of_weights():
    report = small_report()
    for layer in report.layers:
        if layer.replaced:
            assert layer.predicted_loss == pytest.approx(layer.error**2)


def test_two_losses_are_put_side_by_side_only_where_they_are_of_a_kind(measured):
    seen = measured.calibration
    plain = replace(measured, calibration=replace(seen, temperatures={}, outputs={"y": "mse"}))
    assert "They add up to" in said(plain)["Where the loss comes from"]
    soft = replace(seen, temperatures={"y": 3.0}, outputs={"y": "logits"})
    labelled = replace(seen, temperatures={}, outputs={"y": "ce-logits"})
    for other in (soft, labelled):
        text = said(replace(measured, calibration=other))["Where the loss comes from"]
        assert "They add up to" not in text
    assert "cross-entropy" in said(replace(measured, calibration=labelled))["What was assumed"]


def test_given_plans_and_unchanged_models_say_so():
    given = said(stored_report())
    assert "No limit was set" in given["What was promised"]
    assert "What each layer costs the network is not known" in given["Where the loss comes from"]
    assert "4 bits" in given["Where the loss comes from"]
    same = said(compress(small_network(), Budget(mem=1.0), threads=1).report)
    assert "was copied" in same["What was promised"]
    assert same["What was measured"].startswith("Nothing:")
    assert same["Where the loss comes from"] == "No layer was changed."


def test_what_to_try_follows_from_what_was_measured(measured):
    worse = with_quality(measured, drop=0.2)
    assert "Raise the budget" in said(worse)["What to try next"]
    assert "--distil auto" in said(worse)["What to try next"]
    learned = replace(worse.calibration, distillation=object.__new__(Distillation))
    assert "--distil" not in said(replace(worse, calibration=learned))["What to try next"]
    fine = said(with_quality(measured, drop=0.0))["What to try next"]
    assert "Try a smaller budget" in fine
    told = said(replace(measured, forecast=Forecast(0.01, 0.5)))["What to try next"]
    assert "is predicted to lose 0.01 at this budget, ranks alone 0.5" in told
    first, *others = measured.layers
    one = replace(first, decision="factorised", predicted_loss=1.0)
    rest = [replace(each, decision="factorised", predicted_loss=0.1) for each in others]
    heavy = said(replace(measured, layers=(one, *rest)))["What to try next"]
    assert f"Over half of that sum is in {first.name}" in heavy
    for text in (told, fine, heavy):
        assert text.endswith("Measure on your own test set before you use it.")


def test_time_is_told_with_its_interval():
    spread = Spread(1.0, 0.9, 1.1)
    latency = LatencyReport(2, "CPU", 9, spread, spread, 0.71, 0.69, 0.73, None, ())
    text = said(replace(small_report(), latency=latency))["What was measured"]
    assert "71.00 % of the original's time here (95 % interval 69.00 % to 73.00 %)" in text


def test_both_documents_have_them_and_names_stay_names(measured):
    layers = tuple(replace(layer, name=HOSTILE) for layer in measured.layers)
    report = replace(
        measured, layers=layers, calibration=replace(measured.calibration, outputs={HOSTILE: "mse"})
    )
    page = report.to_html()
    text = Strict(page).text
    assert "<img" not in page
    assert "\x1b" not in page + report.to_markdown()
    for paragraph in in_words(report):
        assert paragraph.title in text
        assert f"**{paragraph.title}.**" in report.to_markdown()
    assert "## In words" in report.to_markdown()
    assert "onerror=document.title='owned'>" in text
