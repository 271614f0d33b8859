"""Render the report as one HTML page that needs no scripts and no network.

Everything from the model's file, names above all, goes through `safe_text` here and is
escaped by the template: jinja2's autoescape is on and no markup is made in Python.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

from cobla_onnx.allocation.resources import RESOURCES
from cobla_onnx.report.amounts import count_text, factor_text, kind_text, percent_text, rank_text
from cobla_onnx.report.charts import (
    Chart,
    Sparkline,
    checkpoints_chart,
    front_chart,
    history_chart,
    sparkline,
)
from cobla_onnx.report.costs import Cost
from cobla_onnx.report.in_words import in_words
from cobla_onnx.report.model import BudgetUse, LayerReport, Report
from cobla_onnx.text import safe_text, short_names

if TYPE_CHECKING:
    import jinja2

__all__ = ["template", "to_frame", "to_html"]

OBJECTIVES = {
    "weights": "the relative squared error of the weights, summed over layers",
    "output": "the measured loss of cutting each layer alone, summed over layers",
}
KINDS = {"mem": ("Memory", "bytes of weights"), "mac": ("MACs", "multiply-accumulates")}


@dataclass(frozen=True)
class Bar:
    """A cost before and after, as widths in percent of the largest layer's."""

    before: float
    after: float
    text: str
    kept: str


@dataclass(frozen=True)
class Row:
    """One layer of the table."""

    name: str
    op: str
    shape: str
    cut: bool
    scheme: str
    rank: str
    bits: str
    spectrum: Sparkline | None
    params: Bar
    macs: Bar
    error: str


@dataclass(frozen=True)
class Meter:
    """A budget: the value reached and the limit, in percent."""

    title: str
    unit: str
    known: bool
    reached: float
    limit: float | None
    kept: str
    before: str
    after: str
    factor: str


def to_html(report: Report) -> str:
    """Return the page."""
    charts = [(title, chart) for title, chart in _charts(report) if chart is not None]
    return template("report.html").render(
        report=report,
        title=safe_text(report.input or "a model in memory", 120),
        latency=report.latency,
        limit=report.budget["latency"].limit if "latency" in report.budget else None,
        meters=[
            *(_meter(name, report.budget[name]) for name in KINDS if name in report.budget),
            *_size_meters(report),
        ],
        rows=_rows(report),
        skipped=_left_alone(report),
        prices=_prices(report),
        objective=None if report.solver is None else _objective(report.solver.objective),
        agreement=_agreement(report),
        charts=charts,
        paragraphs=in_words(report),
    )


def to_frame(report: Report) -> str:
    """Return the page inside a frame, for a notebook."""
    page = escape(to_html(report), quote=True)
    return (
        f'<iframe title="Compression report" srcdoc="{page}" sandbox '
        'style="width:100%;height:40rem;border:0"></iframe>'
    )


