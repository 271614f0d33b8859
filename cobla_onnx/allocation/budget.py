"""Budgets: fractions of the original's cost, as hard integer limits on the layers' choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation.problem import Choice, Float64, LayerCurves, VariantCurve
from cobla_onnx.allocation.resources import RESOURCES, Resource
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.wording import option_name

__all__ = [
    "NOTHING",
    "Budget",
    "Constraint",
    "check_budget",
    "least_fraction",
    "require_reachable",
    "rounded_up",
    "unreachable",
    "within",
]

NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Constraint:
    """One limit on the cost of the whole model, in whole units of the resource.

    Attributes
    ----------
    name : str
        Of the `Resource`.
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
        return layer.costs[self.name]

    def costs(self, curve: VariantCurve) -> NDArray[np.int64]:
        """Cost at each of the candidate levels of a curve."""
        return curve.costs[self.name]

    def path(self, curve: VariantCurve) -> Float64:
        """Cost at levels 0 to the whole layer's: linear between candidates, and beyond them.

        The cost at level 0 is that of the line through the first two candidates, at least 0.
        """
        levels = np.arange(curve.most + 1)
        if self.name in curve.per_level:
            return levels.astype(np.float64) * curve.per_level[self.name]
        known, costs = curve.levels, self.costs(curve).astype(np.float64)
        if len(known) == 1:
            return np.full(len(levels), costs[0])
        first, last = np.diff(costs)[[0, -1]] / np.diff(known)[[0, -1]]
        path = np.interp(levels, known, costs)
        path += np.maximum(levels - known[-1], 0) * last
        before = costs[0] - first * np.maximum(known[0] - levels, 0)
        path = np.where(levels < known[0], np.maximum(before, 0.0), path)
        return np.asarray(path, dtype=np.float64)

    def at(self, curve: VariantCurve, level: int) -> int:
        """Exact cost at one of the candidate levels."""
        if self.name in curve.per_level:
            return level * curve.per_level[self.name]
        index = int(np.searchsorted(curve.levels, level))
        assert curve.levels[index] == level
        return int(self.costs(curve)[index])

    def cost(self, layers: Sequence[LayerCurves], choices: Sequence[Choice | None]) -> int:
        """Exact cost of the model under the given choices."""
        total = self.fixed
        for layer, choice in zip(layers, choices, strict=True):
            if choice is None:
                total += self.whole(layer)
            else:
                total += self.at(layer.curves[choice.curve], choice.level)
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
        if all(fraction is None for _, fraction in self._fractions()):
            raise UsageError(
                f"no budget: give {option_name('mem')}, {option_name('mac')} or "
                f"{option_name('latency')}, e.g. {option_name('mem', 0.5)}"
            )
        for resource, value in self._fractions():
            known = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (known and math.isfinite(value) and 0 < value <= 1):
                raise UsageError(
                    f"{option_name(resource.name, value)}: is not a fraction of the original to "
                    "keep; give a number above 0 and at most 1"
                )

    def _fractions(self) -> tuple[tuple[Resource, float | None], ...]:
        return tuple((resource, getattr(self, resource.name)) for resource in RESOURCES)

    def constraints(
        self,
        layers: Sequence[LayerCurves],
        totals: Mapping[str, int | None],
        saved: Mapping[str, int] = NOTHING,
    ) -> tuple[Constraint, ...]:
        """Turn the fractions into integer limits, rounded down exactly.

        Parameters
        ----------
        layers : sequence of LayerCurves
        totals : mapping of str to (int or None)
            Costs of the original model by the name of the resource; None where not known.
        saved : mapping of str to int
            What of these is gone before any choice, such as constants that were stored twice.

        Raises
        ------
        UsageError
            If a budget is set for a cost that is not known of the original.
        BudgetError
            If there is nothing to keep a fraction of.
        """
        result = []
        for resource, value in self._fractions():
            if value is None:
                continue
            name, total = resource.name, totals.get(resource.name)
            if total is None:
                raise UsageError(f"{option_name(name)}: {resource.unknown}")
            if total == 0 and value < 1:
                cause = (
                    f"{option_name(name, value)}: the model {resource.nothing}, none can be saved"
                )
                raise BudgetError(cause, {name: 1.0})
            # repr gives the decimal that was meant, so that 0.3 of 1000 is 300, not 299.
            limit = math.floor(Fraction(repr(float(value))) * total)
            bare = Constraint(name, value, total, limit, 0)
            fixed = total - saved.get(name, 0) - sum(bare.whole(layer) for layer in layers)
            result.append(Constraint(name, value, total, limit, fixed))
        return tuple(result)


def check_budget(budget: object) -> None:
    """Check that what is given for a budget is one.

    Raises
    ------
    UsageError
    """
    if not isinstance(budget, Budget):
        raise UsageError(
            f"{option_name('budget', budget)}: is not a Budget; give e.g. Budget(mem=0.5)"
        )


def within(
    constraints: Sequence[Constraint],
    layers: Sequence[LayerCurves],
    choices: Sequence[Choice | None],
) -> bool:
    """Whether choices keep all limits."""
    return all(c.cost(layers, choices) <= c.limit for c in constraints)


def least_fraction(constraint: Constraint, layers: Sequence[LayerCurves]) -> float:
    """Return the least feasible fraction, rounded up to four digits."""
    return _share(constraint, constraint.least(layers))


def rounded_up(share: Fraction | float) -> float:
    """Return a share of the original's cost with four digits, so that it is itself feasible."""
    return math.ceil(share * 10_000) / 10_000


def _share(constraint: Constraint, cost: int) -> float:
    return rounded_up(Fraction(cost, constraint.total)) if constraint.total else 1.0


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
        fractions[constraint.name] = _share(constraint, least[constraint.name])
        parts.append(
            f"{option_name(constraint.name, constraint.fraction)} is below the least reachable "
            f"{fractions[constraint.name]:g}"
        )
    others = [option_name(c.name, c.fraction) for c in constraints if c.name not in least]
    beside = f" together with {' and '.join(others)}" if others and len(constraints) > 1 else ""
    several = len(parts) > 1
    return BudgetError(
        f"{' and '.join(parts)}{beside}{', each taken alone' if several else ''}",
        fractions,
        f"raise {'them' if several else 'it'}, or let more layers be compressed",
    )
