"""Round two factors, the second one to what the rounded first one gives.

The first factor is rounded under the moment of the layer's inputs. Then the second one is fitted
again to its outputs by least squares, and rounded under their moment. In between the components
are rescaled: entries of one row of the second factor share one scale, so that its rounding loses
the least, for component k of norm b_k and energy m_k, where both are in proportion (by
Cauchy-Schwarz: the loss is proportional to sum b_k^2 / c_k^2 times sum m_k c_k^2, and least for
c_k^2 = b_k / sqrt m_k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from cobla_onnx.variants.coded_factors.form import CodedScheme
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.second_factor import (
    inputs_first_matrix,
    solve,
    split_moments,
    through,
)
from cobla_onnx.variants.low_rank.svd import Factorization, Float64
from cobla_onnx.variants.low_rank.weighted_svd import inputs_first
from cobla_onnx.variants.storage.coding import INTEGERS, Coded
from cobla_onnx.variants.storage.compensation import Compensation
from cobla_onnx.variants.storage.precision import HALF, in_half
from cobla_onnx.variants.storage.rounding import round_weight

__all__ = [
    "Alone",
    "FromInputs",
    "FromOutputs",
    "RoundedPair",
    "Target",
    "random_pair",
    "round_pair",
]


@dataclass(frozen=True)
class RoundedPair(LowRankWeight):
    """A layer's weight as the product of two factors in few bits; they stand as they are decoded.

    Attributes
    ----------
    scheme, factors, bias
        As those of `LowRankWeight`.
    first, second : Coded or None
        Rows of the first factor are components, those of the second are outputs with entries in
        the order (rank, offsets). None for half precision.
    """

    first: Coded | None
    second: Coded | None


class Target(Protocol):
    """What the factors are to reproduce.

    Attributes
    ----------
    own : Compensation or None
        For the second moment of what the first factor reads; None where every error counts alike.
    """

    @property
    def own(self) -> Compensation | None: ...  # noqa: D102

    def seen(self, group: int, left: Float64, right: Float64) -> tuple[Float64, Float64]:
        """Second moment of a first factor's outputs, and their product with the layer's outputs.

        Parameters
        ----------
        left : float64 array, shape (rows, rank)
        right : float64 array, shape (rank, columns)
            The second factor before it is fitted again.

        Returns
        -------
        products : float64 array, shape (rank, offsets, rank, offsets)
        cross : float64 array, shape (rank, offsets, outputs)
        """
        ...


class FromInputs:
    """The layer's outputs, by the second moment of its inputs.

    Parameters
    ----------
    scheme : Scheme
    weight : array, shape ``scheme.shape``
    second : float64 array, shape (groups, size, size)
    """

    def __init__(self, scheme: Scheme, weight: NDArray[Any], second: Float64) -> None:
        stack = inputs_first_matrix(scheme, weight)
        self._split, self._cross = split_moments(scheme, stack, second)

    @cached_property
    def own(self) -> Compensation:
        """For the moment of the first factor's inputs, summed over positions."""
        return Compensation(np.asarray(np.einsum("gajbj->gab", self._split)))

    @property
    def nbytes(self) -> int:
        """Bytes of the moments, and of `own`, which half precision does without."""
        groups, size = self._split.shape[:2]
        return self._split.nbytes + self._cross.nbytes + Compensation.size_of(groups, size)

    def seen(self, group: int, left: Float64, right: Float64) -> tuple[Float64, Float64]:
        """Follow the inputs through the first factor."""
        return through(self._split[group], self._cross[group], left)


class FromOutputs:
    """The layer's outputs, by their own second moment, where inputs are too wide for one.

    The first factor's outputs are what the second one reproduces the layer's outputs from best; the
    rounding of the first one is not made up for.

    Parameters
    ----------
    outputs : float64 array, shape (groups, outputs, outputs)
    importance : float64 array, shape (groups, outputs), optional
    """

    def __init__(self, outputs: Float64, importance: Float64 | None) -> None:
        self._outputs, self._importance = outputs, importance

    @property
    def own(self) -> None:
        """Not known."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the moment."""
        return self._outputs.nbytes

    def seen(self, group: int, left: Float64, right: Float64) -> tuple[Float64, Float64]:
        """Follow the outputs back through the second factor."""
        weighted = right if self._importance is None else right * self._importance[group]
        back = np.linalg.lstsq(weighted @ right.T, weighted, rcond=None)[0]
        products = back @ self._outputs[group] @ back.T
        return products[:, None, :, None], (products @ right)[:, None]


class Alone:
    """The weight itself, without data: all inputs alike and independent.

    Parameters
    ----------
    scheme : Scheme
    weight : array, shape ``scheme.shape``
    """

    def __init__(self, scheme: Scheme, weight: NDArray[Any]) -> None:
        self._stack, self._offsets = inputs_first_matrix(scheme, weight), scheme.offsets

    @property
    def own(self) -> None:
        """Every error counts alike."""
        return None

    def seen(self, group: int, left: Float64, right: Float64) -> tuple[Float64, Float64]:
        """Take the products of the first factor's columns with each other and with the matrix."""
        products = np.einsum("rs,jk->rjsk", left.T @ left, np.eye(self._offsets))
        cross = (left.T @ self._stack[group]).reshape(left.shape[1], -1, self._offsets)
        return products, cross.swapaxes(1, 2)


