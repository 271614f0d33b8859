"""Rules for reductions: dy, broadcast over the reduced axes, times the reduction's derivative."""

from __future__ import annotations

import math

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, Step, vjp

__all__: list[str] = []


def _axes(step: Step) -> list[int]:
    """Reduced axes, counted from the front."""
    rank = len(step.shape())
    given = step.integers(1)
    if not given:
        return [] if step.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in given)


def _kept(g: Emitter, step: Step, name: str) -> str:
    """Give a reduced tensor its axes back, of length 1."""
    axes = _axes(step)
    shape = [1 if axis in axes else n for axis, n in enumerate(step.shape())]
    return name if step.get("keepdims", 1) else g.reshape(name, shape)


def _result(step: Step, dx: str) -> Gradients:
    return (dx, *[None] * (len(step.node.input) - 1))


@vjp("ReduceSum")
def reduce_sum(g: Emitter, step: Step) -> Gradients:
    """y = sum x: dx = dy."""
    return _result(step, g.expand(_kept(g, step, step.dy), step.shape()))


@vjp("ReduceMean")
def reduce_mean(g: Emitter, step: Step) -> Gradients:
    """y = sum x / n: dx = dy / n."""
    count = math.prod(step.shape()[axis] for axis in _axes(step))
    share = g.mul(_kept(g, step, step.dy), 1.0 / max(count, 1))
    return _result(step, g.expand(share, step.shape()))


@vjp("ReduceMax", "ReduceMin")
def reduce_extreme(g: Emitter, step: Step) -> Gradients:
    """The gradient dy goes to the extreme element, in equal parts if there are several."""
    hit = g.float(g.op("Equal", step.x, _kept(g, step, step.y)))
    share = g.div(_kept(g, step, step.dy), g.sum(hit, _axes(step), keep=True))
    return _result(step, g.mul(hit, share))


@vjp("ReduceSumSquare")
def reduce_sum_square(g: Emitter, step: Step) -> Gradients:
    """y = sum x^2: dx = 2 x dy."""
    return _result(step, g.mul(step.x, g.mul(_kept(g, step, step.dy), 2.0)))


@vjp("ReduceL1")
def reduce_l1(g: Emitter, step: Step) -> Gradients:
    """y = sum |x|: dx = sign(x) dy."""
    return _result(step, g.mul(g.op("Sign", step.x), _kept(g, step, step.dy)))


@vjp("ReduceL2")
def reduce_l2(g: Emitter, step: Step) -> Gradients:
    """y = sqrt(sum x^2): dx = x dy / y, and 0 where x is 0."""
    y = _kept(g, step, step.y)
    safe = g.add(y, g.float(g.op("Equal", y, 0.0)))
    return _result(step, g.mul(step.x, g.div(_kept(g, step, step.dy), safe)))


@vjp("ReduceLogSumExp")
def reduce_log_sum_exp(g: Emitter, step: Step) -> Gradients:
    """y = log sum exp(x): dx = exp(x - y) dy."""
    weight = g.op("Exp", g.sub(step.x, _kept(g, step, step.y)))
    return _result(step, g.mul(weight, _kept(g, step, step.dy)))
