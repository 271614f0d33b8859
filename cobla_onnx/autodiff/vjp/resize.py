"""Rule for Resize, which is linear and separable: its adjoint is one matrix for each axis.

The matrix is read off onnxruntime by resizing the identity. All coordinate systems,
rounding and interpolation modes thus have the derivative of what is really computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, NoRuleError, Step, vjp
from cobla_onnx.autodiff.vjp.selection import adjoint_of_matrix
from cobla_onnx.runtime.session import open_session

__all__: list[str] = []

# Of a Resize along all axes alike, or of no meaning for one axis alone.
NOT_COPIED = ("axes", "keep_aspect_ratio_policy")


@vjp("Resize")
def resize(g: Emitter, step: Step) -> Gradients:
    """Y = x M along each axis: dx = dy M^T."""
    if step.get("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise NoRuleError("it crops")
    if step.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoRuleError("it keeps the aspect ratio")
    shape, current = step.shape(), list(step.y_shape)
    rank = len(shape)
    axes = [a % rank for a in step.get("axes", range(rank))]
    given = step.constant(2)
    scales = None if given is None or given.size == 0 else dict(zip(axes, given, strict=True))
    dx = step.dy
    for axis in axes:
        scale = None if scales is None else float(scales[axis])
        if current[axis] == shape[axis] and scale in (None, 1.0):
            continue
        matrix = _matrix(step, shape[axis], current[axis], scale)
        dx = adjoint_of_matrix(g, dx, current, axis, matrix)
        current[axis] = shape[axis]
    return (dx, *[None] * (len(step.node.input) - 1))


def _matrix(step: Step, size: int, target: int, scale: float | None) -> NDArray[Any]:
    """Resize the identity along its last axis, shape (size, target)."""
    values = {k: v for k, v in step.attributes.items() if k not in NOT_COPIED}
    if scale is None:
        inputs, how = ["x", "", "", "how"], np.array([size, 1, 1, target], dtype=np.int64)
    else:
        inputs, how = ["x", "", "how"], np.array([1, 1, 1, scale], dtype=np.float32)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Resize", inputs, ["y"], **values)],
        "resize",
        [value("x", onnx.TensorProto.FLOAT, [size, 1, 1, size])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(how, "how")],
    )
    opset = [onnx.helper.make_opsetid("", 19 if "antialias" in values else 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    identity = np.eye(size, dtype=np.float32).reshape(size, 1, 1, size)
    (result,) = open_session(model, 1).run(None, {"x": identity})
    matrix: NDArray[Any] = result.reshape(size, target)
    return matrix
