"""Table of a sweep, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.report.amounts import budget_name
from cobla_onnx.text import safe_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cobla_onnx.report.sweep import Sweep

__all__ = ["sweep_table"]


def sweep_table(found: Sweep) -> RenderableType:
    """Return a row for each budget, with the meaning of the columns below."""
    measured = [point.quality for point in found.points if point.quality is not None]
    measure = measured[0].measure if measured else None
    table = Table(box=None, pad_edge=False, header_style="bold")
    timed = any(point.latency is not None for point in found.points)
    headings = ["budget", "memory", "MACs", *(["latency"] if timed else []), "loss"]
    headings += [*([measure] if measure else []), "front"]
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    notes = []
    for point in found.points:
        if point.refused:
            table.add_row(budget_name(point.budget), "out of reach", style="dim")
            notes.append(f"{budget_name(point.budget)}: {safe_text(point.refused, 300)}")
            continue
        cells = [_fraction(point.mem), _fraction(point.mac)]
        cells += [_fraction(point.latency)] if timed else []
        cells.append(f"{point.loss or 0.0:.4g}")
        if measure:
            cells.append("" if point.quality is None else f"{point.quality.after:.4f}")
        style = None if point.front else "dim"
        table.add_row(budget_name(point.budget), *cells, "*" if point.front else "", style=style)
    lines = [
        f"memory, MACs{', latency' * timed}: fraction of the original that is kept",
        _loss_meaning(found, measured),
        "front: no other point is at least as good in memory, MACs and loss",
    ]
    return Group(table, *(Text(line) for line in (*lines, *notes)))


def _fraction(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _loss_meaning(found: Sweep, measured: Sequence[Quality]) -> str:
    if not measured:
        return "loss: relative weight errors, summed; give --data to measure outputs"
    return f"loss, {measured[0].measure}: on {measured[0].samples} held-back samples"
