"""Samples from arrays: in memory, mapped from an ``.npy`` file, or packed in an ``.npz``.

An array with one axis more than the model's input is a stack of samples. In one with as many
axes, either the first axis runs over samples, or a batch axis of length 1 is missing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.data.dataset import Dataset, InputSpec, Record, rows_of_a_sample
from cobla_onnx.errors import DataError
from cobla_onnx.runtime.damaged import DAMAGED
from cobla_onnx.runtime.parser import PARSER
from cobla_onnx.text import first_line

__all__ = ["LABEL_NAMES", "array_samples", "evenly", "open_npy", "open_npz", "spread_over"]

# Arrays of an .npz that are not inputs, but often lie beside them.
LABEL_NAMES = ("labels", "label", "y")


class _Source(Protocol):
    """An array that is read item by item along its first axis, by ascending index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def items(self, wanted: Sequence[int]) -> Iterator[NDArray[Any]]: ...

    def all(self) -> NDArray[Any]: ...


@dataclass(frozen=True)
class _Held:
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def items(self, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
        return (self.array[index] for index in wanted)

    def all(self) -> NDArray[Any]:
        return self.array


@dataclass(frozen=True)
class _Member:
    path: Path
    archive: zipfile.ZipFile
    name: str
    shape: tuple[int, ...]

    def items(self, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
        with _as_member(self.path, self.name), self.archive.open(self.name) as file:
            shape, fortran, dtype = _read_header(file)
            if fortran and len(shape) > 1:
                # Its rows are not contiguous.
                content = np.frombuffer(file.read(), dtype).reshape(shape, order="F")
                yield from (content[index] for index in wanted)
                return
            size = int(np.prod(shape[1:])) * dtype.itemsize
            place = 0
            for index in wanted:
                _skip(file, (index - place) * size)
                yield np.frombuffer(file.read(size), dtype).reshape(shape[1:])
                place = index + 1

    def all(self) -> NDArray[Any]:
        with _as_member(self.path, self.name), self.archive.open(self.name) as file:
            shape, fortran, dtype = _read_header(file)
            content = np.frombuffer(file.read(), dtype)
            return content.reshape(shape, order="F" if fortran else "C")


@dataclass(frozen=True)
class _Reading:
    """How an array becomes the feeds of an input.

    Attributes
    ----------
    rows : int
        Rows of samples in each item along the array's first axis.
    lacking : int or None
        Axis of length 1 that an item lacks.
    same : bool
        Whether the array itself is the feed, the same for all samples.
    """

    source: _Source
    rows: int = 1
    lacking: int | None = None
    same: bool = False

    @property
    def count(self) -> int:
        """Total number of rows of samples."""
        return self.source.shape[0] * self.rows

    def feeds(self, starts: Sequence[int], each: int) -> Iterator[NDArray[Any]]:
        """Yield feeds of `each` rows from ascending starts; whole items if `each` is 0."""
        if self.same:
            yield from [self.source.all()] * len(starts)
            return
        if not each:
            for item in self.source.items(starts):
                yield item if self.lacking is None else np.expand_dims(item, self.lacking)
            return
        wanted = [start + row for start in starts for row in range(each)]
        places = sorted({row // self.rows for row in wanted})
        items = zip(places, self.source.items(places), strict=True)
        place, item = next(items, (0, np.empty(0)))
        taken: list[NDArray[Any]] = []
        for row in wanted:
            if row // self.rows != place:
                place, item = next(items)
            taken.append(item if self.lacking is not None else item[row % self.rows])
            if len(taken) == each:
                yield np.stack(taken)
                taken = []


def array_samples(
    source: str,
    arrays: Mapping[str, NDArray[Any]],
    specs: Sequence[InputSpec],
    samples: int | None,
) -> Dataset:
    """Read arrays by input name; at most a given number of samples, spread evenly."""
    return _dataset(source, {name: _Held(a) for name, a in arrays.items()}, specs, samples)


def open_npy(path: Path, specs: Sequence[InputSpec], samples: int | None) -> Dataset:
    """Read an array for a model's only input."""
    if len(specs) != 1:
        raise DataError(
            f"{path}: holds one array, the model has {len(specs)} inputs; give an .npz with an "
            "array for each"
        )
    try:
        with PARSER:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise DataError(
            f"{path}: is not an .npy file of numbers ({first_line(error)}); save it again"
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: is not an .npy file; rename it to match its content")
    return array_samples(str(path), {specs[0].name: array}, specs, samples)


def open_npz(path: Path, specs: Sequence[InputSpec], samples: int | None) -> Dataset:
    """Read an array for each input, item by item."""
    with ExitStack() as opened:
        try:
            # A reader that an error leaves half-way would keep a file open that the archive opened.
            file = opened.enter_context(path.open("rb"))
            archive = opened.enter_context(zipfile.ZipFile(file))
        except DAMAGED as error:
            raise DataError(
                f"{path}: is not an .npz file, or is damaged ({first_line(error)}); save it again"
            ) from error
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        wanted = {spec.name for spec in specs} | set(members) - set(LABEL_NAMES)
        arrays = {
            name: _Member(path, archive, members[name], _shape(path, archive, members[name]))
            for name in sorted(wanted & set(members))
        }
        return _dataset(str(path), arrays, specs, samples)


@contextmanager
def _as_member(path: Path, member: str) -> Iterator[None]:
    """Name the array of an .npz that is damaged, in what reads it and nothing else."""
    try:
        yield
    except MemoryError:
        # Sizes were checked: there is too little for what is not damaged.
        raise
    except DAMAGED as error:
        raise DataError(
            f"{path}: {member!r} is not an array, or is damaged ({first_line(error)}); save it "
            "again"
        ) from error


def _dataset(
    source: str, arrays: Mapping[str, _Source], specs: Sequence[InputSpec], samples: int | None
) -> Dataset:
    inputs = {spec.name: spec for spec in specs}
    arrays = {name: a for name, a in arrays.items() if name in inputs or name not in LABEL_NAMES}
    if not arrays:
        names = ", ".join(map(repr, inputs))
        raise DataError(
            f"{source}: has no array for an input of the model, whose inputs are {names}; name it "
            "after its input"
        )
    whole = _kept_whole(arrays, specs)
    readings = {
        name: _reading(array, inputs.get(name), whole, source) for name, array in arrays.items()
    }
    count = _count(readings, source)
    each = 0 if whole else rows_of_a_sample(specs) or 1
    chosen = evenly(count // (each or 1), samples)
    starts = [index * (each or 1) for index in chosen]
    dataset = Dataset(
        source,
        _records(readings, starts, each),
        specs,
        samples,
        whole=whole,
        positions=chosen,
        source_samples=count // (each or 1),
    )
    left = count % (each or 1)
    if left:
        dataset.notes += (f"{left} rows at the end do not fill a batch of {each}",)
    return dataset


def _records(
    readings: Mapping[str, _Reading], starts: Sequence[int], each: int
) -> Iterator[Record]:
    feeds = {name: reading.feeds(starts, each) for name, reading in readings.items()}
    for _ in starts:
        yield {name: next(its) for name, its in feeds.items()}


def _kept_whole(arrays: Mapping[str, _Source], specs: Sequence[InputSpec]) -> bool:
    """Whether samples are fed whole, not cut along the inputs' first axes."""
    if rows_of_a_sample(specs) is None or any(spec.first == "other" for spec in specs):
        return True
    stacked = [
        spec.name in arrays and len(arrays[spec.name].shape) == len(spec.shape or ()) + 1
        for spec in specs
    ]
    return any(stacked) and any(spec.first == "unknown" for spec in specs)


def _reading(array: _Source, spec: InputSpec | None, whole: bool, source: str) -> _Reading:
    """Choose how an array is read, by its axes and those of the input."""
    shape = array.shape
    if spec is None or spec.shape is None:
        return _Reading(array, lacking=0)
    if len(shape) == len(spec.shape) + 1:
        return _Reading(array, rows=1 if whole else shape[1])
    if not whole or spec.first != "other" or len(shape) != len(spec.shape):
        return _Reading(array, lacking=0)
    if _fits(shape, spec.shape):
        return _Reading(array, same=True)
    # A batch of one that every sample lacks, wherever it is.
    for axis, size in enumerate(spec.shape):
        one = (*shape[1 : axis + 1], 1, *shape[axis + 1 :])
        if size in (None, 1) and _fits(one, spec.shape):
            return _Reading(array, lacking=axis)
    raise DataError(
        f"{source}: input {spec.name!r}: has shape {list(shape)}, the model wants {spec.shown} for "
        "each sample; put an axis of samples before it"
    )


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(
        size in (None, given) for given, size in zip(shape, wanted, strict=True)
    )


def _count(readings: Mapping[str, _Reading], source: str) -> int:
    """Number of rows, or of whole samples, which must be the same for all arrays."""
    varying = {name: reading for name, reading in readings.items() if not reading.same}
    if any(not reading.source.shape for reading in varying.values()):
        raise DataError(f"{source}: its arrays need a first axis of samples")
    counts = {reading.count for reading in varying.values()} or {1}
    if len(counts) > 1:
        sizes = ", ".join(f"{name!r}: {reading.count}" for name, reading in varying.items())
        raise DataError(
            f"{source}: inputs have different numbers of samples ({sizes}); give as many for each"
        )
    return counts.pop()


def evenly(count: int, samples: int | None) -> list[int]:
    """Indices of a given number of `count` samples, evenly spread."""
    if samples is None or samples >= count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, samples).round()]


def spread_over(indices: Sequence[int], count: int) -> list[int]:
    """Return `count` of the indices, or all if there are fewer: every n-th, from the first.

    Where there are fewer than twice as many they are evenly spread, so that not all of those left
    out are at the end.
    """
    step = len(indices) // count
    if step > 1:
        return list(indices[::step][:count])
    return [indices[place] for place in evenly(len(indices), count)]


def _shape(path: Path, archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    """Read the shape of an array in an .npz, and check it against the array's size."""
    with _as_member(path, member), archive.open(member) as file:
        shape, _, dtype = _read_header(file)
        if dtype.hasobject:
            raise DataError(
                f"{path}: {member!r} holds Python objects, which are not read; save numbers, "
                "or texts as an array of dtype str"
            )
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        if file.tell() + size != archive.getinfo(member).file_size:
            raise DataError(f"{path}: {member!r} is not as long as it says; save it again")
    return shape


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    with PARSER:
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)


def _skip(file: Any, count: int) -> None:
    while count > 0:
        count -= len(file.read(min(count, 1 << 20)))
