"""Render a sweep as one HTML page, and its charts as an SVG file, without further packages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cobla_onnx.errors import UsageError
from cobla_onnx.report.amounts import percent_text
from cobla_onnx.report.html import template
from cobla_onnx.report.sweep_charts import front_charts
from cobla_onnx.text import safe_text
from cobla_onnx.wording import either

if TYPE_CHECKING:
    from cobla_onnx.calibration.evaluation.quality import Quality
    from cobla_onnx.report.sweep import Sweep, SweepPoint

__all__ = ["check_page", "page_of", "to_html", "to_svg"]


def check_page(path: Path) -> None:
    """Check, before any work, that the page can be written under this name.

    Raises
    ------
    UsageError
        If its extension is not ``.html``.
    """
    if path.suffix.lower() != ".html":
        shown = safe_text(str(path), 200)
        raise UsageError(
            f"{either(python=shown, command=f'--report {shown}')}: a sweep is shown as a page; "
            "give a name that ends in .html"
        )


def page_of(point: SweepPoint) -> Path | None:
    """Return where the page of a point's model stands: beside the model, if that was written."""
    if point.file is None or point.report is None:
        return None
    return Path(point.file).with_suffix(".html")


def to_html(found: Sweep, folder: Path, command: str | None = None) -> str:
    """Return the page.

    Parameters
    ----------
    folder : Path
        Where it will stand: the pages of models have links from there.
    command : str, optional
        The command line that makes it again.
    """
    measured = next((p.quality for p in found.made if p.quality is not None), None)
    return template("sweep.html").render(
        title=safe_text(found.input or "a model in memory", 120),
        found=found,
        charts=front_charts(found),
        points=[(point, _link(point, folder)) for point in found.made],
        refused=[point for point in found.points if point.refused],
        measured=measured,
        samples=_samples(measured, found.measure),
        compared=any(not point.ours for point in found.points),
        timed=any(point.latency is not None for point in found.made),
        command=command,
    )


def to_svg(found: Sweep) -> str:
    """Return the charts below each other, as a file of their own."""
    return template("front.svg").render(charts=front_charts(found))


def _link(point: SweepPoint, folder: Path) -> str | None:
    """Return a relative link to a model's page; one that cannot be relative is none."""
    page = page_of(point)
    if page is None:
        return None
    try:
        relative = os.path.relpath(page.resolve(), folder.resolve())
    except ValueError:
        # On Windows, another drive.
        return None
    return quote(Path(relative).as_posix())


def _samples(measured: Quality | None, name: str | None) -> str:
    """Say on what losses were measured, and how finely quality can tell points apart."""
    if measured is None:
        return (
            "No data was given: the loss is the sum of relative squared errors of the weights, "
            "which says little of the answers."
        )
    text = f"Loss and {name} were measured on {measured.counted}."
    if name == "drop":
        text += (
            " Nothing tells whether an output holds classes or values: the drop is the agreement "
            "that is lost, or the relative error where that is worse."
        )
    if measured.positions and name != "drop":
        text += f" One of these positions is {percent_text(1 / measured.positions)}."
    return text
