"""Tables of what ``tools/benchmark_precision.py`` measured, in Markdown."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import field
from benchmark_table import gap
from precision_methods import (
    ALTERNATIVES,
    LEARNED,
    METHODS,
    NOT_APPLICABLE,
    OURS,
    UNREACHABLE,
)

__all__ = [
    "BUDGETS",
    "THREADS",
    "Row",
    "equal_bytes",
    "made",
    "print_learned",
    "print_tables",
    "quality_of",
]

BUDGETS = (0.5, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1, 0.075)
THREADS = (1, 2)

Row = dict[str, Any]
"""What was measured of a model under a method at a budget, as it stands in the results."""


def print_tables(rows: Mapping[str, Row], names: Sequence[str]) -> str:
    """Return two tables for each model: methods at budgets, and alternatives beside `auto`."""
    parts = []
    for name in names:
        mine = {
            (method, budget): row
            for key, row in rows.items()
            for subject, method, budget in [key.split(" | ")]
            if subject == name
        }
        if mine:
            tables = ["\n".join(each) for each in (_budgets(mine), _alternatives(mine)) if each]
            parts.append("\n\n".join([f"### {name}, in bits", *tables]))
    return "\n\n".join(parts)


def print_learned(rows: Mapping[str, Row], names: Sequence[str]) -> str:
    """Return the table of what has learned."""
    heads = ("budget", "how", "before", "after", "after less before, 95 %", "s, before", "after")
    lines = [field.line("model", heads), field.line("---", ["---"] * len(heads))]
    for name in names:
        for key, after in rows.items():
            subject, method, budget = key.split(" | ")
            if subject != name or method not in LEARNED:
                continue
            base = method.partition(",")[0]
            before = rows.get(f"{name} | {base} | {budget}", {})
            if not (made(before) and made(after)):
                continue
            cells = [budget, method, quality_of(before), quality_of(after)]
            cells.append(gap(_pairable(after), _pairable(before)))
            cells += [_from_cache(row, f"{row['seconds']:.0f}") for row in (before, after)]
            lines.append(field.line(name, cells))
    return "\n".join(lines)


def _budgets(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    """Table of the methods that take a budget, at those of `BUDGETS` that there are."""
    methods = [m for m in METHODS if METHODS[m].budgeted]
    columns = [f"{b:g}" for b in BUDGETS if any((m, f"{b:g}") in rows for m in methods)]
    lines = (
        [field.line("method", columns), field.line("---", ["---"] * len(columns))]
        if columns
        else []
    )

    def add(heading: str, show: Callable[[Row], str], method: str) -> None:
        cells = [show(rows[method, c]) if (method, c) in rows else "" for c in columns]
        if any(cells):
            lines.append(field.line(heading, cells))

    for method in methods:
        add(method, quality_of, method)
    for other in methods:
        if other != "auto":
            cells = [gap(*(_pairable(rows.get((m, c))) for m in ("auto", other))) for c in columns]
            if any(cells):
                lines.append(field.line(f"*auto less {other}, 95 %*", cells))
    for method in OURS:
        add(f"*CPU s / peak MB, {method}*", _spent, method)
    add(
        "*file / held, auto*",
        lambda row: f"{row['file']:.3f} / {row['held']:.3f}" if made(row) else "",
        "auto",
    )
    for method in OURS:
        add(f"*time with 1, 2 threads, {method}*", _latency, method)
    return lines


def _alternatives(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    """Table of what has the bytes that it has, each beside `auto` at as many."""
    heads = ("bytes", "file", "held", "its figures", "auto's at these bytes", "auto less it, 95 %")
    heads = (*heads, "CPU s / peak MB", "auto's", "time with 1, 2 threads", "auto's")
    lines = [field.line("alternative", heads), field.line("---", ["---"] * len(heads))]
    for method in ALTERNATIVES:
        row = rows.get((method, "as it is"))
        if row is None:
            continue
        cells = [f"{row[part]:.3f}" if made(row) else "" for part in ("mem", "file", "held")]
        budget = equal_bytes(row)
        other = rows.get(("auto", f"{budget:g}"), {}) if budget is not None else {}
        cells += [quality_of(row), quality_of(other) if other else ""]
        cells.append(gap(_pairable(other), _pairable(row)))
        cells += [_spent(row), _spent(other), _latency(row), _latency(other)]
        lines.append(field.line(method, cells))
    return lines if len(lines) > 2 else []


def made(row: Row) -> bool:
    """Whether there is a model that runs."""
    return row.get("exit_code") == 0


def _pairable(row: Row | None) -> Mapping[str, Any]:
    """Return what intervals are made of: figures by sample, where there are any."""
    return row["quality"] if row and made(row) else {}


def quality_of(row: Row) -> str:
    """How well the model does, or why there is none."""
    if "stopped_after" in row:
        return "not finished"
    if not made(row):
        known = {UNREACHABLE: "not reachable", NOT_APPLICABLE: "does not apply"}
        return known.get(row["exit_code"], "fails")
    found = row["quality"]
    if "agreement" in found and "loss" in found:
        return f"{found['agreement']:.1%} / {found['loss']:.3g}"
    if "psnr_db" in found:
        return f"{found['psnr_db']:.1f} dB / {found['loss']:.3g}"
    figures = {k: v for k, v in found.items() if isinstance(v, float)}
    return ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())


def _spent(row: Row) -> str:
    """Time and memory, in brackets where an earlier run's cache was at hand."""
    if not made(row):
        return ""
    return _from_cache(row, f"{row['cpu_seconds']:.0f} / {row['peak_mb']:.0f}")


def _from_cache(row: Row, spent: str) -> str:
    return f"({spent})" if row.get("cached") else spent


def _latency(row: Row) -> str:
    ratios = [row["latency"][str(threads)]["ratio"] for threads in THREADS if "latency" in row]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def equal_bytes(row: Row) -> float | None:
    """Return the budget that allows the bytes of an alternative, None if it saves nothing.

    Rounded down, so that it never allows more.
    """
    return math.floor(row["mem"] * 1e5) / 1e5 if row.get("mem", 1) < 1 else None
