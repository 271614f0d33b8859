"""Units of work that predict the errors of rounded factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Measured
from cobla_onnx.variants.coded_factors.form import CodedScheme
from cobla_onnx.variants.coded_factors.prediction import errors_in_bits, rounding_energies
from cobla_onnx.variants.low_rank.curve import relative_errors
from cobla_onnx.variants.low_rank.from_data import SpectraUnit, solver_of, truncation_errors
from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.low_rank.units import layer_values
from cobla_onnx.variants.low_rank.weighted_svd import WeightedFactorizer
from cobla_onnx.variants.storage.compensation import unavoidable
from cobla_onnx.variants.storage.precision import HALF
from cobla_onnx.variants.storage.rounding import distortion

__all__ = ["PairUnit", "PairsAlone", "beyond_half", "factor_distortion"]

# Entries of a row of random numbers, and rows, by which the distortion of factors is measured.
ROW, ROWS = 256, 64


@functools.cache
def factor_distortion(bits: int) -> float:
    """Mean squared error of rounding a factor, relative to its mean square.

    Entries of factors are sums over many weights, and so about normal.
    """
    return distortion(np.random.default_rng(0).standard_normal((1, ROWS, ROW)), bits)


def beyond_half(weight: NDArray[Any]) -> bool:
    """Whether an entry of a factor might overflow half precision.

    Components are balanced, so that no entry is above the root of the norm of what a component adds
    to the weight; that is at most the weight's own norm.
    """
    largest = max(float(weight.max(initial=0.0)), -float(weight.min(initial=0.0)))
    # Not less than the norm, and without a copy of the weight.
    return math.sqrt(largest * math.sqrt(weight.size)) > float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class PairUnit:
    """The forms of a layer, and what is known of its data."""

    forms: tuple[CodedScheme, ...]
    spectra: SpectraUnit

    def measure(self) -> Measured:
        """Predict the errors of all ranks of each form."""
        unit = self.spectra
        largest = {scheme.name: rank for scheme, rank in unit.ranks}
        key = "" if unit.cache is None else digest(unit.key, unit.weight.array)

        def compute(scheme: Scheme) -> Arrays | None:
            if unit.wide and scheme.offsets > 1:
                return None
            most = largest[scheme.name]
            stored = digest(key, scheme, most)
            return fetch(cache, "pairs", stored, partial(_energies, unit, scheme, most))

        cache = None if unit.cache is None else unit.cache.fresh()
        return _measured(self.forms, unit.weight.array, compute, cache)


@dataclass(frozen=True)
class PairsAlone:
    """The forms of a layer, without data."""

    forms: tuple[CodedScheme, ...]
    weight: Carried
    cache: Cache | None

    def measure(self) -> Measured:
        """Predict the errors of all ranks of each form."""
        weight = self.weight.array
        cache = None if self.cache is None else self.cache.fresh()
        content = "" if cache is None else digest(weight)

        def compute(scheme: Scheme) -> Arrays:
            values = layer_values(scheme, weight, cache, content)
            return _of_spectrum(values, relative_errors(values))

        return _measured(self.forms, weight, compute, cache)


def _measured(
    forms: Sequence[CodedScheme],
    weight: NDArray[Any],
    compute: Callable[[Scheme], Arrays | None],
    cache: Cache | None,
) -> Measured:
    """Put the errors of forms together; what is computed is the same for all bits of a scheme."""
    result = Measured([], [], [])
    known: dict[str, Arrays | None] = {}
    for form in forms:
        if form.scheme.name not in known:
            known[form.scheme.name] = compute(form.scheme)
        found = known[form.scheme.name]
        result.spectra.append(None)
        if found is None:
            result.errors.append(None)
            continue
        if form.bits == HALF and beyond_half(weight):
            result.errors.append(None)
            continue
        lost = factor_distortion(form.bits)
        energies = found["first"], found["second"]
        result.errors.append(errors_in_bits(found["truncated"], energies, (lost, lost)))
    if cache is not None:
        result.notes.extend(cache.notes)
    return result


def _energies(unit: SpectraUnit, scheme: Scheme, max_rank: int) -> Arrays:
    """Errors of truncation, and energies that distortions multiply, relative to the output's."""
    solver = solver_of(unit, scheme, max_rank)
    truncated = truncation_errors(solver)
    if not isinstance(solver, WeightedFactorizer):
        return _of_spectrum(solver.singular_values[:max_rank], truncated)
    if solver.energy <= 0:
        return {"truncated": truncated, "first": np.zeros(1), "second": np.zeros(1)}
    left = unavoidable(solver.own)
    inputs = solver.own.shape[1]
    first, second = rounding_energies(solver.components(), left, inputs, scheme.offsets)
    energies = {"first": first / solver.energy, "second": second / solver.energy}
    return {"truncated": truncated, **energies}


def _of_spectrum(values: Float64, truncated: Float64) -> Arrays:
    """What `_energies` returns, where inputs count alike: all follows from the singular values.

    Parameters
    ----------
    values : float64 array, shape (ranks,)
        Singular values, descending.
    truncated : float64 array, shape (full_rank + 1,)
        Squared relative errors of unrounded factors.
    """
    total = float(np.square(values).sum()) or 1.0
    first = np.append(0.0, np.cumsum(np.square(values)))
    roots = np.append(0.0, np.cumsum(values))
    second = np.square(roots) / np.maximum(np.arange(len(roots)), 1)
    return {"truncated": truncated, "first": first / total, "second": second / total}
