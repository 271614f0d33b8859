"""How far the outputs of two models are apart, added up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import VerificationError
from cobla_onnx.names import quoted

__all__ = ["Comparison", "OutputComparison", "is_numeric"]


@dataclass(frozen=True)
class OutputComparison:
    """One output of the compressed model against the original's.

    Attributes
    ----------
    name : str
    max_abs : float
        Largest absolute difference.
    relative_l2 : float
        Norm of the difference over the norm of the original.
    cosine : float
        Cosine of the angle between the two; 1 is the same direction.
    sqnr_db : float or None
        Signal to quantisation noise, 20 log10(norm / norm of difference); None if equal.
    argmax_agreement : float or None
        Share of samples with the same largest entry along axis 1, None if there is none.
    """

    name: str
    max_abs: float
    relative_l2: float
    cosine: float
    sqnr_db: float | None
    argmax_agreement: float | None


@dataclass
class _Sums:
    largest: float = 0.0
    expected: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    same: int = 0
    compared: int = 0


class Comparison:
    """Compares outputs of two models over any number of batches."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
        """Add the outputs of one batch.

        Raises
        ------
        VerificationError
            If a shape or a type changed, or an output is no longer finite.
        """
        for name, before in expected.items():
            if is_numeric(before):
                self._add(name, before, actual[name])

    def _add(self, name: str, before: NDArray[Any], after: NDArray[Any]) -> None:
        if before.shape != after.shape or before.dtype != after.dtype:
            raise VerificationError(
                f"output {quoted(name)}: shape or type changed; nothing was written"
            )
        sums = self._sums.setdefault(name, _Sums())
        if before.ndim >= 2 and before.shape[1] >= 2:
            same = np.argmax(before, axis=1) == np.argmax(after, axis=1)
            sums.same += int(same.sum())
            sums.compared += same.size
        old, new = np.ravel(before).astype(np.float64), np.ravel(after).astype(np.float64)
        both = np.isfinite(old) & np.isfinite(new)
        if not both.all():
            if np.isfinite(old).all():
                raise VerificationError(
                    f"output {quoted(name)}: is no longer finite; nothing was written"
                )
            old, new = old[both], new[both]
        difference = old - new
        sums.largest = max(sums.largest, float(np.abs(difference).max(initial=0.0)))
        sums.expected += float(old @ old)
        sums.actual += float(new @ new)
        sums.product += float(old @ new)
        sums.noise += float(difference @ difference)

    def results(self) -> tuple[OutputComparison, ...]:
        """Return what was measured, one entry for each numeric output."""
        return tuple(_result(name, sums) for name, sums in self._sums.items())


def is_numeric(value: Any) -> bool:
    """Whether an output is an array of numbers that holds any."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size > 0


def _result(name: str, sums: _Sums) -> OutputComparison:
    norm, other, noise = (math.sqrt(v) for v in (sums.expected, sums.actual, sums.noise))
    return OutputComparison(
        name=name,
        max_abs=sums.largest,
        relative_l2=noise / norm if norm > 0 else noise,
        cosine=sums.product / (norm * other) if norm > 0 and other > 0 else float(noise == 0),
        sqnr_db=None if noise == 0 or norm == 0 else 20 * math.log10(norm / noise),
        argmax_agreement=sums.same / sums.compared if sums.compared else None,
    )