@cache
def template(name: str) -> jinja2.Template:
    """Return a template of this package, with the filters ``name``, ``count`` and ``percent``."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cobla_onnx.report.files", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(name=safe_text, count=count_text, percent=percent_text)
    return environment.get_template(name)


def _meter(name: str, use: BudgetUse) -> Meter:
    title, unit = KINDS[name]
    known = use.reached is not None and use.before is not None
    return Meter(
        title=title,
        unit=unit,
        known=known,
        reached=100 * (use.reached or 0.0),
        limit=None if use.limit is None else 100 * use.limit,
        kept=percent_text(use.reached),
        before=count_text(use.before),
        after=count_text(use.after),
        factor=factor_text(use.before, use.after, "×"),
    )


def _size_meters(report: Report) -> list[Meter]:
    """The file, and what a session holds in RAM, where they were measured."""
    sizes = report.sizes
    zipped = f"; zipped {count_text(sizes.zipped.before)} → {count_text(sizes.zipped.after)}"
    titled = (
        ("File", f"bytes{'; zipped not measured' if sizes.zipped.after is None else zipped}"),
        ("RAM", "bytes of constants once a session has decoded them"),
    )
    return [
        Meter(
            title=title,
            unit=unit,
            known=True,
            reached=100 * (cost.kept or 0.0),
            limit=None,
            kept=percent_text(cost.kept),
            before=count_text(cost.before),
            after=count_text(cost.after),
            factor=factor_text(cost.before, cost.after, "×"),
        )
        for (title, unit), cost in zip(titled, (sizes.file, sizes.session), strict=True)
        if cost.kept is not None
    ]


def _charts(report: Report) -> list[tuple[str, Chart | None]]:
    charts: list[tuple[str, Chart | None]] = []
    if report.solver is not None:
        for name, front in report.solver.fronts.items():
            use = report.budget[name]
            chart = front_chart(front, _noun(name), use.limit, use.reached, report.solver.value)
            charts.append((f"Where this model stands: {KINDS[name][0]}", chart))
    charts.append(("Search by the network's loss", history_chart(report.history)))
    learned = None if report.calibration is None else report.calibration.distillation
    if learned is not None:
        charts.append(("Distillation", checkpoints_chart(learned.checkpoints)))
    return charts


def _rows(report: Report) -> list[Row]:
    layers = [layer for layer in report.layers if layer.decision != "skipped"]
    params = max((layer.params.before or 0 for layer in layers), default=0)
    counted = (size for layer in layers for size in (layer.macs.before, layer.macs.after))
    macs = max((size or 0 for size in counted), default=0)
    names = short_names([layer.name for layer in layers], 80)
    return [_row(layer, names[layer.name], params, macs) for layer in layers]


def _row(layer: LayerReport, name: str, most_params: int, most_macs: int) -> Row:
    cut = layer.replaced
    spectrum = layer.spectrum
    return Row(
        name=name,
        op=safe_text(layer.op, 30),
        shape=" × ".join(map(str, layer.shape)),
        cut=cut,
        scheme=kind_text(layer) if cut else "kept whole",
        rank=rank_text(layer),
        bits=str(layer.bits or ""),
        spectrum=None if spectrum is None else sparkline(spectrum, layer.rank),
        params=_bar(layer.params, most_params),
        macs=_bar(layer.macs, most_macs),
        error=percent_text(layer.error) if cut and layer.error is not None else "",
    )


def _bar(cost: Cost, most: int) -> Bar:
    if cost.before is None or not most:
        return Bar(0.0, 0.0, count_text(cost.before), "")
    after = cost.before if cost.after is None else cost.after
    text = count_text(cost.before)
    if after != cost.before:
        text += f" → {count_text(after)}"
    kept = "" if cost.kept is None or after == cost.before else f"{cost.kept:.0%}"
    return Bar(round(100 * cost.before / most, 2), round(100 * after / most, 2), text, kept)


def _left_alone(report: Report) -> list[tuple[str, list[str]]]:
    """Reasons, with the names of the layers to which they apply."""
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in report.layers:
        if not layer.replaced and not report.unchanged:
            groups[safe_text(layer.reason, 200)].append(safe_text(layer.name, 80))
    return sorted(groups.items(), key=lambda entry: -len(entry[1]))


def _noun(cost: str) -> str:
    return next((resource.label for resource in RESOURCES if resource.name == cost), cost)


def _prices(report: Report) -> list[tuple[str, float]]:
    """Decrease of the objective for one more percentage point of each budget, if any."""
    prices = {} if report.solver is None else report.solver.multipliers
    return [(_noun(name), price / 100) for name, price in prices.items() if price > 0]


def _objective(name: str) -> str:
    return OBJECTIVES.get(name, "the loss of the network, by its gradient")


def _agreement(report: Report) -> tuple[str, str] | None:
    """Return the number that says most about quality, and its name."""
    check = report.verification
    if check is None or not check.outputs:
        return None
    where = f"{check.samples} {check.data} samples"
    outputs: Sequence[Any] = [output for output in check.outputs if not output.silence]
    if not outputs:
        return "?", f"{check.outputs[0].silence}, {where}: the comparison tells nothing"
    shares = [o.argmax_agreement for o in outputs if o.argmax_agreement is not None]
    if shares:
        return percent_text(min(shares)), f"same top class, {where}"
    equal = [o.equal for o in outputs if o.equal is not None]
    if equal:
        return percent_text(min(equal)), f"equal entries, {where}"
    worst = max(o.relative_l2 for o in outputs)
    return percent_text(worst), f"relative error, {where}"
