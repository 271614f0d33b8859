"""Survey the original's outputs in one pass over all samples, and which samples count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.loss import equal_infinities
from cobla_onnx.calibration.evaluation.slices import Slices
from cobla_onnx.calibration.evaluation.temperature import doubts
from cobla_onnx.errors import DataError
from cobla_onnx.graph.health import blame_weights
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.text import quoted

__all__ = ["OutputFacts", "Survey", "find_masks", "survey"]

# Most names of samples that a note lists.
LISTED = 8
# Tolerance for sums of class probabilities to be one, in single precision and below.
ONE, ONE_HALF = 1e-3, 1e-2

_Pattern: TypeAlias = "tuple[Any, ...]"


@dataclass
class OutputFacts:
    """Facts about one output, from all samples.

    Attributes
    ----------
    slices : Slices
    centred : float
        Variance of centred rows, summed over columns, for outputs with two axes.
    unit : bool
        Whether all values lie in [0, 1].
    normal, log_normal : set of int
        Axes along which values, or their exponentials, sum to one.
    suppressed : bool
        Whether there are infinite values.
    mask : str or None
        Input that says which positions count.
    shares : dict of (int, bool) to list of array
        Doubt of each sample, by class axis and whether values are logits; see `temperature.doubts`.
    about : dict of (int, bool) to array
        Doubt about each class, by the same keys, for the two halves of the calibration split;
        shape (2, temperatures, classes).
    """

    slices: Slices
    unit: bool = True
    normal: set[int] = field(default_factory=set)
    log_normal: set[int] = field(default_factory=set)
    suppressed: bool = False
    mask: str | None = None
    shares: dict[tuple[int, bool], list[NDArray[np.float64]]] = field(default_factory=dict)
    about: dict[tuple[int, bool], NDArray[np.float64]] = field(default_factory=dict)
    _centred: Slices | None = None

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Size of each axis; None if it differs between batches."""
        return self.slices.sizes

    @property
    def centred(self) -> float:
        """Variance of centred rows, summed over columns."""
        if self._centred is None:
            return 0.0
        sums = self._centred.of(1) if 1 in self._centred.by_axis else self._centred.whole
        return float(sums.moment.sum() / max(sums.count, 1.0))

    def add(self, values: NDArray[Any], mask: NDArray[Any] | None) -> None:
        """Add the samples of one batch."""
        values = np.atleast_1d(values)
        last = values.ndim - 1
        wide = values.astype(np.float64) if values.dtype == np.float16 else values
        finite = np.isfinite(values)
        self.suppressed |= not bool(finite.all())
        self.unit = self.unit and bool(values.min() >= -1e-6 and values.max() <= 1 + 1e-6)
        tolerance = ONE_HALF if values.dtype == np.float16 else ONE
        axes = {a for a in (1, last) if 1 <= a <= last and values.shape[a] >= 2}
        first = not self.slices.sizes
        self.normal = self._summing(wide, axes if first else self.normal, tolerance, self.unit)
        below = bool(values.max() <= 1e-6)
        if below and (first or self.log_normal):
            wide = np.exp(wide)
        self.log_normal = self._summing(
            wide, axes if first else self.log_normal, tolerance, below and not self.unit
        )
        self.slices.add(values, mask=mask)
        rowed = values.ndim >= 2 and values.size == values.shape[0] * values.shape[1]
        if rowed and values.shape[1] >= 2 and (first or self._centred is not None):
            rows = np.where(finite, values, 0.0).astype(np.float64).reshape(values.shape[:2])
            self._centred = self._centred or Slices(np.dtype(np.float64))
            self._centred.add(rows - rows.mean(axis=1, keepdims=True))

    @staticmethod
    def _summing(
        values: NDArray[Any], axes: set[int], tolerance: float, possible: bool
    ) -> set[int]:
        if not possible:
            return set()
        return {
            axis
            for axis in axes
            if axis < values.ndim
            and np.allclose(values.sum(axis=axis, dtype=np.float64), 1.0, atol=tolerance)
        }

    def add_doubts(
        self, values: NDArray[Any], axis: int, logits: bool, halves: Sequence[int | None]
    ) -> None:
        """Add the doubt, assuming that the classes are along this axis.

        `halves` says to which half of the calibration split each sample belongs, if to any.
        """
        finite, _ = equal_infinities(values, values, -1e300 if logits else 0.0)
        of_samples, of_classes = doubts(finite, logits, axis)
        self.shares.setdefault((axis, logits), []).append(of_samples)
        size = (2, len(of_classes), of_classes.shape[2])
        about = self.about.setdefault((axis, logits), np.zeros(size))
        rows = len(values) // len(halves)
        if about.shape == size and rows * len(halves) == len(values):
            for number, half in enumerate(halves):
                if half is not None:
                    about[half] += of_classes[:, number * rows : (number + 1) * rows].sum(axis=1)


