"""Input of the allocation: cost and loss of every layer at every candidate level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "Float64", "LayerCurves", "LossCurves", "VariantCurve"]

Float64: TypeAlias = NDArray[np.float64]

LossCurves: TypeAlias = Sequence[Sequence[Float64]]
"""Loss of each layer under each of its curves, at levels 0 to the whole layer's."""


@dataclass(frozen=True)
class VariantCurve:
    """One way to replace a layer: what it costs and loses at each level.

    A level is a whole number whose meaning is the family's: the rank, for low rank. From
    level 0, which keeps nothing, to `most`, which is the layer itself, the error falls.

    Attributes
    ----------
    family : str
        The kind of variant.
    scheme : str
        Its name within the layer, such as ``channel``.
    levels : int64 array, shape (candidates,)
        Those from which to choose, ascending, each at least 1. At each of them the layer costs
        less than the whole one.
    costs : mapping of str to int64 array, shape (candidates,)
        By the name of the resource, of those that are known.
    errors : float64 array, shape (most + 1,)
        Squared relative error at levels 0 to `most`, descending to 0.
    per_level : mapping of str to int
        Cost of one level, of the resources of which a cost is proportional to the level.
    nested : bool
        Whether each level contains the lower ones, so that masks may move between them, as
        singular values are added one by one. Of other curves, SLSQP leaves the level as it is.
    spectrum : float64 array, shape (most,), optional
        Singular values, descending. For grouped layers, entry j is the root of the sum over
        the groups of the squared j-th singular value, since ranks are equal over groups.
    """

    family: str
    scheme: str
    levels: NDArray[np.int64]
    costs: Mapping[str, NDArray[np.int64]]
    errors: Float64
    per_level: Mapping[str, int] = field(default_factory=dict)
    nested: bool = True
    spectrum: Float64 | None = None

    @property
    def most(self) -> int:
        """The level of the whole layer."""
        return len(self.errors) - 1

    def only(self, keep: NDArray[Any]) -> VariantCurve:
        """Return the curve with some of its candidates, by a mask or by places."""
        costs = {name: cost[keep] for name, cost in self.costs.items()}
        return replace(self, levels=self.levels[keep], costs=costs)

    def with_cost(self, name: str, cost: NDArray[np.int64]) -> VariantCurve:
        """Return the curve with the cost in one more resource, at each of its candidates."""
        return replace(self, costs={**self.costs, name: cost})


@dataclass(frozen=True)
class LayerCurves:
    """The options of a layer: keep it whole, or choose a point on one of its curves.

    Attributes
    ----------
    name : str
        Name of the layer, for messages.
    costs : mapping of str to int
        Costs of the layer kept whole, by the name of the resource, of those that are known.
    curves : tuple of VariantCurve
        Each has at least one candidate; never empty.
    """

    name: str
    costs: Mapping[str, int]
    curves: tuple[VariantCurve, ...]


@dataclass(frozen=True)
class Choice:
    """A point on a curve: the index of the layer's curve, and a level of it.

    The choice to keep a layer whole is written as None.
    """

    curve: int
    level: int
