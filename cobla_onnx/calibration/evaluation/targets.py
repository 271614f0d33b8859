"""Target class distributions, in the shape of an output, from labels or from the output itself.

A position is an entry of an output without its class axis: a sample, a token, a frame, a
pixel. Labels are one integer for each position, or one-hot. Positions labelled `IGNORED` do not
count: their distribution is all zeros, and the target of a single probability is `NOTHING`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.errors import DataError
from cobla_onnx.wording import option_name

__all__ = ["IGNORED", "NOTHING", "binary_targets", "counted_positions", "one_hot"]

IGNORED = -100
"""Label of a position that does not count, by PyTorch's convention."""

NOTHING = -1
"""Target in place of 0 or 1, for a single probability that does not count."""


def one_hot(output: NDArray[Any], labels: NDArray[np.int64] | None, axis: int = 1) -> NDArray[Any]:
    """Return a distribution over the classes, along an axis, in the shape of an output.

    Parameters
    ----------
    output : array, shape (rows, ...)
        With classes along `axis`.
    labels : int64 array, optional
        One for each position, in the output's shape without `axis`, or one-hot in the output's
        shape; axes of length 1 do not matter, and longer ones may be padded with `IGNORED`.
        Without labels, the output's own most likely classes are used.

    Returns
    -------
    array
        Of the output's type; all zeros along `axis` where the label is `IGNORED`.

    Raises
    ------
    DataError
        If the labels have another shape, or the output has fewer classes than they say.
    """
    result = np.zeros_like(output)
    if labels is None:
        np.put_along_axis(result, output.argmax(axis=axis, keepdims=True), 1, axis=axis)
        return result
    classes = output.shape[axis]
    positions = output.shape[:axis] + output.shape[axis + 1 :]
    found = _at(labels, positions)
    if found is None:
        found = _from_one_hot(labels, output.shape, axis)
    if found is None:
        raise DataError(
            f"{option_name('labels')}: have shape {_shape(labels.shape)} for an output of shape "
            f"{_shape(output.shape)} with classes along axis {axis}; give class numbers of shape "
            f"{_shape(positions)}, {IGNORED} where a position does not count, or one-hot ones of "
            "the output's shape"
        )
    if found.max(initial=0) >= classes:
        raise DataError(
            f"{option_name('labels')}: hold class {found.max()}, the model has {classes}, counted "
            f"from 0; check which classes the model was trained on, and give {IGNORED} for what is "
            "none of them"
        )
    found = np.expand_dims(found, axis)
    counted = found != IGNORED
    np.put_along_axis(result, np.where(counted, found, 0), counted.astype(output.dtype), axis=axis)
    return result


def binary_targets(output: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[Any]:
    """Return labels of 0 and 1 in the shape of an output with one probability for each position.

    Returns
    -------
    array
        Of the output's type; `NOTHING` where the label is `IGNORED`.

    Raises
    ------
    DataError
        If there are other labels than 0 and 1, or the labels have another shape.
    """
    found = _at(labels, output.shape)
    if found is None:
        found = _from_one_hot(labels, (*output.shape, 2), output.ndim)
    if found is None:
        raise DataError(
            f"{option_name('labels')}: have shape {_shape(labels.shape)} for an output of shape "
            f"{_shape(output.shape)}; give one for each of its values, 0 or 1, or {IGNORED} where "
            "it does not count"
        )
    if found.max(initial=0) > 1:
        raise DataError(
            f"{option_name('labels')}: hold class {found.max()}, but the output has one value for "
            "each position, which tells 0 from 1; give labels of 0 and 1"
        )
    return np.where(found == IGNORED, NOTHING, found).astype(output.dtype)


def counted_positions(measure: Measure, target: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Return which positions have a label that counts; None if nothing is labelled.

    Parameters
    ----------
    measure : Measure
    target : array
        From `one_hot` or `binary_targets`.

    Returns
    -------
    bool array, or None
        In the target's shape without the class axis.
    """
    if not measure.labelled:
        return None
    if measure.axis is None:
        return np.asarray(target != NOTHING)
    return np.asarray(target.any(axis=measure.axis))


def _at(labels: NDArray[np.int64], positions: Sequence[int]) -> NDArray[np.int64] | None:
    """Labels in the shape of the positions, if they fit it, maybe filled up behind."""
    shape = tuple(positions)
    slim = tuple(size for size in shape if size != 1)
    for given, wanted in ((labels, shape), (labels.squeeze(), slim)):
        if given.ndim != len(wanted):
            continue
        inner = given[tuple(map(slice, wanted))]
        if inner.shape == wanted and _counting(inner) == _counting(given):
            return inner.reshape(shape)
    return None


def _from_one_hot(
    labels: NDArray[np.int64], shape: Sequence[int], axis: int
) -> NDArray[np.int64] | None:
    """Class numbers from one-hot labels, which have exactly one 1 and otherwise 0."""
    if labels.squeeze().shape != tuple(size for size in shape if size != 1):
        return None
    table = labels.reshape(tuple(shape))
    if not np.isin(table, (0, 1)).all() or not (table.sum(axis=axis) == 1).all():
        return None
    return np.asarray(table.argmax(axis=axis))


def _counting(labels: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(labels != IGNORED))


def _shape(shape: Sequence[int]) -> str:
    """Format a shape for messages, without the size of the batch axis."""
    return "[" + ", ".join(["n", *map(str, shape[1:])]) + "]"
