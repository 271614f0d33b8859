"""Show the report in a terminal: a table of the layers and a few lines."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from cobla_onnx.calibration.evaluation.outputs import OutputComparison
from cobla_onnx.report.amounts import change_text, factor_text, kind_text, rank_text
from cobla_onnx.report.costs import Cost
from cobla_onnx.report.model import BudgetUse, Report
from cobla_onnx.text import numbered, safe_text, short_names

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["output_text", "render"]


def _totals(name: str, unit: str, use: BudgetUse) -> str:
    if use.reached is None or use.before is None or use.after is None:
        return f"{name}: not known"
    limit = f", budget {use.limit:g}" if use.limit is not None else ""
    factor = "as before" if use.after == use.before else "more than before"
    if use.after < use.before:
        factor = f"{factor_text(use.before, use.after)} smaller" if use.after else "all gone"
    amounts = change_text(Cost(use.before, use.after))
    return f"{name}: kept {use.reached:.4f} ({factor}{limit}), {amounts} {unit}"


def output_text(output: OutputComparison, largest: bool = False) -> str:
    """Say how far an output is from the original's, or that the comparison means nothing.

    Parameters
    ----------
    largest : bool
        Give the largest difference in place of the cosine.
    """
    if output.silence:
        return f"{output.silence}, so the comparison tells nothing"
    if output.equal is not None:
        return f"{output.equal:.1%} of the entries are equal"
    text = f"relative error {output.relative_l2:.3g}, "
    text += f"largest difference {output.max_abs:.3g}" if largest else f"cosine {output.cosine:.4f}"
    if output.argmax_agreement is not None:
        text += f", same arg-max {output.argmax_agreement:.1%}"
    if output.slice_error is not None:
        worst = f" ({output.worst})" if output.worst else ""
        text += f"; relative to each feature's spread {output.slice_error:.3g}{worst}"
    return text


def render(report: Report) -> RenderableType:
    """Render a report for the terminal with rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # With a column of bits, names fit 80 columns only where cells are one apart.
    table = Table(box=None, pad_edge=False, collapse_padding=report.has_bits, header_style="bold")
    for heading in ("layer", "op", "decision"):
        table.add_column(heading, overflow="fold")
    layers = [layer for layer in report.layers if layer.decision != "skipped"]
    bits = ["bits"] if report.has_bits else []
    for heading in ("rank", *bits, "parameters", "MACs", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = short_names([layer.name for layer in layers], 28)
    for layer in layers:
        cut = layer.replaced
        table.add_row(
            Text(names[layer.name]),
            layer.op,
            kind_text(layer),
            rank_text(layer),
            *([str(layer.bits or "")] if bits else []),
            change_text(layer.params),
            change_text(layer.macs),
            f"{layer.error:.3f}" if cut and layer.error is not None else "",
            style=None if cut else "dim",
        )
    lines = [Text(_totals(*row)) for row in _budget_rows(report)]
    lines += [Text(line) for line in (*_sizes(report), *_latency(report))]
    counts = [] if report.unchanged else [Text(report.layer_counts)]
    return Group(table, Text(""), *counts, *_left_alone(report), *lines, *_verdict(report))


def _sizes(report: Report) -> list[str]:
    """Lines on the file and on what a session holds, as far as they were measured."""
    sizes, lines = report.sizes, []
    if sizes.file.after is not None:
        zipped = "not measured" if sizes.zipped.after is None else change_text(sizes.zipped)
        lines.append(f"file: {change_text(sizes.file)} bytes, zipped {zipped}")
    if sizes.session.after is not None:
        lines.append(f"RAM: {change_text(sizes.session)} bytes of constants, once decoded")
    return lines


def _latency(report: Report) -> list[str]:
    """Lines on the measured time, and on the slowest layers."""
    time, limit = report.latency, report.budget["latency"].limit
    if time is None:
        return []
    before, after = time.before_ms, time.after_ms
    budget = f", budget {limit:g}" if limit is not None else ""
    lines = [
        f"latency: {time.ratio:.3f} ({time.ratio_low:.3f} to {time.ratio_high:.3f}{budget}), "
        f"{before.median:.3g} ms ({before.low:.3g} to {before.high:.3g}) → {after.median:.3g} ms "
        f"({after.low:.3g} to {after.high:.3g}), {time.repeats} runs in turn, "
        f"{numbered(time.threads, 'thread')}, {time.provider}"
    ]
    cut = [layer for layer in time.layers if layer.after_ms != layer.before_ms]
    names = short_names([layer.name for layer in time.layers], 40)
    lines += [
        f"  {names[layer.name]}: {layer.before_ms:.3g} → {layer.after_ms:.3g} ms alone"
        for layer in cut
    ]
    whole = [names[layer.name] for layer in time.layers if layer not in cut]
    if whole:
        lines.append(f"  as before, of the slowest: {', '.join(whole)}")
    return lines


def _budget_rows(report: Report) -> list[tuple[str, str, BudgetUse]]:
    return [
        ("memory", "bytes of weights", report.budget["mem"]),
        ("MACs", "MACs", report.budget["mac"]),
    ]


def _left_alone(report: Report) -> list[Any]:
    from rich.text import Text

    reasons = Counter(
        (layer.decision, layer.reason)
        for layer in report.layers
        if not layer.replaced and not report.unchanged
    )
    words = {"whole": "kept whole", "skipped": "left alone"}
    return [
        Text(f"{words[decision]}: {count} x {safe_text(reason, 60)}")
        for (decision, reason), count in reasons.items()
    ]


def _verdict(report: Report) -> list[Any]:
    from rich.text import Text

    lines = []
    if report.solver is not None:
        s = report.solver
        line = f"solver: {s.name}, {s.objective} {s.value:.4g}"
        if s.lower_bound is not None and s.gap is not None:
            line += f", at least {s.lower_bound:.4g} within these budgets (gap {s.gap:.2%})"
        lines.append(line)
    seen = report.calibration
    if seen is not None:
        lines.append(
            f"calibrated on {seen.calibration_samples} samples; loss on {seen.selection_samples} "
            f"held back {seen.loss:.4g} (before refit of {numbered(seen.refitted, 'layer')} "
            f"{seen.loss_before_refit:.4g})"
        )
        if seen.distillation is not None:
            lines.append(safe_text(seen.distillation.text, 600))
    check = report.verification
    if check is not None:
        lines.append(
            f"verified in onnxruntime on {check.samples} samples of {check.data} data: "
            f"rewrite exact to {check.rewrite_max_error:.1g}"
        )
        for output in check.outputs:
            lines.append(f"  {safe_text(output.name)}: {output_text(output)}")
    if report.arithmetic is not None:
        lines.append(report.arithmetic.text)
        names = [safe_text(name, 80) for name in report.arithmetic.left]
        lines += [f"  in floating point: {', '.join(names)}"] if names else []
    if report.unchanged:
        lines.append("the budgets are met as it is: the model is copied unchanged")
    lines.extend(f"note: {safe_text(note, 300)}" for note in report.notes)
    return [Text(line) for line in lines]
