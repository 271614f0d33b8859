"""What a patch is: a way to read an operator's data as the vectors that its weight multiplies.

The order of a vector's entries is that of the weight's input side, so that the weight, one row
for each output, times a vector gives the outputs at one position. Vectors are ordered by sample
first: those of the first sample of a batch, then the next.

This is numpy over one batch and needs neither a session nor samples, so it stands with the
operators; which vectors are taken, and what is summed over them, is up to `calibration`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["DensePatch", "Patch", "ReadPatch", "cut"]

# Elements in a chunk of vectors, so that unfolding never multiplies the memory of a batch.
CHUNK = 1 << 22


class Patch(Protocol):
    """Vectors taken from a tensor, all of one length.

    Patches are frozen dataclasses: equal ones share their sums, and the cache hashes them.
    """

    @property
    def data(self) -> str:
        """Name of the tensor."""
        ...

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        ...

    @property
    def size(self) -> int:
        """Entries of a vector."""
        ...

    @property
    def parts(self) -> Sequence[NDArray[np.int64]] | None:
        """Disjoint sets of entries, one for each phase of a position; the others are 0 there.

        None where any entry of any vector may hold data. Only patches of one group have parts.
        """
        ...

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        ...

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of vectors, each of shape (groups, size, positions).

        Parameters
        ----------
        data : array
            A batch.
        chosen : int64 array, optional
            Indices of the vectors to extract, by default all.
        each : int
            The size of chunks is a multiple of this.
        """
        ...

    def phases(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64] | None:
        """Index in `parts` of each vector, shape (positions,); None without parts."""
        ...


@runtime_checkable
class ReadPatch(Patch, Protocol):
    """What an operator reads whose outputs are products of it, with these outputs."""

    def outputs(
        self, output: NDArray[Any], chosen: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """Outputs at the positions of the vectors, shape (groups, outputs, positions).

        Those of `chosen` alone, as in `Patch.vectors`, if given.
        """
        ...


class DensePatch:
    """Base of the patches of which any entry may hold data."""

    @property
    def parts(self) -> None:
        """No entries are known to be 0."""
        return None

    def phases(self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None) -> None:
        """All positions are alike."""


def cut(count: int, size: int, each: int) -> Iterator[slice]:
    """Split `count` vectors of some size into chunks of a multiple of `each` vectors."""
    step = max(1, CHUNK // max(size * each, 1)) * each
    for start in range(0, count, step):
        yield slice(start, start + step)
