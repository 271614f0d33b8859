"""Deviation between the outputs of two models, accumulated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.slices import Slices
from cobla_onnx.errors import VerificationError
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.text import quoted

__all__ = ["Comparison", "OutputComparison", "as_array", "differently_made", "is_numeric"]

# Elements compared at a time, in double precision.
PIECE = 1 << 20
# Values this close to 0 or 1 come from a saturated activation.
SATURATED = 1e-3


@dataclass(frozen=True)
class OutputComparison:
    """One output of the compressed model against the original's.

    Attributes
    ----------
    name : str
    max_abs : float or None
        Largest absolute difference; None for text.
    relative_l2 : float or None
        Norm of the difference over the norm of the original; None for text.
    cosine : float or None
        Cosine of the angle between the two; 1 is the same direction. None for text.
    sqnr_db : float or None
        Signal to quantisation noise, 20 log10(norm / norm of difference); None if equal.
    argmax_agreement : float or None
        Fraction of positions with the same most likely class; None if there are no classes.
    equal : float or None
        Fraction of equal entries, for outputs that are not of floating type.
    reacts : bool
        Whether the original's output differs between inputs. If not, agreement of the two
        outputs says nothing about the approximation.
    finite : bool
        Whether any number of the original's output is finite; others are not compared.
    axis : int or None
        Axis of the classes or features; None if an output has one feature.
    slice_error : float or None
        Root of the mean over features of squared error over variance; None if nothing varies,
        or the output is not of floating type, or certainly holds classes.
    worst_slice : int or None
        Feature of the largest relative error, and that error, `worst_error`.
    worst_error : float or None
    compared_as : str
        The kind of its `Measure`, and the reason for it; empty if the output does not count.
    """

    name: str
    max_abs: float | None
    relative_l2: float | None
    cosine: float | None
    sqnr_db: float | None
    argmax_agreement: float | None
    equal: float | None = None
    reacts: bool = True
    finite: bool = True
    axis: int | None = None
    slice_error: float | None = None
    worst_slice: int | None = None
    worst_error: float | None = None
    compared_as: str = ""

    @property
    def silence(self) -> str:
        """Why the comparison tells nothing about the approximation; empty if it does."""
        if not self.finite:
            return "the original gives nothing but NaN or infinity"
        return "" if self.reacts else "the original gives the same for all inputs"

    @property
    def worst(self) -> str:
        """The worst feature in words; empty if there are fewer than two features."""
        if self.worst_slice is None or self.worst_error is None or self.axis is None:
            return ""
        return f"worst of axis {self.axis} is {self.worst_slice}: {self.worst_error:.3g}"


@dataclass
class _Reaction:
    """Tracks whether an output differs between samples, beyond rounding and saturation."""

    first: NDArray[Any] | None = None
    rows: int = 0
    scale: float = 0.0
    deviation: float = 0.0
    saturated: bool = True
    comparable: bool = True

    def add(self, value: NDArray[Any], samples: int | None) -> None:
        batched = bool(value.ndim) and len(value) == samples
        rows = value if batched else value[None]
        if self.first is None:
            self.first = np.asarray(rows[0])
        if rows.shape[1:] != self.first.shape:
            # Inputs of another shape give different outputs for that reason alone.
            self.comparable = False
            return
        self.rows += len(rows)
        if value.dtype.kind not in "fiub":
            self.deviation = max(self.deviation, float((rows != self.first).any()))
            return
        flat, first = rows.reshape(len(rows), -1), self.first.reshape(-1)
        step = max(1, PIECE // len(rows))
        for start in range(0, len(first), step):
            self._look(flat[:, start : start + step], first[start : start + step])

    def _look(self, rows: NDArray[Any], first: NDArray[Any]) -> None:
        wide, first = rows.astype(np.float64), first.astype(np.float64)
        finite = np.isfinite(wide) & np.isfinite(first)
        wide = np.where(finite, wide, 0.0)
        change = np.where(finite, np.abs(wide - np.where(np.isfinite(first), first, 0.0)), 0.0)
        self.scale = max(self.scale, float(np.abs(wide).max(initial=0.0)))
        self.deviation = max(self.deviation, float(change.max(initial=0.0)))
        near = np.abs(wide - np.round(wide)) <= SATURATED
        self.saturated &= bool(near.all() and (np.abs(wide) <= 1 + SATURATED).all())

    def reacts(self, dtype: np.dtype[Any]) -> bool:
        """Whether it does, as far as the samples show."""
        if self.rows < 2 or not self.comparable:
            return True
        if dtype.kind != "f":
            return self.deviation > 0
        if self.saturated and self.scale >= 1 - SATURATED and self.deviation <= 2 * SATURATED:
            return False
        return self.deviation > 8 * float(np.finfo(dtype).eps) * self.scale


@dataclass
class _Sums:
    dtype: np.dtype[Any]
    largest: float = 0.0
    expected: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    numbers: int = 0
    finite: int = 0
    same: int = 0
    compared: int = 0
    equal: int = 0
    entries: int = 0
    slices: Slices | None = None
    reaction: _Reaction = field(default_factory=_Reaction)

    def add(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        """Add values of both models, where both are finite."""
        old, new = before.astype(np.float64), after.astype(np.float64)
        self.numbers += old.size
        self.finite += int(np.isfinite(old).sum())
        both = np.isfinite(old) & np.isfinite(new)
        if not both.all():
            old, new = old[both], new[both]
        difference = old - new
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))
        self.expected += float(old @ old)
        self.actual += float(new @ new)
        self.product += float(old @ new)
        self.noise += float(difference @ difference)


class Comparison:
    """Compares outputs of two models over any number of batches.

    Parameters
    ----------
    measures : mapping of str to Measure
        How outputs are compared: the axis of classes or features, and which positions count.
    varying : collection of str
        Outputs whose shape depends on the data; where it differs, they are counted and not
        compared.
    """

    def __init__(self, measures: Mapping[str, Measure], varying: Collection[str] = ()) -> None:
        self._measures = measures
        self._varying = set(varying)
        self._sums: dict[str, _Sums] = {}
        self._batches = 0
        self._other_shape: dict[str, int] = {}

    def add(
        self,
        expected: Mapping[str, Any],
        actual: Mapping[str, Any],
        feeds: Feeds,
        samples: int | None = None,
    ) -> None:
        """Add the outputs of one batch, with its inputs and its number of samples.

        Raises
        ------
        VerificationError
            If a shape or a type changed, or an output is no longer finite.
        """
        self._batches += 1
        for name, value in expected.items():
            before, after = as_array(value), as_array(actual[name])
            if before is None or after is None:
                if (before is None) != (after is None):
                    self._refuse(name)
                continue
            if differently_made(before, after, name in self._varying):
                self._refuse(name)
            if before.shape != after.shape:
                self._other_shape[name] = self._other_shape.get(name, 0) + 1
            elif before.size:
                self._add(name, before, after, feeds, samples)

    @staticmethod
    def _refuse(name: str) -> None:
        raise VerificationError(
            f"output {quoted(name)}: shape or type changed; nothing was written"
        )

    def _add(
        self,
        name: str,
        before: NDArray[Any],
        after: NDArray[Any],
        feeds: Feeds,
        samples: int | None,
    ) -> None:
        sums = self._sums.setdefault(name, _Sums(before.dtype))
        sums.reaction.add(before, samples)
        if before.dtype.kind != "f":
            sums.equal += int((before == after).sum())
            sums.entries += before.size
        if not is_numeric(before):
            return
        measure = self._measures.get(name)
        counts: Any = ...
        mask: NDArray[Any] | None = None
        if measure is not None and measure.mask is not None:
            mask = feeds[measure.mask]
            counts = mask.astype(bool)
        axis = _class_axis(measure)
        if axis is not None:
            same = (np.argmax(before, axis=axis) == np.argmax(after, axis=axis))[counts]
            sums.same += int(same.sum())
            sums.compared += same.size
        if before.dtype.kind == "f":
            sums.slices = sums.slices or Slices(before.dtype)
            sums.slices.add(before, after, mask)
        old, new = (np.ravel(v[counts]) for v in (before, after))
        if np.isfinite(old).all() and not np.isfinite(new).all():
            raise VerificationError(
                f"output {quoted(name)}: is no longer finite; nothing was written"
            )
        for start in range(0, old.size, PIECE):
            sums.add(old[start : start + PIECE], new[start : start + PIECE])

    def results(self) -> tuple[OutputComparison, ...]:
        """Return the results, one for each output that could be compared."""
        return tuple(
            _result(name, sums, self._measures.get(name)) for name, sums in self._sums.items()
        )

    def notes(self) -> tuple[str, ...]:
        """Notes on outputs that could not be compared, or whose comparison means nothing."""
        results = self.results()
        notes = tuple(
            f"output {quoted(name)}: could not be compared on {count} of {self._batches} batches, "
            "its shape follows from the data and differs"
            for name, count in self._other_shape.items()
        )
        notes += tuple(
            f"output {quoted(output.name)}: {output.silence} for these inputs, so nothing of it "
            "is compared; look for NaN, infinity or very large numbers in the weights"
            for output in results
            if not output.finite
        )
        finite = [output for output in results if output.finite]
        if finite and not any(output.reacts for output in finite):
            notes += (
                "no output of the original reacts to these inputs, so the comparison of outputs "
                "tells nothing about the approximation; give inputs of the real kind by --data",
            )
        return notes


def is_numeric(value: Any) -> bool:
    """Whether an output is a non-empty array of numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size > 0


