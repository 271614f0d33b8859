"""Choose how each output is compared, from evidence: graph, data, labels and names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from cobla_onnx.autodiff.measures import LossKind, Measure
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.makers import Made, made_by
from cobla_onnx.calibration.evaluation.output_choice import LossName, OutputChoice
from cobla_onnx.calibration.evaluation.survey import OutputFacts, Survey, survey
from cobla_onnx.calibration.evaluation.temperature import temperatures
from cobla_onnx.calibration.heads import Curvature, curvatures
from cobla_onnx.errors import DataError, UsageError
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.text import quoted
from cobla_onnx.wording import in_flags, option_name

__all__ = ["Chooser", "Compared", "look_at", "measures_of", "measures_on", "notes_on"]

# Names that exporters give to class outputs; probabilities are recognised by their sums.
NAMED = re.compile(r"logits?[\W\d_]*$", re.I)
BY_NAME = "its name"
UNDECIDED = "nothing tells whether it is classes or values"


@dataclass(frozen=True)
class Chooser:
    """Decides how outputs are compared.

    Evidence for classes is, in this order: the user's choice, a softmax that produces the output,
    values that sum to one along an axis, labels, the output's name. The axis is that of the
    softmax or of the sums; otherwise the last of two or three axes, and the second of more.
    Without evidence, an output with two axes is compared in a way that is safe for classes and for
    values, and any other as values, with features on the axis along which variances differ most.

    Parameters
    ----------
    loss : {'auto', 'kl', 'mse', 'ce'}
    choices : mapping of str to OutputChoice
        The user's choices, by the user's name of the output.
    made : mapping of str to Made
        The operators that produce the outputs.
    labelled : bool
        Whether labels are given; they belong to the named output, or to the only one.
    shown : mapping of str to str
        The user's output that a measured tensor represents, where it has another name.
    """

    loss: LossName = "auto"
    choices: Mapping[str, OutputChoice] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    labelled: bool = False
    shown: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx.ModelProto, loss: LossName = "auto", **given: Any) -> Chooser:
        """Build a chooser that knows the operators behind a model's outputs."""
        return cls(loss, made=made_by(model), **given)

    def classes(self, name: str, facts: OutputFacts) -> tuple[int, bool] | None:
        """Class axis of an output, as far as known, and whether it holds logits."""
        if self.loss == "mse" or self._choice(name).how == "ignore":
            return None
        measure = self._measure(name, facts, self.loss)
        return (measure.axis or 1, measure.of_logits) if measure.has_classes else None

    def measures(self, found: Survey) -> dict[str, Measure]:
        """Decide for all outputs that count.

        Raises
        ------
        DataError
            If no output is of floating type and counts.
        UsageError
            If the loss or the labels need classes and there are none, if the labels could belong
            to several outputs, or if an axis does not fit.
        """
        counted = {n: f for n, f in found.outputs.items() if self._choice(n).how != "ignore"}
        if not counted:
            raise DataError(
                "the model has no output of floating type that counts: calibration cannot "
                "measure it"
            )
        measures = {name: self._measure(name, facts, self.loss) for name, facts in counted.items()}
        if self.labelled:
            name = self._with_labels(measures, counted)
            measures[name] = self._to_labels(name, counted[name])
        return measures

    def _choice(self, name: str) -> OutputChoice:
        name = self.shown.get(name, name)
        return self.choices.get(name, OutputChoice(name))

    def _measure(self, name: str, facts: OutputFacts, loss: LossName) -> Measure:
        choice = self._choice(name)
        rank = len(facts.sizes)
        axis = self._given_axis(choice, facts)
        if choice.how == "classes":
            axis = axis if axis is not None else self._normal_axis(name, facts)
            return self._of_classes(
                facts, axis if axis is not None else _usual(rank), option_name("outputs"), loss
            )
        if choice.how == "values" or loss == "mse":
            values = choice.how == "values"
            why = option_name("outputs") if values else option_name("loss", "mse")
            return _of_values(facts, axis, why)
        normal = self._normal_axis(name, facts)
        if normal is not None and axis in (None, normal):
            made = self.made.get(name)
            why = "values that sum to one"
            if made is not None and made.op in ("Softmax", "LogSoftmax"):
                why = f"the {made.op} that makes it"
            return self._of_classes(facts, normal, why, loss)
        usual = axis if axis is not None else _usual(rank)
        if _may_be_classes(facts, usual):
            sigmoid = name in self.made and self.made[name].op == "Sigmoid"
            if NAMED.search(self.shown.get(name, name)) and not facts.unit and not sigmoid:
                return self._of_classes(facts, usual, BY_NAME, loss)
            if loss != "auto":
                return self._of_classes(facts, usual, option_name("loss", loss), loss)
            if _two_axes(facts) and not facts.unit and usual == 1 and 1 in facts.slices.by_axis:
                return _either(facts)
        elif loss != "auto":
            raise UsageError(
                f"{option_name('loss', loss)}: output {name!r} of shape {_shape(facts)} has no "
                f"classes along axis {usual}; use {option_name('loss', 'mse')}"
            )
        return _of_values(facts, axis, "no sign of classes")

    def _given_axis(self, choice: OutputChoice, facts: OutputFacts) -> int | None:
        if choice.axis is None:
            return None
        rank = len(facts.sizes)
        axis = choice.axis + rank if choice.axis < 0 else choice.axis
        if not 1 <= axis < rank:
            raise UsageError(
                f"{option_name('outputs', choice.name)}: has shape {_shape(facts)}, no classes or "
                f"features can be along axis {choice.axis}; give one from 1 to {rank - 1}"
            )
        return axis

    def _normal_axis(self, name: str, facts: OutputFacts) -> int | None:
        """Axis along which values, or their exponentials, sum to one."""
        axes = facts.normal or facts.log_normal
        made = self.made.get(name)
        if made is not None and made.axis is not None and axes:
            axis = made.axis % len(facts.sizes)
            if axis in axes:
                return axis
        usual = _usual(len(facts.sizes))
        return usual if usual in axes else min(axes, default=None)

    def _of_classes(self, facts: OutputFacts, axis: int, why: str, loss: LossName) -> Measure:
        if not _may_be_classes(facts, axis):
            raise UsageError(
                f"{why}: an output of shape {_shape(facts)} has no classes along axis {axis}; "
                "name another axis, or take it as values"
            )
        plain: LossKind = "probabilities" if axis in facts.normal else "logits"
        kind: LossKind = plain
        if loss == "ce":
            kind = "ce-probabilities" if plain == "probabilities" else "ce-logits"
        mask = facts.mask if axis > 1 else None
        return Measure(kind, axis, mask=mask, suppressed=facts.suppressed, decided_by=in_flags(why))

    def _with_labels(self, found: Mapping[str, Measure], counted: Mapping[str, OutputFacts]) -> str:
        """Return the output to which the labels belong."""
        told = [name for name in found if self._choice(name).how == "classes"]
        certain = [name for name, measure in found.items() if measure.has_classes]
        for candidates in (told, list(found), certain):
            if len(candidates) == 1:
                return candidates[0]
        listed = ", ".join(quoted(self.shown.get(name, name)) for name in counted)
        raise UsageError(
            f"{option_name('labels')}: the model has {len(counted)} outputs, {listed}, and labels "
            f"belong to one of them; say which by {option_name('outputs', {'NAME': 'classes'})}"
        )

    def _to_labels(self, name: str, facts: OutputFacts) -> Measure:
        choice = self._choice(name)
        axis = self._given_axis(choice, facts)
        axis = axis if axis is not None else self._normal_axis(name, facts)
        axis = axis if axis is not None else _usual(len(facts.sizes))
        if axis == 0 or facts.sizes[axis] == 1:
            # One probability separates 0 from 1, whether for a sample, a token or a pixel.
            kind: LossKind = "binary-probabilities" if facts.unit else "binary-logits"
            why = "labels that are given"
            return Measure(kind, None, mask=facts.mask, labelled=True, decided_by=why)
        if not _may_be_classes(facts, axis):
            raise UsageError(
                f"{option_name('labels')}: output {quoted(name)} of shape {_shape(facts)} has no "
                f"classes along axis {axis}; leave out the labels, or name the output by "
                f"{option_name('outputs', 'NAME=classes:AXIS')}"
            )
        measure = self._of_classes(facts, axis, "labels that are given", "ce")
        return replace(measure, labelled=True)


