"""Pass a unit's arrays and model to the worker that runs it, in this process or in another.

Arrays travel as bytes, or as a place in a file where they are mapped and the worker is on this
machine; what many units share, such as the model, as a file that each worker reads once.
Executors that the caller brings get bytes.
"""

from __future__ import annotations

import pickle
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Carried", "Shared"]

Value = TypeVar("Value")

# Values that are remembered: of other processes, and what was built from one's own.
KEPT_SHARED = 4
KEPT_BUILT = 2


class Carried:
    """An array on its way to a unit of work.

    Pickled, a mapped array of a pool on this machine becomes its place in the file.
    """

    def __init__(self, array: NDArray[Any], by_file: bool) -> None:
        self.array = array
        self._by_file = by_file

    def __getstate__(self) -> tuple[Any, ...]:
        array = self.array
        if (
            self._by_file
            and isinstance(array, np.memmap)
            and array.filename is not None
            and array.flags.c_contiguous
        ):
            return str(array.filename), array.dtype, array.offset, array.shape
        return (np.asarray(array),)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._by_file = False
        if len(state) == 1:
            (self.array,) = state
            return
        path, dtype, offset, shape = state
        flat = np.memmap(path, np.uint8, "r", offset, (int(np.prod(shape)) * dtype.itemsize,))
        self.array = flat.view(dtype).reshape(shape)


class _Memory:
    """The last few values by key, each made once though many threads ask for it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.RLock()
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            found = self._values.pop(key) if key in self._values else make()
            self._values[key] = found
            while len(self._values) > self._size:
                self._values.popitem(last=False)
            return found

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


_worker_memory = _Memory(KEPT_SHARED)


class Shared:
    """A value that many units need; a worker takes it once.

    Parameters
    ----------
    value : picklable object
    folder : path, optional
        Where workers of this machine find it. Without it, it travels with every unit.
    """

    def __init__(self, value: Any, folder: Path | None) -> None:
        self._token = uuid.uuid4().hex
        self._folder = folder
        self._held: tuple[Any] | None = (value,)
        self._packed: Path | bytes | None = None
        self._lock = threading.Lock()
        self._memory = _Memory(KEPT_BUILT)

    def value(self) -> Any:
        """Return the value."""
        if self._held is None:
            assert self._packed is not None
            packed = self._packed
            self._held = (self._memory.get(self._token, lambda: _unpack(packed)),)
        return self._held[0]

    def built(self, make: Callable[..., Value], *arguments: Any) -> Value:
        """Return ``make(value, *arguments)``, made once in each process while it is in use."""
        key = (self._token, make.__module__, make.__qualname__, *arguments)
        result: Value = self._memory.get(key, lambda: make(self.value(), *arguments))
        return result

    def rest(self) -> None:
        """Drop what was built from it in the process that shares it."""
        if self._memory is not _worker_memory:
            self._memory.clear()

    def __getstate__(self) -> tuple[str, Path | bytes]:
        with self._lock:
            if self._packed is None:
                assert self._held is not None
                data = pickle.dumps(self._held[0], protocol=5)
                if self._folder is None:
                    self._packed = data
                else:
                    path = self._folder / self._token
                    path.write_bytes(data)
                    self._packed = path
        return self._token, self._packed

    def __setstate__(self, state: tuple[str, Path | bytes]) -> None:
        self._token, self._packed = state
        self._folder, self._held = None, None
        self._lock, self._memory = threading.Lock(), _worker_memory


def _unpack(packed: Path | bytes) -> Any:
    # Not a file that anybody could bring: this run's own, or bytes from its own process.
    data = packed if isinstance(packed, bytes) else packed.read_bytes()
    return pickle.loads(data)  # noqa: S301
