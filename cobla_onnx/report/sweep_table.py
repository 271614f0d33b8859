"""Table of a sweep, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.report.amounts import count_text
from cobla_onnx.text import safe_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cobla_onnx.report.sweep import Sweep

__all__ = ["sweep_table"]


def sweep_table(found: Sweep) -> RenderableType:
    """Return a row for each point, with the meaning of the columns below."""
    measured = [point.quality for point in found.points if point.quality is not None]
    measure = found.measure
    timed = any(point.latency is not None for point in found.points)
    gap = 1 if timed else 2
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    headings = ["budget", "file", "memory", "MACs", *(["latency"] if timed else []), "loss"]
    headings += [*([measure] if measure else []), "front"]
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    notes = []
    for point in found.points:
        if point.refused:
            table.add_row(point.name, "-", style="dim")
            what = "out of reach: " * point.ours
            notes.append(f"{point.name}: {what}{safe_text(point.refused, 300)}")
            continue
        cells = [count_text(point.file_bytes), _fraction(point.mem), _fraction(point.mac)]
        cells += [_fraction(point.latency)] if timed else []
        cells.append(f"{point.loss or 0.0:.4g}")
        if measure:
            quality = found.quality_of(point)
            cells.append("" if quality is None else f"{quality:.4f}")
        style = None if point.front else "dim"
        table.add_row(point.name, *cells, "*" if point.front else "", style=style)
    whole = "" if found.file_bytes is None else f"; the original has {count_text(found.file_bytes)}"
    lines = [
        f"file: bytes on disk{whole}",
        f"memory, MACs{', latency' * timed}: fraction of the original that is kept",
        _loss_meaning(found, measured),
        "front: no other point is at least as good in memory, MACs and loss",
        *_alternatives(found),
    ]
    return Group(table, *(Text(line) for line in (*lines, *notes)))


def _fraction(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _alternatives(found: Sweep) -> list[str]:
    names = [point.name for point in found.points if not point.ours]
    if not names:
        return []
    return ["without a budget: onnxruntime's quantisers, judged on the same samples"]


def _loss_meaning(found: Sweep, measured: Sequence[Quality]) -> str:
    if not measured:
        return "loss: relative weight errors, summed; give --data to measure outputs"
    what = f"loss, {found.measure}: on {measured[0].samples} held-back samples"
    return what + "; drop: agreement lost, or the error if worse" * (found.measure == "drop")