@dataclass(frozen=True)
class Compared:
    """How all outputs are compared, and the temperatures that decisions follow.

    Attributes
    ----------
    measures : dict of str to Measure
    temperatures : dict of str to float
        Temperatures of class distributions; empty if a loss is asked for.
    notes : tuple of str
        Assumptions made, and samples left out.
    curvatures : dict of str to Curvature
        Weights of the entries of each output.
    """

    measures: dict[str, Measure]
    temperatures: dict[str, float]
    notes: tuple[str, ...] = ()
    curvatures: dict[str, Curvature] = field(default_factory=dict)


def look_at(
    model: onnx.ModelProto,
    dataset: Dataset,
    batch: int,
    threads: int,
    chooser: Chooser,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compared:
    """Run the original on all samples, leave out unusable ones, and decide.

    Raises
    ------
    DataError, UsageError
        See `survey` and `Chooser.measures`.
    """
    found = survey(model, dataset, batch, threads, chooser.classes, progress)
    if found.left_out:
        dataset.leave_out(found.left_out)
        if any(facts.about for facts in found.outputs.values()):
            # The splits have changed, and so has the evidence of their halves about classes.
            again = survey(model, dataset, batch, threads, chooser.classes, progress)
            found = replace(again, notes=found.notes)
    measures = chooser.measures(found)
    shares = {name: facts.shares for name, facts in found.outputs.items()}
    softness = temperatures(measures, shares) if chooser.loss == "auto" else {}
    notes = found.notes + notes_on(measures, chooser.shown)
    return Compared(measures, softness, notes, curvatures(measures, found.outputs, softness))


def measures_of(
    model: onnx.ModelProto,
    feeds: Feeds,
    outputs: Mapping[str, Any],
    loss: LossName,
    labelled: bool = False,
) -> dict[str, Measure]:
    """Decide from a single batch."""
    found = Survey()
    found.add(outputs, feeds)
    return Chooser.of(model, loss, labelled=labelled).measures(found)


def measures_on(
    model: onnx.ModelProto,
    runs: Iterable[tuple[Feeds, Mapping[str, Any]]],
    choices: Mapping[str, OutputChoice] | None = None,
) -> dict[str, Measure]:
    """Decide from inputs and outputs of some runs; empty if no output is floating-point."""
    found = Survey()
    for feeds, outputs in runs:
        found.add(outputs, feeds)
    chooser = Chooser.of(model, choices=choices or {})
    counted = any((choices or {}).get(n, OutputChoice(n)).how != "ignore" for n in found.outputs)
    return chooser.measures(found) if counted else {}


def notes_on(
    measures: Mapping[str, Measure], shown: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Say what was assumed about outputs, and how to decide it explicitly."""
    notes = []
    for name, measure in measures.items():
        label = (shown or {}).get(name, name)
        if measure.kind == "either":
            notes.append(
                f"output {quoted(label)}: {UNDECIDED}; it is compared as both, --output "
                f"{label}=classes or {label}=values settles it"
            )
        elif measure.decided_by == BY_NAME:
            notes.append(
                f"output {quoted(label)}: taken for classes along axis {measure.axis} by its "
                f"name; if it is not, give --output {label}=values"
            )
        if measure.mask is not None:
            notes.append(f"output {quoted(label)}: counts where input {quoted(measure.mask)} is 1")
    return tuple(notes)


def _usual(rank: int) -> int:
    """Class axis by convention: the last for tokens and frames, the second for maps."""
    return 1 if rank > 3 else rank - 1


def _may_be_classes(facts: OutputFacts, axis: int) -> bool:
    if not 1 <= axis < len(facts.sizes):
        return False
    size = facts.sizes[axis]
    return size is None or size >= 2


def _two_axes(facts: OutputFacts) -> bool:
    """Whether an output has two axes, not counting axes of length 1."""
    return len(facts.sizes) >= 2 and all(size == 1 for size in facts.sizes[2:])


def _of_values(facts: OutputFacts, axis: int | None, why: str) -> Measure:
    axis = axis if axis is not None else facts.slices.feature_axis()
    if axis is not None and axis not in facts.slices.by_axis:
        raise UsageError(
            f"{option_name('outputs')}: axis {axis} of an output of shape {_shape(facts)} cannot "
            "hold features, since its size differs, or it has one entry; name another"
        )
    # Rounded, so that sums in another order give the same loss, bit by bit.
    scale = tuple(float(f"{value:.3g}") for value in facts.slices.scale(axis))
    mask = facts.mask
    return Measure(
        "mse", axis, scale, mask=mask, suppressed=facts.suppressed, decided_by=in_flags(why)
    )


def _either(facts: OutputFacts) -> Measure:
    values = _of_values(facts, 1, UNDECIDED)
    assert values.scale is not None
    sums = facts.slices.of(values.axis)
    # Rows that are all equal differ by rounding alone; the scale is then their own size.
    same = not sums.variances(facts.slices.precision).any()
    spread = 1.0 / sum(values.scale) if same else float(f"{facts.centred:.3g}")
    return replace(values, kind="either", spread=spread if spread > 0 else 1.0)


def _shape(facts: OutputFacts) -> str:
    return str(["?" if size is None else size for size in facts.sizes]).replace("'", "")