def as_array(value: Any) -> NDArray[Any] | None:
    """Convert an output of any kind to one array; None if there is nothing to compare.

    A sequence becomes an array with an additional axis if its members have the same shape, and
    otherwise a list of all their entries; a map becomes its values in the order of its keys.
    """
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "fiubOUS" else None
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, (list, tuple)):
        members = [as_array(member) for member in value]
        arrays = [member for member in members if member is not None]
        if len(arrays) < len(members):
            return None
        if not arrays:
            return np.zeros(0, np.float32)
        if len({array.shape for array in arrays}) == 1:
            return np.stack(arrays)
        return np.concatenate([array.ravel() for array in arrays])
    if isinstance(value, float):
        # Maps hold single precision, which Python converts to double.
        return np.asarray(value, np.float32)
    return np.asarray(value) if isinstance(value, (int, str)) else None


def differently_made(before: NDArray[Any], after: NDArray[Any], varying: bool) -> bool:
    """Whether two outputs differ in type, in rank, or in a shape that does not depend on data."""
    text = before.dtype.kind in "OUS" and after.dtype.kind in "OUS"
    if before.dtype != after.dtype and not text:
        return True
    return before.ndim != after.ndim or (before.shape != after.shape and not varying)


def _class_axis(measure: Measure | None) -> int | None:
    """Axis of an arg-max; None for values."""
    return measure.axis if measure and (measure.has_classes or measure.kind == "either") else None


