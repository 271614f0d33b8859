"""Second moments, on which output errors depend.

The output error of a layer y = W x depends on the data only by the second moment S = E[x x^T]:
E||(W - W') x||^2 = tr((W - W') S (W - W')^T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAME", "Joint", "Moment"]

# Samples whose moments differ by less than this, relative to their squares, are the same; and a
# difference of moments below this fraction of them is rounding.
SAME = 1e-12
# Entries of a matrix that are converted at a time.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Moment:
    """Second moment and mean of the vectors that a layer's weight is multiplied with.

    Attributes
    ----------
    second : float64 array, shape (groups, size, size)
        E[x x^T] over all positions of all samples, or the chosen ones.
    mean : float64 array, shape (groups, size)
        E[x].
    count : int
        Number of vectors.
    effective : float64 array, shape (groups,)
        Effective number of independent vectors, see `MomentSum.moment`; 0 if not known.
    share : float
        Chosen fraction of the positions.
    """

    second: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: int
    effective: NDArray[np.float64]
    share: float = 1.0

    def covariance(self, out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """E[(x - E x) (x - E x)^T], for layers whose bias absorbs the mean.

        Parameters
        ----------
        out : float64 array, optional
            Where it is put, which may be `second` itself.
        """
        result = np.empty_like(self.second) if out is None else out
        rows = max(1, BLOCK // max(self.mean.shape[1], 1))
        for group, mean in enumerate(self.mean):
            for at in range(0, len(mean), rows):
                part = slice(at, at + rows)
                squares = mean[part, None] * mean
                np.subtract(self.second[group, part], squares, out=result[group, part])
        return result

    def without(self, part: Moment) -> Moment:
        """Return the moment of the vectors that are not in `part`, by subtraction.

        It has the effective number of `part`: meant for halves, of which neither is special.
        """
        count = self.count - part.count
        if count <= 0:
            none = np.zeros_like(self.effective)
            return Moment(np.zeros_like(self.second), np.zeros_like(self.mean), 0, none)
        second = self.count * self.second
        second -= part.count * part.second
        second /= count
        mean = (self.count * self.mean - part.count * part.mean) / count
        seen = np.einsum("gii->g", second) > SAME * np.einsum("gii->g", self.second)
        second *= seen[:, None, None]
        return Moment(second, mean * seen[:, None], count, part.effective, self.share)


@dataclass(frozen=True)
class Joint:
    """Moments of inputs, and of wanted outputs with these inputs.

    Attributes
    ----------
    inputs : Moment
    cross : float64 array, shape (groups, outputs, size)
        E[y x^T].
    mean : float64 array, shape (groups, outputs)
        E[y].
    """

    inputs: Moment
    cross: NDArray[np.float64]
    mean: NDArray[np.float64]

    def covariance(self) -> NDArray[np.float64]:
        """E[(y - E y) (x - E x)^T], for layers whose bias absorbs the means."""
        return self.cross - self.mean[:, :, None] * self.inputs.mean[:, None, :]

    def squared_error(
        self,
        rows: NDArray[Any],
        bias: NDArray[Any] | None = None,
        importance: NDArray[np.float64] | None = None,
    ) -> float:
        """Return E||y - rows x - bias||^2 but for E||y||^2, which no map of the inputs changes.

        Parameters
        ----------
        rows : array, shape (groups, outputs, size)
        bias : array of groups * outputs entries, optional
        importance : float64 array, shape (groups * outputs,), optional
            Weight of the squared error of each output.
        """
        each = np.einsum("gos,gos->go", rows @ self.inputs.second - 2 * self.cross, rows)
        if bias is not None:
            shift = bias.reshape(self.mean.shape)
            reached = np.einsum("gos,gs->go", rows, self.inputs.mean)
            each = each + shift * (shift + 2 * (reached - self.mean))
        if importance is not None:
            each = each * importance.reshape(each.shape)
        return float(each.sum())
