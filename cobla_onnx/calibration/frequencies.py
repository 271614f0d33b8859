"""How often lookups read each row of their tables.

One-hot vectors with frequencies f have the second moment diag(f), so that these are all that the
errors of a table depend on: E||y - y'||^2 = sum_i f_i ||t_i - t_i'||^2. The moment itself, rows
by rows, is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.moments import Taps
from cobla_onnx.graph.operators.gather import LookupPatch
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.runtime.session import Feeds

__all__ = ["RowCounts", "count_rows"]


@dataclass(frozen=True)
class RowCounts:
    """Numbers of times that the rows of a table were read.

    Attributes
    ----------
    counts : float64 array, shape (rows,)
        Whole numbers.
    """

    counts: NDArray[np.float64]

    def plus(self, other: RowCounts) -> RowCounts:
        """Return the counts of both."""
        return RowCounts(self.counts + other.counts)

    def without(self, part: RowCounts) -> RowCounts:
        """Return the counts of what is not in `part`."""
        return RowCounts(self.counts - part.counts)

    def frequencies(self) -> NDArray[np.float64]:
        """Estimate the frequencies with which rows will be read; all are above 0.

        A constant is added to every count (Lidstone 1920), such that the rows that were not read
        get together the frequency that Good (1953, "The population frequencies of species", after
        Turing) estimates for all that was not seen: the share of what was read exactly once. At
        least one row counts as such, so that none is worthless. Where so much was read only once
        that no constant is large enough, all rows count alike, as they do without data.

        Returns
        -------
        float64 array, shape (rows,)
            With the sum 1.
        """
        size, total = len(self.counts), float(self.counts.sum())
        unread = int((self.counts == 0).sum())
        once = max(int((self.counts == 1).sum()), 1)
        # From unread * added / (total + size * added) = once / total.
        room = unread * total - size * once
        if unread and room <= 0:
            return np.full(size, 1.0 / size)
        added = once * total / room if unread else 0.0
        return np.asarray((self.counts + added) / (total + size * added))


def count_rows(
    model: onnx.ModelProto,
    patches: Sequence[LookupPatch],
    batches: Callable[[], Iterable[Feeds]],
) -> dict[LookupPatch, RowCounts]:
    """Count the rows that lookups read over all batches, in one pass.

    Only the part of the model that leads to the numbers of rows is run; where these are inputs of
    the model, nothing is.

    Parameters
    ----------
    batches : callable
        Returns a fresh iterator over the batches; not called without patches.
    """
    found = {patch: np.zeros(patch.size) for patch in patches}
    if not found:
        return {}
    names = [patch.data for patch in found]
    taps = Taps(prefix(model, names), names, 1)
    for feeds in batches():
        values = taps.run(feeds)
        for patch, counts in found.items():
            counts += np.bincount(patch.rows(values[patch.data]), minlength=patch.size)
    return {patch: RowCounts(counts) for patch, counts in found.items()}
