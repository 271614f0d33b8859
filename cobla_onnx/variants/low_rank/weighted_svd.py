"""SVD weighted by a layer's inputs: it minimises the output error, not the weight error.

For a layer y = M^T x with second moment S = E[x x^T] the best M' of rank r minimises
E||(M - M')^T x||^2. It is the truncated SVD of S^(1/2) M, multiplied by S^(-1/2), and the sum of
the discarded squared singular values is the output error (Wang et al. 2024, SVD-LLM,
arXiv 2403.07378; for convolutions BALF 2025, arXiv 2509.25136). S^(-1/2) is not needed: with V
the leading right singular vectors of S^(1/2) M, which are the eigenvectors of M^T S M,
M' = M V V^T. The factors M V and V^T are as well conditioned as M is, whatever
the rank of S.

Where the second factor moves over several positions (``spatial``, ``input``), the layer is not
a single product with the matrix. The first factor then follows from the moment of its own
input, averaged over positions, and the second is the least-squares solution under the full
moment (Zhang et al. 2015, without further data).

For a layer whose vectors are too wide for S, the second moment of its outputs,
E[y y^T] = M^T S M, is enough if the second factor moves over a single position.

Where outputs are weighted, the error is that of D y with a diagonal D: M D is factorised in place
of M, and the second factor is divided by D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.curve import tails
from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.second_factor import (
    by_output,
    conditional_energies,
    explained_energy,
    inputs_first_matrix,
    solve,
    split_moments,
    through,
)
from cobla_onnx.variants.low_rank.svd import Factorization, Float64

__all__ = ["Components", "OutputFactorizer", "WeightedFactorizer", "balanced", "inputs_first"]


@dataclass(frozen=True)
class _Basis:
    """Right singular vectors of a weighted matrix, and its squared singular values.

    ``right`` has shape (columns, max_rank), its columns are orthonormal.
    """

    right: Float64
    energy: Float64


@dataclass(frozen=True)
class Components:
    """What each rank adds to a pair of factors, inputs first; arrays of shape (groups, ranks).

    Attributes
    ----------
    squares : float64 array
        Mean square of the entries of the first factor.
    strengths : float64 array
        Squared norm of the second factor, with the weights of the outputs.
    energies : float64 array
        Energy of the first factor's outputs, summed over positions, without what those of lower
        ranks tell of it.
    """

    squares: Float64
    strengths: Float64
    energies: Float64


class WeightedFactorizer:
    """Factorise one layer under one scheme, weighted by a second moment.

    Parameters
    ----------
    scheme : Scheme
    weight : array, shape ``scheme.shape``
    second : float64 array, shape (groups, size, size)
        Second moment (or covariance, where a bias absorbs the mean) of the layer's vectors.
        `shrinkage.shrink` makes it positive definite; a moment of zeros stands for the identity.
    max_rank : int
        Largest rank that will be asked for.
    importance : float64 array, shape (groups * outputs,), optional
        How much the squared error of each output counts; above 0.

    Attributes
    ----------
    energy : float
        E||y||^2, summed over groups, with the weights of the outputs.
    own : float64 array, shape (groups, rows, rows)
        Moment of the first factor's inputs, summed over the positions of the second one.
    singular_values : float64 array, shape (full_rank,)
        Of the weighted matrix, descending, combined over groups.
    """

    def __init__(
        self,
        scheme: Scheme,
        weight: NDArray[Any],
        second: Float64,
        max_rank: int,
        importance: Float64 | None = None,
    ) -> None:
        self.scheme = scheme
        self.max_rank = max_rank
        self._roots = _roots(importance, scheme.rows_of(weight))
        stack = inputs_first_matrix(scheme, _scaled(scheme, weight, self._roots))
        split, cross = split_moments(scheme, stack, second)
        self.energy = float(np.sum(by_output(scheme, stack) * cross))
        self.own: Float64 = np.einsum("gajbj->gab", split)
        self._bases = [_basis(*each, max_rank) for each in zip(stack, self.own, strict=True)]
        # Only the span of the first factor matters where the second is fitted to it.
        self._lefts = [
            stack[g] @ basis.right
            if scheme.offsets == 1
            else np.ascontiguousarray(np.linalg.qr(stack[g] @ basis.right)[0])
            for g, basis in enumerate(self._bases)
        ]
        # Where the second factor moves over one position, only the bases are needed below. Lower
        # ranks take leading blocks of these, which are far smaller than the moment.
        self._moments = (
            None
            if scheme.offsets == 1
            else [through(*each) for each in zip(split, cross, self._lefts, strict=True)]
        )
        total = sum(basis.energy for basis in self._bases)
        self.singular_values: Float64 = np.sqrt(np.asarray(total))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        arrays = (
            self.own,
            *self._lefts,
            *(basis.right for basis in self._bases),
            *(array for pair in self._moments or () for array in pair),
        )
        return sum(map(_held_bytes, arrays))

    def errors(self, ranks: NDArray[np.int64]) -> Float64:
        """E||y - y'||^2 at each of the given ranks, for the factors of `factorize`."""
        if self.scheme.offsets == 1:
            return tails(self.singular_values)[ranks]
        result = np.full(len(ranks), self.energy)
        for group in range(len(self._bases)):
            explained = explained_energy(*self._reduced(group, int(ranks.max(initial=0))))
            result -= np.concatenate([[0.0], explained])[ranks]
        return np.asarray(np.maximum(result, 0.0))

    def factorize(self, rank: int) -> Factorization:
        """Return the factors of the given rank in the order of the scheme's matrix."""
        pairs = []
        for group, basis in enumerate(self._bases):
            left, right = self._lefts[group][:, :rank], basis.right[:, :rank].T
            if self.scheme.offsets > 1:
                right = solve(*self._reduced(group, rank)).swapaxes(1, 2).reshape(rank, -1)
            if self._roots is not None:
                right = right / np.repeat(self._roots[group], self.scheme.offsets)
            pairs.append((left, right))
        return balanced(self.scheme, pairs)

    def components(self) -> Components:
        """Return what each rank adds, for ranks 1 to `max_rank`."""
        found = []
        for group, (left, basis) in enumerate(zip(self._lefts, self._bases, strict=True)):
            energies, strengths = basis.energy[: left.shape[1]], np.ones(left.shape[1])
            if self.scheme.offsets > 1:
                products, cross = self._reduced(group, left.shape[1])
                energies = conditional_energies(products)
                right = solve(products, cross)
                strengths = np.einsum("rjo,rjo->r", right, right)
            found.append((np.square(left).mean(axis=0), strengths, energies))
        return Components(*(np.stack(each) for each in zip(*found, strict=True)))

    def _reduced(self, group: int, rank: int) -> tuple[Float64, Float64]:
        """Second moment of the first factor's outputs, and their product with y."""
        assert self._moments is not None
        products, cross = self._moments[group]
        return products[:rank, :, :rank], cross[:rank]


