"""Prove that a model whose functions and bodies were opened computes what the file computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from cobla_onnx.errors import VerificationError
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.text import quoted

__all__ = ["prove_opening"]

# Relative to the largest number of an output: the operators are the same, and only the order of
# their sums may be another.
TOLERANCE = 1e-4


def prove_opening(
    given: onnx.ModelProto, opened: onnx.ModelProto, feeds: Feeds, threads: int
) -> None:
    """Compare the model that layers are found in with the one that was read, on one run.

    What is compared later is compared with the former. Outputs that differ from run to run tell
    nothing.

    Parameters
    ----------
    given, opened : ModelProto
    feeds : dict
        Inputs of one run.

    Raises
    ------
    VerificationError
        If an output differs.
    """
    session = open_session(given, threads)
    expected = run_session(session, feeds)
    actual = run_session(open_session(opened, threads), feeds)
    different = [name for name in expected if not _alike(expected[name], actual[name])]
    if not different:
        return
    again = run_session(session, feeds)
    for name in different:
        if _alike(expected[name], again[name]):
            raise VerificationError(
                f"output {quoted(name)} is another once the model's functions and bodies are "
                "opened, which onnx does; nothing was written, export the model without functions "
                "(and please report this)"
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
    return bool(np.allclose(first, second, rtol=0, atol=TOLERANCE * scale, equal_nan=True))
