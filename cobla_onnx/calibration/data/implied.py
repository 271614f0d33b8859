"""Inputs of a decoder that follow from its token ids: the empty past, the mask, the positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.data.fitting import InputSpec
from cobla_onnx.text import quoted

__all__ = ["implied", "tell_implied"]

PAST = ("past", "cache")


def implied(record: Mapping[str, Any], specs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    """Return arrays for the inputs that a record lacks, at the first step of a decoder.

    Who collects what a decoder sees has the token ids. At the first step its past is empty, of
    length 0 along the one axis of each of its tensors that is open beside the first; every token
    counts, so a mask is of ones; and positions are counted from 0.

    Parameters
    ----------
    record : mapping
        Arrays by input name.
    specs : sequence of InputSpec
        Of all inputs of the model.

    Returns
    -------
    dict of str to array
        Empty if the record lacks nothing, the model has no past, or anything that is lacking
        does not follow.
    """
    missing = [spec for spec in specs if spec.name not in record]
    ids = [spec for spec in specs if spec.name in record and _is_of_tokens(spec, "ids")]
    if len(ids) != 1 or not any(map(_is_past, missing)):
        return {}
    tokens = np.atleast_2d(np.asarray(record[ids[0].name])).shape
    found = {spec.name: _first_step(spec, tokens) for spec in missing}
    arrays = {name: array for name, array in found.items() if array is not None}
    return arrays if len(arrays) == len(found) else {}


def _is_of_tokens(spec: InputSpec, word: str) -> bool:
    """Whether an input has a number for each token, by its axes and a word in its name."""
    return word in spec.name.lower() and spec.shape is not None and len(spec.shape) == 2


def _is_past(spec: InputSpec) -> bool:
    return any(word in spec.name.lower() for word in PAST)


def _first_step(spec: InputSpec, tokens: tuple[int, ...]) -> NDArray[Any] | None:
    """Make an input for token ids of a shape (rows, length); None if it is of no known kind."""
    if _is_past(spec):
        return _empty(spec, tokens[0])
    if _is_of_tokens(spec, "mask"):
        return np.ones(tokens, spec.dtype)
    if _is_of_tokens(spec, "position") and spec.dtype.kind in "iu":
        return np.broadcast_to(np.arange(tokens[1], dtype=spec.dtype), tokens)
    return None


def _empty(spec: InputSpec, rows: int) -> NDArray[Any] | None:
    """Make a past of length 0; None unless a single axis can be that of time."""
    if not spec.filled or spec.first == "other":
        return None
    first, *rest = spec.filled
    if rest.count(None) + rest.count(0) != 1:
        return None
    return np.zeros((rows if first is None else first, *(size or 0 for size in rest)), spec.dtype)


def tell_implied(names: Sequence[str]) -> str:
    """Return a note on inputs that were made."""
    shown = ", ".join(quoted(name) for name in names[:2])
    if len(names) > 2:
        shown += f" and {len(names) - 2} more"
    return (
        f"the data lacks {shown}: made for the first step of a decoder, the past empty, masks of "
        "ones, positions from 0; give them if samples are padded or go on from a past"
    )
