"""Units of work on the weight of one layer: its singular values, and its factors."""

from __future__ import annotations

from dataclasses import dataclass

from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.low_rank.matricisation import Scheme, largest_rank
from cobla_onnx.variants.low_rank.svd import (
    Basis,
    Factorization,
    Float64,
    factorize,
    leading_vectors,
    singular_values,
)
from cobla_onnx.variants.rewrite import Replacement, make_replacement

__all__ = [
    "FactorUnit",
    "Factored",
    "Replaced",
    "ValuesUnit",
    "WeightValues",
    "factorize_layer",
    "replace_layer",
    "weight_values",
]


@dataclass(frozen=True)
class ValuesUnit:
    """A weight, and the schemes under which its singular values are wanted."""

    schemes: tuple[Scheme, ...]
    weight: Carried
    cache: Cache | None


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
