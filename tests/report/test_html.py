"""The page's text: complete, self-contained, and no name becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.report.charts import history_chart, sparkline
from cobla_onnx.report.files import report_writer
from cobla_onnx.report.model import Spectrum
from tests.builders import small_network
from tests.report.reports import HOSTILE, full_report, small_report

VOID = {"meta", "link", "line", "polyline", "polygon", "br"}


class Strict(HTMLParser):
    """Collects elements and text; every element must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def full():
    return full_report()


@pytest.mark.parametrize("make", [small_report, full_report])
def test_the_page_needs_nothing_else_and_runs_nothing(make):
    page = Strict(make().to_html())
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "form", "base"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action"):
                assert value == "data:,"
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_hostile_names_are_shown_and_do_nothing(full):
    page = full.to_html()
    assert "\x1b" not in page
    assert "\u202e" not in page
    shown = Strict(page).text
    assert "</script><img src=x onerror=document.title='owned'>\\x1b[2J" in shown
    assert "<img" not in page


def test_everything_that_was_measured_is_on_the_page(full):
    page = Strict(full.to_html()).text
    for heading in (
        "Memory", "MACs", "Where this model stands", "Layers", "Left as they are", "Verification",
        "Latency", "Notes", "To make it again", "Search by the network's loss",
    ):  # fmt: skip
        assert heading in page, heading
    assert "12.5" in page
    assert "71.00 %" in page
    assert full.versions["onnxruntime"] in page
    assert full.machine["processor"] in page
    small = Strict(replace(full, latency=None, history=(), notes=()).to_html()).text
    for heading in ("Latency", "Notes", "Search by"):
        assert heading not in small


def test_a_model_that_needs_no_change(demo_model):
    report = compress(demo_model, Budget(mem=1.0)).report
    assert "copied unchanged" in Strict(report.to_html()).text
    assert "copied unchanged" in report.to_markdown()


def test_calibration_is_told(demo_model):
    data = demo_model.with_name("digits_calibration.npz")
    report = compress(
        demo_model, Budget(mem=0.5), data=data, samples=40, refit=False, threads=1
    ).report
    page = Strict(report.to_html()).text
    assert "were held back" in page
    assert "held-back samples" in page
    assert "Agreement" in page
    assert "Agreement on 8 held-back samples: 100 %" in report.to_markdown()
    assert "were held back" in report.to_markdown()
    assert report.command == (
        f"compress({str(demo_model)!r}, budget={Budget(mem=0.5)!r}, data={str(data)!r}, "
        "samples=40, refit=False, threads=1)"
    )


def test_in_a_notebook_the_page_is_in_a_frame_that_may_run_nothing():
    frame = Strict(small_report()._repr_html_())
    ((tag, attributes),) = frame.elements
    assert tag == "iframe"
    assert attributes["sandbox"] in ("", None)
    assert (attributes["srcdoc"] or "").startswith("<!doctype html>")


def test_markdown_lets_no_name_become_markup(full):
    text = full.to_markdown()
    assert "\x1b" not in text
    width = None
    for line in text.splitlines():
        if line.startswith("| ") and "`" in line:
            # Cells are parted by bars that are not escaped.
            cells = len(re.findall(r"(?<!\\)\|", line))
            width = cells if width is None else width
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        outside = re.sub(r"\\.", "", outside)
        if not line.startswith(("cobla-onnx", "```")):
            assert "<img" not in outside, line
            assert "[a](b)" not in outside, line
    assert text.startswith("# Compression report")
    assert "12.5 ms (12.1 to 13)" in text
    assert "## Notes" in text


def test_the_ending_says_the_form(tmp_path):
    report = small_report()
    assert report_writer("a.HTML")(report).startswith("<!doctype html>")
    assert report_writer("a.md")(report).startswith("# ")
    assert report_writer("a.json")(report).startswith("{")
    for name in ("a.txt", "a", ".html"):
        with pytest.raises(UsageError, match=r"\.json, \.html, \.md"):
            report_writer(tmp_path / name)


def test_results_write_their_report_with_the_command(tmp_path):
    result = compress(small_network(), Budget(mem=0.5))
    result.save_report(tmp_path / "r.md", ["/usr/bin/cobla-onnx", "in put.onnx", "--mem", "0.5"])
    assert "\ncobla-onnx 'in put.onnx' --mem 0.5\n" in (tmp_path / "r.md").read_text("utf-8")
    result.save_report(tmp_path / "r.html")
    page = Strict((tmp_path / "r.html").read_text("utf-8")).text
    assert f"compress(<ModelProto>, budget={Budget(mem=0.5)!r})" in page


def test_json_holds_spectra_fronts_and_history(full):
    content = full.to_dict()
    spectra = [layer["spectrum"] for layer in content["layers"] if layer["spectrum"]]
    assert all(len(s["ranks"]) == len(s["values"]) <= 64 for s in spectra)
    assert spectra[0]["values"][0] == 1.0
    for layer in content["layers"]:
        if layer["decision"] == "factorised":
            ranks = layer["spectrum"]["ranks"]
            assert {layer["rank"], min(layer["rank"] + 1, ranks[-1])} <= set(ranks)
    front = content["solver"]["fronts"]["mem"]
    assert front["kept"][0] == 1.0
    assert front["losses"] == tuple(sorted(front["losses"]))
    assert content["history"][3]["loss"] is None
    full.to_json()


def test_sparklines_end_at_the_cut():
    drawn = sparkline(Spectrum("matrix", (1, 2, 3, 4), (1.0, 0.1, 0.01, 1e-9)), 2)
    assert drawn.cut == 60.0
    assert drawn.kept == "0.0,28.0 0.0,0.0 30.0,0.0 30.0,9.3 60.0,9.3 60.0,28.0"
    assert drawn.lost.startswith("60.0,28.0 60.0,18.7")
    assert drawn.lost.endswith("120.0,28.0")
    assert sparkline(Spectrum("matrix", (1,), (1.0,)), None).lost == ""


def test_short_histories_have_no_chart(full):
    assert history_chart(full.history[:1]) is None
    chart = history_chart(full.history)
    assert chart is not None
    assert len(chart.line.split()) == 11
    assert HOSTILE not in chart.description
