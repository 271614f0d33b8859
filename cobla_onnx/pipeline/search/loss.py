"""Improve ranks by the loss of the whole network, following its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cobla_onnx.allocation import Choice, Constraint, SeparableError
from cobla_onnx.allocation.objective import masks_of
from cobla_onnx.allocation.slsqp import Effort
from cobla_onnx.allocation.sqp import Scores, Step, allocate_by_loss
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.network_loss import NetworkLoss
from cobla_onnx.pipeline.search.problem import Problem, SearchResult

__all__ = ["improve", "scores", "search_by_loss"]

# Limits of SLSQP on the network's loss: each iteration is a forward and a backward pass.
LOSS_EFFORT = Effort(max_variables=120, rounds=1, iterations=15, tolerance=1e-3, converge=False)


def search_by_loss(
    problem: Problem,
    evidence: Evidence,
    finisher: Finisher,
    constraints: Sequence[Constraint],
    warm: SearchResult,
    separable: SeparableError,
) -> SearchResult:
    """Improve an answer by the loss of the whole network, as far as gradients are available.

    Parameters
    ----------
    warm : SearchResult
        The answer that minimises `separable`.
    separable : SeparableError
        A model of the loss that is a sum over layers.

    Raises
    ------
    ModelError
        If no layer has a gradient.
    """
    gradients = evidence.gradients
    if gradients.blocked:
        index, reason = min(gradients.blocked.items())
        name = problem.analysis.layers[index].name
        warm = _noting(
            warm,
            f"{len(gradients.blocked)} layers have no gradient and stay as the objective output "
            f"has them; {name!r}: {reason}",
        )
    if gradients.left_out:
        warm = _noting(
            warm,
            f"the gradient does not see {gradients.left_out} batches, whose shapes are "
            "more than it is made for; give samples of fewer shapes to have all of them count",
        )
    effort = replace(LOSS_EFFORT, seconds=problem.seconds)
    return improve(problem, evidence, finisher, constraints, warm, separable, effort)


def improve(
    problem: Problem,
    evidence: Evidence,
    finisher: Finisher,
    constraints: Sequence[Constraint],
    warm: SearchResult,
    separable: SeparableError,
    effort: Effort = LOSS_EFFORT,
) -> SearchResult:
    """Return the best candidate on the selection split; see `allocate_by_loss`.

    It is `warm` if none is better there beyond the noise.
    """
    curves, gradients = problem.analysis.curves, evidence.gradients
    fixed = frozenset(gradients.blocked)
    objective = NetworkLoss(curves, evidence.path(), gradients, separable, fixed=fixed)
    start = masks_of(curves, warm.allocation.choices)
    # The separable model ignores interactions between the errors of layers.
    ratio = objective.value(start) / max(objective.separable.value(start), 1e-12)
    objective = replace(objective, separable=objective.separable.scaled(ratio))
    history: list[Step] = []

    def watch(step: Step) -> None:
        history.append(step)
        evidence.context.progress(f"network loss: {step.loss:.4g}", step.number, step.number + 1)

    def refitted(choices: Sequence[Choice | None]) -> Scores:
        weights = finisher.refitted_weights(problem.analysis.plan(choices))
        return Scores(*evidence.judge.scores(weights))

    allocation, candidates = allocate_by_loss(
        curves,
        objective,
        constraints,
        warm.allocation,
        lambda choices: scores(finisher, choices),
        effort,
        watch,
        refitted if problem.refit else None,
    )
    compared = tuple(float(c.scores.searched.mean()) for c in candidates[1:])
    return replace(
        warm,
        allocation=allocation,
        history=(*warm.history, *history),
        candidates=warm.candidates + compared,
    )


def scores(finisher: Finisher, choices: Sequence[Choice | None]) -> Scores:
    """Losses of a plan on the selection split, before refit."""
    weights = finisher.weights(finisher.analysis.plan(choices))
    return Scores(*finisher.judge.scores(weights))


def _noting(result: SearchResult, note: str) -> SearchResult:
    return replace(result, allocation=result.allocation.noting(note))
