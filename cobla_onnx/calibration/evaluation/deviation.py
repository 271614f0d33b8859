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

    Where nothing but 0 is expected, every difference is infinite: rounding is a share of a value,
    and in an unknown unit no absolute difference is small. What a processor may take for 0, a
    number below the smallest normal one, is 0.
    """
    whole, difference = _norms(expected, actual, np.inf)
    if expected.dtype.kind == "f" and difference < np.finfo(expected.dtype).tiny:
        return 0.0
    return difference / whole if whole > 0 else math.inf


def _relative_l2(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Norm of the difference over that of what is expected.

    Where that is 0, the difference as it is: of a network's output, behind an activation that
    cuts off, rounding may leave a little where all was cut off.
    """
    whole, difference = _norms(expected, actual, 2)
    return difference / whole if whole > 0 else difference


def _norms(expected: NDArray[Any], actual: NDArray[Any], order: float) -> tuple[float, float]:
    """Norm of what is expected and of the difference, which is infinite where not alike.

    Taken piece by piece: in double precision outputs of layers may be too much for memory.
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
