"""Calibration samples, checked against a model's inputs and kept in a temporary file.

Whatever the samples came from, they are read once, checked, and written one by one to an
unnamed temporary file, from where any of them can be had in any order. Memory holds one
record at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.cache import digest
from cobla_onnx.errors import DataError, ModelError
from cobla_onnx.runtime import Feeds
from cobla_onnx.scratch import ArrayFile, Place

__all__ = ["Dataset", "InputSpec", "Record", "input_specs"]

Record: TypeAlias = "Mapping[str, Any]"
# A fifth is held back, and at least this many if half of the samples are as many.
LEAST_HELD_BACK = 4


@dataclass(frozen=True)
class InputSpec:
    """An input of the graph that is no initializer.

    Attributes
    ----------
    name : str
    dtype : numpy dtype
    shape : tuple of (int or None) or None
        None for an axis of any size; None as a whole where the rank is not known.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None


def input_specs(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | None]] | None = None
) -> tuple[InputSpec, ...]:
    """Return what the model wants to be fed with.

    Parameters
    ----------
    shapes : mapping of str to sequence of int, optional
        Sizes of symbolic axes; the first axis stays symbolic if it is.

    Raises
    ------
    ModelError
        If an input is not a tensor of numbers.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    return tuple(
        _spec(value, (shapes or {}).get(value.name))
        for value in model.graph.input
        if value.name not in stored
    )


def _spec(value: onnx.ValueInfoProto, given: Sequence[int | None] | None) -> InputSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type == onnx.TensorProto.STRING:
        raise ModelError(
            f"input {value.name!r}: is not a tensor of numbers, which calibration data could "
            "feed; leave --data away"
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if not kind.HasField("shape"):
        return InputSpec(value.name, dtype, None)
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    # Sizes of 0 and below stand for "any" in some exporters.
    sizes = [size if size is not None and size > 0 else None for size in sizes]
    if given is not None and len(given) == len(sizes):
        rest = zip(sizes[1:], given[1:], strict=True)
        sizes[1:] = [known if known is not None else new for known, new in rest]
    return InputSpec(value.name, dtype, tuple(sizes))


class Dataset:
    """Samples in a temporary file, split into those that make factors and those held back.

    A sample is one row where every input's first axis may be of any size, as many rows as
    that axis has where it is fixed, and otherwise a record as it was given.

    Parameters
    ----------
    source : str
        What the samples came from, for messages and the report.
    records : iterable of mapping
        Arrays by input name.
    specs : sequence of InputSpec
    limit : int, optional
        No record is asked for once there are as many samples.

    positions, source_samples, names : optional
        As the attributes of the same names.

    Attributes
    ----------
    calibration, selection : tuple of int
        Indices of the samples of each split: every fifth, at least a few, is held back.
    notes : tuple of str
    rows : int or None
        Rows of a sample, None where records are taken as they are.
    positions : sequence of int
        Which of the source's samples each one is.
    source_samples : int
        How many samples the source has; of one that is read as it comes, how many were read.
    names : tuple of str
        File name of each sample, where it is one.

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
        positions: Sequence[int] | None = None,
        source_samples: int | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.notes: tuple[str, ...] = ()
        self._specs = specs
        self._file = ArrayFile()
        # For each sample and input.
        self._places: list[list[Place]] = []
        self.rows = _rows_of_a_sample(specs)
        for record in records:
            if not self._add(record, limit):
                break
        if len(self._places) < 2:
            raise DataError(
                f"{source}: gives {len(self._places)} samples of {self.rows or 1} rows, at least "
                "2 are needed, one of them to be held back; give more data"
            )
        self.calibration, self.selection = _split(len(self._places))
        self.positions = range(len(self._places)) if positions is None else positions
        self.source_samples = len(self._places) if source_samples is None else source_samples
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def batches(self, indices: Iterable[int], size: int) -> Iterator[Feeds]:
        """Yield samples as inputs for the model, up to `size` at a time where it allows.

        Samples of different shapes, and those of models with a fixed batch, are not put
        together.
        """
        pending: list[int] = []
        for index in indices:
            if pending and (len(pending) == size or not self._alike(pending[0], index)):
                yield self._feeds(pending)
                pending = []
            pending.append(index)
        if pending:
            yield self._feeds(pending)

    def content(self, indices: Iterable[int]) -> str:
        """Hash samples: their values, shapes, types and the names of the inputs."""
        return digest(
            [(spec.name, spec.dtype.str, spec.dtype.name) for spec in self._specs],
            self.rows,
            [digest(self._feeds([index])) for index in indices],
        )

    def examples(self) -> tuple[int, tuple[int, int] | None]:
        """Return the largest sample, and two that may run together, if there are any."""
        sizes = [sum(math.prod(place.shape) for place in places) for places in self._places]
        first: dict[Any, int] = {}
        for index, places in enumerate(self._places):
            other = first.setdefault(tuple(place.shape for place in places), index)
            if other != index and self._alike(other, index):
                return int(np.argmax(sizes)), (other, index)
        return int(np.argmax(sizes)), None

    def _alike(self, one: int, other: int) -> bool:
        shapes = [[place.shape for place in self._places[i]] for i in (one, other)]
        return self.rows == 1 and shapes[0] == shapes[1]

    def _feeds(self, indices: Sequence[int]) -> Feeds:
        feeds: Feeds = {}
        for number, spec in enumerate(self._specs):
            parts = [self._file.get(self._places[index][number]) for index in indices]
            feeds[spec.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return feeds

    def _add(self, record: Record, limit: int | None) -> bool:
        """Check and keep a record; tell whether more are wanted."""
        arrays = [self._checked(spec, record) for spec in self._specs]
        extra = sorted(set(record) - {spec.name for spec in self._specs})
        if extra:
            raise DataError(
                f"{self.source}: {extra[0]!r} is no input of the model, whose inputs are "
                f"{', '.join(repr(spec.name) for spec in self._specs)}; leave it out"
            )
        for start, stop in self._pieces(arrays):
            if limit is not None and len(self._places) >= limit:
                return False
            self._places.append(
                [self._file.put(a if start is None else a[start:stop]) for a in arrays]
            )
        return limit is None or len(self._places) < limit

    def _pieces(self, arrays: Sequence[NDArray[Any]]) -> Iterator[tuple[int | None, int | None]]:
        if self.rows is None:
            yield None, None
            return
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            raise DataError(
                f"{self.source}: inputs have different numbers of samples, "
                f"{', '.join(map(str, sorted(lengths)))}; give as many for each"
            )
        length = lengths.pop()
        rest = length % self.rows
        if rest and not self.notes:
            self.notes = (f"{rest} rows at the end do not fill a batch of {self.rows}",)
        for start in range(0, length - rest, self.rows):
            yield start, start + self.rows

    def _checked(self, spec: InputSpec, record: Record) -> NDArray[Any]:
        if spec.name not in record:
            raise DataError(
                f"{self.source}: has nothing for input {spec.name!r}; it has "
                f"{', '.join(map(repr, sorted(record))) or 'nothing at all'}"
            )
        where = f"{self.source}: input {spec.name!r}"
        array = _converted(np.asarray(record[spec.name]), spec.dtype, where)
        _check_shape(array, spec, self.rows is not None, where)
        return array


def _rows_of_a_sample(specs: Sequence[InputSpec]) -> int | None:
    """Rows that make a sample, None where records are taken as they are."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in specs if spec.shape is not None}
    if any(spec.shape is None for spec in specs):
        firsts.add(0)
    if len(firsts) != 1:
        return None
    first = firsts.pop()
    return 1 if first is None else first or None


def _split(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    held = max(count // 5, min(LEAST_HELD_BACK, count // 2))
    chosen = {int((i + 0.5) * count / held) for i in range(held)}
    rest = tuple(i for i in range(count) if i not in chosen)
    return rest, tuple(sorted(chosen))


def _converted(array: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """Convert to the input's type, where no meaning is lost."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: holds {array.dtype}, not numbers")
    if dtype.kind == "f":
        if array.dtype.kind != "f":
            raise DataError(
                f"{where}: is {array.dtype}, the model wants {dtype}; convert and normalise it "
                "as in training first"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{where}: holds NaN or infinity; clean the data")
        if array.size and float(np.abs(array).max()) > float(np.finfo(dtype).max):
            raise DataError(f"{where}: its values overflow {dtype}; check the preprocessing")
        return array.astype(dtype, copy=False)
    if array.dtype.kind == "f" or (dtype.kind == "b") != (array.dtype.kind == "b"):
        raise DataError(f"{where}: is {array.dtype}, the model wants {dtype}; convert it first")
    converted = array.astype(dtype, copy=False)
    if not np.array_equal(converted, array):
        raise DataError(f"{where}: its values do not fit into {dtype}; convert it first")
    return converted


def _check_shape(array: NDArray[Any], spec: InputSpec, rows: bool, where: str) -> None:
    if spec.shape is None:
        return
    axes = range(1 if rows else 0, len(spec.shape))
    fits = array.ndim == len(spec.shape) and all(
        spec.shape[axis] in (None, array.shape[axis]) for axis in axes
    )
    if not fits:
        wanted = ", ".join("?" if size is None else str(size) for size in spec.shape)
        raise DataError(
            f"{where}: has shape {list(array.shape)}, the model wants [{wanted}]; "
            "check the data's layout"
        )
    if array.size == 0:
        raise DataError(f"{where}: is empty; give some samples")
