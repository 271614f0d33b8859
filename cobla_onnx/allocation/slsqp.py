"""COBLA's relaxed problem: masks in [0, 1] on singular values, solved by SLSQP.

Two things make it small and linear:

Keep-whole. Under its active scheme a layer's masks up to the tangent rank r_t cost what a
unit of rank costs; all singular values beyond r_t share one mask, which costs what is
then missing to the whole layer. r_t is where the line from the whole layer touches the
convex curve of loss against cost, so between r_t and whole no rank is worth its price.
All masks at 1 are the whole layer at exactly its cost: the authors' second pass for "cost
saturation" becomes part of one linear problem.

Blocks. Neighbouring singular values share a mask. What the prices of the knapsack settle
is frozen; a second round freezes what reached a bound and splits what did not.

Source: Li and Shi, Constrained Optimization Based Low-Rank Approximation of Deep Neural
Networks, ECCV 2018; the solver is scipy's SLSQP (Kraft 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from cobla_onnx.allocation.budget import Constraint
from cobla_onnx.allocation.curves import Choice, Float64, LayerCurves
from cobla_onnx.allocation.knapsack import KnapsackSolution, LossCurves
from cobla_onnx.allocation.objective import Masks, Objective

__all__ = ["Relaxed", "relax"]

MAX_VARIABLES = 200
MAX_ITERATIONS = 100
# A gain this many times its price is kept, one this many times below it is dropped.
CERTAIN_KEEP, CERTAIN_DROP = 100.0, 8.0
KKT_TOLERANCE = 1e-3
FEASIBILITY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Relaxed:
    """A solution of the relaxed problem, or why there is none.

    Attributes
    ----------
    masks : Masks or None
        None where SLSQP's answer did not stand up to the checks in `problem`.
    tails : tuple of int
        For each layer the tangent rank, from which on all masks are equal.
    value : float
    kkt_residual : float
        Norm of the projected gradient of the Lagrangian, relative to the gradient's.
    multipliers : dict of str to float
        Price of each budget, as in `KnapsackSolution`.
    """

    masks: Masks | None
    tails: tuple[int, ...]
    value: float
    kkt_residual: float
    multipliers: dict[str, float]
    iterations: int
    variables: int
    problem: str = ""


@dataclass
class _Blocks:
    """A partition of all masks into blocks of neighbours, over all layers in a row.

    ``starts`` are the first mask of each block, and ``costs`` (constraints, blocks) what
    a block costs as a share of the room that each budget leaves.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    costs: Float64
    divisible: NDArray[np.bool_]
    free: NDArray[np.bool_]
    values: Float64 = field(default_factory=lambda: np.zeros(0))


class _Space:
    """The masks of all layers as one vector, with their costs."""

    def __init__(
        self,
        layers: Sequence[LayerCurves],
        constraints: Sequence[Constraint],
        schemes: Sequence[int],
        tails: Sequence[int],
    ) -> None:
        self.schemes = tuple(schemes)
        curves = [layer.curves[s] for layer, s in zip(layers, schemes, strict=True)]
        self.lengths = np.array([len(c.singular_values) for c in curves])
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        costs = np.zeros((len(constraints), self.offsets[-1]))
        for k, constraint in enumerate(constraints):
            room = max(constraint.limit - constraint.fixed, 1)
            for i, (layer, curve) in enumerate(zip(layers, curves, strict=True)):
                start, end = self.offsets[i], self.offsets[i + 1]
                unit, tail = constraint.per_rank(curve), tails[i]
                costs[k, start : start + tail] = unit / room
                rest = (constraint.whole(layer) - tail * unit) / room
                costs[k, start + tail : end] = rest / max(end - start - tail, 1)
        self.costs = costs

    def masks(self, flat: Float64) -> Masks:
        return Masks(self.schemes, tuple(np.split(flat, self.offsets[1:-1])))


