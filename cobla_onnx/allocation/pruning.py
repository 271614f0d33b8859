"""Leave out candidates of a layer that another one beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation.problem import VariantCurve

__all__ = ["undominated"]

# Candidates that are compared with all others at a time.
AT_ONCE = 512


def undominated(curves: Sequence[VariantCurve]) -> list[NDArray[np.bool_]]:
    """Mark the candidates that no other of the layer beats, for each curve.

    One beats another if it costs no more of any resource and its error is no larger. Of those that
    are the same in all of this, the first stays. The loss of a network rises with the error of a
    layer, so that what is left out is never the best choice.

    Parameters
    ----------
    curves : sequence of VariantCurve
        Of one layer, with costs of the same resources.

    Returns
    -------
    list of bool arrays, each of shape (candidates,)
    """
    names = sorted(curves[0].costs)
    points = np.concatenate(
        [np.stack([c.errors[c.levels], *(c.costs[name] for name in names)]) for c in curves], axis=1
    )
    # In this order a candidate can only be beaten by one before it.
    order = np.lexsort(points[::-1])
    points = points[:, order]
    beaten = np.zeros(points.shape[1], bool)
    for begin in range(0, len(beaten), AT_ONCE):
        some = points[:, begin : begin + AT_ONCE]
        # Those that are beaten themselves beat none that is not beaten by another.
        before = np.flatnonzero(~beaten[: begin + some.shape[1]])
        no_worse = (points[:, before, None] <= some[:, None]).all(axis=0)
        earlier = before[:, None] < begin + np.arange(some.shape[1])
        beaten[begin : begin + some.shape[1]] = (no_worse & earlier).any(axis=0)
    kept = np.empty(len(beaten), bool)
    kept[order] = ~beaten
    return np.split(kept, np.cumsum([len(c.levels) for c in curves])[:-1])