class OutputFactorizer:
    """Factorise a layer by the second moment of its outputs; see `WeightedFactorizer`.

    For schemes whose second factor moves over one position. The size of the inputs does
    not matter, and the optimum is the same.

    Parameters
    ----------
    scheme : Scheme
    weight : array, shape ``scheme.shape``
    outputs : float64 array, shape (groups, outputs, outputs)
        Second moment, or covariance, of the layer's outputs without bias.
    max_rank : int
    importance : float64 array, shape (groups * outputs,), optional
        How much the squared error of each output counts; above 0.
    """

    def __init__(
        self,
        scheme: Scheme,
        weight: NDArray[Any],
        outputs: Float64,
        max_rank: int,
        importance: Float64 | None = None,
    ) -> None:
        assert scheme.offsets == 1
        self.scheme = scheme
        self.max_rank = max_rank
        self._roots = _roots(importance, scheme.rows_of(weight))
        self._rows = scheme.rows_of(_scaled(scheme, weight, self._roots))
        if self._roots is not None:
            outputs = outputs * self._roots[:, :, None] * self._roots[:, None, :]
        self.energy = float(np.einsum("gii->", outputs))
        found = [_descending(gram) for gram in outputs]
        self._vectors = [np.ascontiguousarray(vectors[:, :max_rank]) for _, vectors in found]
        size = min(scheme.matrix_shape()[1:])
        total = sum(np.maximum(energy[:size], 0.0) for energy, _ in found)
        self.singular_values: Float64 = np.sqrt(np.asarray(total))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(map(_held_bytes, (*self._rows, *self._vectors)))

    def errors(self, ranks: NDArray[np.int64]) -> Float64:
        """E||y - y'||^2 at each of the given ranks."""
        return tails(self.singular_values)[ranks]

    def factorize(self, rank: int) -> Factorization:
        """Return the factors of the given rank in the order of the scheme's matrix."""
        pairs = []
        for group, (rows, vectors) in enumerate(zip(self._rows, self._vectors, strict=True)):
            basis = vectors[:, :rank]
            right = basis.T if self._roots is None else basis.T / self._roots[group]
            pairs.append(((basis.T @ rows).T, right))
        return balanced(self.scheme, pairs)


