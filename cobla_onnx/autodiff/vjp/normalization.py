"""Rules for normalisations, with statistics of the input or with given (constant) ones.

With z = (x - mean) / deviation and dz = dy scale, over the same elements,
dx = (dz - mean(dz) - z mean(dz z)) / deviation (Ioffe and Szegedy 2015, Ba et al. 2016).
Batch normalisation at inference has constant statistics and is affine.
"""

from __future__ import annotations

from collections.abc import Sequence

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, NoRuleError, Step, vjp

__all__: list[str] = []


@vjp("BatchNormalization")
def batch_normalization(g: Emitter, step: Step) -> Gradients:
    """Y = s (x - m) / sqrt(v + eps) + b with given m and v; with respect to all five."""
    if step.get("training_mode", 0):
        raise NoRuleError("it is in training mode")
    x, scale, _, mean, variance = step.node.input
    rank = len(step.shape())
    others = [0, *range(2, rank)]
    along = [-1] + [1] * (rank - 2)
    inverse = g.div(1.0, g.op("Sqrt", g.add(variance, float(step.get("epsilon", 1e-5)))))
    slope = g.mul(scale, inverse)
    dx = g.mul(step.dy, g.reshape(slope, along)) if step.wants(0) else None
    total = g.sum(step.dy, others) if step.wants(2) or step.wants(3) else None
    d_scale = d_mean = d_variance = None
    if step.wants(1) or step.wants(4):
        centred = g.sub(x, g.reshape(mean, along))
        raw = g.mul(g.sum(g.mul(step.dy, centred), others), inverse)
        d_scale = raw if step.wants(1) else None
        if step.wants(4):
            d_variance = g.mul(g.mul(raw, g.mul(slope, inverse)), -0.5)
    if step.wants(3) and total is not None:
        d_mean = g.neg(g.mul(total, slope))
    return dx, d_scale, total, d_mean, d_variance


def _standardized(g: Emitter, x: str, axes: Sequence[int], epsilon: float) -> tuple[str, str]:
    """Z = (x - mean) / deviation over axes, and 1 / deviation."""
    centred = g.sub(x, g.mean(x, axes, keep=True))
    variance = g.mean(g.square(centred), axes, keep=True)
    inverse = g.div(1.0, g.op("Sqrt", g.add(variance, epsilon)))
    return g.mul(centred, inverse), inverse


def _through(g: Emitter, dz: str, z: str, inverse: str, axes: Sequence[int]) -> str:
    """Dx = (dz - mean(dz) - z mean(dz z)) / deviation."""
    mean = g.mean(dz, axes, keep=True)
    along = g.mul(z, g.mean(g.mul(dz, z), axes, keep=True))
    return g.mul(g.sub(g.sub(dz, mean), along), inverse)


@vjp("InstanceNormalization")
def instance_normalization(g: Emitter, step: Step) -> Gradients:
    """Over the positions of each channel of each sample (Ulyanov et al. 2016)."""
    rank = len(step.shape())
    axes = list(range(2, rank))
    z, inverse = _standardized(g, step.x, axes, float(step.get("epsilon", 1e-5)))
    dx = None
    if step.wants(0):
        scale = g.reshape(step.node.input[1], [-1] + [1] * (rank - 2))
        dx = _through(g, g.mul(step.dy, scale), z, inverse, axes)
    d_scale = g.sum(g.mul(step.dy, z), [0, *axes]) if step.wants(1) else None
    return dx, d_scale, g.sum(step.dy, [0, *axes]) if step.wants(2) else None


@vjp("LayerNormalization")
def layer_normalization(g: Emitter, step: Step) -> Gradients:
    """Over the last axes of each sample (Ba et al. 2016)."""
    shape = step.shape()
    axes = list(range(step.axis(-1), len(shape)))
    z, inverse = _standardized(g, step.x, axes, float(step.get("epsilon", 1e-5)))
    dx = d_scale = d_bias = None
    if step.wants(0):
        dx = _through(g, g.mul(step.dy, step.node.input[1]), z, inverse, axes)
    if step.wants(1):
        d_scale = g.sum_to(g.mul(step.dy, z), shape, step.shape(1))
    if step.wants(2):
        d_bias = g.sum_to(step.dy, shape, step.shape(2))
    return (dx, d_scale, d_bias)[: len(step.node.input)]


@vjp("LpNormalization")
def lp_normalization(g: Emitter, step: Step) -> Gradients:
    """Y = x / |x|: dx = (dy - d|x|/dx sum(dy y)) / |x|, d|x|/dx = y, or sign(x) for p = 1."""
    axis, order = step.axis(-1), int(step.get("p", 2))
    norm = g.op("ReduceL2" if order == 2 else "ReduceL1", step.x, g.integers([axis]), keepdims=1)
    direction = step.y if order == 2 else g.op("Sign", step.x)
    inner = g.sum(g.mul(step.dy, step.y), [axis], keep=True)
    return (g.div(g.sub(step.dy, g.mul(direction, inner)), norm),)
