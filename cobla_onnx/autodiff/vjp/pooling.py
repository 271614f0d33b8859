"""Rules for pooling: a maximum routes its gradient to its source, a mean distributes it evenly."""

from __future__ import annotations

import math

import numpy as np

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.convolution import Window, input_gradient, window_of
from cobla_onnx.autodiff.vjp.registry import Gradients, NoRuleError, Step, vjp

__all__: list[str] = []


@vjp("MaxPool")
def max_pool(g: Emitter, step: Step) -> Gradients:
    """The gradient dy goes to the largest element of its window.

    Windows side by side: where x equals the maximum spread over its window again; if
    several do, in equal parts. Else to the first one, by its index.
    """
    shape, out = step.shape(), step.y_shape
    window = window_of(step, tuple(step.attributes["kernel_shape"]), shape[2:], out[2:])
    ends = window.ends(shape[2:], out[2:])
    side_by_side = window.strides == window.kernel and max(*window.dilations, 1) == 1
    if side_by_side and len(shape) == 4 and not any(window.begins) and max(ends) <= 0:
        return (_spread(g, step, window, ends),)
    if step.get("storage_order", 0):
        raise NoRuleError("its indices are column major")
    if not step.has_output(1):
        # The graph is a private copy: its node gives the indices too, instead of a second
        # one that pools again.
        del step.node.output[1:]
        step.node.output.append(g.name("grad/indices"))
    indices = step.node.output[1]
    size = math.prod(shape)
    zeros = g.expand(g.number(0.0), [size])
    places, flat = g.reshape(indices, [-1]), g.reshape(step.dy, [-1])
    dx = g.op("ScatterElements", zeros, places, flat, axis=0, reduction="add")
    return (g.reshape(dx, shape),)


def _spread(g: Emitter, step: Step, window: Window, ends: list[int]) -> str:
    """Gradient where windows neither overlap nor leave gaps, but perhaps a rest at the end."""
    shape = step.shape()
    covered = [*shape[:2], *(n + e for n, e in zip(shape[2:], ends, strict=True))]
    x = g.frame(step.x, shape, [0] * 4, [0, 0, *ends])
    # Scales are single precision whatever the graph is in.
    scales = g.constant(np.array([1, 1, *window.kernel], dtype=np.float32))
    how = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    hit = g.float(g.op("Equal", x, g.op("Resize", step.y, "", scales, **how)))
    pooling = {"kernel_shape": list(window.kernel), "strides": list(window.strides)}
    share = g.div(step.dy, g.mul(g.op("AveragePool", hit, **pooling), math.prod(window.kernel)))
    dx = g.mul(hit, g.op("Resize", share, "", scales, **how))
    return g.frame(dx, covered, [0] * 4, [0, 0, *(-e for e in ends)])


def _counts(step: Step, window: Window) -> np.ndarray:
    """How many elements each mean is over, shape (*outputs,)."""
    inputs, outputs = step.shape()[2:], step.y_shape[2:]
    axes = len(inputs)
    padded = bool(step.get("count_include_pad", 0))
    if padded and step.get("auto_pad", "NOTSET").startswith("SAME"):
        after = [max(e, 0) for e in window.ends(inputs, outputs)]
    else:
        after = list(step.get("pads", [0] * 2 * axes)[axes:])
    counts = np.ones(())
    for axis in range(axes):
        k, s = window.kernel[axis], window.strides[axis]
        d, b, n = window.dilations[axis], window.begins[axis], inputs[axis]
        place = np.arange(outputs[axis])[:, None] * s + np.arange(k) * d - b
        low, high = (-b, n + after[axis]) if padded else (0, n)
        counts = np.multiply.outer(counts, ((place >= low) & (place < high)).sum(axis=1))
    return counts


@vjp("AveragePool")
def average_pool(g: Emitter, step: Step) -> Gradients:
    """y = sum over the window / its size: dx = dy / size, summed over the windows of x."""
    shape, out = step.shape(), step.y_shape
    window = window_of(step, tuple(step.attributes["kernel_shape"]), shape[2:], out[2:])
    counts = np.maximum(_counts(step, window), 1)
    if counts.min() == counts.max():
        share = g.mul(step.dy, 1.0 / float(counts.max()))
    else:
        share = g.mul(step.dy, g.constant((1.0 / counts).astype(g.dtype)))
    if math.prod(out[2:]) == 1 and window.kernel == shape[2:] and not any(window.begins):
        return (g.expand(share, shape),)
    batch = shape[0] * shape[1]
    ones = g.constant(np.ones((1, 1, *window.kernel), dtype=g.dtype))
    flat, inner = (batch, 1, *shape[2:]), (batch, 1, *out[2:])
    moved = g.reshape(share, inner)
    # ConvTranspose pads its output by less than a stride only.
    ends = window.ends(shape[2:], out[2:])
    over = [max(-e, 0) for e in ends]
    kept = tuple(n - o for n, o in zip(flat[2:], over, strict=True))
    dx = input_gradient(g, moved, inner, ones, (1, 1, *window.kernel), window, (batch, 1, *kept))
    dx = g.frame(dx, (batch, 1, *kept), [0] * len(shape), [0, 0, *over])
    return (g.reshape(dx, shape),)


@vjp("GlobalAveragePool")
def global_average_pool(g: Emitter, step: Step) -> Gradients:
    """y = mean over positions: dx = dy / positions at each."""
    shape = step.shape()
    return (g.expand(g.mul(step.dy, 1.0 / math.prod(shape[2:])), shape),)


@vjp("GlobalMaxPool")
def global_max_pool(g: Emitter, step: Step) -> Gradients:
    """The gradient dy goes to the largest position, in equal parts if there are several."""
    hit = g.float(g.op("Equal", step.x, step.y))
    axes = range(2, len(step.shape()))
    return (g.mul(hit, g.div(step.dy, g.sum(hit, axes, keep=True))),)


@vjp("LRN")
def local_response(g: Emitter, step: Step) -> Gradients:
    """y = x D^-b, D = k + a / n sum over n neighbouring channels of x^2.

    Krizhevsky et al. 2012. dx = dy D^-b - 2 a b / n x sum over the channels that have this
    one as neighbour of dy y / D.
    """
    size, shape = int(step.attributes["size"]), step.shape()
    alpha, beta = float(step.get("alpha", 1e-4)), float(step.get("beta", 0.75))
    channels = shape[1]
    if len(shape) < 3:
        raise NoRuleError("its input has no positions")
    offset = np.arange(channels)[None, :] - np.arange(channels)[:, None]
    near = (offset >= -((size - 1) // 2)) & (offset <= size // 2)
    flat = [shape[0], channels, math.prod(shape[2:])]
    x, y, dy = (g.reshape(name, flat) for name in (step.x, step.y, step.dy))
    total = g.matmul(g.constant(near.astype(g.dtype)), g.square(x))
    base = g.add(g.mul(total, alpha / size), float(step.get("bias", 1.0)))
    back = g.matmul(g.constant(near.T.astype(g.dtype)), g.div(g.mul(dy, y), base))
    direct = g.mul(dy, g.op("Pow", base, -beta))
    dx = g.sub(direct, g.mul(g.mul(x, back), 2.0 * alpha * beta / size))
    return (g.reshape(dx, shape),)
