"""Calibration samples, checked against a model's inputs and kept in a temporary file.

Samples of any source are read once, checked, and written one by one to an unnamed temporary
file, from which they can be read in any order. Memory holds one record at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.data.fitting import InputSpec, as_array, check_shape, converted
from cobla_onnx.calibration.data.implied import implied, tell_implied
from cobla_onnx.errors import DataError, ModelError
from cobla_onnx.graph.first_axis import FirstAxis, first_axes
from cobla_onnx.graph.protos import given_inputs
from cobla_onnx.runtime.cache import digest
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.temporary import ArrayFile, Place
from cobla_onnx.text import quoted
from cobla_onnx.wording import option_name

__all__ = ["Dataset", "InputSpec", "Record", "input_specs", "rows_of_a_sample"]

Record: TypeAlias = "Mapping[str, Any]"
# A fifth is held back, but at least this many if that is no more than half of the samples.
LEAST_HELD_BACK = 4
# Most missing inputs that a message names.
MOST_SHOWN = 4


def input_specs(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | None]] | None = None
) -> tuple[InputSpec, ...]:
    """Return the specifications of the model's inputs.

    Parameters
    ----------
    shapes : mapping of str to sequence of int, optional
        Sizes of symbolic axes, kept in addition to the model's own.

    Raises
    ------
    ModelError
        If an input is not a tensor.
    """
    axes = first_axes(model)
    return tuple(
        _spec(value, axes[name], (shapes or {}).get(name))
        for name, value in given_inputs(model.graph).items()
    )


def _spec(
    value: onnx.ValueInfoProto, first: FirstAxis, given: Sequence[int | None] | None
) -> InputSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise ModelError(
            f"input {value.name!r}: is not a tensor, which calibration data could feed; leave "
            f"out {option_name('data')}"
        )
    text = kind.elem_type == onnx.TensorProto.STRING
    dtype = np.dtype("U" if text else onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if not kind.HasField("shape"):
        return InputSpec(value.name, dtype, None, first)
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    # Sizes of 0 and below stand for "any" in some exporters.
    sizes = [size if size is not None and size > 0 else None for size in sizes]
    return InputSpec(
        value.name, dtype, tuple(sizes), first, None if given is None else tuple(given)
    )


class Dataset:
    """Samples in a temporary file, split into calibration and held-back samples.

    If the first axis of every input runs over samples, a sample is one row, or as many rows as a
    fixed axis has, collected over several records if needed. Otherwise it is a whole record.

    Parameters
    ----------
    source : str
        Source of the samples, for messages and the report.
    records : iterable of mapping
        Arrays by input name.
    specs : sequence of InputSpec
    limit : int, optional
        No further record is read once there are this many samples.

    whole : bool, optional
        Whether each record is one sample; by default unless the first axis of every input is
        known to run over samples.
    positions, source_samples, names, source_names : optional
        See the attributes of the same names.

    Attributes
    ----------
    calibration, selection : tuple of int
        Indices of the samples of each split: every fifth, at least a few, is held back.
    notes : tuple of str
    rows : int or None
        Rows of a sample; None if each record is one sample.
    positions : sequence of int
        Which of the source's samples each one is.
    source_samples : int
        Number of samples in the source; for a one-shot source, the number read.
    names, source_names : tuple of str
        Path of each sample's file relative to the source, with forward slashes, and those of
        all files there; empty if samples are not files.

    Raises
    ------
    DataError
        If a record does not fit the inputs, or there are less than two samples.
    """

    def __init__(
        self,
        source: str,
        records: Iterable[Record],
        specs: Sequence[InputSpec],
        limit: int | None = None,
        *,
        whole: bool | None = None,
        positions: Sequence[int] | None = None,
        source_samples: int | None = None,
        names: Sequence[str] = (),
        source_names: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.notes: tuple[str, ...] = ()
        self._specs = specs
        self._file = ArrayFile()
        # For each sample and input.
        self._places: list[list[Place]] = []
        if whole is None:
            whole = any(spec.first != "batch" or spec.shape is None for spec in specs)
        self.rows = None if whole else rows_of_a_sample(specs)
        # A fixed batch takes only samples of its size.
        self._joins = self.rows == 1 and all(s.shape and s.shape[0] is None for s in specs)
        # Rows that do not yet fill a batch, by input.
        self._rest: list[list[NDArray[Any]]] = [[] for _ in specs]
        # Names of inputs that records lacked.
        self._implied: dict[str, None] = {}
        for record in records:
            if not self._add(record, limit):
                break
        self._tell_what_was_taken(specs)
        if len(self._places) < 2:
            raise DataError(self._too_few())
        self.calibration, self.selection = _split(len(self._places))
        self.positions = range(len(self._places)) if positions is None else positions
        self.source_samples = len(self._places) if source_samples is None else source_samples
        self.names = tuple(names)
        self.source_names = tuple(source_names) or self.names

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def batches(self, indices: Iterable[int], size: int) -> Iterator[Feeds]:
        """Yield samples as inputs for the model, up to `size` at a time where it allows.

        Samples of different shapes, and those of models with a fixed batch, are not batched.
        """
        return (feeds for _, feeds in self.grouped(indices, size))

    def grouped(self, indices: Iterable[int], size: int) -> Iterator[tuple[tuple[int, ...], Feeds]]:
        """Yield the indices of samples with each batch of `batches`."""
        return ((group, self._feeds(group)) for group in self.groups(indices, size))

    def counted(self, indices: Iterable[int], size: int) -> Iterator[tuple[int, Feeds]]:
        """Yield how many samples there are in each batch of `batches`, as `count` does."""
        return ((self.count(group), feeds) for group, feeds in self.grouped(indices, size))

    def groups(self, indices: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
        """Yield the indices of samples that `batches` combines."""
        pending: list[int] = []
        for index in indices:
            if pending and (len(pending) == size or not self._alike(pending[0], index)):
                yield tuple(pending)
                pending = []
            pending.append(index)
        if pending:
            yield tuple(pending)

    def joins(self, indices: Iterable[int], size: int) -> bool:
        """Whether `batches` combines samples at all."""
        return any(len(group) > 1 for group in self.groups(indices, size))

    def leave_out(self, indices: Iterable[int]) -> None:
        """Exclude further samples from both splits; the others are split anew."""
        gone = set(indices)
        kept = [i for i in sorted((*self.calibration, *self.selection)) if i not in gone]
        made, held = _split(len(kept))
        self.calibration = tuple(kept[i] for i in made)
        self.selection = tuple(kept[i] for i in held)

    @property
    def specs(self) -> Sequence[InputSpec]:
        """Specifications of the model's inputs."""
        return self._specs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The most common shapes of the inputs; among equally common ones, the median by size."""
        found = Counter(tuple(self._shapes_of(index)) for index in range(len(self)))
        most = max(found.values())
        common = [shapes for shapes, count in found.items() if count == most]
        common.sort(key=lambda shapes: (sum(map(math.prod, shapes)), shapes))
        middle = common[(len(common) - 1) // 2]
        return {spec.name: shape for spec, shape in zip(self._specs, middle, strict=True)}

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same shapes."""
        return all(self._shapes_of(0) == self._shapes_of(i) for i in range(1, len(self)))

    def _shapes_of(self, index: int) -> list[tuple[int, ...]]:
        return [place.shape for place in self._places[index]]

    def count(self, indices: Sequence[int]) -> int:
        """Count samples as users do: each row of a fixed batch, and a whole record once."""
        return len(indices) * (self.rows or 1)

    def content(self, indices: Iterable[int]) -> str:
        """Hash samples: their values, shapes, types, and the names of the inputs."""
        return digest(
            [(spec.name, spec.dtype.str, spec.dtype.name) for spec in self._specs],
            self.rows,
            [digest(self._feeds([index])) for index in indices],
        )

    def examples(self) -> tuple[int, tuple[int, int] | None]:
        """Return the largest sample, and two that may be batched, if there are any."""
        sizes = [sum(math.prod(place.shape) for place in places) for places in self._places]
        first: dict[Any, int] = {}
        for index, places in enumerate(self._places):
            other = first.setdefault(tuple(place.shape for place in places), index)
            if other != index and self._alike(other, index):
                return int(np.argmax(sizes)), (other, index)
        return int(np.argmax(sizes)), None

    def _alike(self, one: int, other: int) -> bool:
        return self._joins and self._shapes_of(one) == self._shapes_of(other)

    def _feeds(self, indices: Sequence[int]) -> Feeds:
        feeds: Feeds = {}
        for number, spec in enumerate(self._specs):
            parts = [self._file.get(self._places[index][number]) for index in indices]
            feeds[spec.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return feeds

    def _add(self, record: Record, limit: int | None) -> bool:
        """Check and keep a record; return whether more are wanted."""
        names = {spec.name for spec in self._specs}
        record = {
            name: as_array(value, self._where(name)) if name in names else value
            for name, value in record.items()
        }
        made = implied(record, self._specs)
        self._implied |= dict.fromkeys(made)
        record = {**record, **made}
        self._refuse_missing(record)
        arrays = [self._checked(spec, record) for spec in self._specs]
        extra = sorted(set(record) - names)
        if extra:
            raise DataError(
                f"{self.source}: {extra[0]!r} is not an input of the model, whose inputs are "
                f"{', '.join(repr(spec.name) for spec in self._specs)}; leave it out"
            )
        for sample in self._samples(arrays):
            if limit is not None and len(self._places) >= limit:
                return False
            self._places.append([self._file.put(array) for array in sample])
        return limit is None or len(self._places) < limit

    def _samples(self, arrays: list[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
        """Split a record into samples; rows that do not fill one are kept for the next record."""
        if self.rows is None:
            yield arrays
            return
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            raise DataError(
                f"{self.source}: inputs have different numbers of samples, "
                f"{', '.join(map(str, sorted(lengths)))}; give as many for each"
            )
        joined = [
            np.concatenate([*rest, array]) if rest else array
            for rest, array in zip(self._rest, arrays, strict=True)
        ]
        full = len(joined[0]) - len(joined[0]) % self.rows
        for start in range(0, full, self.rows):
            yield [array[start : start + self.rows] for array in joined]
        self._rest = [[array[full:].copy()] if len(array) > full else [] for array in joined]

    def _tell_what_was_taken(self, specs: Sequence[InputSpec]) -> None:
        if self._implied:
            self.notes += (tell_implied(list(self._implied)),)
        left = len(self._rest[0][0]) if self._rest and self._rest[0] else 0
        if left:
            self.notes += (f"{left} rows at the end do not fill a batch of {self.rows}",)
        unsure = next((spec.name for spec in specs if spec.first == "unknown"), None)
        if unsure is None or any(spec.first == "other" for spec in specs):
            return
        if self.rows is not None:
            self.notes += (
                f"the first axis of input {quoted(unsure)} was taken for samples; if it is not, "
                "put an axis of samples before it",
            )
        elif any(place.shape[:1] > (1,) for sample in self._places for place in sample):
            self.notes += (
                f"the first axis of input {quoted(unsure)} may not be of samples, so records were "
                "kept whole; if it is, give all rows as one array",
            )

    def _too_few(self) -> str:
        found = f"{self.source}: gives {len(self._places)} samples"
        if self.rows is not None:
            found += f" of {self.rows} rows"
        advice = "give more data"
        kept = next((spec.name for spec in self._specs if spec.first != "batch"), None)
        if self.rows is None and kept is not None:
            advice = (
                f"the first axis of input {quoted(kept)} is not of samples: give arrays with an "
                "axis of samples before it"
            )
        return f"{found}, at least 2 are needed, one of them to be held back; {advice}"

    def _refuse_missing(self, record: Record) -> None:
        """Say which inputs a record lacks, and how to give the past of a decoder."""
        missing = [spec for spec in self._specs if spec.name not in record]
        if not missing:
            return
        shown = ", ".join(f"{quoted(spec.name)} {spec.shown}" for spec in missing[:MOST_SHOWN])
        if len(missing) > MOST_SHOWN:
            shown += f" and {len(missing) - MOST_SHOWN} more"
        advice = "give an array for each"
        if any("past" in spec.name.lower() or "cache" in spec.name.lower() for spec in missing):
            advice += ", a past that is still empty with a length of 0 on its axis of time"
        raise DataError(
            f"{self.source}: has nothing for input {shown}; it has "
            f"{', '.join(map(quoted, sorted(record))) or 'nothing at all'}; {advice}"
        )

    def _checked(self, spec: InputSpec, record: Record) -> NDArray[Any]:
        where = self._where(spec.name)
        array = converted(record[spec.name], spec.dtype, where)
        if self.rows is not None and spec.shape and array.ndim == len(spec.shape) - 1:
            # One row, without the axis of samples.
            array = array[None]
        check_shape(array, spec, self.rows is not None, where)
        return array

    def _where(self, name: str) -> str:
        return f"{self.source}: input {name!r}"


def rows_of_a_sample(specs: Sequence[InputSpec]) -> int | None:
    """Rows of a sample; None if the inputs' first axes cannot be cut together."""
    if any(not spec.shape for spec in specs):
        return None
    fixed = {spec.shape[0] for spec in specs if spec.shape} - {None}
    return None if len(fixed) > 1 else fixed.pop() if fixed else 1


def _split(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    held = max(count // 5, min(LEAST_HELD_BACK, count // 2))
    chosen = {int((i + 0.5) * count / held) for i in range(held)}
    rest = tuple(i for i in range(count) if i not in chosen)
    return rest, tuple(sorted(chosen))
