"""Singular values and factors of a weight itself, without data; the cache keeps both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.run_cache import RunCache
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Measured
from cobla_onnx.variants.low_rank.curve import relative_errors
from cobla_onnx.variants.low_rank.matricisation import Scheme, largest_rank
from cobla_onnx.variants.low_rank.svd import (
    Basis,
    Factorization,
    Float64,
    factorize,
    gram_matrices,
    leading_vectors,
    singular_values,
)
from cobla_onnx.variants.low_rank.tridiagonal import Tridiagonal, reduced

__all__ = ["GRAMS", "VALUES", "VECTORS", "ValuesUnit", "factorize_layer", "layer_values"]

# Kinds of results in a cache.
VALUES, GRAMS, VECTORS = "values", "grams", "vectors"


@dataclass(frozen=True)
class ValuesUnit:
    """A weight, and the schemes under which its singular values are wanted."""

    schemes: tuple[Scheme, ...]
    weight: Carried
    cache: Cache | None

    def measure(self) -> Measured:
        """Compute, or find in the cache, the singular values of a weight under each scheme."""
        weight = self.weight.array
        cache = None if self.cache is None else self.cache.fresh()
        content = "" if cache is None else digest(weight)
        result = Measured([], [], [])
        for scheme in self.schemes:
            values = layer_values(scheme, weight, cache, content)
            result.errors.append(relative_errors(values))
            result.spectra.append(values)
        if cache is not None:
            result.notes.extend(cache.notes)
        return result


def layer_values(
    scheme: Scheme, weight: NDArray[Any], cache: Cache | None, content: str
) -> Float64:
    """Compute, or find in the cache, the singular values of a weight under a scheme.

    Parameters
    ----------
    content : str
        Digest of the weight; not used without a cache.
    """

    def compute() -> Arrays:
        return {"values": singular_values(_reduced(scheme, weight, cache, content))}

    return fetch(cache, VALUES, digest(content, scheme), compute)["values"]


def factorize_layer(
    layer: Layer, scheme: Scheme, rank: int, weight: NDArray[Any], cache: Cache | None
) -> Factorization:
    """Factorise a weight at a rank.

    The cache keeps the singular vectors for all ranks at which the layer would be smaller, so
    that they serve any later budget.
    """
    stack = scheme.matrix(weight)
    most = largest_rank(layer, scheme)
    if cache is None or rank > most:
        return factorize(stack, rank)
    content = digest(weight)

    def compute() -> Arrays:
        basis = leading_vectors(_reduced(scheme, weight, cache, content), most)
        return {"vectors": basis.vectors, "values": basis.singular_values}

    found = fetch(cache, VECTORS, digest(content, scheme, most), compute)
    return factorize(stack, rank, Basis(found["vectors"], found["values"]))


def _reduced(
    scheme: Scheme, weight: NDArray[Any], cache: Cache | None, content: str
) -> Tridiagonal:
    """Reduced Gram matrices under a scheme; a run keeps them, a folder would grow too large."""

    def compute() -> Arrays:
        return dict(vars(reduced(gram_matrices(scheme.matrix(weight)))))

    kept = cache if isinstance(cache, RunCache) else None
    return Tridiagonal(**fetch(kept, GRAMS, digest(content, scheme), compute))
