"""Draw quality against bytes, for each lever and for what people use instead.

    pip install ".[plot]"
    python tools/draw_front.py results.json --model "ResNet-20" --write docs/images/front.svg

RESULTS is what ``tools/benchmark_precision.py run`` wrote. Each method with a budget is a line over
the bytes that its models have, counted again; each alternative a point. Models that cannot be made
are left out, and a line ends there.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parent))
import field
from precision_methods import ALTERNATIVES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# Colour-blind safe (Okabe and Ito, 2008).
LINES = {
    "auto": ("#0072B2", "o", "ranks and bits (--precision auto)"),
    "bits alone": ("#E69F00", "s", "bits alone"),
    "ranks alone": ("#009E73", "^", "ranks alone"),
}
POINTS = "#CC79A7"
TICKS = (0.05, 0.1, 0.15, 0.25, 0.5, 1.0)

Row = Mapping[str, Any]


def read_points(
    rows: Mapping[str, Row], model: str, figure: str
) -> dict[str, list[tuple[float, float]]]:
    """Return (bytes kept, figure of quality) by method, in the order of bytes."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, row in rows.items():
        name, method, _ = key.split(" | ")
        if name == model and row.get("exit_code") == 0 and figure in row["quality"]:
            found.setdefault(method, []).append((row["mem"], row["quality"][figure]))
    return {method: sorted(points) for method, points in found.items()}


def draw(points: Mapping[str, list[tuple[float, float]]], model: str, figure: str) -> bytes:
    """Draw an SVG file; the same for the same points."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    with matplotlib.rc_context({"svg.hashsalt": "cobla-onnx", "font.size": 9}):
        chart = Figure(figsize=(6.4, 3.4), layout="constrained")
        FigureCanvasAgg(chart)
        axes = chart.subplots()
        for method, (colour, marker, label) in LINES.items():
            if method in points:
                x, y = zip(*points[method], strict=True)
                axes.plot(x, y, color=colour, marker=marker, markersize=4, label=label)
        for method in ALTERNATIVES:
            for x, y in points.get(method, ()):
                axes.plot(x, y, color=POINTS, marker="D", markersize=5, linestyle="none")
                axes.annotate(
                    method, (x, y), (4, -9), textcoords="offset points", fontsize=7, color="#444444"
                )
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(TICKS, [f"{tick:.0%}" for tick in TICKS])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"bytes of {model}'s weights that are left")
        axes.set_ylabel(f"{figure} with the original")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower center")
        file = io.BytesIO()
        chart.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


@app.command()
def main(
    results: Path,
    model: Annotated[str, typer.Option(help="Name of a model in the results.")],
    write: Annotated[Path, typer.Option(help="SVG file.")],
    figure: Annotated[str, typer.Option(help="Figure of quality.")] = "agreement",
) -> None:
    """Draw one model."""
    points = read_points(field.read(results), model, figure)
    if not points:
        raise typer.BadParameter(f"{results}: there is no row of {model!r} with {figure!r}")
    write.write_bytes(draw(points, model, figure))


if __name__ == "__main__":
    app()
