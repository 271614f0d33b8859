"""Solve the integer problem, one choice per layer under hard budgets, with a proven bound.

With a separable loss the allocation is a multiple-choice knapsack. Its LP relaxation gives a
price for each budget, and by weak duality the prices give a lower bound. A choice cannot be
part of a better solution if its priced cost exceeds the best of its layer by more than the gap
between that bound and a known solution. Of tens of thousands of choices a few hundred are left.
They are solved by dynamic programming if there is one budget, and by branch and bound (scipy's
HiGHS) if there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy  # its parts load when first used: optimize alone takes longer than most commands
from numpy.typing import NDArray

from cobla_onnx.allocation.budget import Constraint, unreachable, within
from cobla_onnx.allocation.dynamic import solve_programme
from cobla_onnx.allocation.problem import Choice, Float64, LayerCurves, LossCurves

__all__ = ["KnapsackSolution", "knapsack", "solved"]

# Relative gap at which branch and bound stops: the next digit may take a thousand times as long,
# and the loss that is minimised is a model whose error is far larger.
RELATIVE_GAP = 1e-3
# A limit on work and not on time, so that results can be repeated.
NODE_LIMIT = 1000
# Tolerance of HiGHS, of limits and of losses; costs are counted exactly afterwards.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class KnapsackSolution:
    """The choices found, their loss, a lower bound, and the prices of the budgets.

    ``multipliers`` are losses per unit of fraction: what loosening a budget would gain.
    """

    choices: tuple[Choice | None, ...]
    value: float
    lower_bound: float
    multipliers: dict[str, float]


@dataclass(frozen=True)
class _Table:
    """All choices side by side, one column each; curve -1 is keeping the layer whole."""

    layer: NDArray[np.int64]
    curve: NDArray[np.int64]
    level: NDArray[np.int64]
    loss: Float64
    spent: NDArray[np.int64]
    limits: NDArray[np.int64]

    @property
    def rooms(self) -> NDArray[np.int64]:
        """What may be spent, at least 1, so that costs can be divided by it."""
        return np.maximum(self.limits, 1)

    @cached_property
    def costs(self) -> Float64:
        """Costs as fractions of what may be spent, so that every limit is 1."""
        return np.asarray(self.spent / self.rooms[:, None])

    def __getitem__(self, keep: NDArray[Any]) -> _Table:
        return _Table(
            self.layer[keep],
            self.curve[keep],
            self.level[keep],
            self.loss[keep],
            self.spent[:, keep],
            self.limits,
        )

    def choices(self, columns: NDArray[Any]) -> tuple[Choice | None, ...]:
        """Convert columns, one for each layer in order, to choices."""
        return tuple(
            None if self.curve[c] < 0 else Choice(int(self.curve[c]), int(self.level[c]))
            for c in columns
        )


def _table(
    layers: Sequence[LayerCurves], losses: LossCurves, constraints: Sequence[Constraint]
) -> _Table:
    """List all choices of all layers, each as one column."""
    parts: list[tuple[int, int, NDArray[np.int64], Float64, NDArray[np.int64]]] = []
    for index, layer in enumerate(layers):
        whole = np.array([[c.whole(layer)] for c in constraints], dtype=np.int64)
        parts.append((index, -1, np.zeros(1, np.int64), np.zeros(1), whole))
        for number, curve in enumerate(layer.curves):
            costs = np.array([c.costs(curve) for c in constraints], dtype=np.int64)
            loss = np.asarray(losses[index][number])[curve.levels]
            parts.append((index, number, curve.levels, loss, costs))
    return _Table(
        np.concatenate([np.full(len(p[2]), p[0]) for p in parts]),
        np.concatenate([np.full(len(p[2]), p[1]) for p in parts]),
        np.concatenate([p[2] for p in parts]),
        np.concatenate([p[3] for p in parts]),
        np.concatenate([p[4] for p in parts], axis=1),
        np.array([c.limit - c.fixed for c in constraints], dtype=np.int64),
    )


@dataclass
class _Search:
    """The best choices so far, and a lower bound on the loss."""

    loss: Callable[[Sequence[Choice | None]], float]
    relative_gap: float
    bound: float
    best: tuple[Choice | None, ...] | None = None
    value: float = np.inf

    def add(self, found: tuple[Choice | None, ...] | None, proved: float = -np.inf) -> None:
        """Consider choices, and a proven bound on any that beat the best so far."""
        self.bound = max(self.bound, min(proved, self.value))
        if found is not None and self.loss(found) < self.value:
            self.best, self.value = found, self.loss(found)

    @property
    def distance(self) -> float:
        """Distance above the bound within which choices could still be better."""
        if self.best is None:
            return np.inf
        return self.value - self.bound + 1e-12 * max(1.0, abs(self.value))

    @property
    def done(self) -> bool:
        """Whether the remaining gap is too small to be worth a search."""
        return self.distance <= self.relative_gap * abs(self.value) + 1e-11


def knapsack(
    layers: Sequence[LayerCurves],
    losses: LossCurves,
    constraints: Sequence[Constraint],
    *,
    relative_gap: float = RELATIVE_GAP,
) -> KnapsackSolution:
    """Choose for each layer a curve and a level, or to keep it whole, with the least loss.

    Raises
    ------
    BudgetError
        If the constraints cannot be met together; names the least feasible fraction.
    """
    found = solved(layers, losses, constraints, relative_gap=relative_gap)
    if found is None:
        raise _together(layers, constraints)
    return found


def solved(
    layers: Sequence[LayerCurves],
    losses: LossCurves,
    constraints: Sequence[Constraint],
    *,
    relative_gap: float = RELATIVE_GAP,
) -> KnapsackSolution | None:
    """Do the same; return None where the constraints cannot be met together.

    To name the least feasible fraction, `knapsack` solves a further problem, exactly.
    """
    table = _table(layers, losses, constraints)
    assign = _assignment(table, len(layers))
    prices = _prices(table, assign)
    if prices is None:
        return None
    reduced, bound = _reduced(table, prices, len(layers))
    search = _Search(lambda found: _loss(found, losses), relative_gap, bound)
    search.add(_incumbent(table, prices, layers, constraints))
    if not search.done and len(constraints) == 1:
        candidates = table[reduced <= search.distance]
        columns = candidates.layer, candidates.loss, candidates.spent[0]
        found = solve_programme(*columns, int(table.limits[0]))
        search.add(
            None if found.columns is None else candidates.choices(found.columns), found.bound
        )
    if not search.done:
        candidates = table[reduced <= search.distance]
        search.add(*_branch(candidates, layers, constraints, relative_gap, search.value))
    if search.best is None:
        return None
    multipliers = {
        c.name: float(price * c.total / room)
        for c, price, room in zip(constraints, prices, table.rooms, strict=True)
    }
    bound = min(max(search.bound, 0.0), search.value)
    return KnapsackSolution(search.best, search.value, bound, multipliers)


def _assignment(table: _Table, layers: int) -> scipy.sparse.csr_array:
    """Matrix of the constraint that each layer has exactly one choice."""
    columns = np.arange(len(table.layer))
    ones = np.ones(len(columns))
    return scipy.sparse.csr_array((ones, (table.layer, columns)), shape=(layers, len(columns)))


def _prices(table: _Table, assign: scipy.sparse.csr_array) -> Float64 | None:
    """Multipliers of the budgets in the LP relaxation; None if it is infeasible."""
    result = scipy.optimize.linprog(
        table.loss,
        A_ub=table.costs,
        b_ub=np.ones(len(table.costs)) + TOLERANCE,
        A_eq=assign,
        b_eq=np.ones(assign.shape[0]),
        bounds=(0, None),
        method="highs",
    )
    if result.x is None or result.ineqlin.marginals is None:
        return None
    prices: Float64 = np.maximum(-np.asarray(result.ineqlin.marginals), 0.0)
    return prices


def _reduced(table: _Table, prices: Float64, layers: int) -> tuple[Float64, float]:
    """Reduced cost of each choice (above the best of its layer), and the dual bound."""
    priced = table.loss + prices @ table.costs
    best = np.full(layers, np.inf)
    np.minimum.at(best, table.layer, priced)
    return priced - best[table.layer], float(best.sum() - prices.sum())


def _incumbent(
    table: _Table,
    prices: Float64,
    layers: Sequence[LayerCurves],
    constraints: Sequence[Constraint],
) -> tuple[Choice | None, ...] | None:
    """Best choices of each layer at rising prices until the budgets hold, then filled up."""
    floor = 1e-9 * max(float(prices.max(initial=0.0)), 1e-6)
    scale = 1.0
    for _ in range(200):
        priced = table.loss + (np.maximum(prices, floor) * scale) @ table.costs
        # The first of each layer after sorting by layer, then price, then loss.
        order = np.lexsort((table.loss, priced, table.layer))
        first = order[np.searchsorted(table.layer[order], np.arange(len(layers)))]
        if within(constraints, layers, table.choices(first)):
            return table.choices(_filled(table, first))
        scale *= 1.005 if scale < 1.5 else 1.5
    return None


def _filled(table: _Table, columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spend the rest of the budgets greedily, changing one layer at a time while a gain fits."""
    columns = columns.copy()
    for _ in range(len(columns)):
        more = table.spent - table.spent[:, columns[table.layer]]
        left = table.limits - table.spent[:, columns].sum(axis=1)
        gain = table.loss[columns[table.layer]] - table.loss
        gain[(more > left[:, None]).any(axis=0)] = 0.0
        best = int(np.argmax(gain))
        if gain[best] <= 0:
            break
        columns[table.layer[best]] = best
    return columns


