"""How far the outputs of two models are apart, added up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import VerificationError
from cobla_onnx.measures import Measure
from cobla_onnx.names import quoted
from cobla_onnx.runtime import Feeds
from cobla_onnx.slices import Slices

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
        Share of positions with the same most likely class; None where there are no classes.
    axis : int or None
        Of the classes or features; None where an output has one feature.
    slice_error : float or None
        Root of the mean over features of squared error over variance; None where nothing
        varies, or the output is not of floating type.
    worst_slice : int or None
        Feature of the largest relative error, and that error, `worst_error`.
    worst_error : float or None
    compared_as : str
        The kind of its `Measure`, and what decided that; empty where it does not count.
    """

    name: str
    max_abs: float
    relative_l2: float
    cosine: float
    sqnr_db: float | None
    argmax_agreement: float | None
    axis: int | None = None
    slice_error: float | None = None
    worst_slice: int | None = None
    worst_error: float | None = None
    compared_as: str = ""

    @property
    def worst(self) -> str:
        """The worst feature in words; empty where there is one feature, or none."""
        if self.worst_slice is None or self.worst_error is None or self.axis is None:
            return ""
        return f"worst of axis {self.axis} is {self.worst_slice}: {self.worst_error:.3g}"


@dataclass
class _Sums:
    largest: float = 0.0
    expected: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    same: int = 0
    compared: int = 0
    slices: Slices | None = None


class Comparison:
    """Compares outputs of two models over any number of batches.

    Parameters
    ----------
    measures : mapping of str to Measure
        How outputs are compared: where their classes or features are, and what counts.
    """

    def __init__(self, measures: Mapping[str, Measure]) -> None:
        self._measures = measures
        self._sums: dict[str, _Sums] = {}

    def add(self, expected: Mapping[str, Any], actual: Mapping[str, Any], feeds: Feeds) -> None:
        """Add the outputs of one batch, and the inputs that they are of.

        Raises
        ------
        VerificationError
            If a shape or a type changed, or an output is no longer finite.
        """
        for name, before in expected.items():
            if is_numeric(before):
                self._add(name, before, actual[name], feeds)

    def _add(self, name: str, before: NDArray[Any], after: NDArray[Any], feeds: Feeds) -> None:
        if before.shape != after.shape or before.dtype != after.dtype:
            raise VerificationError(
                f"output {quoted(name)}: shape or type changed; nothing was written"
            )
        sums = self._sums.setdefault(name, _Sums())
        measure = self._measures.get(name)
        counts: Any = ...
        mask: NDArray[Any] | None = None
        if measure is not None and measure.mask is not None:
            mask = feeds[measure.mask]
            counts = mask.astype(bool)
        if _class_axis(measure) is not None:
            axis = _class_axis(measure)
            same = (np.argmax(before, axis=axis) == np.argmax(after, axis=axis))[counts]
            sums.same += int(same.sum())
            sums.compared += same.size
        if before.dtype.kind == "f":
            sums.slices = sums.slices or Slices(before.dtype)
            sums.slices.add(before, after, mask)
        old, new = (np.ravel(v[counts]).astype(np.float64) for v in (before, after))
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
        return tuple(
            _result(name, sums, self._measures.get(name)) for name, sums in self._sums.items()
        )


def is_numeric(value: Any) -> bool:
    """Whether an output is an array of numbers that holds any."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size > 0


def _class_axis(measure: Measure | None) -> int | None:
    """Axis of an arg-max; None for values."""
    return measure.axis if measure and (measure.has_classes or measure.kind == "either") else None


def _result(name: str, sums: _Sums, measure: Measure | None) -> OutputComparison:
    norm, other, noise = (math.sqrt(v) for v in (sums.expected, sums.actual, sums.noise))
    return OutputComparison(
        name=name,
        max_abs=sums.largest,
        relative_l2=noise / norm if norm > 0 else noise,
        cosine=sums.product / (norm * other) if norm > 0 and other > 0 else float(noise == 0),
        sqnr_db=None if noise == 0 or norm == 0 else 20 * math.log10(norm / noise),
        argmax_agreement=sums.same / sums.compared if sums.compared else None,
        compared_as="" if measure is None else f"{measure.kind}, by {measure.decided_by}",
        **_slice_errors(sums.slices, measure),
    )


def _slice_errors(slices: Slices | None, measure: Measure | None) -> dict[str, Any]:
    """What `OutputComparison` says of features."""
    if slices is None:
        return {}
    axis = slices.feature_axis() if measure is None else measure.axis
    if axis not in slices.by_axis:
        axis = None
    errors = slices.relative_errors(axis, None if measure is None else measure.scale)
    known = np.isfinite(errors)
    if not known.any():
        return {"axis": axis}
    worst = int(np.argmax(np.where(known, errors, -1.0)))
    return {
        "axis": axis,
        "slice_error": float(np.sqrt(np.square(errors[known]).mean())),
        "worst_slice": worst,
        "worst_error": float(errors[worst]),
    }
