"""Prove that a model that was made ready for its layers computes what the file computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.errors import VerificationError
from cobla_onnx.graph.macs import Shape
from cobla_onnx.graph.words import known_words
from cobla_onnx.runtime.session import open_session, run_session, runnable_feeds
from cobla_onnx.text import quoted
from cobla_onnx.variants.replacement import ROUNDING
from cobla_onnx.wording import either

__all__ = ["prove_opening"]

# Relative to the largest number of an output, of types that have no other: the operators are the
# same, and only the order of their sums may be another.
TOLERANCE = 1e-4


def prove_opening(
    given: onnx.ModelProto,
    opened: onnx.ModelProto,
    shapes: Mapping[str, Shape],
    dataset: Dataset | None,
    seed: int,
    threads: int,
) -> None:
    """Compare the model that layers are found in with the file, on one run.

    All later checks compare with the former, and would not see a fault of opening. Outputs that
    differ from run to run tell nothing.

    Parameters
    ----------
    given, opened : ModelProto
    shapes : mapping of str to tuple
        Shapes of the model's inputs, as far as known.
    dataset : Dataset or None
        Without samples, inputs are random.
    seed, threads : int

    Raises
    ------
    VerificationError
        If an output differs.
    ModelError
        If onnxruntime does not run the model as it was read.
    """
    # One session at a time: each holds the weights.
    session = open_session(given, threads)
    if dataset is None:
        feeds = runnable_feeds(session, shapes, seed, known_words(given))[0][0]
    else:
        feeds = next(dataset.batches(dataset.selection, 1))
    expected = run_session(session, feeds)
    del session
    actual = run_session(open_session(opened, threads), feeds)
    different = [name for name in expected if not _alike(expected[name], actual[name])]
    if not different:
        return
    again = run_session(open_session(given, threads), feeds)
    without = either(python="deduplicate=False", command="--no-deduplicate")
    for name in different:
        if _alike(expected[name], again[name]):
            raise VerificationError(
                f"output {quoted(name)} is another once the model's functions and bodies are "
                "opened, which onnx does, or equal constants are stored once; nothing was "
                "written, export the model without functions, or give "
                f"{without} (and please report this)"
            )


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, list):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(_alike(a, b) for a, b in pairs)
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "fc":
        return bool(np.array_equal(first, second))
    if first.shape != second.shape:
        return False
    finite = np.isfinite(first)
    scale = float(np.abs(first[finite]).max(initial=0.0))
    atol = ROUNDING.get(first.dtype, TOLERANCE) * scale
    return bool(np.allclose(first, second, rtol=0, atol=atol, equal_nan=True))
