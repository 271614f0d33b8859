"""Allocate levels: knapsack, relaxed masks by SLSQP, rounding, and an optimality certificate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from cobla_onnx.allocation.bound import Front, least_losses
from cobla_onnx.allocation.budget import Constraint, require_reachable, within
from cobla_onnx.allocation.knapsack import knapsack
from cobla_onnx.allocation.objective import Objective, loss_curves, masks_of
from cobla_onnx.allocation.problem import Choice, LayerCurves, LossCurves
from cobla_onnx.allocation.resources import RESOURCES
from cobla_onnx.allocation.slsqp import Relaxed, nearest_choices, relax

__all__ = ["Allocation", "Certificate", "allocate", "fitting", "relative_gap"]


@dataclass(frozen=True)
class Certificate:
    """How good an allocation is, with a bound on how much better it could be.

    Attributes
    ----------
    solver, objective : str
    value : float
        Objective of the choices.
    lower_bound : float or None
        Lower bound over all choices within the budgets; None if the objective is not separable.
    gap : float or None
        (value - lower_bound) / value.
    multipliers : mapping of str to float
        Decrease of the objective per unit by which a budget's fraction is raised.
    reached : mapping of str to int
        Exact cost under each constraint.
    relaxed_value, kkt_residual : float or None
        Of the relaxed problem, where SLSQP solved it.
    iterations, variables : int
        Of SLSQP.
    notes : tuple of str
        What a reader has to know, such as a fallback that was taken.
    fronts : mapping of str to Front
        The least loss at every fraction of memory or MACs, each budget taken alone.
    """

    solver: str
    objective: str
    value: float
    lower_bound: float | None
    gap: float | None
    multipliers: Mapping[str, float]
    reached: Mapping[str, int]
    relaxed_value: float | None = None
    kkt_residual: float | None = None
    iterations: int = 0
    variables: int = 0
    notes: tuple[str, ...] = ()
    fronts: Mapping[str, Front] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """One choice per layer, None for a layer kept whole, and the certificate.

    `factors` says what the factors approximate: the layers' outputs on the data, or the weights
    themselves.
    """

    choices: tuple[Choice | None, ...]
    certificate: Certificate
    factors: Literal["data", "weights"] = "data"

    def noting(self, note: str) -> Allocation:
        """Return a copy with a further note."""
        notes = (*self.certificate.notes, note)
        return replace(self, certificate=replace(self.certificate, notes=notes))


def allocate(
    layers: Sequence[LayerCurves],
    objective: Objective,
    constraints: Sequence[Constraint],
    *,
    solver: Literal["slsqp", "milp"] = "slsqp",
) -> Allocation:
    """Choose for each layer to keep it whole, or a curve and a level.

    Parameters
    ----------
    layers : sequence of LayerCurves
    objective : Objective
        What is minimised.
    constraints : sequence of Constraint
        Hard limits; see `Budget.constraints`.
    solver : {'slsqp', 'milp'}
        ``milp`` solves the objective's separable model alone. ``slsqp`` starts there,
        solves the relaxed problem and rounds; it is never worse.

    Raises
    ------
    BudgetError
        If the limits cannot be met; names the least feasible ones.
    """
    whole: tuple[Choice | None, ...] = (None,) * len(layers)
    if within(constraints, layers, whole):
        reached = {c.name: c.cost(layers, whole) for c in constraints}
        zero = dict.fromkeys(reached, 0.0)
        return Allocation(whole, Certificate(solver, objective.name, 0, 0, 0, zero, reached))
    require_reachable(layers, constraints)
    losses = loss_curves(objective, layers)
    warm = knapsack(layers, losses, constraints)
    best, value = warm.choices, objective.value(masks_of(layers, warm.choices))
    relaxed: Relaxed | None = None
    notes: tuple[str, ...] = ()
    if solver == "slsqp":
        relaxed = relax(layers, objective, losses, constraints, warm.choices, warm.multipliers)
        if relaxed.masks is None:
            notes = (f"SLSQP: {relaxed.problem}; the knapsack's answer is used instead",)
        for choices in _rounded(layers, objective, losses, constraints, relaxed):
            candidate = objective.value(masks_of(layers, choices))
            if candidate < value:
                best, value = choices, candidate
    bound = min(warm.lower_bound, value)
    counted = {resource.name for resource in RESOURCES if resource.counted}
    solved = relaxed is not None and relaxed.masks is not None
    return Allocation(
        best,
        Certificate(
            solver=solver,
            objective=objective.name,
            value=value,
            lower_bound=bound,
            gap=relative_gap(value, bound),
            multipliers=warm.multipliers,
            reached={c.name: c.cost(layers, best) for c in constraints},
            relaxed_value=relaxed.value if relaxed and solved else None,
            kkt_residual=relaxed.kkt_residual if relaxed and solved else None,
            iterations=relaxed.iterations if relaxed else 0,
            variables=relaxed.variables if relaxed else 0,
            notes=notes,
            fronts={
                c.name: least_losses(layers, losses, c) for c in constraints if c.name in counted
            },
        ),
    )


def relative_gap(value: float, bound: float) -> float:
    """Return how much of an objective's value could be saved at most; 0 where it is 0."""
    return (value - bound) / value if value > 0 else 0.0


def _rounded(
    layers: Sequence[LayerCurves],
    objective: Objective,
    losses: LossCurves,
    constraints: Sequence[Constraint],
    relaxed: Relaxed,
) -> Iterator[tuple[Choice | None, ...]]:
    """Yield integer choices near a relaxed solution, all within the limits."""
    if relaxed.masks is None:
        return
    scales = _slopes(objective, losses, relaxed)
    if not np.allclose(scales, 1.0, rtol=1e-9):
        scaled = [[c * s for c in curves] for curves, s in zip(losses, scales, strict=True)]
        yield knapsack(layers, scaled, constraints).choices
    yield from fitting(layers, constraints, relaxed)


def fitting(
    layers: Sequence[LayerCurves], constraints: Sequence[Constraint], relaxed: Relaxed
) -> Iterator[tuple[Choice | None, ...]]:
    """Yield choices nearest to ever larger fractions of the relaxed ranks, within the limits."""
    low, high = 0.0, 1.0
    for _ in range(25):
        # Bisection for the largest fraction of the relaxed ranks that fits the budgets.
        middle = high if low == 0.0 and high == 1.0 else (low + high) / 2
        choices = nearest_choices(layers, relaxed, middle)
        if within(constraints, layers, choices):
            yield choices
            low = middle
            if middle == 1.0:
                return
        else:
            high = np.nextafter(1.0, 0.0) if middle == 1.0 else middle


def _slopes(objective: Objective, losses: LossCurves, relaxed: Relaxed) -> list[float]:
    """Ratio of the objective's slope to that of its separable model, for each layer."""
    assert relaxed.masks is not None
    gradient = objective.gradient(relaxed.masks)
    scales = []
    for i, (scheme, mask) in enumerate(
        zip(relaxed.masks.schemes, relaxed.masks.values, strict=True)
    ):
        model = 2.0 * float(np.diff(losses[i][scheme]) @ (1.0 - mask))
        actual = float(gradient[i].sum())
        scales.append(
            float(np.clip(actual / model, 0.05, 20.0)) if min(-model, -actual) > 0 else 1.0
        )
    return scales
