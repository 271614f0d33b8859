"""Render the report as Markdown, for a model card, an issue or a review."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from cobla_onnx.calibration.evaluation.outputs import OutputComparison
from cobla_onnx.report.amounts import change_text, count_text, kind_text, percent_text, rank_text
from cobla_onnx.report.in_words import in_words
from cobla_onnx.report.model import Report
from cobla_onnx.text import numbered, safe_text, short_names

__all__ = ["to_markdown"]


def to_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown.

    Names from the model's file are shown as code, and sentences are escaped, so that nothing in
    them becomes markup.
    """
    blocks = [
        f"# Compression report: {_code(report.input or 'a model in memory', 120)}",
        _totals(report),
        *_solver(report),
        *_in_words(report),
        "## Layers",
        *([] if report.unchanged else [f"{report.layer_counts}."]),
        _layers(report),
        *_left_alone(report),
        *_verification(report),
        *_calibration(report),
        *_arithmetic(report),
        *_latency(report),
        *_list("## Notes", [_plain(note, 600) for note in report.notes]),
        *_environment(report),
    ]
    return "\n\n".join(blocks) + "\n"


def _code(text: str, limit: int = 80) -> str:
    """Show a text as code: fences longer than any inside, no line breaks, no cell borders."""
    shown = safe_text(text, limit).replace("|", "\\|") or " "
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _plain(text: str, limit: int) -> str:
    """Escape every character of a sentence that has a meaning in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", safe_text(text, limit))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(heading: str, entries: Sequence[str]) -> list[str]:
    return [heading, "\n".join(f"* {entry}" for entry in entries)] if entries else []


def _totals(report: Report) -> str:
    if report.unchanged:
        return "The budgets are met as it is: the model is copied unchanged."
    rows = []
    for name, use in report.budget.items():
        if use.limit is None and use.reached is None:
            continue
        title = {"mem": "memory (bytes of weights)", "mac": "MACs"}.get(name, name)
        limit = "" if use.limit is None else percent_text(use.limit)
        costs = count_text(use.before), count_text(use.after)
        rows.append((title, *costs, percent_text(use.reached), limit))
    for title, cost in report.sizes.titled():
        if cost.after is not None:
            numbers = count_text(cost.before), count_text(cost.after), percent_text(cost.kept)
            rows.append((title, *numbers, ""))
    return _table(("cost", "before", "after", "kept", "budget"), rows)


def _solver(report: Report) -> list[str]:
    solver = report.solver
    if solver is None or report.unchanged:
        return []
    text = f"Objective {_code(solver.objective)} of {_code(solver.name)}: {solver.value:.4g}"
    if solver.lower_bound is not None and solver.gap is not None:
        text += (
            f"; no choice within these budgets is below {solver.lower_bound:.4g} "
            f"(gap {100 * solver.gap:.2f} %)"
        )
    return [text + "."]


def _in_words(report: Report) -> list[str]:
    blocks = ["## In words"]
    for paragraph in in_words(report):
        blocks.append(f"**{paragraph.title}.** {_plain(paragraph.text, 2000)}")
        lines = [f"* {_plain(line, 300)}" for line in paragraph.lines]
        blocks += ["\n".join(lines)] if lines else []
    return blocks


def _layers(report: Report) -> str:
    rows = []
    layers = [layer for layer in report.layers if layer.decision != "skipped"]
    shown = short_names([layer.name for layer in layers], 80)
    for layer in layers:
        cut = layer.replaced
        error = "" if not cut or layer.error is None else percent_text(layer.error)
        names = _code(shown[layer.name], 80), _code(layer.op, 30)
        numbers = [rank_text(layer), *([str(layer.bits or "")] if report.has_bits else [])]
        costs = change_text(layer.params), change_text(layer.macs)
        rows.append((*names, kind_text(layer), *numbers, *costs, error))
    bits = ["bits"] if report.has_bits else []
    return _table(("layer", "op", "decision", "rank", *bits, "parameters", "MACs", "error"), rows)


def _left_alone(report: Report) -> list[str]:
    if report.unchanged:
        return []
    reasons = Counter(layer.reason for layer in report.layers if not layer.replaced)
    entries = [f"{count} × {_plain(reason, 200)}" for reason, count in reasons.most_common()]
    return _list("## Left as they are", entries)


def _verification(report: Report) -> list[str]:
    check = report.verification
    if check is None:
        return []
    text = (
        f"In onnxruntime on {check.samples} samples of {check.data} data; the rewrite is exact "
        f"to {check.rewrite_max_error:.1g} of a layer's largest output."
    )
    rows = [(_code(output.name), *_measures(output)) for output in check.outputs]
    heads = (
        "output", "relative error", "cosine", "by feature", "worst feature", "SQNR", "same arg-max"
    )  # fmt: skip
    return ["## Verification", text, _table(heads, rows)]


def _measures(output: OutputComparison) -> tuple[str, ...]:
    if output.silence:
        return (f"tells nothing: {output.silence}", *[""] * 5)
    if output.equal is not None:
        return (f"{percent_text(output.equal)} of the entries equal", *[""] * 5)
    return (
        percent_text(output.relative_l2),
        "" if output.cosine is None else f"{output.cosine:.5f}",
        percent_text(output.slice_error),
        _plain(output.worst, 80),
        "" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB",
        "" if output.argmax_agreement is None else percent_text(output.argmax_agreement),
    )


def _calibration(report: Report) -> list[str]:
    seen = report.calibration
    if seen is None:
        return []
    learned = seen.distillation
    return [
        "## Calibration",
        f"{_code(seen.source, 300)}: {seen.calibration_samples} samples made the factors, "
        f"{seen.selection_samples} were held back. Loss on those {seen.loss:.4g}; before the "
        f"refit of {numbered(seen.refitted, 'layer')} {seen.loss_before_refit:.4g}. "
        f"{seen.quality.measure.capitalize()} on {seen.quality.counted}: "
        f"{percent_text(seen.quality.before)} → {percent_text(seen.quality.after)}.",
        *([] if learned is None else [f"{_plain(learned.text, 600)}."]),
    ]


def _arithmetic(report: Report) -> list[str]:
    said = report.arithmetic
    if said is None:
        return []
    left = [_code(name, 80) for name in said.left]
    return ["## 8-bit arithmetic", said.text + ".", *_list("In floating point:", left)]


def _latency(report: Report) -> list[str]:
    latency = report.latency
    if latency is None:
        return []
    before, after = latency.before_ms, latency.after_ms
    text = (
        f"{before.median:.3g} ms ({before.low:.3g} to {before.high:.3g}) → "
        f"{after.median:.3g} ms ({after.low:.3g} to {after.high:.3g}), ratio "
        f"{latency.ratio:.3f}; {_code(latency.provider)}, "
        f"{numbered(latency.threads, 'thread')}, {latency.repeats} interleaved repeats."
    )
    rows = [
        (_code(layer.name), f"{layer.before_ms:.3g}", f"{layer.after_ms:.3g}")
        for layer in latency.layers
    ]
    table = [_table(("layer", "before, ms", "after, ms"), rows)] if rows else []
    return ["## Latency", text, *table]


def _environment(report: Report) -> list[str]:
    facts = {**report.machine, **report.versions}
    entries = [f"{key}: {_code(value, 120)}" for key, value in facts.items()]
    entries.append(f"threads: {report.threads}, seed: {report.seed}, {report.seconds:.1f} s")
    command = [] if report.command is None else [_fenced(safe_text(report.command, 4000))]
    return ["## To make it again", *command, *_list("", entries)[1:]]


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
