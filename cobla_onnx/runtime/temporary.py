"""Temporary folders, and temporary files for arrays that are too large for memory."""

from __future__ import annotations

import contextlib
import mmap
import pickle
import shutil
import tempfile
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.processes import interrupts_wait
from cobla_onnx.text import quoted

__all__ = [
    "ArrayFile",
    "Place",
    "Rows",
    "Shelf",
    "SpareFiles",
    "ValueFile",
    "array_bytes",
    "owned",
    "temporary_folder",
]

Key = TypeVar("Key")

# Bytes on a shelf that stay in memory.
AT_HAND = 1 << 24
# Bytes from which on it takes less time to map an array than to read it, and multiples of bytes at
# which such arrays begin.
MAPPED, ALIGNMENT = 1 << 16, 64


class Place(NamedTuple):
    """Where in an `ArrayFile` an array is, and what it is."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class SpareFiles:
    """Temporary files of arrays that nobody wants any more, for others to write over.

    Pages that a file has already are written several times faster than new ones.
    """

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        weakref.finalize(self, _close_all, self._files)

    def take(self) -> IO[bytes]:
        """Return one of them, or a new one."""
        # SIM115: closed with the object that it is given to, or with this one.
        return self._files.pop() if self._files else tempfile.TemporaryFile()

    def give_back(self, file: IO[bytes]) -> None:
        """Keep a file for others."""
        self._files.append(file)


class ArrayFile:
    """Arrays in a temporary file, removed with this object or when it is closed.

    Parameters
    ----------
    spare : SpareFiles, optional
        Where the file comes from, and goes back to when neither it nor one of its views is used.
    """

    def __init__(self, spare: SpareFiles | None = None) -> None:
        self._file = tempfile.TemporaryFile() if spare is None else spare.take()  # noqa: SIM115
        release = _close if spare is None else spare.give_back
        self._finalizer = weakref.finalize(self, release, self._file)
        # Several threads may read; there is one place in the file for all of them.
        self._lock = threading.Lock()
        self._end, self._flushed = 0, 0

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self._end

    def put(self, array: NDArray[Any]) -> Place:
        """Append an array."""
        with self._lock:
            step = ALIGNMENT if array.nbytes >= MAPPED else 1
            place = Place(-(-self._end // step) * step, array.dtype, array.shape)
            self._file.seek(place.offset)
            self._file.write(array_bytes(array))
            self._end = place.offset + array.nbytes
        return place

    def get(self, place: Place) -> NDArray[Any]:
        """Read an array."""
        count = int(np.prod(place.shape))
        with self._lock:
            self._file.seek(place.offset)
            return np.fromfile(self._file, place.dtype, count).reshape(place.shape)

    def view(self, place: Place) -> NDArray[Any]:
        """Return an array that is read from the file as it is looked at, and cannot be changed.

        A large one alone, which is then not copied.
        """
        nbytes = int(np.prod(place.shape)) * place.dtype.itemsize
        if nbytes < MAPPED:
            return self.get(place)
        with self._lock:
            if self._flushed < self._end:
                self._file.flush()
                self._flushed = self._end
        begin = place.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = place.offset - begin
        pages = mmap.mmap(
            self._file.fileno(), skipped + nbytes, access=mmap.ACCESS_READ, offset=begin
        )
        array = np.frombuffer(pages, np.uint8, nbytes, skipped)
        return np.asarray(_View(self, array.view(place.dtype).reshape(place.shape)))

    def clear(self) -> None:
        """Drop all batches."""
        self._file.truncate(0)
        self._end, self._flushed = 0, 0

    def close(self) -> None:
        """Free the disk space; this happens by itself when the file is no longer used."""
        self._finalizer()


class ValueFile(Generic[Key]):
    """Values by key in a temporary file, for what can be made again if it is not there.

    Parameters
    ----------
    limit : int
        Most bytes of the file.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._file: IO[bytes] | None = None
        self._places: dict[Key, int] = {}
        self._end = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def put(self, key: Key, value: Any) -> None:
        """Append a value, if its key is new and there is room; a full disk takes none."""
        if key in self._places or self._end >= self._limit:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, _close, self._file)
        try:
            self._file.seek(self._end)
            pickle.dump(value, self._file, pickle.HIGHEST_PROTOCOL)
            self._file.flush()
        except OSError:
            # What could not be written would be tried again by every later step.
            _close(self._file)
            self._places, self._limit = {}, 0
        else:
            self._places[key], self._end = self._end, self._file.tell()

    def get(self, key: Key) -> Any:
        """Read a value."""
        assert self._file is not None
        self._file.seek(self._places[key])
        # S301: written by this process, into a file without a name.
        return pickle.load(self._file)  # noqa: S301

    def forget(self, key: Key) -> None:
        """Let another value take its key."""
        self._places.pop(key, None)


class _View:
    """An array of a file, which keeps the file from being written over."""

    def __init__(self, file: ArrayFile, array: NDArray[Any]) -> None:
        self._kept = file, array
        self.__array_interface__ = array.__array_interface__