def round_pair(form: CodedScheme, factors: Factorization, target: Target) -> RoundedPair:
    """Round both factors to the form's bits.

    Parameters
    ----------
    form : CodedScheme
    factors : Factorization
        In the order of the scheme's matrix.
    target : Target
    """
    scheme, bits = form.scheme, form.bits
    if bits == HALF:
        return _in_half(scheme, factors)
    left, right = inputs_first(scheme, factors)
    first = round_weight(left.swapaxes(1, 2), target.own, bits)
    rescaled, moments, rows = [], [], []
    for group, decoded in enumerate(first.dense().astype(np.float64).swapaxes(1, 2)):
        scales, moment, its_rows = _fitted(*target.seen(group, decoded, right[group]))
        rescaled.append(scales)
        moments.append(moment)
        rows.append(its_rows)
    first = replace(first, scales=(first.scales * np.stack(rescaled)).astype(np.float32))
    second = round_weight(np.stack(rows), Compensation(np.stack(moments)), bits)
    return RoundedPair(scheme, _decoded(scheme, first, second), None, first, second)


def _in_half(scheme: Scheme, factors: Factorization) -> RoundedPair:
    left, right = (in_half(each).astype(np.float64) for each in (factors.left, factors.right))
    rounded = Factorization(left, factors.singular_values, right)
    return RoundedPair(scheme, rounded, None, None, None)


def random_pair(scheme: Scheme, rank: int, bits: int) -> RoundedPair:
    """Return factors of random content, which keep the size of numbers about as it is."""
    groups, rows, columns = scheme.matrix_shape()
    if not scheme.inputs_first:
        rows, columns = columns, rows
    generator = np.random.default_rng(0)
    count = 2 ** min(bits, 8)
    levels = INTEGERS if bits == 8 else np.arange(count, dtype=np.float32) - count / 2

    def numbers(outputs: int, size: int) -> Coded:
        codes = generator.integers(0, count, (groups, outputs, size), np.uint8)
        # Levels, which are as likely, have a standard deviation of count / sqrt(12). Scales that
        # are all the same would be stored as one.
        scales = generator.uniform(0.9, 1.1, (groups, outputs)) * math.sqrt(12 / size) / count
        return Coded(codes, levels, scales.astype(np.float32))

    first = numbers(rank, rows)
    second = numbers(columns // scheme.offsets, rank * scheme.offsets)
    factors = _decoded(scheme, first, second)
    if bits == HALF:
        return _in_half(scheme, factors)
    return RoundedPair(scheme, factors, None, first, second)


def _fitted(products: Float64, cross: Float64) -> tuple[Float64, Float64, Float64]:
    """Second factor by least squares, with its components in proportion.

    Returns
    -------
    scales : float64 array, shape (rank,)
        By which the first factor's columns are to be multiplied.
    moment : float64 array, shape (rank * offsets, rank * offsets)
    rows : float64 array, shape (outputs, rank * offsets)
    """
    rank, offsets, outputs = cross.shape
    right = _least_squares(products, cross)
    energies = np.einsum("rjrj->r", products)
    norms = np.sqrt(np.einsum("rjo,rjo->r", right, right))
    known = (energies > 0) & (norms > 0)
    scales = np.ones(rank)
    scales[known] = np.sqrt(norms[known] / np.sqrt(energies[known]))
    moment = products * scales[:, None, None, None] * scales[:, None]
    rows = (right / scales[:, None, None]).transpose(2, 0, 1)
    return scales, moment.reshape(rank * offsets, -1), rows.reshape(outputs, -1)


def _least_squares(products: Float64, cross: Float64) -> Float64:
    """Solve for the second factor, also where few bits left two columns of the first the same."""
    try:
        return solve(products, cross)
    except scipy.linalg.LinAlgError:
        rank, offsets, outputs = cross.shape
        flat = products.reshape(rank * offsets, -1)
        found = np.linalg.lstsq(flat, cross.reshape(-1, outputs), rcond=None)[0]
        return np.asarray(found).reshape(cross.shape)


def _decoded(scheme: Scheme, first: Coded, second: Coded) -> Factorization:
    """Factors as they are decoded, in the order of the scheme's matrix."""
    left, right = arranged(scheme, first.dense(), second.dense())
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=2)
    return Factorization(left.astype(np.float64), norms, right.astype(np.float64))


def arranged(
    scheme: Scheme, first: NDArray[Any], second: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Turn the rows of both factors, or of their codes, into the scheme's matrix factors.

    Parameters
    ----------
    first : array, shape (groups, rank, rows)
    second : array, shape (groups, outputs, rank * offsets)

    Returns
    -------
    left : array, shape (groups, rows, rank)
    right : array, shape (groups, rank, columns)
    """
    groups, outputs = second.shape[:2]
    rank = first.shape[1]
    left = first.swapaxes(1, 2)
    right = second.reshape(groups, outputs, rank, -1).swapaxes(1, 2).reshape(groups, rank, -1)
    return (left, right) if scheme.inputs_first else (right.swapaxes(1, 2), left.swapaxes(1, 2))
