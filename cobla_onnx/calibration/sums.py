"""Running sums of vectors, from which second moments follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.moment import SAME, Joint, Moment
from cobla_onnx.runtime.lapack import add_gram

__all__ = ["JointSum", "MomentSum"]

# As `SAME`, where products are in single precision.
SAME_IN_SINGLE = 1e-6
# Largest numbers whose products, and sums of these, single precision holds.
SINGLE = 1e-15, 1e15
# Most numbers whose squares are added up in their own type, before sums are added in double.
ADDED = 1 << 16
# Adding a matrix of products to another takes about as long as the products of this many vectors.
ADDING = 100
# Rows of a matrix, of which the half above the diagonal is added or copied, at a time.
ROWS = 256


class MomentSum:
    """Accumulates vectors to a `Moment`.

    Parameters
    ----------
    groups, size : int
    parts : sequence of int64 array, optional
        Disjoint sets of the entries that are not 0 in vectors of each phase; for one group.
    exact : bool
        Whether products are taken in double precision; otherwise in single precision, chunk by
        chunk, and added in double precision, unless numbers are too large or too small for it.
    """

    def __init__(
        self,
        groups: int,
        size: int,
        parts: Sequence[NDArray[np.int64]] | None = None,
        exact: bool = True,
    ) -> None:
        self._parts, self._exact = parts, exact
        # Products between different parts are 0. What is below the diagonal has no meaning.
        self._blocks: NDArray[np.float64] | list[NDArray[np.float64]] = (
            np.zeros((groups, size, size))
            if parts is None
            else [np.zeros((len(part), len(part))) for part in parts]
        )
        self._total = np.zeros((groups, size))
        self._count = 0
        self._positions = 0.0
        # Sums over samples of squares: of the products that each adds, and of its number.
        self._spread = np.zeros(groups)
        self._samples, self._squares = 0, 0
        self._fourth = np.zeros(groups)
        # Whether any of these squares are of products in single precision.
        self._single = not exact

    def add(
        self,
        vectors: NDArray[Any],
        each: int = 1,
        share: float = 1.0,
        phases: NDArray[np.int64] | None = None,
        dtype: type[np.floating[Any]] | None = None,
    ) -> None:
        """Add vectors of shape (groups, size, positions).

        Parameters
        ----------
        each : int
            Vectors in a sample; those of one sample are not independent.
        share : float
            Chosen fraction of all vectors.
        phases : int64 array, shape (positions,)
            Part to which each vector belongs, if there are parts.
        dtype : type, optional
            In which products are taken; by default as `exact` and the numbers want it.
        """
        samples = vectors.shape[2] // each
        starts = np.arange(0, vectors.shape[2], each)
        if self._parts is None and len(vectors) > 1 and _apart(vectors.shape[1:], len(starts)):
            self._add_groups(vectors, each, dtype)
        elif self._parts is None:
            for group, block in enumerate(vectors):
                self._add(group, self._blocks[group], self._total[group], block, starts, dtype)
        else:
            assert phases is not None
            for number, rows in enumerate(self._parts):
                columns = np.flatnonzero(phases == number)
                total = np.zeros(len(rows))
                begins = np.searchsorted(columns, starts)
                block = vectors[0][np.ix_(rows, columns)]
                self._add(0, self._blocks[number], total, block, begins, dtype)
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
        dtype: type[np.floating[Any]] | None,
    ) -> None:
        """Add vectors as columns to sums; those of each sample begin at one of `starts`."""
        dtype = dtype or _type_of_products(block, self._exact)
        spans = list(itertools.pairwise([*starts.tolist(), block.shape[1]]))
        # The spread needs the products of each sample, and these add up to those of all.
        apart = _apart(block.shape, len(starts))
        for start, end in spans if apart else [(0, block.shape[1])]:
            factor = np.ascontiguousarray(block[:, start:end], dtype)
            own = apart or dtype is not np.float64
            products = np.zeros(second.shape, dtype) if own else second
            add_gram(products, factor)
            if own:
                _add_above(second, products)
            total += block[:, start:end].sum(axis=1, dtype=np.float64)
            squares = np.einsum("sp,sp->p", factor, factor).astype(np.float64)
            self._fourth[group] += squares @ squares
            if apart:
                diagonal = products.diagonal().astype(np.float64)
                self._spread[group] += 2 * _squared_norm(products) - diagonal @ diagonal
            else:
                # How much samples differ is needed to a few digits.
                its = factor
                if dtype is np.float64:
                    its = block.astype(_type_of_products(block, exact=False), copy=False)
                self._spread[group] += _spread(its, squares, spans)
                self._single |= its.dtype != np.float64

    def _add_groups(
        self, vectors: NDArray[Any], each: int, dtype: type[np.floating[Any]] | None
    ) -> None:
        """Add the same of all groups in one go: those of a depthwise layer are many and small."""
        assert isinstance(self._blocks, np.ndarray)
        dtype = dtype or _type_of_products(vectors, self._exact, axis=(1, 2))
        groups, size, _ = vectors.shape
        # (groups, samples, size, each)
        factors = np.moveaxis(vectors.reshape(groups, size, -1, each), 2, 1)
        factors = np.ascontiguousarray(factors, dtype)
        products = factors @ factors.swapaxes(2, 3)
        self._blocks += products.sum(axis=1, dtype=np.float64)
        self._total += vectors.sum(axis=2, dtype=np.float64)
        self._spread += np.einsum("gnij,gnij->g", products, products, dtype=np.float64)
        squares = np.einsum("gnsp,gnsp->gnp", factors, factors)
        self._fourth += np.einsum("gnp,gnp->g", squares, squares, dtype=np.float64)

    def merge(self, other: MomentSum) -> None:
        """Add another sum."""
        for block, more in zip(self._blocks, other._blocks, strict=True):
            block += more
        self._total += other._total
        self._count += other._count
        self._positions += other._positions
        self._spread += other._spread
        self._samples += other._samples
        self._squares += other._squares
        self._fourth += other._fourth
        self._single |= other._single

    def _second(self) -> NDArray[np.float64]:
        """Sum of the products, shape (groups, size, size)."""
        if isinstance(self._blocks, np.ndarray):
            _mirror(self._blocks)
            return self._blocks
        assert self._parts is not None
        size = self._total.shape[1]
        result = np.zeros((1, size, size))
        for rows, block in zip(self._parts, self._blocks, strict=True):
            _mirror(block[None])
            result[0][np.ix_(rows, rows)] = block
        return result

    def moment(self) -> Moment:
        """Return the mean over all added vectors.

        The variance of S follows from how much the samples' own moments S_k, of which it is
        the mean, differ: sum ||S_k - S||^2 / (m (m - 1)) (Ledoit and Wolf 2004, Lemma 3.4, with
        samples in place of vectors). The mean over N independent normal vectors would have the
        variance (tr(S)^2 + ||S||^2 - 2 ||mean||^4) / N; the N at which the two are equal is the
        effective number of vectors. For a single sample, or copies of one, the positions count
        as independent. For a single vector the number is 0, since nothing is known of others.
        """
        count = max(self._count, 1)
        second, mean = self._second() / count, self._total / count
        norms = np.einsum("gij,gij->g", second, second)
        traces = np.einsum("gii->g", second)
        normal = traces**2 + norms - 2 * np.einsum("gi,gi->g", mean, mean) ** 2
        sums = self._spread - self._squares * norms
        parts, repeated = self._samples, 1
        same = SAME_IN_SINGLE if self._single else SAME
        if parts < 2 or bool(np.all(sums <= same * self._spread)):
            parts, repeated = self._count, max(self._samples, 1)
            sums = self._fourth - self._count * norms
        if parts <= repeated or bool(np.all(sums <= same * self._fourth)):
            effective = np.zeros_like(norms)
        else:
            variance = np.maximum(sums, 0.0) * parts / (parts - 1) / count**2 * repeated
            # Never more than the actual number.
            least = np.maximum(normal * repeated / count, np.finfo(np.float64).tiny)
            effective = normal / np.maximum(variance, least)
        share = self._count / self._positions if self._positions else 1.0
        return Moment(second, mean, self._count, effective, share)


class JointSum:
    """Accumulates pairs of vectors to a `Joint`.

    The moment of the outputs with themselves is never made: regression does not need it, and of
    a layer with many outputs, such as one that ends in a vocabulary, it would be by far the
    largest part.

    Parameters
    ----------
    groups, size, outputs : int
    exact : bool
        As for `MomentSum`.
    """

    def __init__(self, groups: int, size: int, outputs: int, exact: bool = True) -> None:
        self._inputs = MomentSum(groups, size, exact=exact)
        self._exact = exact
        self._cross = np.zeros((groups, outputs, size))
        self._total = np.zeros((groups, outputs))

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        groups, _, size = self._cross.shape
        return self._cross.nbytes + 8 * groups * size**2

    def add(
        self,
        vectors: NDArray[Any],
        outputs: NDArray[Any],
        each: int = 1,
        share: float = 1.0,
    ) -> None:
        """Add vectors (groups, size, positions) and their outputs (groups, outputs, positions).

        `each` and `share` are those of `MomentSum.add`.
        """
        types = [_type_of_products(array, self._exact) for array in (outputs, vectors)]
        left, right = outputs.astype(types[0], copy=False), vectors.astype(types[1], copy=False)
        self._inputs.add(right, each, share, dtype=types[1])
        self._cross += left @ right.swapaxes(1, 2)
        self._total += outputs.sum(axis=2, dtype=np.float64)

    def merge(self, other: JointSum) -> None:
        """Add another sum."""
        self._inputs.merge(other._inputs)
        self._cross += other._cross
        self._total += other._total

    def joint(self) -> Joint:
        """Return the means over all added pairs."""
        inputs = self._inputs.moment()
        count = max(inputs.count, 1)
        return Joint(inputs, self._cross / count, self._total / count)


def _add_above(total: NDArray[np.float64], matrix: NDArray[Any]) -> None:
    """Add what is on and above the diagonal of a matrix, which is 0 below, to another."""
    for at in range(0, len(matrix), ROWS):
        total[at : at + ROWS, at:] += matrix[at : at + ROWS, at:]


def _mirror(matrices: NDArray[np.float64]) -> None:
    """Copy what is above the diagonal of square matrices to what is below."""
    for at in range(0, matrices.shape[2], ROWS):
        end = at + ROWS
        matrices[:, end:, at:end] = matrices[:, at:end, end:].swapaxes(1, 2)
        corners = matrices[:, at:end, at:end]
        below = np.tri(corners.shape[1], k=-1, dtype=bool)
        corners[:, below] = corners.swapaxes(1, 2)[:, below]


def _apart(shape: tuple[int, ...], samples: int) -> bool:
    """Whether products of vectors (size, positions) are taken of each sample by itself."""
    size, positions = shape
    return positions**2 >= ADDING * size * samples**2


def _type_of_products(
    array: NDArray[Any], exact: bool, axis: tuple[int, ...] | None = None
) -> type[np.floating[Any]]:
    """Return the type in which an array's products are taken; all others than `axis` are apart."""
    if exact:
        return np.float64
    # Half precision cannot hold the numbers that these are compared with.
    largest = np.maximum(array.max(axis, initial=0.0), -array.min(axis, initial=0.0), dtype=float)
    single = (largest == 0) | ((SINGLE[0] <= largest) & (largest <= SINGLE[1]))
    return np.float32 if np.all(single) else np.float64


def _squared_norm(gram: NDArray[Any]) -> float:
    """Sum of the squares of all entries of a Gram matrix, block by block.

    In single precision where it holds them: no entry is larger than the largest on the diagonal.
    """
    largest = float(gram.diagonal().max(initial=0.0))
    dtype = gram.dtype if SINGLE[0] <= largest <= SINGLE[1] else np.dtype(np.float64)
    rows = max(1, ADDED // max(gram.shape[1], 1))
    parts = (gram[at : at + rows].astype(dtype, copy=False) for at in range(0, len(gram), rows))
    return sum(float(np.vdot(part, part)) for part in parts)


def _spread(
    vectors: NDArray[Any], squares: NDArray[np.float64], spans: Sequence[tuple[int, int]]
) -> float:
    """Sum over samples of ||X X^T||^2, by the smaller of X X^T and X^T X."""
    if len(spans) == vectors.shape[1]:
        return float(squares @ squares)
    total = 0.0
    for start, end in spans:
        # The smaller product; the columns of a sample are a matrix as they lie there.
        part = vectors[:, start:end]
        gram = part @ part.T if len(part) < end - start else part.T @ part
        total += _squared_norm(gram)
    return total
