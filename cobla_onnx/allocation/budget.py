"""Budgets: fractions of the original's cost, as hard integer limits on the layers' choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation.problem import Choice, Curve, Float64, LayerCurves
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.wording import option_name

__all__ = ["Budget", "Constraint", "least_fraction", "require_reachable", "unreachable"]

# Said of a model whose cost is 0, so that nothing can be saved.
COUNTED = {
    "mem": "stores no weights",
    "mac": "does no multiply-accumulate operations",
    "latency": "has no layer that takes time",
}


@dataclass(frozen=True)
class Constraint:
    """One limit on the cost of the whole model, in whole bytes, MACs or nanoseconds.

    Attributes
    ----------
    name : {'mem', 'mac', 'latency'}
    fraction : float
        The limit as it was given, as a fraction of the total.
    total : int
        Cost of the original model.
    limit : int
        The most that the compressed model may cost.
    fixed : int
        Cost that no choice can change. For a latency, the whole model's time less the sum of
        its layers, timed one by one; it may be negative.
    """

    name: str
    fraction: float
    total: int
    limit: int
    fixed: int

    def whole(self, layer: LayerCurves) -> int:
        """Cost of a layer that is kept whole."""
        costs = {"mem": layer.bytes_whole, "mac": layer.macs_whole, "latency": layer.time_whole}
        cost = costs[self.name]
        assert cost is not None
        return cost

    def per_rank(self, curve: Curve) -> int:
        """Cost of one unit of rank on a curve, for costs that are proportional to the rank."""
        cost = curve.bytes_per_rank if self.name == "mem" else curve.macs_per_rank
        assert cost is not None
        assert self.name != "latency"
        return cost

    def costs(self, curve: Curve) -> NDArray[np.int64]:
        """Cost at each of the candidate ranks of a curve."""
        if self.name == "latency":
            assert curve.times is not None
            return curve.times
        return curve.ranks * self.per_rank(curve)

    def path(self, curve: Curve) -> Float64:
        """Cost at ranks 0 to full rank: linear between candidates, and beyond them.

        The cost at rank 0 is that of the line through the first two candidates, at least 0.
        """
        ranks = np.arange(len(curve.singular_values) + 1)
        if self.name != "latency":
            return ranks.astype(np.float64) * self.per_rank(curve)
        known, costs = curve.ranks, self.costs(curve).astype(np.float64)
        if len(known) == 1:
            return np.full(len(ranks), costs[0])
        first, last = np.diff(costs)[[0, -1]] / np.diff(known)[[0, -1]]
        path = np.interp(ranks, known, costs)
        path += np.maximum(ranks - known[-1], 0) * last
        before = costs[0] - first * np.maximum(known[0] - ranks, 0)
        path = np.where(ranks < known[0], np.maximum(before, 0.0), path)
        return np.asarray(path, dtype=np.float64)

    def at(self, curve: Curve, rank: int) -> int:
        """Exact cost at one of the candidate ranks."""
        if self.name != "latency":
            return rank * self.per_rank(curve)
        index = int(np.searchsorted(curve.ranks, rank))
        assert curve.ranks[index] == rank
        return int(self.costs(curve)[index])

    def cost(self, layers: Sequence[LayerCurves], choices: Sequence[Choice | None]) -> int:
        """Exact cost of the model under the given choices."""
        total = self.fixed
        for layer, choice in zip(layers, choices, strict=True):
            if choice is None:
                total += self.whole(layer)
            else:
                total += self.at(layer.curves[choice.curve], choice.rank)
        return total

    def least(self, layers: Sequence[LayerCurves]) -> int:
        """Return the least cost that any choices have."""
        return self.fixed + sum(
            min(
                self.whole(layer),
                *(int(self.costs(curve).min()) for curve in layer.curves),
            )
            for layer in layers
        )


@dataclass(frozen=True)
class Budget:
    """How much to keep at most, as fractions of the original. Limits are hard.

    Attributes
    ----------
    mem : float, optional
        Fraction of the bytes of all weights, as `stored_bytes` counts them.
    mac : float, optional
        Fraction of the multiply-accumulate operations.
    latency : float, optional
        Fraction of the time of one run in onnxruntime on this machine.

    Raises
    ------
    UsageError
        If none is given, or one is not above 0 and at most 1.

    Examples
    --------
    >>> Budget(mem=0.3)
    Budget(mem=0.3, mac=None, latency=None)
    """

    mem: float | None = None
    mac: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        budgets = (("mem", self.mem), ("mac", self.mac), ("latency", self.latency))
        if all(value is None for _, value in budgets):
            raise UsageError(
                f"no budget: give {option_name('mem')}, {option_name('mac')} or "
                f"{option_name('latency')}, e.g. {option_name('mem', 0.5)}"
            )
        for name, value in budgets:
            if value is not None and not (math.isfinite(value) and 0 < value <= 1):
                raise UsageError(
                    f"{option_name(name, value)}: is not a fraction of the original to keep; "
                    "give a number above 0 and at most 1"
                )

    def constraints(
        self,
        layers: Sequence[LayerCurves],
        mem_total: int,
        mac_total: int | None,
        time_total: int | None = None,
    ) -> tuple[Constraint, ...]:
        """Turn the fractions into integer limits, rounded down exactly.

        Raises
        ------
        UsageError
            If a budget is set for a cost that is not known of the original.
        BudgetError
            If there is nothing to keep a fraction of.
        """
        unknown_macs = f"the MACs of the model are not known; give {option_name('input_shapes')}"
        result = []
        for name, value, total, unknown in (
            ("mem", self.mem, mem_total, ""),
            ("mac", self.mac, mac_total, unknown_macs),
            ("latency", self.latency, time_total, "the layers were not timed; use `compress`"),
        ):
            if value is None:
                continue
            if total is None:
                raise UsageError(f"{option_name(name)}: {unknown}")
            if total == 0 and value < 1:
                cause = f"{option_name(name, value)}: the model {COUNTED[name]}, none can be saved"
                raise BudgetError(cause, {name: 1.0})
            # repr gives the decimal that was meant, so that 0.3 of 1000 is 300, not 299.
            limit = math.floor(Fraction(repr(float(value))) * total)
            bare = Constraint(name, value, total, limit, 0)
            fixed = total - sum(bare.whole(layer) for layer in layers)
            result.append(Constraint(name, value, total, limit, fixed))
        return tuple(result)


def least_fraction(constraint: Constraint, layers: Sequence[LayerCurves]) -> float:
    """Return the least feasible fraction, rounded up to four digits."""
    return _rounded_up(constraint.least(layers), constraint.total)


def _rounded_up(cost: int, total: int) -> float:
    """Cost as a fraction, rounded up, so that the number is itself feasible."""
    return math.ceil(Fraction(cost, total) * 10_000) / 10_000 if total else 1.0


def require_reachable(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> None:
    """Check that each limit, taken alone, can be met.

    Raises
    ------
    BudgetError
        If one cannot; names the least feasible fraction.
    """
    beyond = {c.name: c.least(layers) for c in constraints if c.least(layers) > c.limit}
    if beyond:
        raise unreachable([c for c in constraints if c.name in beyond], beyond)


def unreachable(constraints: Sequence[Constraint], least: dict[str, int]) -> BudgetError:
    """Build the error that names the least cost for each infeasible constraint."""
    parts, fractions = [], {}
    for constraint in constraints:
        if constraint.name not in least:
            continue
        fractions[constraint.name] = _rounded_up(least[constraint.name], constraint.total)
        parts.append(
            f"{option_name(constraint.name, constraint.fraction)} is below the least reachable "
            f"{fractions[constraint.name]:g}"
        )
    others = [option_name(c.name, c.fraction) for c in constraints if c.name not in least]
    within = f" together with {' and '.join(others)}" if others and len(constraints) > 1 else ""
    return BudgetError(
        f"{' and '.join(parts)}{within}",
        fractions,
        "raise it, or let more layers be factorised",
    )
