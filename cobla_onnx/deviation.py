"""How far two runs of a network are apart, relative to what they should give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.comparison import differently_made, is_numeric

__all__ = ["network_errors", "rounding_error"]


def rounding_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Largest difference, relative to the largest value."""
    return _relative(expected, actual, lambda v: float(np.abs(v).max(initial=0.0)))


def _relative_l2(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    return _relative(expected, actual, lambda v: float(np.linalg.norm(v)))


def _relative(
    expected: NDArray[Any], actual: NDArray[Any], size: Callable[[NDArray[Any]], float]
) -> float:
    """Size of the difference over the size of what is expected; infinite where not alike."""
    if expected.shape != actual.shape:
        return math.inf
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return math.inf
    whole = size(expected[finite])
    difference = size(expected[finite] - actual[finite])
    return difference / whole if whole > 0 else difference


def network_errors(
    dense: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    varying: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Largest relative L2 difference of each floating output, where shapes may be compared."""
    errors: dict[str, float] = {}
    for expected, actual in zip(dense, results, strict=True):
        for name, value in actual.items():
            if is_numeric(value) and value.dtype.kind == "f":
                before = expected[name]
                if before.shape != value.shape and not differently_made(
                    before, value, name in varying
                ):
                    continue
                error = _relative_l2(before, value)
                errors[name] = max(errors.get(name, 0.0), error)
    return errors
