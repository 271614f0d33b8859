"""What outputs are compared with where classes are known: distributions in their shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import DataError

__all__ = ["binary_targets", "one_hot"]


def one_hot(output: NDArray[Any], labels: NDArray[np.int64] | None, axis: int = 1) -> NDArray[Any]:
    """Return a distribution over the classes, along an axis, in the shape of an output.

    Parameters
    ----------
    output : array, shape (rows, ...)
        With classes along `axis`.
    labels : int64 array, shape (rows, ...), optional
        One for each position, that is the output's shape without `axis`. The output's own
        most likely classes where there are none.

    Raises
    ------
    DataError
        If there are too few labels, or the output has fewer classes than they say.
    """
    result = np.zeros_like(output)
    if labels is None:
        np.put_along_axis(result, output.argmax(axis=axis, keepdims=True), 1, axis=axis)
        return result
    classes = output.shape[axis]
    positions = output.shape[:axis] + output.shape[axis + 1 :]
    if len(labels) != len(output) or labels.size * classes != output.size:
        raise DataError(
            f"--labels: have shape {list(labels.shape)} for an output of shape "
            f"{list(output.shape)}; give one for each position of the output"
        )
    if labels.max() >= classes:
        raise DataError(
            f"--labels: hold class {labels.max()}, the model has {classes}, counted from "
            "0; check which classes the model was trained on"
        )
    chosen = np.expand_dims(labels.reshape(positions), axis)
    np.put_along_axis(result, chosen, 1, axis=axis)
    return result


def binary_targets(output: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[Any]:
    """Return labels of 0 and 1 in the shape of an output with one probability for each row.

    Raises
    ------
    DataError
        If there are others, or too few.
    """
    if labels.size != output.size:
        raise DataError(
            f"--labels: have shape {list(labels.shape)} for an output of shape "
            f"{list(output.shape)}; give one for each row of the output"
        )
    if labels.max(initial=0) > 1:
        raise DataError(
            f"--labels: hold class {labels.max()}, but the output has one value for each row, "
            "which tells 0 from 1; give labels of 0 and 1"
        )
    return labels.reshape(output.shape).astype(output.dtype)
