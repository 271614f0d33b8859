"""Rules for arithmetic; the gradient of a broadcast operand is summed over the repeated axes."""

from __future__ import annotations

from collections.abc import Callable

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, Step, flat, vjp

__all__: list[str] = []

flat("piecewise constant", "Floor", "Ceil", "Round", "Sign")
flat("its result does not depend on values", "Shape", "Size", "ConstantOfShape", "EyeLike")
flat("its result is boolean", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
flat("its result is boolean", "And", "Or", "Xor", "Not", "IsNaN", "IsInf")
flat("its result is an index", "ArgMax", "ArgMin", "NonZero", "Range", "OneHot")


def _each(g: Emitter, step: Step, gradients: dict[int, Callable[[], str]]) -> Gradients:
    """Write the wanted gradients, each summed to its operand's shape."""
    result: list[str | None] = [None] * len(step.node.input)
    for index, make in gradients.items():
        if step.wants(index):
            result[index] = g.sum_to(make(), step.y_shape, step.shape(index))
    return result


@vjp("Identity")
def identity(g: Emitter, step: Step) -> Gradients:
    """y = x: dx = dy."""
    return (step.dy,)


@vjp("Cast", "CastLike")
def cast(g: Emitter, step: Step) -> Gradients:
    """y = x as a floating type, of which the graph has but one: dx = dy."""
    return (step.dy, *[None] * (len(step.node.input) - 1))


@vjp("Dropout")
def dropout(g: Emitter, step: Step) -> Gradients:
    """Inference: y = x."""
    return (step.dy, *[None] * (len(step.node.input) - 1))


@vjp("Add")
def add(g: Emitter, step: Step) -> Gradients:
    """y = a + b: da = db = dy."""
    return _each(g, step, {0: lambda: step.dy, 1: lambda: step.dy})


@vjp("Sub")
def sub(g: Emitter, step: Step) -> Gradients:
    """y = a - b: da = dy, db = -dy."""
    return _each(g, step, {0: lambda: step.dy, 1: lambda: g.neg(step.dy)})


@vjp("Mul")
def mul(g: Emitter, step: Step) -> Gradients:
    """y = a b: da = dy b, db = dy a."""
    a, b = step.node.input
    return _each(g, step, {0: lambda: g.mul(step.dy, b), 1: lambda: g.mul(step.dy, a)})


@vjp("Div")
def div(g: Emitter, step: Step) -> Gradients:
    """y = a / b: da = dy / b, db = -dy y / b."""
    b = step.node.input[1]
    return _each(
        g,
        step,
        {
            0: lambda: g.div(step.dy, b),
            1: lambda: g.neg(g.div(g.mul(step.dy, step.y), b)),
        },
    )


@vjp("Sum")
def sum_(g: Emitter, step: Step) -> Gradients:
    """y = a + b + ...: every operand gets dy."""
    return _each(g, step, {i: lambda: step.dy for i in range(len(step.node.input))})


@vjp("Mean")
def mean(g: Emitter, step: Step) -> Gradients:
    """y = (a + b + ...) / n: every operand gets dy / n."""
    count = len(step.node.input)
    share = g.mul(step.dy, 1.0 / count)
    return _each(g, step, {i: lambda: share for i in range(count)})


@vjp("Max", "Min")
def extreme(g: Emitter, step: Step) -> Gradients:
    """y = the largest (smallest) operand: dy goes to it, in equal parts if there are several."""
    names = step.node.input
    if len(names) == 1:
        return (step.dy,)
    hits = [g.float(g.op("Equal", name, step.y)) for name in names]
    share = g.div(step.dy, g.total([g.expand(hit, step.y_shape) for hit in hits]))
    return _each(
        g,
        step,
        {i: lambda hit=hit: g.mul(share, hit) for i, hit in enumerate(hits)},  # type: ignore[misc]
    )


@vjp("Where")
def where(g: Emitter, step: Step) -> Gradients:
    """y = c ? a : b: da = dy [c], db = dy [not c]."""
    condition = step.node.input[0]
    return _each(
        g,
        step,
        {
            1: lambda: g.masked(step.dy, condition),
            2: lambda: g.masked(step.dy, g.op("Not", condition)),
        },
    )


@vjp("Pow")
def power(g: Emitter, step: Step) -> Gradients:
    """y = a^b: da = dy b a^(b - 1), db = dy y log(a)."""
    a, b = step.node.input
    exponent = step.constants.get(b)

    def base() -> str:
        if exponent is not None and exponent.size == 1:
            value = float(exponent.reshape(()))
            # The usual exponents, without the cost of a power function.
            if value in (1.0, 2.0):
                return g.mul(step.dy, g.mul(a, 2.0)) if value == 2.0 else step.dy
            return g.mul(step.dy, g.mul(g.op("Pow", a, value - 1.0), value))
        floating = g.float(b)
        return g.mul(step.dy, g.mul(floating, g.op("Pow", a, g.sub(floating, 1.0))))

    # Where a = 0 the limit of y log(a) is 0 (b > 0), which is not what 0 times -inf gives.
    def log() -> str:
        zero = g.float(g.op("Equal", a, 0.0))
        return g.mul(step.dy, g.mul(step.y, g.op("Log", g.add(a, zero))))

    return _each(g, step, {0: base, 1: log})


def _unary(operator: str, slope: Callable[[Emitter, Step], str]) -> None:
    """Register dx = dy f'(x)."""
    vjp(operator)(lambda g, step: (g.mul(step.dy, slope(g, step)),))


def _one_minus_square(g: Emitter, step: Step) -> str:
    return g.sub(1.0, g.square(step.x))


_unary("Exp", lambda g, s: s.y)
_unary("Log", lambda g, s: g.op("Reciprocal", s.x))
_unary("Sqrt", lambda g, s: g.div(0.5, s.y))
_unary("Reciprocal", lambda g, s: g.neg(g.square(s.y)))
_unary("Abs", lambda g, s: g.op("Sign", s.x))
_unary("Sin", lambda g, s: g.op("Cos", s.x))
_unary("Cos", lambda g, s: g.neg(g.op("Sin", s.x)))
_unary("Tan", lambda g, s: g.add(g.square(s.y), 1.0))
_unary("Sinh", lambda g, s: g.op("Cosh", s.x))
_unary("Cosh", lambda g, s: g.op("Sinh", s.x))
_unary("Asin", lambda g, s: g.div(1.0, g.op("Sqrt", _one_minus_square(g, s))))
_unary("Acos", lambda g, s: g.div(-1.0, g.op("Sqrt", _one_minus_square(g, s))))
_unary("Atan", lambda g, s: g.div(1.0, g.add(g.square(s.x), 1.0)))
_unary("Asinh", lambda g, s: g.div(1.0, g.op("Sqrt", g.add(g.square(s.x), 1.0))))
_unary("Acosh", lambda g, s: g.div(1.0, g.op("Sqrt", g.sub(g.square(s.x), 1.0))))
_unary("Atanh", lambda g, s: g.div(1.0, _one_minus_square(g, s)))


@vjp("Neg")
def neg(g: Emitter, step: Step) -> Gradients:
    """y = -x: dx = -dy."""
    return (g.neg(step.dy),)
