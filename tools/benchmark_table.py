"""Results of the benchmark as tables in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap", "gap", "print_tables"]

COMPARED = {
    "ours less BALF's": ("ours", "BALF's criterion"),
    "loss less output": ("ours, loss", "ours"),
}
"""Rows of paired differences: in agreement, and in the loss."""


def bootstrap(
    ours: NDArray[np.float64], other: NDArray[np.float64], draws: int = 4000
) -> tuple[float, float]:
    """95 % interval of the mean difference, over paired test samples."""
    difference = ours - other
    chosen = np.random.default_rng(0).integers(0, len(difference), (draws, len(difference)))
    low, high = np.percentile(difference[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def print_tables(
    rows: Sequence[dict[str, Any]], tasks: Sequence[str], methods: Sequence[str]
) -> None:
    """Print the tables of each task, methods in the given order."""
    for task in tasks:
        mine = [row for row in rows if row["task"] == task]
        if mine:
            print(f"\n### {task}\n")
            _tables(mine, methods)


def _tables(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
    by = {(row["method"], row["kind"], row["value"]): row for row in rows}
    names = [name for name in methods if any(k[0] == name for k in by)]
    classes = any("agreement" in row for row in rows)
    what = "agreement with the original / KL" if classes else "SQNR in dB / relative squared error"
    tops = {row["top1_original"] for row in rows if "top1_original" in row}
    if tops:
        print(f"Top-1 of the original on the test images: {max(tops):.1%}.\n")
    for kind in ("mem", "mac"):
        values = sorted({k[2] for k in by if k[1] == kind}, reverse=True)
        if not values:
            continue
        print(f"{what}, `--{kind}`:\n")
        print("| method | " + " | ".join(f"{v:g}" for v in values) + " |")
        print("| --- |" + " --- |" * len(values))
        for name in names:
            cells = [_cell(by.get((name, kind, v))) for v in values]
            if any(cell != "" for cell in cells):
                print(f"| {name} | " + " | ".join(cells) + " |")
        if tops:
            for name in ("ours", "ours, loss"):
                kept = [_top1(by.get((name, kind, v))) for v in values]
                if any(kept):
                    print(f"| *top-1 of {name}* | " + " | ".join(kept) + " |")
        for heading, pair in COMPARED.items():
            gaps = [_gap(by, pair, kind, v) for v in values]
            if any(gaps):
                print(f"| *{heading}, 95 %* | " + " | ".join(gaps) + " |")
        print()
    _footnotes(rows)


def _footnotes(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "none":
            print(
                f"{row['method']} has no budget: memory {row['mem']:.3f}, MACs {row['mac']:.3f}, "
                f"{_cell(row)}."
            )
    for name in ("ours", "ours, loss", "ours, data-free", "BALF's criterion"):
        mine = [row for row in rows if row["method"] == name and "seconds" in row]
        if mine:
            each = float(np.median([row["seconds"] for row in mine]))
            most = max(row["peak_mb"] for row in mine)
            print(
                f"{name}: analysis {mine[0]['analysis_seconds']:.0f} s, {each:.0f} s a budget "
                f"(median), peak memory {most:.0f} MB, images included."
            )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "unreachable" in row:
        return "not reachable"
    if "agreement" in row:
        return f"{row['agreement']:.1%} / {row['loss']:.3g}"
    quality = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
    return f"{quality} / {row['loss']:.3g}"


def _top1(row: dict[str, Any] | None) -> str:
    return f"{row['top1']:.1%}" if row is not None and "top1" in row else ""


def _gap(by: Mapping[Any, dict[str, Any]], names: tuple[str, str], kind: str, value: float) -> str:
    ours, other = (by.get((name, kind, value), {}) for name in names)
    return gap(ours, other)


def gap(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Intervals of the differences in agreement and in the loss, of what both rows have."""
    found = []
    if "same" in ours and "same" in other:
        low, high = bootstrap(_bits(ours), _bits(other))
        found.append(f"{low:+.1%} to {high:+.1%}")
    if "losses" in ours and "losses" in other:
        low, high = bootstrap(np.array(ours["losses"]), np.array(other["losses"]))
        found.append(f"{low:+.2g} to {high:+.2g}")
    return " / ".join(found)


def _bits(row: Mapping[str, Any]) -> NDArray[np.float64]:
    """1 for each test sample on which the most likely class stayed the same."""
    packed = np.frombuffer(bytes.fromhex(row["same"]), np.uint8)
    return np.unpackbits(packed)[: row["samples"]].astype(np.float64)
