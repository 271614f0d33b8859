"""Choose ranks and make factors by the model's loss on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cobla_onnx.allocation import Constraint
from cobla_onnx.calibration.evaluation.probe import Weights
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.distil import Distilled, distil
from cobla_onnx.distillation.record import Distillation
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.loss import search_by_loss
from cobla_onnx.pipeline.search.output import search_by_output
from cobla_onnx.pipeline.search.problem import Problem, SearchResult
from cobla_onnx.pipeline.search.refit import ChosenLayer, replaced_weights, replacements_for
from cobla_onnx.pipeline.search.rivals import Rivals
from cobla_onnx.plan import Plan
from cobla_onnx.runtime.temporary import Shelf
from cobla_onnx.variants.base import Approximation
from cobla_onnx.variants.replacement import Replacement

__all__ = [
    "Factors",
    "MeasuredFactors",
    "distil_factors",
    "draft_by_data",
    "make_factors",
    "measure_factors",
    "search_by_data",
]


def search_by_data(
    problem: Problem, evidence: Evidence, finisher: Finisher, constraints: Sequence[Constraint]
) -> SearchResult:
    """Choose ranks; the objective of the problem says by which loss.

    Parameters
    ----------
    finisher : Finisher
        Of `evidence`, made for this budget; it keeps what the factors of the answer need.

    Raises
    ------
    BudgetError
        If the constraints cannot be met.
    ModelError
        If the objective ``loss`` is asked for and no layer has a gradient.
    """
    rivals = Rivals(finisher, evidence.crossfit(finisher))
    found, losses = search_by_output(problem, evidence, rivals, constraints)
    if not any(found.allocation.choices):
        return found
    if problem.objective != "output":
        found = search_by_loss(problem, evidence, finisher, constraints, found, losses)
    answer, rival = rivals.or_weights_alone(
        found.allocation, constraints, evidence.weight_curves, problem.refit
    )
    return replace(found, allocation=answer, rivals=(*found.rivals, rival))


def draft_by_data(
    problem: Problem, evidence: Evidence, constraints: Sequence[Constraint]
) -> SearchResult:
    """Choose ranks as `search_by_data` does before it compares them with others.

    Raises
    ------
    BudgetError
        If the constraints cannot be met.
    """
    return search_by_output(problem, evidence, None, constraints)[0]


@dataclass(frozen=True)
class Factors:
    """Factors of the layers that a plan replaces.

    Attributes
    ----------
    chosen : sequence of ChosenLayer
        With the factors before refit.
    approximations : sequence of Approximation
        After it, in the order of `chosen`.
    refitted : int
        How many of them were changed.
    loss_before : float or None
        On the selection split before refit and distillation; None if there was neither.
    distilled : Distilled or None
        What they became afterwards; None if that was not asked for.
    """

    chosen: Sequence[ChosenLayer]
    approximations: Sequence[Approximation]
    refitted: int = 0
    loss_before: float | None = None
    distilled: Distilled | None = None

    def replacements(self) -> list[Replacement]:
        """Return what is stored for the layers, in the order of `chosen`."""
        if self.distilled is not None:
            return list(self.distilled.replacements)
        return replacements_for(self.chosen, self.approximations)

    def weights(self) -> Weights:
        """Return weights and biases of the layers in the form that `Probe` takes."""
        if self.distilled is None or not self.distilled.record.kept:
            return replaced_weights(self.chosen, self.approximations)
        return {
            entry.index: (made.dense(), made.bias)
            for entry, made in zip(self.chosen, self.distilled.replacements, strict=True)
        }


@dataclass(frozen=True)
class MeasuredFactors:
    """Replacements of a plan's layers, and what they cost on the selection split.

    Attributes
    ----------
    replacements : list of Replacement
    loss, loss_before_refit : float
    quality : Quality
    refitted : int
        Layers whose refit was kept.
    distillation : Distillation or None
    """

    replacements: list[Replacement]
    loss: float
    loss_before_refit: float
    quality: Quality
    refitted: int
    distillation: Distillation | None = None


def make_factors(finisher: Finisher, plan: Plan, refit: bool) -> Factors:
    """Make the factors of a plan, and refit them if asked for."""
    chosen = finisher.chosen(plan)
    before = [entry.approximation for entry in chosen]
    if not refit or plan.factors != "data":
        return Factors(chosen, before)
    loss = finisher.judge.selection.loss(replaced_weights(chosen, before))
    return Factors(chosen, *finisher.refitted(plan), loss)


def distil_factors(
    evidence: Evidence,
    finisher: Finisher,
    plan: Plan,
    factors: Factors,
    settings: Settings,
) -> Factors:
    """Let the factors of a plan learn from the original's outputs, if asked for; see `distil`."""
    if settings.distil is None:
        return factors
    replacements = factors.replacements()
    if not replacements:
        record = Distillation(reason="no layer was changed, so that none has anything to learn")
        return replace(factors, distilled=Distilled(replacements, record))
    context = evidence.context
    distilled = distil(
        evidence.judge,
        replacements,
        settings.distil,
        lambda: evidence.crossfit(finisher).parts(plan, settings.refit),
        augmentation=None if settings.augment is None else Augmentation.of(settings.augment),
        seed=settings.seed,
        seconds=settings.time_limit,
        threads=min(context.threads, context.pool.runs_at_most),
        progress=context.progress,
    )
    loss = factors.loss_before
    if loss is None:
        loss = evidence.judge.selection.loss(factors.weights())
    return replace(factors, distilled=distilled, loss_before=loss)


def measure_factors(evidence: Evidence, factors: Factors) -> MeasuredFactors:
    """Measure factors on the selection split."""
    selection = evidence.judge.selection
    found = Shelf(
        {name: actual[name] for name in expected if name in actual}
        for expected, actual in selection.outputs(factors.weights())
    )
    losses, quality = evidence.judged(found)
    loss = float(losses.mean())
    return MeasuredFactors(
        factors.replacements(),
        loss,
        loss if factors.loss_before is None else factors.loss_before,
        quality,
        factors.refitted,
        None if factors.distilled is None else factors.distilled.record,
    )
