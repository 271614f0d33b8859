"""Documents and tables of results: every renderer shows what the result holds."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from cobla_onnx import Budget, compare, sweep
from cobla_onnx.errors import UsageError
from cobla_onnx.report.comparison import ModelComparison, ModelFacts
from cobla_onnx.report.comparison_table import comparison_table
from cobla_onnx.report.costs import Cost
from cobla_onnx.report.html import to_frame, to_html
from cobla_onnx.report.markdown import to_markdown
from cobla_onnx.report.sweep_plot import check_plot
from cobla_onnx.report.sweep_table import sweep_table
from cobla_onnx.report.terminal import output_text, render
from tests.builders import small_network
from tests.report.reports import small_report, stored_report


def shown(renderable: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(renderable)
    return out.getvalue()


def test_a_report_is_rendered_by_its_renderers():
    report = small_report()
    assert report.to_html() == to_html(report)
    assert report.to_markdown() == to_markdown(report)
    assert shown(report) == shown(render(report))
    assert to_frame(report).startswith("<iframe")
    for layer in report.layers:
        assert layer.name in to_html(report)
        assert layer.name in to_markdown(report)
        assert layer.name in shown(render(report))
    outputs = report.verification.outputs
    assert outputs
    assert all(output_text(output) in shown(render(report)) for output in outputs)


@pytest.mark.parametrize(
    ("after", "said"),
    [(50, "2.0x smaller"), (100, "as before"), (125, "more than before"), (0, "all gone")],
)
def test_what_became_of_a_cost_is_said_in_words(after, said):
    """Lookups of low rank take more MACs than the table's own."""
    report = small_report()
    use = replace(report.budget["mac"], before=100, after=after, reached=after / 100, limit=None)
    text = shown(render(replace(report, budget={**report.budget, "mac": use})))
    assert f"MACs: kept {after / 100:.4f} ({said})" in text


def test_names_stay_whole_in_80_columns_beside_bits():
    report = stored_report()
    layers = [
        replace(
            layer,
            name=f"stage{number}/conv1",
            scheme="spatial-wh",
            rank=25,
            full_rank=192,
            bits=3,
            params=Cost(36900, 9600),
            macs=Cost(2_360_000, 614_000),
        )
        for number, layer in enumerate(report.layers)
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(replace(report, layers=tuple(layers)))
    for layer in layers:
        assert layer.name in out.getvalue()


def test_bits_have_a_column_of_their_own_where_there_are_any():
    report, ranks = stored_report(), small_report()
    whole, cut, stored = report.layers
    assert (whole.rank, whole.bits) == (None, None)
    assert (cut.rank, cut.bits) == (2, None)
    assert (stored.rank, stored.bits) == (None, 4)
    counts = "2 of 3 layers compressed: 1 factorised, 1 stored in fewer bits"
    for text in (shown(report), report.to_markdown(), report.to_html()):
        assert counts in text
    row = next(line for line in report.to_markdown().splitlines() if "`fc`" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2:5] == ["stored", str(stored.full_rank), "4"]
    assert re.search(r"fc +Gemm +stored +\d+ +4 ", shown(report))
    assert 'data-label="Bits" class="right">4<' in report.to_html()
    assert "bits" not in shown(ranks).splitlines()[0]
    assert "| bits |" not in ranks.to_markdown()
    assert ">Bits<" not in ranks.to_html()
    assert f"of {len(ranks.layers)} layers factorised" in shown(ranks)


def test_a_comparison_shows_both_models():
    found = compare(small_network(), small_network(), threads=1)
    assert isinstance(found, ModelComparison)
    assert isinstance(found.first, ModelFacts)
    text = shown(comparison_table(found))
    assert text == shown(found)
    assert "a model in memory" in text
    assert all(output.name in text for output in found.outputs)


def test_a_sweep_has_a_row_for_each_budget(tmp_path):
    budgets = [Budget(mem=0.6), Budget(mem=0.8)]
    found = sweep(small_network(), budgets, threads=1, solver="milp")
    text = shown(sweep_table(found))
    assert text == shown(found)
    assert all(f"{point.mem:.4f}" in text for point in found.points)
    with pytest.raises(UsageError, match=r"ends in \.svg or \.png"):
        check_plot(tmp_path / "plot.txt")
