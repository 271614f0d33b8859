"""Choose ranks by the measured losses of truncating each layer alone."""

from __future__ import annotations

from collections.abc import Sequence

from cobla_onnx.allocation import Allocation, Constraint, LayerCurves, OutputError, allocate
from cobla_onnx.allocation.budget import within
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.neighbours import neighbours
from cobla_onnx.pipeline.search.problem import Problem, SearchResult
from cobla_onnx.pipeline.search.rivals import Rivals

__all__ = ["search_by_output", "sketch_by_output"]

# Most allocations in a row, each after measuring the points that the last one chose.
ROUNDS = 3


def search_by_output(
    problem: Problem, evidence: Evidence, rivals: Rivals | None, constraints: Sequence[Constraint]
) -> tuple[SearchResult, OutputError]:
    """Choose ranks by measured loss: the last round's, unless a rival is significantly better.

    See `Rivals.settle`; with None it is the last round's.

    Returns
    -------
    SearchResult
    OutputError
        The separable model of the loss that the last round minimised.

    Raises
    ------
    BudgetError
        If the constraints cannot be met.
    """
    analysis, progress = problem.analysis, evidence.context.progress
    curves = analysis.curves
    errors = _nothing_to_do(curves, constraints)
    if errors is not None:
        return SearchResult(allocate(curves, errors, constraints, solver=problem.solver)), errors
    sensitivity = evidence.sensitivity(constraints)
    rounds: list[tuple[OutputError, Allocation]] = []
    for number in range(ROUNDS):
        progress("allocate", number, ROUNDS)
        losses = sensitivity.objective()
        rounds.append((losses, allocate(curves, losses, constraints, solver=problem.solver)))
        if number == ROUNDS - 1 or not sensitivity.refine(rounds[-1][1].choices):
            break
    progress("allocate", ROUNDS, ROUNDS)
    *earlier, (losses, last) = rounds
    if rivals is None:
        return SearchResult(last, probe_samples=sensitivity.samples, losses=losses), losses
    others = [(f"round {number + 1}", each) for number, (_, each) in enumerate(earlier)]
    near = neighbours(analysis, losses, constraints, last)
    settled = rivals.settle(last, [*others, *near])
    result = SearchResult(
        settled.allocation,
        probe_samples=sensitivity.samples,
        candidates=settled.losses,
        rivals=settled.rivals,
        losses=losses,
    )
    return result, losses


def sketch_by_output(
    problem: Problem, evidence: Evidence, constraints: Sequence[Constraint]
) -> SearchResult:
    """Choose ranks by the losses that are measured already, none at what is chosen.

    Raises
    ------
    BudgetError
        If the constraints cannot be met.
    """
    curves = problem.analysis.curves
    losses = _nothing_to_do(curves, constraints) or evidence.sensitivity(constraints).objective()
    allocation = allocate(curves, losses, constraints, solver=problem.solver)
    return SearchResult(allocation, losses=losses)


def _nothing_to_do(
    curves: Sequence[LayerCurves], constraints: Sequence[Constraint]
) -> OutputError | None:
    """Return any loss if the model is within the constraints as it is; else None."""
    if not within(constraints, curves, (None,) * len(curves)):
        return None
    return OutputError([[c.errors for c in layer.curves] for layer in curves])
