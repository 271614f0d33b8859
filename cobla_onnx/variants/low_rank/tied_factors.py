"""Low rank of a tied weight: the least sum of the errors of its readings, as far as it is found.

J(E - A B) of `tied_moments` is a weighted low-rank approximation with the weights p_i + q_j. For a
given B the best A is known, and for a given A the best B: with the rows of B orthonormal, turned so
that B Q B^T is diagonal with entries l_k, each row of A has a diagonal system, p_i + l_k. One step
of each after the closed form for weights of rank 1 leaves about 1 % to what further ones gain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.svd import Factorization, Float64
from cobla_onnx.variants.low_rank.tied_moments import Sides
from cobla_onnx.variants.low_rank.weighted_svd import Components, WeightedFactorizer, balanced

__all__ = ["TiedFactorizer"]


class TiedFactorizer:
    """Factorise a tied weight, as `WeightedFactorizer` does other layers.

    Parameters
    ----------
    scheme : Scheme
    weight : array, shape (rows, columns)
    sides : Sides
    max_rank : int
        Largest rank that will be asked for.

    Attributes
    ----------
    energy : float
        J of the whole weight.
    own, singular_values
        Those of the weights of rank 1.
    """

    def __init__(self, scheme: Scheme, weight: NDArray[Any], sides: Sides, max_rank: int) -> None:
        self.scheme, self.max_rank = scheme, max_rank
        self._begin = WeightedFactorizer(scheme, weight, sides.second, max_rank, sides.importance)
        self.own = self._begin.own
        self.singular_values = self._begin.singular_values
        turned = weight.astype(np.float64)
        self._p, self._left = sides.rows, None
        # p + g q = g (p / g + q): weights of outputs are taken into the rows.
        self._roots = None if sides.outputs is None else np.sqrt(sides.outputs)[:, None]
        if self._roots is not None:
            turned = turned * self._roots
            self._p = self._p / self._roots[:, 0] ** 2
        if sides.rows.ndim == 2:
            self._p, self._left = np.linalg.eigh(sides.rows)
            turned = self._left.T @ turned
        self._q, self._right = np.linalg.eigh(sides.columns)
        self._p, self._q = np.maximum(self._p, 0.0), np.maximum(self._q, 0.0)
        turned = turned @ self._right
        # The matrix times the weights of its entries.
        self._target: Float64 = turned * self._p[:, None] + turned * self._q
        self.energy = float(np.vdot(turned, self._target))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        held = (self._target, self._right, *(() if self._left is None else (self._left,)))
        return self._begin.nbytes + sum(int(array.nbytes) for array in held)

    def components(self) -> Components:
        """Return what each rank adds, for the weights of rank 1."""
        return self._begin.components()

    def errors(self, ranks: NDArray[np.int64]) -> Float64:
        """J at each of the given ranks, for the factors of `factorize`."""
        found = [self._fitted(int(rank))[2] if rank else 0.0 for rank in ranks]
        return np.maximum(self.energy - np.array(found), 0.0)

    def factorize(self, rank: int) -> Factorization:
        """Return the factors of the given rank in the order of the scheme's matrix."""
        left, right, _ = self._fitted(rank)
        if self._left is not None:
            left = self._left @ left
        if self._roots is not None:
            left = left / self._roots
        return balanced(self.scheme, [(self._right @ right, left.T)])

    def _fitted(self, rank: int) -> tuple[Float64, Float64, float]:
        """Return A and B^T in the bases of the moments, and the part of J that they explain."""
        begin = (self._begin.factorize(rank).right[0] @ self._right).T
        _, left, _ = _other_side(begin, self._q, self._p, self._target.T)
        return _other_side(left, self._p, self._q, self._target)


def _other_side(
    given: Float64, along: Float64, across: Float64, target: Float64
) -> tuple[Float64, Float64, float]:
    """Solve for the factor on the other side of a given one, whose span alone matters.

    Parameters
    ----------
    given : float64 array, shape (n, rank)
    along, across : float64 arrays, shapes (n,) and (m,)
        Entry (i, j) of the matrix has the weight ``along[i] + across[j]``.
    target : float64 array, shape (n, m)
        The matrix times its weights.

    Returns
    -------
    basis : float64 array, shape (n, rank)
        Of the same span.
    other : float64 array, shape (m, rank)
    explained : float
        The weighted energy of the matrix without that of what is left of it.
    """
    basis = np.linalg.qr(given)[0]
    levels, axes = np.linalg.eigh((basis * along[:, None]).T @ basis)
    basis = basis @ axes
    weights = np.maximum(across[:, None] + levels, np.finfo(np.float64).tiny)
    products = target.T @ basis
    other = products / weights
    return basis, other, float(np.vdot(products, other))
