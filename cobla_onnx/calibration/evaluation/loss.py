"""Loss of each sample: how far a compressed model's outputs are from the original's.

Without labels the original's own outputs are the target. The `Measure` of each output says how
it is compared: by the divergence of class distributions, by the relative squared error of each
feature, or by both. The losses of several outputs are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import TINY, LossKind, Measure, as_measure
from cobla_onnx.calibration.evaluation.targets import counted_positions

__all__ = [
    "counting",
    "equal_infinities",
    "log_probabilities",
    "sample_losses",
    "squared_errors",
]

# Elements of an output that are compared at a time, in double precision.
AT_ONCE = 1 << 22
# Replaces minus infinity where both logits are: their difference must be 0 and not NaN.
LOW = -1e300


def sample_losses(
    measures: Mapping[str, LossKind | Measure],
    expected: Mapping[str, NDArray[Any]],
    actual: Mapping[str, NDArray[Any]],
) -> NDArray[np.float64]:
    """Loss of each sample, summed over outputs, shape (samples,).

    Parameters
    ----------
    measures : mapping of str to Measure
    expected : mapping of str to array
        Targets by the names of the outputs, and masks by the names of the inputs.
    actual : mapping of str to array

    An output that is not batched along its first axis counts as one sample. A compressed
    output that is not finite where the original's is has an infinite loss.
    """
    terms = []
    for name, given in measures.items():
        measure = as_measure(given)
        mask = None if measure.mask is None else expected[measure.mask]
        terms.append(_losses(measure, expected[name], actual[name], mask))
    size = min(len(term) for term in terms)
    parts: Sequence[NDArray[np.float64]] = [
        term if len(term) == size else np.full(size, term.mean()) for term in terms
    ]
    total: NDArray[np.float64] = np.sum(parts, axis=0)
    return np.where(np.isfinite(total), total, np.inf)


def _losses(
    measure: Measure, expected: NDArray[Any], actual: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[np.float64]:
    p, q = np.atleast_1d(expected), np.atleast_1d(actual)
    if p.shape != q.shape:
        return np.full(len(p), np.inf)
    power = 1.0
    if measure.scale is None and measure.kind == "mse":
        power = max(float(np.square(p, dtype=np.float64).mean()), TINY)
    step = max(1, AT_ONCE * len(p) // max(p.size, 1))
    found = []
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(p), step):
            rows = slice(start, start + step)
            counts = counting(measure, p[rows], None if mask is None else mask[rows])
            both = equal_infinities(p[rows], q[rows], LOW if measure.has_classes else 0.0)
            found.append(_positions_mean(_position_losses(measure, *both, power), counts))
    return np.concatenate(found) if found else np.zeros(0)


def counting(
    measure: Measure, target: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Return which positions count, by the labels and by the mask; None if all do.

    Parameters
    ----------
    measure : Measure
    target : array, shape (samples, ...)
    mask : array, shape (samples, length of the sequence), optional

    Returns
    -------
    bool array, or None
        In the shape of the positions, or of its first two axes.
    """
    counted = counted_positions(measure, target)
    if mask is None:
        return counted
    marked = mask.astype(bool)
    if counted is None:
        return marked
    return np.asarray(counted & marked.reshape(*marked.shape, *[1] * (counted.ndim - 2)))


def equal_infinities(
    expected: NDArray[Any], actual: NDArray[Any], instead: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two arrays in double precision, with common infinities replaced."""
    p, q = expected.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(p).all():
        same = np.isinf(p) & (p == q)
        p[same] = q[same] = instead
    return p, q


def squared_errors(
    measure: Measure, p: NDArray[np.float64], q: NDArray[np.float64], power: float = 1.0
) -> NDArray[np.float64]:
    """Scaled squared error of each position, in the shape of the output without `axis`."""
    squares = np.square(q - p)
    if measure.scale is None:
        # The mean over all axes but the first is taken later.
        return squares / power
    scale = np.array(measure.scale)
    if measure.axis is None:
        return np.asarray(squares * scale[0])
    return np.tensordot(squares, scale, axes=(measure.axis, 0))


def _position_losses(
    measure: Measure, p: NDArray[np.float64], q: NDArray[np.float64], power: float
) -> NDArray[np.float64]:
    """Loss of each position, shape (samples, positions...)."""
    if measure.kind == "mse":
        return squared_errors(measure, p, q, power)
    if measure.kind == "either":
        difference = q - p
        centred = difference - difference.mean(axis=1, keepdims=True)
        about = np.square(centred).sum(axis=1) / measure.spread
        return np.asarray(0.5 * (squared_errors(measure, p, q) + about))
    if measure.kind == "binary-logits":
        return np.logaddexp(0.0, q) - p * q
    if measure.kind == "binary-probabilities":
        q = np.clip(q, TINY, 1.0 - TINY)
        return -p * np.log(q) - (1.0 - p) * np.log(1.0 - q)
    axis = measure.axis
    assert axis is not None
    if measure.kind.startswith("ce"):
        # A class of probability 0 that is not the label costs nothing.
        log_q = np.maximum(
            log_probabilities(q, measure.of_logits, axis), np.where(p > 0, -np.inf, LOW)
        )
        return np.asarray(-(p * log_q).sum(axis=axis))
    log_p, log_q = (log_probabilities(v, measure.of_logits, axis) for v in (p, q))
    weight = np.exp(log_p)
    terms = np.multiply(weight, log_p - log_q, where=weight > 0, out=weight)
    return np.asarray(terms.sum(axis=axis))


def _positions_mean(
    losses: NDArray[np.float64], counts: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    """Mean over the positions that count, shape (samples,); 0 if none does."""
    if counts is not None:
        # A padded position may hold any value, even NaN.
        counts = np.broadcast_to(_widened(counts, losses.ndim), losses.shape)
        losses = np.where(counts, losses, 0.0)
    lines = losses.reshape(len(losses), -1)
    if counts is None:
        return np.asarray(lines.mean(axis=1))
    number = np.count_nonzero(counts.reshape(len(losses), -1), axis=1)
    return np.asarray(lines.sum(axis=1) / np.maximum(number, 1))


def _widened(counts: NDArray[np.bool_], rank: int) -> NDArray[np.bool_]:
    return counts.reshape(*counts.shape, *[1] * (rank - counts.ndim))


def log_probabilities(
    values: NDArray[np.float64], logits: bool, axis: int = 1
) -> NDArray[np.float64]:
    """Logarithms of class probabilities along an axis, from logits or from probabilities."""
    if not logits:
        return np.log(np.maximum(values, TINY))
    shifted = values - values.max(axis=axis, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return result