def relax(
    layers: Sequence[LayerCurves],
    objective: Objective,
    losses: LossCurves,
    constraints: Sequence[Constraint],
    warm: KnapsackSolution,
    *,
    max_variables: int = MAX_VARIABLES,
    rounds: int = 2,
) -> Relaxed:
    """Solve the relaxed problem from the knapsack's answer.

    Parameters
    ----------
    losses : sequence of sequence of array
        The objective's separable model, ``objective.curve`` for all layers and curves.
    warm : KnapsackSolution
    max_variables : int
        Most variables that SLSQP sees; its time grows with their cube.
    """
    prices = np.array(
        [warm.multipliers[c.name] * max(c.limit - c.fixed, 1) / c.total for c in constraints]
    )
    weights = prices if prices.any() else np.ones(len(constraints))
    schemes, tails = _active(layers, losses, constraints, warm, weights)
    space = _Space(layers, constraints, schemes, tails)
    flat = _warm_masks(space, warm)
    gains = np.concatenate([-np.diff(losses[i][s]) for i, s in enumerate(schemes)])
    blocks = _partition(space, tails, gains, weights, flat, max_variables)
    start_value = objective.value(space.masks(flat))
    scale = start_value if np.isfinite(start_value) and start_value > 0 else 1.0
    iterations = variables = 0
    outcome = None
    for number in range(rounds):
        outcome = _solve(space, objective, blocks, flat, scale)
        iterations += outcome[1]
        variables = max(variables, int(blocks.free.sum()))
        if outcome[2]:
            return Relaxed(None, tails, np.nan, np.inf, {}, iterations, variables, outcome[2])
        flat = outcome[0]
        if number + 1 < rounds:
            blocks = _refine(space, blocks, flat, max_variables)
    residual, multipliers = _kkt(space, objective, blocks, flat)
    value = objective.value(space.masks(flat))
    named = {
        c.name: float(m) * c.total / max(c.limit - c.fixed, 1)
        for c, m in zip(constraints, multipliers, strict=True)
    }
    problem = ""
    if residual > KKT_TOLERANCE:
        problem = f"its answer is not stationary (KKT residual {residual:.1e})"
    elif value > start_value * (1 + 1e-6):
        problem = "its answer is worse than its start"
    return Relaxed(
        None if problem else space.masks(flat),
        tails, value, residual, named, iterations, variables, problem,
    )  # fmt: skip


