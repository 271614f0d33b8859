"""By what the errors of a tied weight count: the sum over its readings.

A reading whose vectors are rows of the stored matrix E (a lookup by rows of frequencies f, whose
moment is diag f; a product x E) has the squared error tr(dE^T P dE) with the moment P of its
vectors, and one whose vectors are columns (a product x E^T) has tr(dE Q dE^T). Each is taken
relative to the energy of its outputs, and the mean of both is what counts:

    J(dE) = sum_ij (p_i + q_j) dE_ij^2

in the bases of the eigenvectors of P and Q. Where outputs of the second kind have weights g_i in
the loss (`cobla_onnx.calibration.heads`), q_j becomes g_i q_j.

A sum of moments on different sides has no closed form as a truncated SVD: weighted low-rank
approximation (Srebro and Jaakkola 2003, "Weighted low-rank approximations") has none for weights
of a rank above 1. What has one is the weight of rank 1 with the same sums over rows and over
columns, (p_i + g_i mean q) (mean p + q_j) up to a factor: moments of the other side as if they were
multiples of the identity. All families use it; for low rank it is where the search for the least J
begins, see `tied_factors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.graph.operators.gather import LookupPatch
from cobla_onnx.graph.operators.product import Product
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.shrinkage import shrink
from cobla_onnx.variants.low_rank.svd import Float64

__all__ = ["Sides", "sides_of"]


@dataclass(frozen=True)
class Sides:
    """Moments of the readings of a tied weight.

    Attributes
    ----------
    rows : float64 array, shape (rows,) or (rows, rows)
        P; its diagonal, where lookups alone read rows.
    columns : float64 array, shape (columns, columns)
        Q.
    outputs : float64 array, shape (rows,), optional
        g, above 0 and with the mean 1; not with all of P.
    """

    rows: Float64
    columns: Float64
    outputs: Float64 | None = None

    @property
    def each_row(self) -> Float64:
        """Diagonal of P, shape (rows,)."""
        return self.rows if self.rows.ndim == 1 else np.diagonal(self.rows)

    def error(self, change: NDArray[Any]) -> float:
        """J of a change of the matrix; 1 for the matrix itself."""
        wide = change.astype(np.float64)
        left = self.rows[:, None] * wide if self.rows.ndim == 1 else self.rows @ wide
        return float(np.vdot(left, wide)) + _along_columns(wide, self.columns, self.outputs)

    @property
    def second(self) -> Float64:
        """Moment of what stands for all readings as one with inputs along columns, (1, c, c)."""
        others = float(self.each_row.mean())
        return (self.columns + others * np.eye(len(self.columns)))[None]

    @property
    def importance(self) -> Float64:
        """How much each row counts in that reading, shape (rows,)."""
        others = float(np.trace(self.columns)) / len(self.columns)
        total = float(self.each_row.mean()) + others
        if total <= 0:
            return np.ones(len(self.each_row))
        weights = 1.0 if self.outputs is None else self.outputs
        return np.asarray((self.each_row + weights * others) / total)


def sides_of(seen: Seen, layer: Layer, weight: NDArray[Any]) -> Sides:
    """Return the moments of a tied weight's readings, each drawn towards the one without data.

    Parameters
    ----------
    weight : array, shape ``layer.shape``
    """
    wide = weight.astype(np.float64, copy=False)
    count, width = weight.shape
    rows: Float64 = np.zeros(count)
    columns: Float64 = np.zeros((width, width))
    parts: list[tuple[Float64, float]] = []
    frequencies = seen.frequencies(layer)
    if frequencies is not None:
        energy = float(np.einsum("rw,rw->r", wide, wide) @ frequencies)
        parts.append((frequencies, energy))
    along = _products(seen, layer, by_rows=True)
    if along is not None:
        parts.append((along, float(np.vdot(along @ wide, wide))))
    across = _products(seen, layer, by_rows=False)
    energies = [energy for _, energy in parts if energy > 0]
    outputs = _outputs(seen, layer) if along is None else None
    of_columns = 0.0 if across is None else _along_columns(wide, across, outputs)
    share = len(energies) + (of_columns > 0)
    for moment, energy in parts:
        if energy <= 0:
            continue
        if moment.ndim > rows.ndim:
            rows = np.diag(rows)
        scaled = moment / (share * energy)
        rows = rows + (scaled if scaled.ndim == rows.ndim else np.diag(scaled))
    if across is not None and of_columns > 0:
        columns = across / (share * of_columns)
    return Sides(rows, columns, outputs)


def _along_columns(matrix: Float64, moment: Float64, outputs: Float64 | None) -> float:
    each = np.einsum("rc,rc->r", matrix @ moment, matrix)
    return float(each.sum() if outputs is None else each @ outputs)


def _outputs(seen: Seen, layer: Layer) -> Float64 | None:
    """Weights of the outputs of the only product with the transpose of the stored matrix."""
    found = [each for each in layer.readings if _is_product(each) and not _reads_rows(each)]
    return seen.importance.get(layer.name) if len(found) == 1 == len(found[0].uses) else None


def _products(seen: Seen, layer: Layer, *, by_rows: bool) -> Float64 | None:
    """Moment of the vectors of products that are rows of the stored matrix, or columns."""
    patches = [
        patch
        for use, patch in zip(layer.uses, seen.patches(layer), strict=True)
        if not isinstance(patch, LookupPatch) and _reads_rows(layer.reading(use)) == by_rows
    ]
    if not patches:
        return None
    moment = seen.moment_of(patches)
    return np.asarray(shrink(moment.second, moment.effective, moment.mean)[0][0])


def _is_product(reading: Layer) -> bool:
    return operator_of(reading).kind == Product.kind


def _reads_rows(reading: Layer) -> bool:
    """Whether a product multiplies its vectors with columns of the stored matrix."""
    return schemes_for(reading)[0].inputs_first != reading.transposed