class _Batches(Sequence["dict[str, NDArray[Any]]"]):
    """Batches by their places; several of them are a list."""

    @overload
    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, NDArray[Any]]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> dict[str, NDArray[Any]] | list[dict[str, NDArray[Any]]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._at(range(len(self))[index])

    @abstractmethod
    def _at(self, place: int) -> dict[str, NDArray[Any]]:
        """Return the batch at a place from 0 on."""


class Shelf(_Batches):
    """Batches of arrays by name, the first few in memory, the others in a temporary file.

    Several threads may read it.
    """

    def __init__(self, batches: Iterable[Mapping[str, NDArray[Any]]] = ()) -> None:
        self._file: ArrayFile | None = None
        self._room = AT_HAND
        self._held: list[dict[str, NDArray[Any] | Place]] = []
        for batch in batches:
            self.append(batch)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has its own file.
        return Shelf, (list(self),)

    def append(self, batch: Mapping[str, NDArray[Any]]) -> None:
        """Put a batch at the end."""
        self._room -= sum(array.nbytes for array in batch.values())
        numbers = all(array.dtype.kind in "biuf" for array in batch.values())
        if self._room >= 0 or not numbers:
            self._held.append(owned(batch))
            return
        file = self._file = self._file or ArrayFile()
        self._held.append({name: file.put(array) for name, array in batch.items()})

    def __len__(self) -> int:
        return len(self._held)

    def _at(self, place: int) -> dict[str, NDArray[Any]]:
        return {name: self._read(entry) for name, entry in self._held[place].items()}

    def _read(self, entry: NDArray[Any] | Place) -> NDArray[Any]:
        if not isinstance(entry, Place):
            return entry
        assert self._file is not None
        return self._file.get(entry)


class Rows(_Batches):
    """Numbers by name, a row of one shape for each sample, in temporary files.

    Some rows are read at a time, wherever they are. Several threads may.
    """

    def __init__(self, batches: Iterable[Mapping[str, NDArray[Any]]] = ()) -> None:
        self._columns: dict[str, _Column] = {}
        for batch in batches:
            self.append(batch)

    def append(self, batch: Mapping[str, NDArray[Any]]) -> None:
        """Put rows at the end.

        Raises
        ------
        ModelError
            If they are of another shape or type than those before.
        """
        for name, array in batch.items():
            if name not in self._columns:
                self._columns[name] = _Column(array.dtype, array.shape[1:])
            column = self._columns[name]
            if (array.dtype, array.shape[1:]) != (column.dtype, column.shape):
                raise ModelError(
                    f"tensor {quoted(name)} is {column.dtype} {column.shape} for some samples and "
                    f"{array.dtype} {array.shape[1:]} for others"
                )
            column.append(array)

    def take(self, chosen: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Copy some rows."""
        return {name: column.take(chosen) for name, column in self._columns.items()}

    def __len__(self) -> int:
        return next((column.count for column in self._columns.values()), 0)

    def _at(self, place: int) -> dict[str, NDArray[Any]]:
        return self.take([place])


class _Column:
    """Rows of one shape and type in a temporary file."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.count = dtype, shape, 0
        # Unbuffered: a row is read where it is wanted. Not mapped: what has been looked at would
        # count as memory of this process.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, _close, self._file)
        self._lock = threading.Lock()

    def append(self, array: NDArray[Any]) -> None:
        rest = array_bytes(array)
        with self._lock:
            self._file.seek(self.count * (len(rest) // max(1, len(array))))
            while rest:
                rest = rest[self._file.write(rest) :]
            self.count += len(array)

    def take(self, chosen: Sequence[int]) -> NDArray[Any]:
        found = np.empty((len(chosen), *self.shape), self.dtype)
        if not found.nbytes:
            return found
        rows = found.reshape(len(chosen), -1).view(np.uint8)
        with self._lock:
            for row, place in zip(rows, chosen, strict=True):
                self._file.seek(place * row.nbytes)
                self._file.readinto(row.data)
        return found


def owned(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy arrays whose memory belongs to something else; other values stay.

    To be kept: one output of a run keeps all that its session has allocated for runs.
    """
    return {
        name: value.copy() if isinstance(value, np.ndarray) and value.base is not None else value
        for name, value in values.items()
    }


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Make a folder that is removed when the block is left.

    Ctrl-C waits while it is made or removed: `tempfile.TemporaryDirectory`, interrupted while
    it removes its files, leaves them.

    Parameters
    ----------
    purpose : str
        A word for its name, so that users know whose it is.
    """
    folder: Path | None = None
    try:
        with interrupts_wait():
            folder = Path(tempfile.mkdtemp(prefix=f"cobla-onnx-{purpose}-"))
        yield folder
    finally:
        with interrupts_wait():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def array_bytes(array: NDArray[Any]) -> memoryview:
    """View an array of any type as the bytes that a file should get.

    Not `numpy.ndarray.tofile`, whose errors do not tell that the disk is full.
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _close(file: IO[bytes]) -> None:
    # On a full disk closing fails a second time, over what nobody wants any more.
    with contextlib.suppress(OSError):
        file.close()


def _close_all(files: Iterable[IO[bytes]]) -> None:
    for file in files:
        _close(file)
