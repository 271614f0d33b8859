"""Plot a sweep with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import either

if TYPE_CHECKING:
    from cobla_onnx.report.sweep import Sweep, SweepPoint

__all__ = ["check_plot", "draw"]

COSTS = {"mem": "memory kept", "mac": "MACs kept", "latency": "latency kept"}
FORMATS = (".svg", ".png")
# Colour-blind safe (Okabe and Ito, 2008).
ON_FRONT, DOMINATED, OTHERS = "#0072B2", "#999999", "#CC79A7"
MARKERS = "Ds^vP"


def check_plot(path: Path) -> None:
    """Check, before any work, that the plot can be drawn.

    Raises
    ------
    UsageError
        If the extension is neither ``.svg`` nor ``.png``, or matplotlib is not installed.
    """
    shown = either(python=str(path), command=f"--plot {path}")
    if path.suffix not in FORMATS:
        raise UsageError(f"{shown}: give a name that ends in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f'{shown}: needs matplotlib; pip install "cobla-onnx[plot]"') from error


def draw(found: Sweep, path: Path) -> bytes:
    """Draw a sweep: loss, and quality where measured, against memory, MACs and latency.

    Returns
    -------
    bytes
        An SVG or PNG file, by the extension of `path`; the same for the same sweep.

    Raises
    ------
    UsageError
        See `check_plot`.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = [name for name in COSTS if all(getattr(p, name) is not None for p in found.made)]
    rows = ["loss", *([found.measure] if found.measure else [])]
    with matplotlib.rc_context({"svg.hashsalt": "cobla-onnx", "font.size": 9}):
        figure = Figure(figsize=(3.8 * len(costs), 2.8 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), len(costs), squeeze=False)
        for row, quantity in enumerate(rows):
            for column, cost in enumerate(costs):
                _panel(axes[row][column], found, cost, quantity)
        axes[0][0].legend(frameon=False)
        file = io.BytesIO()
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return file.getvalue()


def _panel(axes: Any, found: Sweep, cost: str, quantity: str) -> None:
    def value(point: SweepPoint) -> float:
        other = None if quantity == "loss" else found.quality_of(point)
        return (point.loss or 0.0) if other is None else other

    for wanted, colour, marker, label in (
        ((True, True), ON_FRONT, "o", "Pareto front"),
        ((True, False), DOMINATED, "x", "dominated"),
    ):
        shown = sorted(
            (getattr(p, cost), value(p)) for p in found.made if (p.ours, p.front) == wanted
        )
        if shown:
            x, y = zip(*shown, strict=True)
            line = "-" if wanted[1] and cost == "mem" else "none"
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=label)
    others = [point for point in found.made if not point.ours]
    for point, marker in zip(others, itertools.cycle(MARKERS), strict=False):
        place = getattr(point, cost), value(point)
        axes.plot(*place, color=OTHERS, marker=marker, linestyle="none", label=point.name)
    axes.set_xlabel(COSTS[cost])
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
