"""How far a compressed model's outputs are from the original's, as one number a sample.

Without labels the original's own outputs are the target: the Kullback-Leibler divergence
between class distributions where an output is one (or logits), the relative mean squared
error elsewhere. Several outputs are summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.autodiff.losses import TINY, LossKind
from cobla_onnx.errors import DataError, UsageError

__all__ = ["LossKind", "LossName", "choose_kinds", "log_probabilities", "sample_losses"]

LossName: TypeAlias = Literal["auto", "kl", "mse", "ce"]


def choose_kinds(
    outputs: Mapping[str, NDArray[Any]], loss: LossName | Mapping[str, LossKind]
) -> dict[str, LossKind]:
    """Decide how each output of the model is compared.

    Parameters
    ----------
    outputs : mapping of str to array
        Outputs of the original on some samples.
    loss : {'auto', 'kl', 'mse', 'ce'} or mapping of str to str
        A mapping is the answer. ``auto`` takes a two-dimensional output (but for axes of
        length 1) as a distribution if its rows are one, as logits if they do not lie in
        [0, 1], and else as numbers. ``kl`` insists on classes along axis 1; ``ce`` too,
        with the original's most likely class as the label.

    Raises
    ------
    DataError
        If an output of the original is not finite, or no output is of floating type.
    UsageError
        If the loss needs classes and an output has none.
    """
    if not isinstance(loss, str):
        return dict(loss)
    kinds: dict[str, LossKind] = {}
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.size == 0:
            continue
        if not np.isfinite(value).all():
            raise DataError(
                f"output {name!r}: the original gives NaN or infinity on the calibration data; "
                "check the data's preprocessing"
            )
        kinds[name] = _kind(name, value, loss)
    if not kinds:
        raise DataError("the model has no output of floating type: calibration cannot measure it")
    return kinds


def _kind(name: str, value: NDArray[Any], loss: LossName) -> LossKind:
    has_classes = value.ndim >= 2 and value.shape[1] >= 2
    if loss == "mse":
        return "mse"
    if not has_classes:
        if loss == "auto":
            return "mse"
        raise UsageError(
            f"--loss {loss}: output {name!r} of shape {list(value.shape)} has no classes along "
            "axis 1; use --loss mse"
        )
    wide = value.astype(np.float64)
    unit = bool((wide >= -1e-6).all() and (wide <= 1 + 1e-6).all())
    normal = unit and bool(np.allclose(wide.sum(axis=1), 1.0, atol=1e-3))
    if loss == "ce":
        return "ce-probabilities" if normal else "ce-logits"
    if loss == "kl":
        return "probabilities" if normal else "logits"
    if int(np.prod(value.shape[2:])) != 1:
        return "mse"
    if normal:
        return "probabilities"
    return "mse" if unit else "logits"


def sample_losses(
    kinds: Mapping[str, LossKind],
    expected: Mapping[str, NDArray[Any]],
    actual: Mapping[str, NDArray[Any]],
) -> NDArray[np.float64]:
    """Loss of each sample, summed over outputs, shape (samples,).

    An output that is not batched along its first axis counts as one sample. A compressed
    output that is not finite has an infinite loss.
    """
    terms = [_losses(kind, expected[name], actual[name]) for name, kind in kinds.items()]
    size = min(len(term) for term in terms)
    parts: Sequence[NDArray[np.float64]] = [
        term if len(term) == size else np.full(size, term.mean()) for term in terms
    ]
    total: NDArray[np.float64] = np.sum(parts, axis=0)
    return np.where(np.isfinite(total), total, np.inf)


def _losses(kind: LossKind, expected: NDArray[Any], actual: NDArray[Any]) -> NDArray[np.float64]:
    p, q = np.atleast_1d(expected).astype(np.float64), np.atleast_1d(actual).astype(np.float64)
    if kind == "mse":
        p, q = p.reshape(len(p), -1), q.reshape(len(q), -1)
        power = float(np.square(p).mean())
        error: NDArray[np.float64] = np.square(p - q).mean(axis=1) / max(power, TINY)
        return error
    log_p, log_q = (log_probabilities(v, kind.endswith("logits")) for v in (p, q))
    weight = np.exp(log_p)
    if kind.startswith("ce"):
        weight = (weight == weight.max(axis=1, keepdims=True)).astype(np.float64)
        divergence = -weight * log_q
    else:
        divergence = weight * (log_p - log_q)
    per_sample: NDArray[np.float64] = divergence.sum(axis=1).reshape(len(p), -1).mean(axis=1)
    return per_sample


def log_probabilities(values: NDArray[np.float64], logits: bool) -> NDArray[np.float64]:
    """Logarithms of class probabilities along axis 1, from logits or from probabilities."""
    if not logits:
        return np.log(np.maximum(values, TINY))
    shifted = values - values.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
