"""Rules for activations: dx = dy f'(x), written in terms of the output y where simpler.

Using y also lets onnxruntime fuse a Relu into the convolution before it, whose own output
nobody else reads then. At a kink the derivative from the left, or 0, is taken. Formulas
follow from the definitions in ONNX's operator reference.
"""

from __future__ import annotations

import math

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, Step, vjp

__all__: list[str] = []


@vjp("Relu")
def relu(g: Emitter, step: Step) -> Gradients:
    """Y = max(x, 0): dx = dy [y > 0]."""
    return (g.masked(step.dy, g.op("Greater", step.y, 0.0)),)


@vjp("LeakyRelu")
def leaky_relu(g: Emitter, step: Step) -> Gradients:
    """Y = x for x >= 0, a x below: dx = dy (a + (1 - a) [x > 0])."""
    alpha = float(step.get("alpha", 0.01))
    # y has the sign of x if a is positive.
    positive = g.float(g.op("Greater", step.y if alpha > 0 else step.x, 0.0))
    return (g.mul(step.dy, g.add(g.mul(positive, 1.0 - alpha), alpha)),)


@vjp("PRelu")
def p_relu(g: Emitter, step: Step) -> Gradients:
    """Y = x for x >= 0, s x below: dx = dy [x > 0] + dy s [x <= 0], ds = dy min(x, 0)."""
    shape = step.shape()
    negative = g.masked(step.dy, g.op("LessOrEqual", step.x, 0.0))
    slope = None
    if step.wants(1):
        slope = g.sum_to(g.mul(negative, step.x), shape, step.shape(1))
    above = g.masked(step.dy, g.op("Greater", step.x, 0.0))
    return g.add(above, g.mul(negative, step.node.input[1])), slope


@vjp("Clip")
def clip(g: Emitter, step: Step) -> Gradients:
    """Y = min(max(x, low), high): dx = dy [low < y < high]."""
    if step.wants(1) or step.wants(2):
        low, high = [step.node.input[i] if step.has(i) else "" for i in (1, 2)]
        return _clip_limits(g, step, low, high)
    dx = step.dy
    for index, compare in ((1, "Greater"), (2, "Less")):
        if step.has(index):
            dx = g.masked(dx, g.op(compare, step.y, step.node.input[index]))
    return (dx, *[None] * (len(step.node.input) - 1))


def _clip_limits(g: Emitter, step: Step, low: str, high: str) -> Gradients:
    """Dlow = sum dy [y = low < high], dhigh = sum dy [y = high]."""
    result: list[str | None] = [None] * len(step.node.input)
    dx = step.dy
    if high:
        inside = g.op("Less", step.y, high)
        result[2] = _sum_all(g, g.masked(dx, g.op("Not", inside)), step)
        dx = g.masked(dx, inside)
    if low:
        inside = g.op("Greater", step.y, low)
        result[1] = _sum_all(g, g.masked(dx, g.op("Not", inside)), step)
        dx = g.masked(dx, inside)
    result[0] = dx
    return result


def _sum_all(g: Emitter, a: str, step: Step) -> str:
    return g.sum(a, range(len(step.shape())))


@vjp("Sigmoid")
def sigmoid(g: Emitter, step: Step) -> Gradients:
    """Y = 1 / (1 + exp(-x)): dx = dy y (1 - y)."""
    return (g.mul(step.dy, g.mul(step.y, g.sub(1.0, step.y))),)


@vjp("Tanh")
def tanh(g: Emitter, step: Step) -> Gradients:
    """y = tanh(x): dx = dy (1 - y^2)."""
    return (g.mul(step.dy, g.sub(1.0, g.square(step.y))),)


@vjp("Erf")
def erf(g: Emitter, step: Step) -> Gradients:
    """y = 2 / sqrt(pi) times the integral of exp(-t^2): dx = dy 2 / sqrt(pi) exp(-x^2)."""
    slope = g.mul(g.op("Exp", g.neg(g.square(step.x))), 2.0 / math.sqrt(math.pi))
    return (g.mul(step.dy, slope),)


@vjp("Gelu")
def gelu(g: Emitter, step: Step) -> Gradients:
    """Y = x P(x) (Hendrycks and Gimpel 2016): dx = dy (P(x) + x p(x)), or its tanh form."""
    x = step.x
    if step.get("approximate", "none") == "tanh":
        scale, cubic = math.sqrt(2.0 / math.pi), 0.044715
        square = g.square(x)
        inner = g.mul(g.mul(x, g.add(g.mul(square, cubic), 1.0)), scale)
        t = g.op("Tanh", inner)
        slope = g.mul(g.add(g.mul(square, 3.0 * cubic), 1.0), scale)
        half = g.mul(g.add(t, 1.0), 0.5)
        tail = g.mul(g.mul(g.mul(x, 0.5), g.sub(1.0, g.square(t))), slope)
        return (g.mul(step.dy, g.add(half, tail)),)
    below = g.mul(g.add(g.op("Erf", g.mul(x, math.sqrt(0.5))), 1.0), 0.5)
    density = g.mul(g.op("Exp", g.mul(g.square(x), -0.5)), 1.0 / math.sqrt(2.0 * math.pi))
    return (g.mul(step.dy, g.add(below, g.mul(x, density))),)


