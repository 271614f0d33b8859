"""Result of a sweep: one point for each budget, and the Pareto front."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cobla_onnx.allocation import Budget
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.graph.io.model_file import write_atomically
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import Report
from cobla_onnx.report.serialise import Exported

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["COLUMNS", "Sweep", "SweepPoint"]

COLUMNS = (
    "mem_budget", "mac_budget", "latency_budget", "mem", "mac", "latency",
    "loss", "measure", "quality", "drop", "front", "file", "refused",
)  # fmt: skip


@dataclass(frozen=True)
class SweepPoint:
    """One budget and its result.

    Attributes
    ----------
    budget : Budget
    mem, mac, latency : float or None
        Fractions kept; None if the budget was refused, MACs are not known, or time was not
        measured.
    loss : float or None
        Loss on the selection split; without data the objective, the sum of weight errors.
    quality : Quality or None
        Accuracy, agreement or relative error on the selection split; needs data.
    front : bool
        Whether the point is on the Pareto front: no other is at least as good in memory, MACs
        and loss, and better in one. Latency does not count: its noise would put nearly every
        point on the front.
    plan : Plan or None
    report : Report or None
    file : str or None
        Path of the written model.
    refused : str or None
        Reason why there is no model.
    """

    budget: Budget
    mem: float | None = None
    mac: float | None = None
    latency: float | None = None
    loss: float | None = None
    quality: Quality | None = None
    front: bool = False
    plan: Plan | None = None
    report: Report | None = None
    file: str | None = None
    refused: str | None = None

    def row(self) -> list[Any]:
        """Return the cells of a CSV row, by `COLUMNS`; empty where there is no value."""
        quality = self.quality
        cells = (
            self.budget.mem, self.budget.mac, self.budget.latency,
            self.mem, self.mac, self.latency, self.loss,
            quality and quality.measure, quality and quality.after, quality and quality.drop,
            int(self.front), self.file, self.refused,
        )  # fmt: skip
        return ["" if cell is None else cell for cell in cells]


@dataclass(frozen=True)
class Sweep(Exported):
    """Result of `sweep`: `points` in the order of the budgets.

    Attributes
    ----------
    input : str or None
        The file.
    objective : str
        Meaning of the points' `loss`: ``output`` or ``loss`` on held-back samples, or
        ``weights``.
    points : tuple of SweepPoint
    """

    input: str | None
    objective: str
    points: tuple[SweepPoint, ...]

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The points that no other point dominates."""
        return tuple(point for point in self.points if point.front)

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as plain dicts and lists, each point with its whole report."""
        points = []
        for point in self.points:
            entry = asdict(replace(point, plan=None, report=None))
            entry["plan"] = None if point.plan is None else json.loads(point.plan.to_json())
            entry["report"] = None if point.report is None else point.report.to_dict()
            points.append(entry)
        return {
            "schema_version": self.schema_version,
            "input": self.input,
            "objective": self.objective,
            "points": points,
        }

    def to_csv(self) -> str:
        """Return a CSV row for each point; the columns are those of `COLUMNS`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(point.row() for point in self.points)
        return text.getvalue()

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_csv`, atomically."""
        write_atomically(path, self.to_csv().encode())

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the points, as ``.svg`` or ``.png`` by the extension of `path`.

        Raises
        ------
        UsageError
            If the extension is another, or matplotlib is not installed.
        """
        from cobla_onnx.report.sweep_plot import draw

        write_atomically(path, draw(self, Path(path)))

    def __rich__(self) -> RenderableType:
        from cobla_onnx.report.sweep_table import sweep_table

        return sweep_table(self)