def _branch(
    table: _Table,
    layers: Sequence[LayerCurves],
    constraints: Sequence[Constraint],
    relative_gap: float,
    known: float,
) -> tuple[tuple[Choice | None, ...] | None, float]:
    """Solve by branch and bound; tighten the limits where rounding exceeds an exact one.

    Losses are told as multiples of the least one that is `known`: HiGHS takes a gap of 1e-6 for
    none, and what it calls a bound may be above the least loss by as much.
    """
    assign = _assignment(table, len(layers))
    scale = known if 0 < known < np.inf else float(table.loss.max()) or 1.0
    room = 1.0
    for _ in range(4):
        result = scipy.optimize.milp(
            table.loss / scale,
            integrality=np.ones(len(table.loss)),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(assign, 1, 1),
                scipy.optimize.LinearConstraint(table.costs, -np.inf, room),
            ],
            # Presolve compares all columns in pairs: of 35,000 it took 32 s, and the search 1 s.
            options={"mip_rel_gap": relative_gap, "node_limit": NODE_LIMIT, "presolve": False},
        )
        if result.x is None:
            return None, -np.inf
        columns = np.flatnonzero(result.x > 0.5)
        order = np.argsort(table.layer[columns], kind="stable")
        choices = table.choices(columns[order])
        proved = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        bound = scale * (proved - TOLERANCE)
        if len(choices) == len(layers) and within(constraints, layers, choices):
            return choices, bound if room == 1.0 else -np.inf
        room -= 2 * TOLERANCE
    return None, -np.inf


def _loss(choices: Sequence[Choice | None], losses: LossCurves) -> float:
    return float(
        sum(
            losses[index][choice.curve][choice.level]
            for index, choice in enumerate(choices)
            if choice is not None
        )
    )


def _together(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> Exception:
    """Build the error: the least feasible last constraint, given the others."""
    last, others = constraints[-1], constraints[:-1]
    if not others:
        return unreachable(constraints, {last.name: last.least(layers)})
    # Minimise the cost of the last constraint, relative to keeping the layer whole.
    losses = [
        [(last.path(curve) - last.whole(layer)) / last.total for curve in layer.curves]
        for layer in layers
    ]
    solution = knapsack(layers, losses, others, relative_gap=0.0)
    return unreachable(constraints, {last.name: last.cost(layers, solution.choices)})
