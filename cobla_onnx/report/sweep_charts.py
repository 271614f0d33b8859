"""Geometry of a sweep's charts: loss, and quality where measured, against bytes and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cobla_onnx.report.amounts import count_text, percent_text
from cobla_onnx.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Tick,
    decades,
    log_scale,
    polyline,
    round_numbers,
    scale,
)
from cobla_onnx.report.sweep import Sweep, SweepPoint

__all__ = ["FrontChart", "Label", "Place", "front_charts"]

# Labels beside points: about as wide as their letters, and a line high.
LETTER, LINE = 7.5, 14.0
# Half of a point with what is free around it, and how far below it a line of text is based.
POINT, BASELINE = 6.0, 4.0


@dataclass(frozen=True)
class Label:
    """A text beside a point, where no other one is."""

    x: float
    y: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Place:
    """A point of a sweep: where it is drawn, as what, and what it says of itself.

    ``kind`` is ``front``, ``dominated`` or ``other``, which is what another method made.
    """

    x: float
    y: float
    kind: str
    title: str
    label: Label | None = None


@dataclass(frozen=True)
class FrontChart(Chart):
    """A chart whose `line` goes through our own points on the front."""

    places: tuple[Place, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class _Axis:
    """What an axis shows: its name, the value of a point, and how values are written.

    ``most`` is the largest value that there can be, such as an agreement of 1.
    """

    title: str
    of: Callable[[SweepPoint], float | None]
    text: Callable[[float], str]
    logarithmic: bool = False
    most: float | None = None


def front_charts(found: Sweep) -> list[FrontChart]:
    """Return charts of what all points have: quality, then loss; against bytes, then time."""
    points = found.made
    down = [_Axis("loss", lambda p: p.loss, lambda v: f"{v:.2g}", logarithmic=True)]
    if found.measure is not None:
        most = 1.0 if found.measure in ("accuracy", "agreement") else None
        down.insert(0, _Axis(found.measure, found.quality_of, percent_text, most=most))
    across = [
        _Axis("bytes of the file", lambda p: p.file_bytes, lambda v: count_text(round(v))),
        _Axis("time, share of the original's", lambda p: p.latency, lambda v: f"{100 * v:.0f} %"),
    ]
    return [
        _chart(points, x, y)
        for x in across
        for y in down
        if points and all(axis.of(p) is not None for axis in (x, y) for p in points)
    ]


def _chart(points: Sequence[SweepPoint], x: _Axis, y: _Axis) -> FrontChart:
    across, x_ticks = _scaled([x.of(p) or 0.0 for p in points], x, LEFT, WIDTH - RIGHT)
    up, y_ticks = _scaled([y.of(p) or 0.0 for p in points], y, HEIGHT - BOTTOM, TOP)
    at = [(across(x.of(p) or 0.0), up(y.of(p) or 0.0)) for p in points]
    ours = sorted(place for place, p in zip(at, points, strict=True) if p.ours and p.front)
    return FrontChart(
        polyline(ours),
        (),
        x_ticks,
        y_ticks,
        x.title,
        y.title,
        f"{y.title} over {x.title} of {len(points)} models.",
        places=_places(points, at, x, y),
        title=f"{y.title.capitalize()} against {x.title}",
    )


def _scaled(
    values: Sequence[float], axis: _Axis, begin: float, end: float
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """Return the scale of an axis, and its ticks."""
    positive = [value for value in values if value > 0]
    if axis.logarithmic and positive and max(positive) > min(positive):
        low, high = min(positive), max(positive)
        up = log_scale(low, high, begin, end)
        # A loss of 0 stands at the lower end.
        return lambda value: up(max(value, low)), decades(low, high, up)
    low, high = min(values), max(values)
    # Room at both sides, so that points stand on no edge, but not beyond 0.
    room = 0.06 * (high - low or abs(high) or 1.0)
    low, high = max(low - room, min(low, 0.0)), high + room
    high = high if axis.most is None else min(high, axis.most)
    place = scale(low, high, begin, end)
    numbers = round_numbers(low, high)
    return place, tuple(Tick(round(place(value), 1), axis.text(value)) for value in numbers)


def _places(
    points: Sequence[SweepPoint], at: Sequence[tuple[float, float]], x: _Axis, y: _Axis
) -> tuple[Place, ...]:
    """Place points, those of other methods with their names beside them."""
    taken = [(left - POINT, left + POINT, top + BASELINE) for left, top in at]
    found = []
    for point, (left, top) in sorted(zip(points, at, strict=True), key=lambda entry: entry[1][1]):
        kind = ("front" if point.front else "dominated") if point.ours else "other"
        title = f"{point.name}: {x.text(x.of(point) or 0)}, {y.title} {y.text(y.of(point) or 0)}"
        label = None if point.ours else _label(point.name, left, top, taken)
        found.append(Place(round(left, 1), round(top, 1), kind, title, label))
    return tuple(found)


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> Label:
    """Put a name to the side where there is room, below the names and points in its way."""
    width = LETTER * len(text)
    before = x + 10 + width > WIDTH
    begin = x - 10 - width if before else x + 10
    line = y + BASELINE

    def in_the_way(other: tuple[float, float, float]) -> bool:
        first, last, height = other
        return begin < last and first < begin + width and abs(height - line) < LINE

    while any(map(in_the_way, taken)):
        line += LINE
    taken.append((begin, begin + width, line))
    return Label(
        round(x - 10 if before else x + 10, 1), round(line, 1), text, "end" if before else "start"
    )