def _active(
    layers: Sequence[LayerCurves],
    losses: LossCurves,
    constraints: Sequence[Constraint],
    warm: KnapsackSolution,
    weights: Float64,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the scheme to relax for each layer and its tangent rank."""
    schemes, tails = [], []
    for index, (layer, choice) in enumerate(zip(layers, warm.choices, strict=True)):
        rooms = [max(c.limit - c.fixed, 1) for c in constraints]
        shares = weights / rooms
        whole = shares @ [c.whole(layer) for c in constraints]
        best, tangents = [], []
        for number, curve in enumerate(layer.curves):
            unit = shares @ [c.per_rank(curve) for c in constraints]
            ranks = np.append(0, curve.ranks)
            loss = np.asarray(losses[index][number])[ranks]
            best.append(float((loss + unit * ranks).min()))
            missing = whole - unit * ranks
            steep = np.where(missing > 0, loss / np.where(missing > 0, missing, 1.0), np.inf)
            tangents.append(int(ranks[np.argmin(steep)]))
        scheme = int(np.argmin(best)) if choice is None else choice.curve
        schemes.append(scheme)
        tails.append(tangents[scheme])
    return tuple(schemes), tuple(tails)


def _warm_masks(space: _Space, warm: KnapsackSolution) -> Float64:
    flat = np.ones(space.offsets[-1])
    for i, choice in enumerate(warm.choices):
        if choice is not None:
            flat[space.offsets[i] + choice.rank : space.offsets[i + 1]] = 0.0
    return flat


def _partition(
    space: _Space,
    tails: Sequence[int],
    gains: Float64,
    weights: Float64,
    flat: Float64,
    max_variables: int,
) -> _Blocks:
    """Cut each layer's masks into blocks; freeze those whose gain and price settle them."""
    price = weights @ space.costs
    each = max(2, (max_variables - len(tails)) // max(len(tails), 1))
    starts: list[int] = []
    divisible: list[bool] = []
    for i, tail in enumerate(tails):
        begin, end = int(space.offsets[i]), int(space.offsets[i + 1])
        sure = gains[begin : begin + tail] > CERTAIN_KEEP * price[begin : begin + tail]
        none = gains[begin : begin + tail] * CERTAIN_DROP < price[begin : begin + tail]
        low = int(np.argmin(sure)) if tail and not sure.all() else tail
        high = max(low, tail - int(np.argmin(none[::-1])) if tail and not none.all() else low)
        cuts = np.unique(np.linspace(low, high, each + 1).round().astype(int))
        edges = sorted({0, *cuts.tolist(), tail} - ({end - begin} if end > begin else set()))
        starts.extend(begin + e for e in edges)
        divisible.extend(e < tail for e in edges)
    blocks = _with_costs(space, np.array(starts), np.array(divisible))
    gain = np.add.reduceat(gains, blocks.starts)
    cost = np.add.reduceat(price, blocks.starts)
    kept, dropped = gain > CERTAIN_KEEP * cost, gain * CERTAIN_DROP < cost
    mean = np.add.reduceat(flat, blocks.starts) / blocks.sizes
    # Only what the warm start agrees with: it is feasible, and so stays the start.
    blocks.free = ~((kept & (mean == 1.0)) | (dropped & (mean == 0.0)))
    return blocks


def _with_costs(space: _Space, starts: NDArray[np.int64], divisible: NDArray[np.bool_]) -> _Blocks:
    sizes = np.diff(np.append(starts, space.offsets[-1]))
    costs = np.add.reduceat(space.costs, starts, axis=1)
    return _Blocks(starts, sizes, costs, divisible, np.ones(len(starts), dtype=bool))


def _refine(space: _Space, blocks: _Blocks, flat: Float64, max_variables: int) -> _Blocks:
    """Freeze the blocks that reached a bound, halve the widest of the others."""
    mean = np.add.reduceat(flat, blocks.starts) / blocks.sizes
    open_ = (mean > 1e-3) & (mean < 1 - 1e-3)
    order = np.argsort(-blocks.sizes * (open_ & blocks.divisible), kind="stable")
    spare = max(0, max_variables - int(open_.sum()))
    split = [b for b in order[:spare] if open_[b] and blocks.divisible[b] and blocks.sizes[b] > 1]
    halves = blocks.starts[split] + blocks.sizes[split] // 2
    starts = np.concatenate([blocks.starts, halves])
    order = np.argsort(starts, kind="stable")
    divisible = np.concatenate([blocks.divisible, np.ones(len(halves), dtype=bool)])[order]
    free = np.concatenate([open_, np.ones(len(halves), dtype=bool)])[order]
    result = _with_costs(space, starts[order], divisible)
    result.free = free
    return result


def _solve(
    space: _Space, objective: Objective, blocks: _Blocks, flat: Float64, scale: float
) -> tuple[Float64, int, str]:
    """One run of SLSQP over the free blocks; returns masks, iterations and a problem."""
    start = np.add.reduceat(flat, blocks.starts) / blocks.sizes
    free = blocks.free
    if not free.any():
        return flat, 0, ""

    def expand(x: Float64) -> Float64:
        values = start.copy()
        # SLSQP leaves the box by a rounding error or two.
        values[free] = np.clip(x, 0.0, 1.0)
        return np.repeat(values, blocks.sizes)

    def value(x: Float64) -> float:
        return objective.value(space.masks(expand(x))) / scale

    def gradient(x: Float64) -> Float64:
        full = np.concatenate(objective.gradient(space.masks(expand(x))))
        return np.asarray(np.add.reduceat(full, blocks.starts)[free] / scale)

    if not (np.isfinite(value(start[free])) and np.isfinite(gradient(start[free])).all()):
        return flat, 0, "the objective is not finite at its start"
    costs = blocks.costs[:, free]
    room = 1.0 - blocks.costs[:, ~free] @ start[~free]
    result = minimize(
        value,
        start[free],
        jac=gradient,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * int(free.sum()),
        constraints=[{"type": "ineq", "fun": lambda x: room - costs @ x, "jac": lambda x: -costs}],
        options={"maxiter": MAX_ITERATIONS, "ftol": 1e-12},
    )
    solution = np.clip(result.x, 0.0, 1.0)
    if not np.isfinite(solution).all() or not np.isfinite(value(solution)):
        return flat, int(result.nit), "its answer is not finite"
    if (costs @ solution > room + FEASIBILITY_TOLERANCE).any():
        return flat, int(result.nit), "its answer is over budget"
    return expand(solution), int(result.nit), ""


def _kkt(
    space: _Space, objective: Objective, blocks: _Blocks, flat: Float64
) -> tuple[float, Float64]:
    """Residual of the conditions of Karush, Kuhn and Tucker, and the multipliers.

    The multipliers are those that best balance the gradient where no bound is active.
    """
    free = blocks.free
    if not free.any():
        return 0.0, np.zeros(len(blocks.costs))
    x = (np.add.reduceat(flat, blocks.starts) / blocks.sizes)[free]
    full = np.concatenate(objective.gradient(space.masks(flat)))
    gradient = np.add.reduceat(full, blocks.starts)[free]
    costs = blocks.costs[:, free]
    used = space.costs @ flat
    active = used > 1.0 - 1e-4
    inside = (x > 1e-4) & (x < 1 - 1e-4)
    multipliers = np.zeros(len(costs))
    if inside.any() and active.any():
        multipliers[active], _ = nnls(costs[active][:, inside].T, -gradient[inside])
    balance = gradient + multipliers @ costs
    stuck = x - np.clip(x - balance, 0.0, 1.0)
    scale = max(float(np.linalg.norm(gradient)), 1e-12)
    return float(np.linalg.norm(stuck)) / scale, multipliers


def nearest_choices(
    layers: Sequence[LayerCurves], relaxed: Relaxed, shrink: float
) -> tuple[Choice | None, ...]:
    """Ranks nearest to `shrink` times the sums of the relaxed masks, or whole."""
    assert relaxed.masks is not None
    choices: list[Choice | None] = []
    for layer, scheme, mask, tail in zip(
        layers, relaxed.masks.schemes, relaxed.masks.values, relaxed.tails, strict=True
    ):
        if shrink >= 1.0 and mask[tail:].sum() >= 0.5 * len(mask[tail:]):
            choices.append(None)
            continue
        ranks = layer.curves[scheme].ranks
        wanted = shrink * float(mask[: max(tail, 1)].sum())
        choices.append(Choice(scheme, int(ranks[np.argmin(np.abs(ranks - wanted))])))
    return tuple(choices)
