"""Units of work on the weight of one layer: its singular values, and its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import onnx

from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Replacement
from cobla_onnx.variants.low_rank.matricisation import Scheme, largest_rank
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.svd import (
    Basis,
    Factorization,
    Float64,
    factorize,
    leading_vectors,
    singular_values,
)

__all__ = [
    "FactorUnit",
    "Factored",
    "Replaced",
    "ValuesUnit",
    "WeightValues",
    "factor_units",
    "factorize_layer",
    "mapped",
    "replace_layer",
    "values_units",
    "weight_values",
]


class Noting(Protocol):
    """The result of a unit of work, with its notes about its own copy of the cache."""

    @property
    def notes(self) -> list[str]:
        """What a user should know of the cache."""
        ...


Unit = TypeVar("Unit")
Result = TypeVar("Result", bound=Noting)


def mapped(
    work: Callable[[Unit], Result], units: Iterable[Unit], pool: Pool, cache: Cache | None
) -> Iterator[Result]:
    """Yield ``work(unit)`` for each unit, over the pool; the cache takes over the notes."""
    for made in pool.map(work, units):
        if cache is not None:
            cache.notes += made.notes
        yield made


@dataclass(frozen=True)
class ValuesUnit:
    """A weight, and the schemes under which its singular values are wanted."""

    schemes: tuple[Scheme, ...]
    weight: Carried
    cache: Cache | None


def values_units(
    model: onnx.ModelProto,
    layers: Iterable[tuple[Layer, Iterable[Scheme]]],
    pool: Pool,
    cache: Cache | None,
) -> Iterator[ValuesUnit]:
    """Yield the units for layers, each with the schemes that are wanted."""
    for layer, schemes in layers:
        yield ValuesUnit(tuple(schemes), pool.carry(read_weight(model, layer)), cache)


@dataclass(frozen=True)
class WeightValues:
    """Singular values for each scheme, and the cache's notes."""

    values: list[Float64]
    notes: list[str]


def weight_values(unit: ValuesUnit) -> WeightValues:
    """Compute, or find in the cache, the singular values of a weight under each scheme."""
    weight = unit.weight.array
    cache = None if unit.cache is None else unit.cache.fresh()
    content = "" if cache is None else digest(weight)
    values = []
    for scheme in unit.schemes:

        def compute(scheme: Scheme = scheme) -> Arrays:
            return {"values": singular_values(scheme.matrix(weight))}

        values.append(fetch(cache, "values", digest(content, scheme), compute)["values"])
    return WeightValues(values, [] if cache is None else cache.notes)


@dataclass(frozen=True)
class FactorUnit:
    """A layer, and the scheme and rank at which its factors are wanted."""

    layer: Layer
    scheme: Scheme
    rank: int
    weight: Carried
    cache: Cache | None


def factor_units(
    model: onnx.ModelProto,
    wanted: Iterable[tuple[Layer, Scheme, int]],
    pool: Pool,
    cache: Cache | None,
) -> Iterator[FactorUnit]:
    """Yield the units for layers, each with a scheme and a rank."""
    for layer, scheme, rank in wanted:
        yield FactorUnit(layer, scheme, rank, pool.carry(read_weight(model, layer)), cache)


@dataclass(frozen=True)
class Factored:
    """The factors, and the cache's notes."""

    factors: Factorization
    notes: list[str]


@dataclass(frozen=True)
class Replaced:
    """The factor nodes' weights, and the cache's notes."""

    replacement: Replacement
    notes: list[str]


def replace_layer(unit: FactorUnit) -> Replaced:
    """Make the factor nodes' weights of a layer at a rank."""
    found = factorize_layer(unit)
    return Replaced(make_replacement(unit.layer, unit.scheme, found.factors), found.notes)


def factorize_layer(unit: FactorUnit) -> Factored:
    """Factorise a weight at a rank.

    The cache keeps the singular vectors for all ranks at which the layer would be smaller, so
    that they serve any later budget.
    """
    stack = unit.scheme.matrix(unit.weight.array)
    most = largest_rank(unit.layer, unit.scheme)
    if unit.cache is None or unit.rank > most:
        return Factored(factorize(stack, unit.rank), [])

    def compute() -> Arrays:
        basis = leading_vectors(stack, most)
        return {"vectors": basis.vectors, "values": basis.singular_values}

    cache = unit.cache.fresh()
    key = digest(digest(unit.weight.array), unit.scheme, most)
    found = fetch(cache, "vectors", key, compute)
    basis = Basis(found["vectors"], found["values"])
    return Factored(factorize(stack, unit.rank, basis), cache.notes)