@vjp("HardSigmoid")
def hard_sigmoid(g: Emitter, step: Step) -> Gradients:
    """Y = max(0, min(1, a x + b)): dx = a dy [0 < y < 1]."""
    inside = g.op("And", g.op("Greater", step.y, 0.0), g.op("Less", step.y, 1.0))
    return (g.masked(g.mul(step.dy, float(step.get("alpha", 0.2))), inside),)


@vjp("HardSwish")
def hard_swish(g: Emitter, step: Step) -> Gradients:
    """Y = x max(0, min(1, x / 6 + 1 / 2)): dx = dy (h + x / 6 [|x| < 3])."""
    gate = g.op("HardSigmoid", step.x, alpha=1.0 / 6.0, beta=0.5)
    inside = g.op("Less", g.op("Abs", step.x), 3.0)
    slope = g.masked(g.mul(step.x, 1.0 / 6.0), inside)
    return (g.mul(step.dy, g.add(gate, slope)),)


@vjp("Swish")
def swish(g: Emitter, step: Step) -> Gradients:
    """Y = x s, s = sigmoid(a x): dx = dy s (1 + a x (1 - s))."""
    scaled = g.mul(step.x, float(step.get("alpha", 1.0)))
    s = g.op("Sigmoid", scaled)
    return (g.mul(step.dy, g.mul(s, g.add(g.mul(scaled, g.sub(1.0, s)), 1.0))),)


@vjp("Softplus")
def softplus(g: Emitter, step: Step) -> Gradients:
    """Y = log(1 + exp(x)): dx = dy sigmoid(x)."""
    return (g.mul(step.dy, g.op("Sigmoid", step.x)),)


@vjp("Softsign")
def softsign(g: Emitter, step: Step) -> Gradients:
    """Y = x / (1 + |x|): dx = dy / (1 + |x|)^2."""
    return (g.div(step.dy, g.square(g.add(g.op("Abs", step.x), 1.0))),)


@vjp("Mish")
def mish(g: Emitter, step: Step) -> Gradients:
    """Y = x t, t = tanh(softplus(x)): dx = dy (t + x (1 - t^2) sigmoid(x))."""
    t = g.op("Tanh", g.op("Softplus", step.x))
    slope = g.mul(g.mul(step.x, g.sub(1.0, g.square(t))), g.op("Sigmoid", step.x))
    return (g.mul(step.dy, g.add(t, slope)),)


@vjp("ThresholdedRelu")
def thresholded_relu(g: Emitter, step: Step) -> Gradients:
    """Y = x [x > a]: dx = dy [x > a]."""
    above = g.op("Greater", step.x, float(step.get("alpha", 1.0)))
    return (g.masked(step.dy, above),)


def _exponential(g: Emitter, step: Step, scale: float, alpha: float, width: float) -> Gradients:
    """Y = c x above 0 and c a (exp(x / w) - 1) below: dx = dy c (1, or a / w exp(x / w))."""
    below = g.op("Min", g.mul(step.x, 1.0 / width), 0.0)
    decay = g.mul(g.op("Exp", below), scale * alpha / width)
    positive = g.float(g.op("Greater", step.x, 0.0))
    # Above zero `decay` is its constant value at 0, which is taken off again.
    slope = g.add(decay, g.mul(positive, scale - scale * alpha / width))
    return (g.mul(step.dy, slope),)


@vjp("Elu")
def elu(g: Emitter, step: Step) -> Gradients:
    """Clevert et al. 2015."""
    return _exponential(g, step, 1.0, float(step.get("alpha", 1.0)), 1.0)


@vjp("Selu")
def selu(g: Emitter, step: Step) -> Gradients:
    """Klambauer et al. 2017."""
    alpha = float(step.get("alpha", 1.6732632423543772))
    return _exponential(g, step, float(step.get("gamma", 1.0507009873554805)), alpha, 1.0)


@vjp("Celu")
def celu(g: Emitter, step: Step) -> Gradients:
    """Barron 2017."""
    alpha = float(step.get("alpha", 1.0))
    return _exponential(g, step, 1.0, alpha, alpha)


@vjp("Softmax")
def softmax(g: Emitter, step: Step) -> Gradients:
    """Y = exp(x) / sum exp(x): dx = y (dy - sum(dy y))."""
    axis = step.axis(-1)
    inner = g.sum(g.mul(step.dy, step.y), [axis], keep=True)
    return (g.mul(step.y, g.sub(step.dy, inner)),)


@vjp("LogSoftmax")
def log_softmax(g: Emitter, step: Step) -> Gradients:
    """Y = x - log sum exp(x): dx = dy - exp(y) sum(dy)."""
    total = g.sum(step.dy, [step.axis(-1)], keep=True)
    return (g.sub(step.dy, g.mul(g.op("Exp", step.y), total)),)
