"""Solve COBLA's relaxed problem by SLSQP: masks in [0, 1] on singular values.

`allocation.blocks` describes how the problem is kept small, and how keep-whole stays linear.

Scale. Each variable is multiplied by the root of its curvature in the separable model, so
that the unit matrix, from which SLSQP's BFGS updates start, is near the true Hessian.

Source: Li and Shi, Constrained Optimization Based Low-Rank Approximation of Deep Neural
Networks, ECCV 2018; the solver is scipy's SLSQP (Kraft 1988).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from cobla_onnx.allocation.blocks import (
    Blocks,
    Space,
    active_schemes,
    partition,
    refine,
    warm_masks,
)
from cobla_onnx.allocation.budget import Constraint
from cobla_onnx.allocation.objective import Masks, Objective
from cobla_onnx.allocation.problem import Choice, Float64, LayerCurves, LossCurves

__all__ = ["Effort", "Iteration", "Relaxed", "nearest_choices", "relax"]

KKT_TOLERANCE = 1e-3
FEASIBILITY_TOLERANCE = 1e-6
# Lower bound on the curvature of a variable, relative to the largest.
LEAST_CURVATURE = 1e-6


@dataclass(frozen=True)
class Iteration:
    """State of SLSQP when it asked for a gradient.

    Attributes
    ----------
    number : int
        From 0, over all rounds.
    value : float
        Objective at the masks.
    costs : tuple of float
        Fraction of the room of each budget that is used.
    seconds : float
        Since the start.
    """

    number: int
    value: float
    costs: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Effort:
    """Limits on the work of SLSQP.

    Attributes
    ----------
    max_variables : int
        Most variables that SLSQP is given; its own time grows with their cube.
    rounds : int
        Number of runs, each with finer blocks where the last left masks between 0 and 1.
    iterations : int
        Most iterations in each round.
    tolerance : float
        Relative change of the objective that ends a round.
    seconds : float, optional
        Time limit, after which no evaluation is started; the best masks so far are returned.
    converge : bool
        Whether an answer that is not stationary is rejected.
    watch : callable
        Called with every `Iteration`.
    """

    max_variables: int = 200
    rounds: int = 2
    iterations: int = 100
    tolerance: float = 1e-12
    seconds: float | None = None
    converge: bool = True
    watch: Callable[[Iteration], None] = lambda iteration: None


@dataclass(frozen=True)
class Relaxed:
    """A solution of the relaxed problem, or the reason why there is none.

    Attributes
    ----------
    masks : Masks or None
        None if SLSQP's answer failed a check; `problem` says which.
    tails : tuple of int
        For each layer the tangent rank; all masks beyond it are equal.
    value : float
    kkt_residual : float
        Norm of the projected gradient of the Lagrangian, relative to the gradient's.
    multipliers : dict of str to float
        Price of each budget, as in `KnapsackSolution`.
    stopped : str
        Why it ended before it converged, if it did; else empty.
    """

    masks: Masks | None
    tails: tuple[int, ...]
    value: float
    kkt_residual: float
    multipliers: dict[str, float]
    iterations: int
    variables: int
    problem: str = ""
    stopped: str = ""


def relax(
    layers: Sequence[LayerCurves],
    objective: Objective,
    losses: LossCurves,
    constraints: Sequence[Constraint],
    start: Sequence[Choice | None],
    multipliers: Mapping[str, float],
    effort: Effort = Effort(),
    fixed: Collection[int] = (),
) -> Relaxed:
    """Solve the relaxed problem, starting from choices within the limits.

    Parameters
    ----------
    losses : sequence of sequence of array
        The objective's separable model, ``objective.curve`` for all layers and curves.
    start : sequence of (Choice or None)
        The knapsack's answer.
    multipliers : mapping of str to float
        The knapsack's prices, which decide the masks that are frozen.
    effort : Effort
    fixed : collection of int
        Layers whose masks stay as they are, with those of which the levels are not nested.
    """
    prices = np.array(
        [multipliers[c.name] * max(c.limit - c.fixed, 1) / c.total for c in constraints]
    )
    weights = prices if prices.any() else np.ones(len(constraints))
    schemes, tails = active_schemes(layers, losses, constraints, start, weights)
    space = Space(layers, losses, constraints, schemes, tails)
    flat = warm_masks(space, start)
    pairs = enumerate(zip(layers, schemes, strict=True))
    still = {*fixed, *(i for i, (layer, k) in pairs if not layer.curves[k].nested)}
    blocks = partition(space, tails, weights, flat, effort.max_variables, still)
    search = _Search(space, objective, effort)
    start_value = search.value(flat, blocks)
    variables = 0
    stopped = problem = ""
    for number in range(effort.rounds):
        variables = max(variables, int(blocks.free.sum()))
        flat, problem, stopped = search.run(blocks, flat)
        if problem or (stopped and number + 1 < effort.rounds):
            break
        if number + 1 < effort.rounds:
            blocks = refine(space, blocks, flat, effort.max_variables)
    if problem:
        return Relaxed(None, tails, np.nan, np.inf, {}, search.iterations, variables, problem)
    residual, prices = _kkt(space, search.gradient(flat, blocks), blocks, flat)
    value = search.value(flat, blocks)
    named = {
        c.name: float(m) * c.total / max(c.limit - c.fixed, 1)
        for c, m in zip(constraints, prices, strict=True)
    }
    if effort.converge and residual > KKT_TOLERANCE:
        problem = f"its answer is not stationary (KKT residual {residual:.1e})"
    elif value > start_value * (1 + 1e-6):
        problem = "its answer is worse than its start"
    return Relaxed(
        None if problem else space.masks(flat, blocks.starts),
        tails, value, residual, named, search.iterations, variables, problem, stopped,
    )  # fmt: skip


class _TimeIsUp(Exception):
    """Raised inside the objective to end SLSQP."""


class _Search:
    """Runs SLSQP over the free blocks, and remembers the best masks evaluated."""

    def __init__(self, space: Space, objective: Objective, effort: Effort) -> None:
        self._space, self._objective, self._effort = space, objective, effort
        self._began = time.perf_counter()
        self.iterations = 0
        self._values: dict[bytes, float] = {}
        self._last: tuple[bytes, Float64] | None = None

    def value(self, flat: Float64, blocks: Blocks) -> float:
        """Return the objective; values of masks seen before are remembered."""
        key = flat.tobytes()
        if key not in self._values:
            self._values[key] = self._objective.value(self._space.masks(flat, blocks.starts))
        return self._values[key]

    def gradient(self, flat: Float64, blocks: Blocks) -> Float64:
        """Return the derivative with respect to each block; the last one is remembered."""
        key = flat.tobytes() + blocks.starts.tobytes()
        if self._last is None or self._last[0] != key:
            by_layer = self._objective.gradient(self._space.masks(flat, blocks.starts))
            by_block = np.add.reduceat(np.concatenate(by_layer), blocks.starts)
            self._last = key, np.asarray(by_block)
        return self._last[1]

    def run(self, blocks: Blocks, flat: Float64) -> tuple[Float64, str, str]:
        """Return masks, any problem with them, and why the run ended early (both empty if none)."""
        if not blocks.free.any():
            return flat, "", ""
        first = self.value(flat, blocks)
        if not (np.isfinite(first) and np.isfinite(self.gradient(flat, blocks)).all()):
            return flat, "the objective is not finite at its start", ""
        scaled = _Scaled(self, self._space, blocks, flat, first)
        try:
            result = scipy.optimize.minimize(
                scaled.value,
                scaled.start,
                jac=scaled.gradient,
                method="SLSQP",
                bounds=[(0.0, float(root)) for root in scaled.roots],
                constraints=[
                    {"type": "ineq", "fun": scaled.room_left, "jac": lambda _: -scaled.costs}
                ],
                options={"maxiter": self._effort.iterations, "ftol": self._effort.tolerance},
            )
        except _TimeIsUp:
            return scaled.best, "", "the time limit was reached"
        except KeyboardInterrupt:
            return scaled.best, "", "it was interrupted"
        if not np.isfinite(result.x).all() or not np.isfinite(result.fun):
            return flat, "its answer is not finite", ""
        if not scaled.fits(result.x):
            return flat, "its answer is over budget", ""
        masks = scaled.masks(result.x)
        best = masks if self.value(masks, blocks) <= scaled.best_value else scaled.best
        return best, "", "the iteration limit was reached" if result.status == 9 else ""

    def end_in_time(self) -> None:
        """End SLSQP once its time is up."""
        limit = self._effort.seconds
        if limit is not None and time.perf_counter() - self._began > limit:
            raise _TimeIsUp

    def watch(self, value: float, masks: Float64) -> None:
        """Tell and count an iteration."""
        costs = tuple(float(v) for v in self._space.offset + self._space.costs @ masks)
        seconds = time.perf_counter() - self._began
        self._effort.watch(Iteration(self.iterations, value, costs, seconds))
        self.iterations += 1


class _Scaled:
    """The free blocks as SLSQP's variables: masks times the roots of their curvatures.

    It remembers the best masks within the budgets, since SLSQP may end at worse ones or be stopped.

    Parameters
    ----------
    flat : float64 array
        All masks to begin with.
    first : float
        The objective there.
    """

    def __init__(
        self, search: _Search, space: Space, blocks: Blocks, flat: Float64, first: float
    ) -> None:
        self._search, self._blocks = search, blocks
        self._means = np.add.reduceat(flat, blocks.starts) / blocks.sizes
        self._scale = first if first > 0 else 1.0
        free = blocks.free
        self.roots = _roots(blocks.curvature[free] / self._scale)
        self.costs = blocks.costs[:, free] / self.roots
        self.start = self._means[free] * self.roots
        self._room = 1.0 - space.offset - blocks.costs[:, ~free] @ self._means[~free]
        self.best, self.best_value = flat, first

    def masks(self, x: Float64) -> Float64:
        """Return all masks at some variables."""
        values = self._means.copy()
        # SLSQP may leave the bounds by a rounding error or two.
        values[self._blocks.free] = np.clip(x / self.roots, 0.0, 1.0)
        return np.repeat(values, self._blocks.sizes)

    def room_left(self, x: Float64) -> Float64:
        """Return what is left of each budget."""
        return np.asarray(self._room - self.costs @ x)

    def fits(self, x: Float64) -> bool:
        """Whether budgets are kept, but for rounding."""
        return bool((self.room_left(x) >= -FEASIBILITY_TOLERANCE).all())

    def value(self, x: Float64) -> float:
        """Return the objective relative to its start."""
        self._search.end_in_time()
        masks = self.masks(x)
        found = self._search.value(masks, self._blocks)
        if found < self.best_value and self.fits(x):
            self.best, self.best_value = masks, found
        return found / self._scale

    def gradient(self, x: Float64) -> Float64:
        """Return the derivative of `value`."""
        masks = self.masks(x)
        self._search.watch(self._search.value(masks, self._blocks), masks)
        found = self._search.gradient(masks, self._blocks)[self._blocks.free]
        return np.asarray(found / self.roots / self._scale)


def _roots(curvature: Float64) -> Float64:
    """Scale of each variable: the root of its curvature, bounded from below."""
    most = float(curvature.max(initial=0.0))
    if most <= 0:
        return np.ones_like(curvature)
    return np.sqrt(np.maximum(curvature, LEAST_CURVATURE * most))


def _kkt(space: Space, gradient: Float64, blocks: Blocks, flat: Float64) -> tuple[float, Float64]:
    """Residual of the Karush-Kuhn-Tucker (KKT) conditions, and the multipliers.

    The multipliers are those that best balance the gradient where no bound is active.
    """
    free = blocks.free
    if not free.any():
        return 0.0, np.zeros(len(blocks.costs))
    x = (np.add.reduceat(flat, blocks.starts) / blocks.sizes)[free]
    gradient = gradient[free]
    costs = blocks.costs[:, free]
    used = space.offset + space.costs @ flat
    active = used > 1.0 - 1e-4
    inside = (x > 1e-4) & (x < 1 - 1e-4)
    multipliers = np.zeros(len(costs))
    if inside.any() and active.any():
        multipliers[active], _ = scipy.optimize.nnls(costs[active][:, inside].T, -gradient[inside])
    balance = gradient + multipliers @ costs
    stuck = x - np.clip(x - balance, 0.0, 1.0)
    scale = max(float(np.linalg.norm(gradient)), 1e-12)
    return float(np.linalg.norm(stuck)) / scale, multipliers


def nearest_choices(
    layers: Sequence[LayerCurves], relaxed: Relaxed, shrink: float
) -> tuple[Choice | None, ...]:
    """Candidate levels nearest to `shrink` times the sums of the relaxed masks, or whole."""
    assert relaxed.masks is not None
    choices: list[Choice | None] = []
    for layer, scheme, mask, tail in zip(
        layers, relaxed.masks.schemes, relaxed.masks.values, relaxed.tails, strict=True
    ):
        if shrink >= 1.0 and mask[tail:].sum() >= 0.5 * len(mask[tail:]):
            choices.append(None)
            continue
        levels = layer.curves[scheme].levels
        wanted = shrink * float(mask[: max(tail, 1)].sum())
        choices.append(Choice(scheme, int(levels[np.argmin(np.abs(levels - wanted))])))
    return tuple(choices)
