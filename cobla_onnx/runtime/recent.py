"""Keep what was made last, within a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from cobla_onnx.runtime.temporary import ValueFile

__all__ = ["Recent"]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Results by key, the least recently used dropped first; for several threads.

    Parameters
    ----------
    limit : int
        Bytes.
    size : callable
        Bytes of a result.
    last : bool
        Whether the last one is held whatever its size.
    on_disk : int
        Bytes of a temporary file for those that are dropped, which are read again when asked for.
        The first ones stay there.
    """

    def __init__(
        self, limit: int, size: Callable[[Value], int], last: bool = True, on_disk: int = 0
    ) -> None:
        self._limit, self._size, self._least = limit, size, int(last)
        # With sizes, which may take a walk over arrays; the most recently used at the end.
        self._held: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._dropped: ValueFile[Key] | None = ValueFile(on_disk) if on_disk else None
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """Return a result if it is still held."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found[0]
            if self._dropped is None or key not in self._dropped:
                return None
            value: Value = self._dropped.get(key)
            self._hold(key, value)
            return value

    def once(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return a result that is held; make it, and hold it, if it is not."""
        found = self.get(key)
        return self.put(key, make()) if found is None else found

    def put(self, key: Key, value: Value) -> Value:
        """Hold a result, in place of an earlier one of the same key; return it."""
        with self._lock:
            if self._dropped is not None:
                self._dropped.forget(key)
            self._hold(key, value)
        return value

    def _hold(self, key: Key, value: Value) -> None:
        self._held.pop(key, None)
        self._held[key] = value, self._size(value)
        held = sum(size for _, size in self._held.values())
        while held > self._limit and len(self._held) > self._least:
            other, (dropped, size) = self._held.popitem(last=False)
            held -= size
            if self._dropped is not None:
                self._dropped.put(other, dropped)
