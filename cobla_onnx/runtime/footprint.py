"""What a session holds in RAM as constants, read from the graph that onnxruntime optimised."""

from __future__ import annotations

from pathlib import Path

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.model_file import copy_without_initializers, stored_bytes
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.runtime.session import open_session
from cobla_onnx.runtime.temporary import temporary_folder

__all__ = ["MEASURED", "constants_in_session"]

MEASURED = 1 << 30
"""Most bytes of weights of a model that is opened to be measured."""
# Bytes of a weight whose numbers are not handed over. Smaller ones may be shapes, or masks that
# onnxruntime looks at before it fuses what reads them.
LARGE = 1 << 23


def constants_in_session(model: onnx.ModelProto, threads: int) -> int | None:
    """Count the bytes of a model's constants once onnxruntime has folded them.

    The model is opened with extended optimisations, which fold all that is computed from constants
    (weights that are decoded, above all) and fuse what any processor can, and the graph that
    results is written to a temporary file, whose initializers are counted. Large weights are zeros
    meanwhile, which changes no size and spares a copy. The layouts of the full level, which depend
    on the processor, may pad some of them, and kernels may hold weights once more, packed.

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
            light = _with_zeros(model, folder.resolve())
            open_session(light, threads, optimized=True, written=str(written))
        except ModelError:
            return None
        if not written.exists():
            return None
        # The sizes are in the model's file, the numbers in another.
        return stored_bytes(onnx.load(written, load_external_data=False))


def _with_zeros(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Copy a model with all large weights in one file, which is a hole."""
    large = [t for t in model.graph.initializer if tensor_bytes(t) > LARGE]
    if not large:
        return model
    light = copy_without_initializers(model, {tensor.name for tensor in large})
    hole = folder / "zeros"
    with hole.open("wb") as file:
        file.truncate(max(map(tensor_bytes, large)))
    for tensor in large:
        stub = light.graph.initializer.add(
            name=tensor.name,
            data_type=tensor.data_type,
            dims=tensor.dims,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        stub.external_data.add(key="location", value=hole.name)
        stub.external_data.add(key="basepath", value=str(folder))
    return light
