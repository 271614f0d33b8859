"""What a report says, for somebody who never saw this package; only what it knows.

Texts may hold names from the model's file: whoever shows them makes them safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cobla_onnx.report.amounts import count_text, percent_text
from cobla_onnx.report.model import CalibrationReport, LayerReport, Report
from cobla_onnx.text import numbered, short_names

__all__ = ["Paragraph", "in_words"]

# Layers that are named, most loss first.
NAMED = 5
# A drop above which there is something to mend, and one that is none.
MUCH, NOTHING = 0.01, 0.001
NOUNS = {"mem": "bytes of weights", "mac": "multiply-accumulates", "latency": "running time"}
KINDS = {
    "probabilities": "as probabilities of classes",
    "logits": "as logits of classes",
    "mse": "as values",
    "either": "both as classes and as values, since nothing tells which",
}


@dataclass(frozen=True)
class Paragraph:
    """A question, the sentences that answer it, and a line for each layer that they speak of."""

    title: str
    sentences: tuple[str, ...]
    lines: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The sentences as one text."""
        return " ".join(self.sentences)


def in_words(report: Report) -> tuple[Paragraph, ...]:
    """Return what was promised, measured and assumed, where the loss comes from, what to try."""
    shares = _shares(report)
    return (
        Paragraph("What was promised", tuple(_promised(report))),
        Paragraph("What was measured", tuple(_measured(report))),
        Paragraph("What was assumed", tuple(_assumed(report))),
        _losses(report, shares),
        Paragraph("What to try next", tuple(_next(report, shares))),
    )


def _promised(report: Report) -> Iterator[str]:
    limited = {name: use for name, use in report.budget.items() if use.limit is not None}
    if not limited:
        yield "No limit was set: what becomes of each layer was given."
    for name, use in limited.items():
        reached = "not measured" if use.reached is None else f"{percent_text(use.reached)} are left"
        yield f"At most {percent_text(use.limit)} of the {NOUNS[name]} were to stay; {reached}."
    if report.unchanged:
        yield "The model meets that as it is, and was copied."
    elif report.verification is not None:
        yield (
            "The finished model was run in onnxruntime: what stands in place of each layer gives "
            "what was planned for it, up to "
            f"{report.verification.rewrite_max_error:.1g} of the layer's largest output. That says "
            "that nothing went wrong on the way, not that the plan is good."
        )


def _measured(report: Report) -> Iterator[str]:
    seen, check = report.calibration, report.verification
    if seen is not None:
        yield from _quality(seen)
    elif check is not None:
        yield (
            f"No data was given. Outputs were compared with the original's on {check.samples} "
            "random inputs, which says little of real ones."
        )
    else:
        yield "Nothing: there was nothing to compare."
    latency = report.latency
    if latency is None:
        yield "Running time was not measured."
    else:
        yield (
            f"It takes {percent_text(latency.ratio)} of the original's time here (95 % interval "
            f"{percent_text(latency.ratio_low)} to {percent_text(latency.ratio_high)}), on "
            f"{numbered(latency.threads, 'thread')}; another machine may give another figure."
        )


def _quality(seen: CalibrationReport) -> Iterator[str]:
    quality = seen.quality
    before = f", the original's in {percent_text(quality.before)}" * (quality.measure == "accuracy")
    yield (
        f"On {quality.counted} of the data given, of which no factor was made, "
        f"{_what(quality.measure)} {percent_text(quality.after)}{before}."
    )
    if quality.measure == "agreement":
        yield "No labels were given, so accuracy was not measured: the original may be wrong, too."
    if quality.positions == quality.samples and quality.measure != "relative error":
        yield f"One sample is {percent_text(1 / quality.samples)} of that."
        if quality.drop == 0:
            yield (
                f"No difference in {quality.samples} samples does not exclude, at 95 % "
                f"confidence, a drop of up to {percent_text(min(1.0, 3 / quality.samples))} on "
                "others like them."
            )
    yield (
        f"The loss there is {seen.loss:.3g}. These samples also decided between candidates, so "
        "that other data may show a little more loss."
    )


def _what(measure: str) -> str:
    return {
        "accuracy": "the class is the label in",
        "agreement": "the most likely class is the original's in",
    }.get(measure, "the error of outputs, relative to how much each feature varies, is")


def _assumed(report: Report) -> Iterator[str]:
    seen = report.calibration
    if seen is None:
        yield (
            "All numbers of a weight count alike, and all layers by the share of their weights "
            "that is lost: nothing is known of the answers."
        )
        return
    for name, kind in seen.outputs.items():
        how = KINDS.get(kind, "by the cross-entropy of classes")
        yield f"Output {name} was compared {how}."
    yield (
        f"The {seen.calibration_samples} samples that made the factors were taken to be like what "
        "the model will see."
    )


