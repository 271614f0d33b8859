"""Geometry of the HTML report's charts: points and ticks in drawing units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cobla_onnx.allocation.bound import Front
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.distillation.record import Checkpoint
from cobla_onnx.report.model import Spectrum

__all__ = [
    "Chart",
    "Mark",
    "Sparkline",
    "Tick",
    "checkpoints_chart",
    "decades",
    "front_chart",
    "history_chart",
    "log_scale",
    "polyline",
    "round_numbers",
    "scale",
    "sparkline",
]

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 28, 40
# A sparkline's size, and the smallest singular value that it shows above its base.
SPARK_WIDTH, SPARK_HEIGHT, SPARK_DECADES = 120, 28, 3.0


@dataclass(frozen=True)
class Tick:
    """A tick: a place on an axis, in drawing units, and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A highlighted point, with its label."""

    x: float
    y: float
    text: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """A line with axes; `line` is the ``points`` of an SVG polyline."""

    line: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    description: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Sparkline:
    """A spectrum as two areas: the part kept, and the part cut off."""

    kept: str
    lost: str
    cut: float | None
    width: int = SPARK_WIDTH
    height: int = SPARK_HEIGHT


def sparkline(spectrum: Spectrum, rank: int | None) -> Sparkline:
    """Draw a spectrum over its ranks, three decades high, with the cut after `rank`."""
    last = spectrum.ranks[-1]
    scale = SPARK_WIDTH / last
    # Each singular value is a step, as wide as the distance of its rank from the last.
    corners = []
    edge = 0.0
    for number, value in zip(spectrum.ranks, spectrum.values, strict=True):
        height = 0.0 if value <= 0 else max(0.0, 1.0 + math.log10(value) / SPARK_DECADES)
        y = SPARK_HEIGHT * (1.0 - height)
        corners.append((number, edge * scale, number * scale, y))
        edge = number
    kept = [c for c in corners if rank is None or c[0] <= rank]
    lost = [c for c in corners if rank is not None and c[0] > rank]
    return Sparkline(_area(kept), _area(lost), None if rank is None else round(rank * scale, 1))


def _area(corners: Sequence[tuple[int, float, float, float]]) -> str:
    if not corners:
        return ""
    points = [(corners[0][1], float(SPARK_HEIGHT))]
    for _, begin, end, y in corners:
        points += [(begin, y), (end, y)]
    points.append((corners[-1][2], float(SPARK_HEIGHT)))
    return polyline(points)


def front_chart(
    front: Front, name: str, limit: float | None, reached: float | None, value: float
) -> Chart | None:
    """Draw the lower bound of the loss over the fraction kept, with the result as a point."""
    positive = [loss for loss in front.losses if loss > 0]
    if reached is None or len(positive) < 2 or value <= 0:
        return None
    # Three decades below the result: the line starts at 0, which a logarithm cannot show.
    low = min(value, max(min(positive), value / 1e3))
    high = max(*positive, value)
    across = scale(min(front.kept), 1.0, LEFT, WIDTH - RIGHT)
    up = log_scale(low, high, HEIGHT - BOTTOM, TOP)
    points = [(across(x), up(y)) for x, y in zip(front.kept, front.losses, strict=True) if y >= low]
    marks = [Mark(across(reached), up(value), f"this model: {value:.3g}", "here")]
    if limit is not None and limit > min(front.kept):
        marks.append(Mark(across(limit), HEIGHT - BOTTOM, "budget", "limit"))
    fifths = [fifth / 5 for fifth in range(6) if min(front.kept) <= fifth / 5]
    return Chart(
        polyline(points),
        tuple(marks),
        tuple(Tick(round(across(x), 1), f"{100 * x:.0f} %") for x in fifths),
        decades(low, high, up),
        f"{name} kept",
        "objective",
        f"Least objective at every share of {name} kept; this model keeps {100 * reached:.1f} %.",
    )


def history_chart(history: Sequence[Step]) -> Chart | None:
    """Draw the loss of the search over its evaluations."""
    points = [(s.number, s.loss, s.stage) for s in history if math.isfinite(s.loss)]
    return _losses_chart(points, ("evaluation", "evaluations"), "loss on the calibration split")


def checkpoints_chart(checkpoints: Sequence[Checkpoint]) -> Chart | None:
    """Draw the held-back loss of a distillation over its passes."""
    points = [(c.number, c.held_back, c.stage) for c in checkpoints if c.held_back is not None]
    return _losses_chart(points, ("pass", "states"), "loss on the samples held back")


def _losses_chart(
    points: Sequence[tuple[int, float, str]], counted: tuple[str, str], what: str
) -> Chart | None:
    """Draw losses over their numbers; a mark names the stage of the least one."""
    if len(points) < 2:
        return None
    losses = [loss for _, loss, _ in points]
    low, high = min(losses), max(losses)
    first, last = points[0][0], points[-1][0]
    across = scale(first, last, LEFT, WIDTH - RIGHT)
    wide = low > 0 and high / low > 20
    if wide:
        up = log_scale(low, high, HEIGHT - BOTTOM, TOP)
        ticks = decades(low, high, up)
    else:
        up = scale(low, high, HEIGHT - BOTTOM, TOP)
        ticks = tuple(Tick(round(up(y), 1), f"{y:.3g}") for y in round_numbers(low, high))
    number, best, stage = min(points, key=lambda point: point[1])
    mark = Mark(across(number), up(best), f"{stage}: {best:.3g}", "here")
    numbers = round_numbers(first, last)
    return Chart(
        polyline([(across(number), up(loss)) for number, loss, _ in points]),
        (mark,),
        tuple(Tick(round(across(x), 1), f"{x:.0f}") for x in numbers if x == round(x)),
        ticks,
        counted[0],
        what,
        f"Loss over {len(points)} {counted[1]}; the least is {best:.3g}.",
    )


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """Write points as an SVG polyline has them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    """Map numbers from `low` to `high` to drawing units from `begin` to `end`."""
    span = high - low or 1.0
    return lambda value: begin + (value - low) / span * (end - begin)


def log_scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    """Map the logarithms of positive numbers."""
    inner = scale(math.log10(low), math.log10(high), begin, end)
    return lambda value: inner(math.log10(value))


def decades(low: float, high: float, up: Callable[[float], float]) -> tuple[Tick, ...]:
    """Ticks at powers of ten, at most six; at the ends if there are too few."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    values = [10.0**n for n in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]
    if len(values) < 2:
        values = [low, high]
    return tuple(Tick(round(up(y), 1), f"{y:.2g}") for y in values)


def round_numbers(low: float, high: float) -> list[float]:
    """Return about five round numbers between two numbers."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step)
    return [round(step * n, 12) for n in range(first, math.floor(high / step) + 1)]
