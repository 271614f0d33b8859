"""What a session holds in RAM as constants, read from the graph that onnxruntime optimised."""

from __future__ import annotations

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.runtime.session import open_session
from cobla_onnx.runtime.temporary import temporary_folder

__all__ = ["MEASURED", "constants_in_session"]

MEASURED = 1 << 30
"""Most bytes of weights of a model that is opened to be measured."""


def constants_in_session(model: onnx.ModelProto, threads: int) -> int | None:
    """Count the bytes of a model's constants once onnxruntime has folded them.

    The model is opened with extended optimisations, which fold all that is computed from constants
    (weights that are decoded, above all) and fuse what any processor can, and the graph that
    results is written to a temporary file, whose initializers are counted. The layouts of the full
    level, which depend on the processor, may pad some of them, and kernels may hold weights once
    more, packed.

    Returns
    -------
    int or None
        None, not measured, if the weights are more than `MEASURED` bytes, or if onnxruntime
        cannot write its graph.
    """
    if stored_bytes(model) > MEASURED:
        return None
    with temporary_folder("graph") as folder:
        written = folder / "optimised.onnx"
        try:
            open_session(model, threads, optimized=True, written=str(written))
        except ModelError:
            return None
        if not written.exists():
            return None
        # The sizes are in the model's file, the numbers in another.
        return stored_bytes(onnx.load(written, load_external_data=False))