def _shares(report: Report) -> list[tuple[LayerReport, float]]:
    """Return layers with their share of the predicted loss, most first; empty if not known."""
    losses = [(layer, layer.predicted_loss or 0.0) for layer in report.layers if layer.replaced]
    total = sum(loss for _, loss in losses)
    if total <= 0:
        return []
    shares = [(layer, loss / total) for layer, loss in losses]
    return sorted(shares, key=lambda entry: -entry[1])


def _losses(report: Report, shares: list[tuple[LayerReport, float]]) -> Paragraph:
    title = "Where the loss comes from"
    if not any(layer.replaced for layer in report.layers):
        return Paragraph(title, ("No layer was changed.",))
    if shares:
        chosen = [layer for layer, _ in shares[:NAMED]]
        sentences = list(
            _predicted(report, sum(layer.predicted_loss or 0.0 for layer, _ in shares))
        )
    else:
        replaced = [layer for layer in report.layers if layer.replaced]
        chosen = sorted(replaced, key=lambda layer: -(layer.error or 0.0))[:NAMED]
        sentences = [
            "What each layer costs the network is not known; those with the largest error of "
            "their own are:"
        ]
    known = {layer.name: share for layer, share in shares}
    names = short_names([layer.name for layer in chosen], 80)
    lines = [f"{names[each.name]}: {_cut(each, known.get(each.name))}" for each in chosen]
    said = report.arithmetic
    if said is not None:
        sentences.append(
            f"Computing in 8 bits brought the loss from {said.loss_before:.3g} to {said.loss:.3g}."
        )
    return Paragraph(title, tuple(sentences), tuple(lines))


def _predicted(report: Report, total: float) -> Iterator[str]:
    """Say what the shares of layers are, and what the whole model was measured at."""
    seen = report.calibration
    if seen is None or report.solver is None or report.solver.objective == "weights":
        yield (
            "Shares of layers are by the squared relative error of their weights, which is what "
            "was minimised, and no measure of quality."
        )
        return
    yield (
        "Shares of layers are predicted: by what the network loses with one layer alone replaced, "
        "before any refit, from runs on samples that made the factors."
    )
    loss = seen.loss if report.arithmetic is None else report.arithmetic.loss_before
    if _same_loss(seen):
        yield (
            f"They add up to a loss of {total:.3g}; the whole model was measured at {loss:.3g} on "
            "the samples held back."
        )
    yield "What single layers lose within the finished model was not measured."


def _same_loss(seen: CalibrationReport) -> bool:
    """Whether the loss that decisions follow is the one that is stated, and 0 for the original."""
    plain = all(kind in KINDS for kind in seen.outputs.values())
    return plain and all(value <= 1.0 for value in seen.temperatures.values())


def _cut(layer: LayerReport, share: float | None) -> str:
    """Say what became of a layer, and what that loses."""
    parts = []
    if layer.rank is not None:
        parts.append(f"rank {layer.rank} of {layer.full_rank}")
    if layer.bits is not None:
        parts.append(f"{layer.bits} bits")
    if not parts:
        parts.append(layer.decision)
    if share is not None:
        parts.append(f"{percent_text(share)} of the sum ({layer.predicted_loss:.2g})")
    if layer.error is not None:
        parts.append(f"its own error {percent_text(layer.error)}")
    return ", ".join(parts)


def _next(report: Report, shares: list[tuple[LayerReport, float]]) -> Iterator[str]:
    seen = report.calibration
    if seen is None:
        yield (
            "Give --data with 100 to 300 samples of what the model will see: factors then follow "
            "what matters for the answers, and the loss is measured."
        )
    if report.forecast is not None:
        yield (
            "Give --precision auto: storing numbers in fewer bits is predicted to lose "
            f"{report.forecast.predicted:.2g} at this budget, ranks alone "
            f"{report.forecast.ranks_alone:.2g}."
        )
    if seen is not None and seen.quality.drop > MUCH:
        yield "Raise the budget; cobla-onnx sweep shows what each one costs."
        if seen.distillation is None:
            yield "Give --distil auto: what is stored then learns from the original's outputs."
    elif seen is not None and seen.quality.drop <= NOTHING and not report.unchanged:
        yield "Try a smaller budget: cobla-onnx sweep shows where the loss begins."
    if shares and shares[0][1] > 0.5 and len(shares) > 1:
        name = short_names([shares[0][0].name], 80)[shares[0][0].name]
        yield (
            f"Over half of that sum is in {name} "
            f"({count_text(shares[0][0].params.before)} weights): see what --exclude of it does, "
            "which others then pay for."
        )
    yield "Measure on your own test set before you use it."