def _held_bytes(array: NDArray[Any]) -> int:
    """Bytes that an array keeps in memory; for a view, those of its base array."""
    base = array.base
    return base.nbytes if isinstance(base, np.ndarray) else array.nbytes


def _roots(importance: Float64 | None, rows: NDArray[Any]) -> Float64 | None:
    """Weights of the outputs themselves, shape (groups, outputs); None where all are 1."""
    return None if importance is None else np.sqrt(importance).reshape(rows.shape[:2])


def _scaled(scheme: Scheme, weight: NDArray[Any], roots: Float64 | None) -> NDArray[Any]:
    """Weight of a layer with scaled outputs; not a copy where none is scaled."""
    return weight if roots is None else scheme.weight_of(scheme.rows_of(weight) * roots[:, :, None])


def balanced(scheme: Scheme, pairs: list[tuple[Float64, Float64]]) -> Factorization:
    """Stack inputs-first factors of all groups, evenly scaled, in the order of the scheme."""
    scaled = [_balance(left, right) for left, right in pairs]
    left = np.stack([entry[0] for entry in scaled])
    right = np.stack([entry[1] for entry in scaled])
    if not scheme.inputs_first:
        left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
    return Factorization(left, np.stack([entry[2] for entry in scaled]), right)


def inputs_first(scheme: Scheme, factors: Factorization) -> tuple[Float64, Float64]:
    """Return the factors in the order of the nodes: the inverse of what `balanced` does at last.

    Returns
    -------
    first : float64 array, shape (groups, inputs, rank)
    second : float64 array, shape (groups, rank, outputs)
    """
    if scheme.inputs_first:
        return factors.left, factors.right
    return factors.right.swapaxes(1, 2), factors.left.swapaxes(1, 2)


def _basis(matrix: Float64, moment: Float64, max_rank: int) -> _Basis:
    """Leading directions of a matrix under a moment, computed in the cheaper of two ways."""
    rows, columns = matrix.shape
    size = min(rows, columns)
    count = min(max_rank, size)
    if columns <= rows:
        energy, vectors = _descending(matrix.T @ moment @ matrix)
        return _Basis(np.ascontiguousarray(vectors[:, :count]), np.maximum(energy, 0.0))
    values, axes = np.linalg.eigh(moment)
    half = (axes * np.sqrt(np.maximum(values, 0.0))).T @ matrix
    energy, vectors = _descending(half @ half.T)
    # Singular vectors but for their lengths, the singular values. Where these are rounding
    # the columns are made orthogonal: any direction does, but none twice.
    right = np.linalg.qr(half.T @ vectors[:, :count])[0]
    return _Basis(np.ascontiguousarray(right), np.maximum(energy, 0.0))


def _descending(gram: Float64) -> tuple[Float64, Float64]:
    # numpy's, unlike scipy's, lets other Python threads run meanwhile.
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _balance(left: Float64, right: Float64) -> tuple[Float64, Float64, Float64]:
    """Balance the norms of each pair; make the largest entry of the left one positive."""
    sizes = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    scale = np.sqrt(np.divide(sizes[1], sizes[0], where=sizes[0] > 0, out=np.ones_like(sizes[0])))
    scale[scale <= 1e-12] = 1.0
    largest = np.argmax(np.abs(left), axis=0)
    signs = np.sign(left[largest, np.arange(left.shape[1])])
    scale *= np.where(signs == 0, 1.0, signs)
    return left * scale, right / scale[:, None], sizes[0] * sizes[1]