def _result(name: str, sums: _Sums, measure: Measure | None) -> OutputComparison:
    norm, other, noise = (math.sqrt(v) for v in (sums.expected, sums.actual, sums.noise))
    numbers = sums.dtype.kind in "fiub"
    cosine = sums.product / (norm * other) if norm > 0 and other > 0 else float(noise == 0)
    return OutputComparison(
        name=name,
        max_abs=sums.largest if numbers else None,
        relative_l2=(noise / norm if norm > 0 else noise) if numbers else None,
        cosine=cosine if numbers else None,
        sqnr_db=None if noise == 0 or norm == 0 else 20 * math.log10(norm / noise),
        argmax_agreement=sums.same / sums.compared if sums.compared else None,
        equal=sums.equal / sums.entries if sums.entries else None,
        reacts=sums.reaction.reacts(sums.dtype),
        finite=sums.finite > 0 or not sums.numbers,
        compared_as="" if measure is None else f"{measure.kind}, by {measure.decided_by}",
        **_slice_errors(sums.slices, measure),
    )


def _slice_errors(slices: Slices | None, measure: Measure | None) -> dict[str, Any]:
    """The entries of `OutputComparison` about features."""
    if slices is None:
        return {}
    if measure is not None and measure.has_classes:
        # A class that no sample shows hardly varies; classes are compared by their arg-max above.
        return {"axis": measure.axis}
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
