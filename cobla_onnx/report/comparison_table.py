"""Table of a comparison of two models, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cobla_onnx.report.amounts import count_text
from cobla_onnx.report.terminal import output_text
from cobla_onnx.text import numbered, safe_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cobla_onnx.calibration.evaluation.outputs import OutputComparison
    from cobla_onnx.report.comparison import ModelComparison, ModelFacts

__all__ = ["comparison_table"]


def comparison_table(found: ModelComparison) -> RenderableType:
    """Return sizes and times of both models, with the deviation of their outputs below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("A", "B", "B / A"):
        table.add_column(heading, justify="right", no_wrap=True)
    one, two = found.first, found.second
    for name, before, after in (
        ("file, bytes", one.file_bytes, two.file_bytes),
        ("weights, bytes", one.weight_bytes, two.weight_bytes),
        ("MACs", one.macs, two.macs),
        ("nodes", one.nodes, two.nodes),
    ):
        ratio = f"{after / before:.3f}" if before and after is not None else ""
        table.add_row(name, count_text(before), count_text(after), ratio)
    time = found.latency
    table.add_row(
        "latency, ms (median)", f"{time.before[0]:.3g}", f"{time.after[0]:.3g}", f"{time.ratio:.3f}"
    )
    table.add_row(
        "  10th to 90th percentile",
        *(f"{low:.3g} to {high:.3g}" for _, low, high in (time.before, time.after)),
        f"{time.low:.2f}-{time.high:.2f}",
    )
    shapes = ", ".join(
        f"{safe_text(name, 28)} {'x'.join(map(str, shape)) or 'scalar'}"
        for name, shape in found.timed_shapes.items()
    )
    lines = [
        f"A {_shown(one)}",
        f"B {_shown(two)}",
        "",
        f"latency: {time.repeats} runs of each in turn, {numbered(found.threads, 'thread')}, "
        f"{shapes};",
        "  beside the ratio its 95 % interval",
        f"outputs of B against A on {found.samples} samples, {safe_text(found.data, 60)}:",
        *map(_output_line, found.outputs),
        *(f"note: {safe_text(note, 300)}" for note in found.notes),
    ]
    return Group(*map(Text, lines[:3]), table, *map(Text, lines[2:]))


def _output_line(output: OutputComparison) -> str:
    return f"  {safe_text(output.name)}: {output_text(output, largest=True)}"


def _shown(model: ModelFacts) -> str:
    return "a model in memory" if model.path is None else safe_text(model.path, 120)
