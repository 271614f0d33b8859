"""Result of a sweep: a point for each budget and each alternative, and the Pareto front."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cobla_onnx.allocation import Budget
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.graph.io.model_file import write_atomically
from cobla_onnx.plan import Plan
from cobla_onnx.report.amounts import budget_name
from cobla_onnx.report.model import Report
from cobla_onnx.report.provenance import command_text
from cobla_onnx.report.serialise import Exported

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["COLUMNS", "OURS", "Sweep", "SweepPoint"]

OURS = "cobla-onnx"

COLUMNS = (
    "mem_budget", "mac_budget", "latency_budget", "mem", "mac", "latency",
    "loss", "measure", "quality", "drop", "front", "file", "refused", "file_bytes", "method",
)  # fmt: skip


@dataclass(frozen=True)
class SweepPoint:
    """One budget and its result, or what another method makes.

    Attributes
    ----------
    budget : Budget or None
        None for a method that takes none.
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
    file_bytes : int or None
        Bytes that the model takes on disk, with external data.
    method : str
        What made it: ``cobla-onnx``, or a quantiser of ``onnxruntime``.
    """

    budget: Budget | None
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
    file_bytes: int | None = None
    method: str = OURS

    @property
    def ours(self) -> bool:
        """Whether this package made it."""
        return self.method == OURS

    @property
    def name(self) -> str:
        """Its budget, or what else made it, for people."""
        if self.budget is None:
            return self.method.removeprefix("onnxruntime ")
        return budget_name(self.budget)

    def row(self) -> list[Any]:
        """Return the cells of a CSV row, by `COLUMNS`; empty where there is no value."""
        quality, budget = self.quality, self.budget
        cells = (
            budget and budget.mem, budget and budget.mac, budget and budget.latency,
            self.mem, self.mac, self.latency, self.loss,
            quality and quality.measure, quality and quality.after, quality and quality.drop,
            int(self.front), self.file, self.refused, self.file_bytes, self.method,
        )  # fmt: skip
        return ["" if cell is None else cell for cell in cells]


@dataclass(frozen=True)
class Sweep(Exported):
    """Result of `sweep`: `points` in the order of the budgets, then those of other methods.

    Attributes
    ----------
    input : str or None
        The file.
    objective : str
        Meaning of the points' `loss`: ``output`` or ``loss`` on held-back samples, or
        ``weights``.
    points : tuple of SweepPoint
    file_bytes : int or None
        Bytes of the original on disk; None for a model in memory.
    """

    input: str | None
    objective: str
    points: tuple[SweepPoint, ...]
    file_bytes: int | None = None

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The points that no other point dominates."""
        return tuple(point for point in self.points if point.front)

    @property
    def made(self) -> tuple[SweepPoint, ...]:
        """The points that have a model."""
        return tuple(point for point in self.points if not point.refused)

    @property
    def measure(self) -> str | None:
        """The measure of quality that all points have; ``drop`` if it is not the same for all.

        Of an output that may hold classes or values the worse reading counts, which is one for
        this point and the other for that.
        """
        found = {point.quality.measure for point in self.points if point.quality is not None}
        return "drop" if len(found) > 1 else next(iter(found), None)

    def quality_of(self, point: SweepPoint) -> float | None:
        """Return a point's quality in terms of `measure`; None if it has none."""
        if point.quality is None:
            return None
        return point.quality.drop if self.measure == "drop" else point.quality.after

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
            "file_bytes": self.file_bytes,
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

    def to_svg(self) -> str:
        """Draw loss, and quality where measured, against the bytes of the files, as SVG.

        Needs nothing that is not installed with the package.
        """
        from cobla_onnx.report.sweep_page import to_svg

        return to_svg(self)

    def to_html(self, folder: str | os.PathLike[str] = ".") -> str:
        """Return one self-contained page: the front as charts and as a table.

        Parameters
        ----------
        folder : path
            Of the page: models that were written have links to their own pages from there.
        """
        from cobla_onnx.report.sweep_page import to_html

        return to_html(self, Path(folder))

    def save_report(
        self, path: str | os.PathLike[str], arguments: Sequence[str] | None = None
    ) -> None:
        """Write `to_html`, and beside each model that was written its own page.

        Parameters
        ----------
        arguments : sequence of str, optional
            The command line to show, as in ``sys.argv``.

        Raises
        ------
        UsageError
            If the extension is not ``.html``.
        """
        from cobla_onnx.report.sweep_page import check_page, page_of, to_html

        page = Path(path)
        check_page(page)
        for point in self.points:
            own = page_of(point)
            if own is not None and point.report is not None:
                write_atomically(own, point.report.to_html().encode())
        command = None if arguments is None else command_text(arguments)
        write_atomically(page, to_html(self, page.parent, command).encode())

    def __rich__(self) -> RenderableType:
        from cobla_onnx.report.sweep_table import sweep_table

        return sweep_table(self)
