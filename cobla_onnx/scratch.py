"""Unnamed temporary files of arrays, for what is too much for memory."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayFile", "Place", "array_bytes"]


class Place(NamedTuple):
    """Where in an `ArrayFile` an array is, and what it is."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class ArrayFile:
    """Arrays in a temporary file that goes when this object does, or is closed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
        self._finalizer = weakref.finalize(self, _close, self._file)

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self._file.seek(0, 2)

    def put(self, array: NDArray[Any]) -> Place:
        """Append an array."""
        place = Place(self.size, array.dtype, array.shape)
        self._file.write(array_bytes(array))
        return place

    def get(self, place: Place) -> NDArray[Any]:
        """Read an array."""
        self._file.seek(place.offset)
        count = int(np.prod(place.shape))
        return np.fromfile(self._file, place.dtype, count).reshape(place.shape)

    def clear(self) -> None:
        """Throw everything away."""
        self._file.truncate(0)

    def close(self) -> None:
        """Give the disk space back; happens by itself when nobody holds the file."""
        self._finalizer()


def array_bytes(array: NDArray[Any]) -> memoryview:
    """View an array of any type as the bytes that a file should get.

    Not `numpy.ndarray.tofile`, whose errors do not tell that the disk is full.
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _close(file: IO[bytes]) -> None:
    # On a full disk closing fails a second time, over what nobody wants any more.
    with contextlib.suppress(OSError):
        file.close()
