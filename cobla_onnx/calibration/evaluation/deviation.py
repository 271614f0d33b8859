"""Relative deviation between the outputs of two runs of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.outputs import PIECE, differently_made, is_numeric

__all__ = ["network_errors", "rounding_error"]


def rounding_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Largest difference, relative to the largest value; infinite where not alike.

    Where only 0 is expected, any difference is infinite: rounding is relative to a value, and in
    an unknown unit no absolute difference is small. Subnormal numbers, which a processor may flush
    to 0, count as 0.
    """
    whole, difference = _norms(expected, actual, np.inf)
    if expected.dtype.kind == "f" and difference < np.finfo(expected.dtype).tiny:
        return 0.0
    return difference / whole if whole > 0 else math.inf


def _relative_l2(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Norm of the difference, relative to that of the expected values.

    Where that is 0, the absolute norm: after an activation that cuts off, rounding may leave small
    values in an output where everything should be 0. Subnormal numbers count as 0.
    """
    whole, difference = _norms(expected, actual, 2)
    if expected.dtype.kind == "f" and difference < np.finfo(expected.dtype).tiny:
        return 0.0
    return difference / whole if whole > 0 else difference


def _norms(expected: NDArray[Any], actual: NDArray[Any], order: float) -> tuple[float, float]:
    """Norms of the expected values and of the difference, which is infinite where not alike.

    Computed in chunks: in double precision, outputs of layers may be too large for memory.
    """
    if expected.shape != actual.shape:
        return 1.0, math.inf
    old, new = expected.reshape(-1), actual.reshape(-1)
    wholes, differences = [0.0], [0.0]
    for start in range(0, old.size, PIECE):
        before, after = (a[start : start + PIECE].astype(np.float64) for a in (old, new))
        finite = np.isfinite(before)
        if not np.array_equal(finite, np.isfinite(after)):
            return 1.0, math.inf
        before, after = before[finite], after[finite]
        if before.size:
            wholes.append(float(np.linalg.norm(before, order)))
            differences.append(float(np.linalg.norm(before - after, order)))
    whole, difference = (float(np.linalg.norm(found, order)) for found in (wholes, differences))
    return whole, difference


def network_errors(
    dense: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    varying: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Largest relative L2 difference of each floating output whose shapes can be compared."""
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
