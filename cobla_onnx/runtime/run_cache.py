"""What a run keeps of its results for its own later steps, where no folder was given for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from numpy.typing import NDArray

from cobla_onnx.runtime.cache import Arrays, Cache
from cobla_onnx.runtime.recent import Recent

__all__ = ["RunCache"]

# Bytes in memory, and in a temporary file; what is large is read again without delay.
IN_MEMORY, ON_DISK = 1 << 26, 1 << 34


class RunCache(Cache):
    """Arrays by the content that they were computed from, until the run ends.

    What memory has no room for waits in a temporary file, and is dropped where that is full. It is
    for units of work in this process: what a copy in another one keeps, nobody finds.

    Parameters
    ----------
    kinds : collection of str
        What is worth keeping; all else is computed anew.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        self.hits = self.misses = 0
        self.notes = []
        self._kinds = kinds
        self._kept: Recent[tuple[str, str], Arrays] = Recent(
            IN_MEMORY, _size, last=False, on_disk=ON_DISK
        )

    def get(self, kind: str, key: str) -> Arrays | None:
        """Return the arrays of a key, or None where there are none."""
        found = self._kept.get((kind, key))
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, kind: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays under a key, if they are of a kind that is kept."""
        if kind in self._kinds:
            self._kept.put((kind, key), dict(arrays))


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