@dataclass
class Survey:
    """Results of the original on all samples.

    Attributes
    ----------
    outputs : dict of str to OutputFacts
        Outputs of floating type, in the model's order.
    masks : tuple of str
        Inputs that are masks of a sequence.
    left_out : tuple of int
        Samples for which the original gives NaN, or infinities at unusual places.
    notes : tuple of str
    """

    outputs: dict[str, OutputFacts] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def add(self, outputs: Mapping[str, Any], feeds: Feeds) -> None:
        """Add the outputs of one batch."""
        for name, value in outputs.items():
            if not _is_floating(value):
                continue
            known = name in self.outputs
            facts = self.outputs.setdefault(name, OutputFacts(Slices(value.dtype)))
            fitting = [m for m in self.masks if feeds[m].shape == value.shape[:2]]
            if not known:
                facts.mask = fitting[0] if fitting else None
            elif facts.mask is not None and facts.mask not in fitting:
                facts.mask = None
            facts.add(value, None if facts.mask is None else feeds[facts.mask])


def survey(
    model: onnx.ModelProto,
    dataset: Dataset,
    batch: int,
    threads: int,
    classes: Callable[[str, OutputFacts], tuple[int, bool] | None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Run the original on all samples.

    Samples that give NaN are left out, as are those whose infinities are at other places than
    in most samples. An infinity at a fixed place, such as a suppressed token, is not a fault.

    Parameters
    ----------
    classes : callable
        Guesses from the known facts the class axis of an output, and whether it holds logits;
        None if there are no classes.

    Raises
    ------
    DataError
        If fewer than two samples are left.
    ModelError
        If that is so, and a weight is not finite.
    """
    masks = find_masks(dataset, batch)
    session = open_session(model, threads, optimized=True)
    found: dict[_Pattern, Survey] = {}
    members: dict[_Pattern, list[int]] = {}
    # Held-back samples must not influence the weights of classes.
    halves = {index: number % 2 for number, index in enumerate(dataset.calibration)}
    left_out: list[int] = []
    for group, feeds in dataset.grouped(range(len(dataset)), batch):
        progress(group[0], len(dataset))
        outputs = run_session(session, feeds)
        parts: Iterable[tuple[tuple[int, ...], Feeds, Mapping[str, Any]]]
        if all(np.isfinite(v).all() for v in outputs.values() if _is_floating(v)):
            parts = [(group, feeds, outputs)]
        else:
            alone = ((i, next(iter(dataset.batches([i], 1)))) for i in group)
            parts = (((i,), one, run_session(session, one)) for i, one in alone)
        for indices, given, values in parts:
            pattern = _pattern(values)
            if pattern is None:
                left_out.extend(indices)
                continue
            part = found.setdefault(pattern, Survey(masks=masks))
            part.add(values, given)
            for name, facts in part.outputs.items():
                axis = classes(name, facts)
                if axis is not None and name in values:
                    members_of = [halves.get(index) for index in indices]
                    facts.add_doubts(values[name], *axis, members_of)
            members.setdefault(pattern, []).extend(indices)
    progress(len(dataset), len(dataset))
    usual = max(members, key=lambda pattern: (len(members[pattern]), pattern == ()), default=())
    for pattern, indices_of in members.items():
        if pattern != usual:
            left_out.extend(indices_of)
    if len(dataset) - len(left_out) < 2:
        blame_weights(model)
        raise DataError(
            f"{dataset.source}: the original gives NaN or infinity for {len(left_out)} of "
            f"{len(dataset)} samples, at least 2 others are needed; check the data's preprocessing"
        )
    chosen = sorted(left_out)
    notes = (_left_out_note(dataset, chosen),) if chosen else ()
    return replace(found[usual], left_out=tuple(chosen), notes=notes)


def _pattern(outputs: Mapping[str, Any]) -> _Pattern | None:
    """Places of infinities in a sample's outputs, for any sequence length; None for NaN.

    None, too, where no output has a finite number: nothing could be compared.
    """
    places = []
    floating = [value for value in outputs.values() if _is_floating(value)]
    if floating and not any(np.isfinite(value).any() for value in floating):
        return None
    for name, value in outputs.items():
        if not _is_floating(value) or np.isfinite(value).all():
            continue
        if np.isnan(value).any():
            return None
        signs = np.sign(np.where(np.isinf(value), value, 0.0)).astype(np.int8)
        for axis in dict.fromkeys((value.ndim - 1, min(1, value.ndim - 1))):
            lines = np.moveaxis(signs, axis, -1).reshape(-1, value.shape[axis])
            if value.ndim > 1 and (lines == lines[0]).all():
                places.append((name, axis, lines[0].tobytes()))
                break
        else:
            places.append((name, value.shape, signs.tobytes()))
    return tuple(places)


def _left_out_note(dataset: Dataset, indices: Sequence[int]) -> str:
    names = [
        quoted(dataset.names[i]) if dataset.names else str(dataset.positions[i]) for i in indices
    ]
    listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    counted = "" if dataset.names else " (counted from 0)"
    what = "sample" if len(names) == 1 else f"{len(names)} samples,"
    return (
        f"{what} {listed}{counted}: the original gives NaN or infinity there, left out of the data"
    )


def find_masks(dataset: Dataset, batch: int) -> tuple[str, ...]:
    """Find the attention masks: inputs that say where a padded sequence ends.

    They are integers or booleans, only 0 and 1 and some of both, with two axes that are also the
    first two of another input, and in each row the ones are contiguous at one end. Token types
    look similar and are recognised by their names.
    """
    possible = {
        spec.name
        for spec in dataset.specs
        if spec.dtype.kind in "iub"
        and (spec.shape is None or len(spec.shape) == 2)
        and not any(word in spec.name.lower() for word in ("type", "segment"))
    }
    seen: dict[str, set[int]] = {}
    if not possible or len(dataset.specs) < 2:
        return ()
    for feeds in dataset.batches(range(len(dataset)), batch):
        for name in tuple(possible):
            if not _is_mask(name, feeds):
                possible.discard(name)
                continue
            seen.setdefault(name, set()).update(np.unique(feeds[name]).astype(int).tolist())
    return tuple(s.name for s in dataset.specs if s.name in possible and seen[s.name] == {0, 1})


def _is_mask(name: str, feeds: Feeds) -> bool:
    value = feeds[name]
    if value.ndim != 2 or not value.size or value.min() < 0 or value.max() > 1:
        return False
    if not any(n != name and other.shape[:2] == value.shape for n, other in feeds.items()):
        return False
    # At most one step in each row, and at least one 1.
    steps = np.abs(np.diff(value.astype(np.int8), axis=1)).sum(axis=1)
    return bool((steps <= 1).all() and value.astype(bool).any(axis=1).all())


def _is_floating(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 0
