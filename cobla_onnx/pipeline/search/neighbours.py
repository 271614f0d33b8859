"""Solutions of nearby problems, as alternative plans: other rank grids, other budgets, bits alone.

An allocation is optimal under its model of the loss, but the error of that model is larger than
the difference between plans of nearly the same cost. Solutions of nearby problems are a priori as
good, so they are worth measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cobla_onnx.allocation import (
    Allocation,
    Budget,
    Choice,
    Constraint,
    LayerCurves,
    SeparableError,
)
from cobla_onnx.allocation.knapsack import RELATIVE_GAP, solved
from cobla_onnx.allocation.objective import loss_curves, masks_of
from cobla_onnx.allocation.solve import relative_gap
from cobla_onnx.allocation.subproblem import Subproblem
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.runtime.machine import convolution_block
from cobla_onnx.runtime.providers import CPU, current_provider
from cobla_onnx.variants.low_rank.ranks import rank_rule
from cobla_onnx.variants.registry import level_of

__all__ = ["neighbours"]

# Limits that are tried on the other budget, as fractions of the answer's cost there.
SHARES = (0.95, 0.9)
# Relative gap at which branch and bound of a problem with two limits stops: its answers are judged
# on samples, and a fifth of the gap takes five times as long.
NEAR = 5e-3

Choices = tuple["Choice | None", ...]


def neighbours(
    analysis: Analysis,
    losses: SeparableError,
    constraints: Sequence[Constraint],
    answer: Allocation,
) -> Iterator[tuple[str, Allocation]]:
    """Solve problems near the answer's own; their solutions keep its limits, too.

    They are: the budget that was not limited, limited to the same fraction, and to a little less
    than the answer costs there; and, for a memory budget alone, the rank grid of MAC budgets, and,
    where the answer has ranks and might have bits, these without ranks.

    Parameters
    ----------
    analysis : Analysis
    losses : Objective
        The separable objective that the answer minimises.
    constraints : sequence of Constraint
        With a table of times there are no neighbours, since each would have to be timed.
    answer : Allocation

    Yields
    ------
    origin : str
        Names the problem.
    allocation : Allocation
        Its certificate is the answer's, with the values of its own choices.
    """
    for other in _other_limits(analysis, constraints, answer):
        found = _solved(analysis.curves, losses, [*constraints, other])
        if found is not None:
            origin = f"{other.name} at most {other.fraction:.3g}"
            yield origin, _standing_in(analysis, losses, constraints, answer, found)
    if [constraint.name for constraint in constraints] == ["mem"]:
        budget = Budget(mem=constraints[0].fraction)
        for origin, part in _parts(analysis, answer):
            found = _solved_part(analysis, losses, budget, part)
            if found is not None:
                yield origin, _standing_in(analysis, losses, constraints, answer, found)


def _parts(analysis: Analysis, answer: Allocation) -> Iterator[tuple[str, Subproblem]]:
    """Yield problems with fewer curves or levels, and a name of what is left."""
    whole, cpu = analysis.curves, current_provider() == CPU
    rule = rank_rule("auto", mac=True, latency=False, block=convolution_block(), cpu=cpu)
    yield str(rule.convolution), Subproblem.found_in(whole, analysis.under(rule).curves)
    chosen = zip(whole, answer.choices, strict=True)
    levels = {level_of(layer.curves[c.curve].scheme) for layer, c in chosen if c is not None}
    if levels - {"bits"}:
        yield (
            "bits alone",
            Subproblem.keeping(whole, lambda curve: level_of(curve.scheme) == "bits"),
        )


def _other_limits(
    analysis: Analysis, constraints: Sequence[Constraint], answer: Allocation
) -> Iterator[Constraint]:
    limited = constraints[0]
    if len(constraints) > 1 or limited.name == "latency" or not analysis.mac_total:
        return

    def other(fraction: float) -> Constraint:
        by_memory = limited.name == "mem"
        budget = Budget(mac=fraction) if by_memory else Budget(mem=fraction)
        return analysis.constraints(budget)[0]

    all_of_it = other(1.0)
    reached = all_of_it.cost(analysis.curves, answer.choices) / all_of_it.total
    for fraction in dict.fromkeys((limited.fraction, *(share * reached for share in SHARES))):
        # Lookups of low rank may take the MACs beyond those of the original.
        if 0 < fraction < reached and fraction <= 1:
            yield other(fraction)


def _solved(
    layers: Sequence[LayerCurves], losses: SeparableError, constraints: Sequence[Constraint]
) -> Choices | None:
    """Solve a problem; None where no choices meet the additional limit as well."""
    if not layers:
        return None
    curves = loss_curves(losses, layers)
    gap = RELATIVE_GAP if len(constraints) == 1 else NEAR
    found = solved(layers, curves, constraints, relative_gap=gap)
    return None if found is None else found.choices


def _solved_part(
    analysis: Analysis, losses: SeparableError, budget: Budget, part: Subproblem
) -> Choices | None:
    """Solve a part of the problem: what is not in it stays whole, and counts as fixed."""
    limits = budget.constraints(part.layers, analysis.totals, analysis.saved)
    found = _solved(part.layers, part.losses(losses), limits)
    return None if found is None else part.choices(found, analysis.curves)


def _standing_in(
    analysis: Analysis,
    losses: SeparableError,
    constraints: Sequence[Constraint],
    answer: Allocation,
    choices: Choices,
) -> Allocation:
    """Make an allocation of choices; the bound of the answer's problem holds for them, too."""
    value = losses.value(masks_of(analysis.curves, choices))
    bound = answer.certificate.lower_bound
    assert bound is not None
    certificate = replace(
        answer.certificate,
        value=value,
        gap=relative_gap(value, bound),
        reached={c.name: c.cost(analysis.curves, choices) for c in constraints},
    )
    return Allocation(choices, certificate)
