"""Running sums of vectors, and the second moments derived from them.

For a layer y = W x the second moment S = E[x x^T] is all that its output error depends on:
E||(W - W') x||^2 = tr((W - W') S (W - W')^T).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Moment", "MomentSum"]

# Samples whose moments differ by less, relative to their squares, are the same.
SAME = 1e-12


@dataclass(frozen=True)
class Moment:
    """Second moment and mean of the vectors that a layer multiplies.

    Attributes
    ----------
    second : float64 array, shape (groups, size, size)
        E[x x^T] over all positions of all samples, or those that were chosen.
    mean : float64 array, shape (groups, size)
        E[x].
    count : int
        Vectors seen.
    effective : float64 array, shape (groups,)
        Independent vectors that they are worth, see `MomentSum.moment`; 0 where nothing tells.
    share : float
        Of the positions that were there.
    """

    second: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: int
    effective: NDArray[np.float64]
    share: float = 1.0

    def covariance(self) -> NDArray[np.float64]:
        """E[(x - E x) (x - E x)^T]: what matters where a bias can absorb the mean."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


class MomentSum:
    """Adds vectors up to a `Moment`.

    Parameters
    ----------
    groups, size : int
    parts : sequence of int64 array, optional
        Entries that are not 0 in vectors of each phase, none of them in two; of one group.
    """

    def __init__(
        self, groups: int, size: int, parts: Sequence[NDArray[np.int64]] | None = None
    ) -> None:
        self._parts = parts
        # What belongs to different parts has no products.
        self._blocks = (
            [np.zeros((size, size)) for _ in range(groups)]
            if parts is None
            else [np.zeros((len(part), len(part))) for part in parts]
        )
        self._total = np.zeros((groups, size))
        self._count = 0
        self._positions = 0.0
        # Over samples, the squares of what each adds: of its products, and of its number.
        self._spread = np.zeros(groups)
        self._samples, self._squares = 0, 0
        self._fourth = np.zeros(groups)

    def add(
        self,
        vectors: NDArray[Any],
        each: int = 1,
        share: float = 1.0,
        phases: NDArray[np.int64] | None = None,
    ) -> None:
        """Add vectors of shape (groups, size, positions).

        Parameters
        ----------
        each : int
            Vectors of a sample; those of one sample are not independent.
        share : float
            Of the vectors that there are.
        phases : int64 array, shape (positions,)
            Part to which each vector belongs, where there are parts.
        """
        samples = vectors.shape[2] // each
        starts = np.arange(0, vectors.shape[2], each)
        if self._parts is None:
            for group, block in enumerate(vectors):
                self._add(group, self._blocks[group], self._total[group], block, starts)
        else:
            assert phases is not None
            for number, rows in enumerate(self._parts):
                columns = np.flatnonzero(phases == number)
                total = np.zeros(len(rows))
                begins = np.searchsorted(columns, starts)
                self._add(0, self._blocks[number], total, vectors[0][np.ix_(rows, columns)], begins)
                self._total[0, rows] += total
        self._count += vectors.shape[2]
        self._positions += vectors.shape[2] / share
        self._samples += samples
        self._squares += samples * each**2

    def _add(
        self,
        group: int,
        second: NDArray[np.float64],
        total: NDArray[np.float64],
        block: NDArray[Any],
        starts: NDArray[np.int64],
    ) -> None:
        """Add vectors as columns to sums; those of each sample begin at one of `starts`."""
        # Contiguous double precision: numpy then uses the symmetric product.
        wide = np.ascontiguousarray(block, np.float64)
        second += wide @ wide.T
        total += wide.sum(axis=1)
        squares = np.einsum("sp,sp->p", wide, wide)
        self._fourth[group] += squares @ squares
        self._spread[group] += _spread(wide, squares, starts)

    def merge(self, other: MomentSum) -> None:
        """Add what another sum has added up."""
        for block, more in zip(self._blocks, other._blocks, strict=True):
            block += more
        self._total += other._total
        self._count += other._count
        self._positions += other._positions
        self._spread += other._spread
        self._samples += other._samples
        self._squares += other._squares
        self._fourth += other._fourth

    def _second(self) -> NDArray[np.float64]:
        """Sum of the products, shape (groups, size, size)."""
        if self._parts is None:
            return np.stack(self._blocks)
        size = self._total.shape[1]
        result = np.zeros((1, size, size))
        for rows, block in zip(self._parts, self._blocks, strict=True):
            result[0][np.ix_(rows, rows)] = block
        return result

    def moment(self) -> Moment:
        """Return the mean over what was added.

        How much the samples' own moments S_k differ tells the variance of S, their mean:
        sum ||S_k - S||^2 / (m (m - 1)) (Ledoit and Wolf 2004, Lemma 3.4, with samples in
        place of vectors). The mean over N independent normal vectors would have the variance
        (tr(S)^2 + ||S||^2 - 2 ||mean||^4) / N; the N with which it is the same is the number
        of vectors that the samples are worth. A single sample, or one that comes again and
        again, is judged by its positions, as if they were independent; a single vector is
        worth none, since nothing tells how much it says about others.
        """
        count = max(self._count, 1)
        second, mean = self._second() / count, self._total / count
        norms = np.einsum("gij,gij->g", second, second)
        traces = np.einsum("gii->g", second)
        normal = traces**2 + norms - 2 * np.einsum("gi,gi->g", mean, mean) ** 2
        sums = self._spread - self._squares * norms
        parts, repeated = self._samples, 1
        if parts < 2 or bool(np.all(sums <= SAME * self._spread)):
            parts, repeated = self._count, max(self._samples, 1)
            sums = self._fourth - self._count * norms
        if parts <= repeated or bool(np.all(sums <= SAME * self._fourth)):
            effective = np.zeros_like(norms)
        else:
            variance = np.maximum(sums, 0.0) * parts / (parts - 1) / count**2 * repeated
            # Never worth more than there are.
            least = np.maximum(normal * repeated / count, np.finfo(np.float64).tiny)
            effective = normal / np.maximum(variance, least)
        share = self._count / self._positions if self._positions else 1.0
        return Moment(second, mean, self._count, effective, share)


def _spread(
    wide: NDArray[np.float64], squares: NDArray[np.float64], starts: NDArray[np.int64]
) -> float:
    """Sum over samples of ||X X^T||^2, by the smaller of X X^T and X^T X."""
    if np.array_equal(starts, np.arange(wide.shape[1])):
        return float(squares @ squares)
    total = 0.0
    for start, end in itertools.pairwise([*starts.tolist(), wide.shape[1]]):
        part = np.ascontiguousarray(wide[:, start:end])
        gram = part @ part.T if len(part) < end - start else part.T @ part
        total += float(np.vdot(gram, gram))
    return total
