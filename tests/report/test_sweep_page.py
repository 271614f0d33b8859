"""The page and the chart of a sweep: complete, self-contained, every point drawn once."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from cobla_onnx import Budget, sweep
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.errors import UsageError
from cobla_onnx.report.charts import HEIGHT, WIDTH
from cobla_onnx.report.sweep import Sweep, SweepPoint
from cobla_onnx.report.sweep_charts import LETTER, LINE, front_charts
from cobla_onnx.report.sweep_page import check_page, page_of
from tests.builders import small_network
from tests.report.reports import HOSTILE, small_report
from tests.report.test_html import Strict


def quality(after: float, measure: str = "agreement") -> Quality:
    return Quality(measure, 1.0, after, 1.0 - after, 40, "y", positions=40)


def point(mem: float, loss: float, **more) -> SweepPoint:
    given = {"budget": Budget(mem=mem), "quality": quality(1 - mem / 10), "front": True, **more}
    return SweepPoint(mem=mem, mac=1.0, loss=loss, file_bytes=round(1e5 * mem), **given)


def other(name: str, mem: float, loss: float, **more) -> SweepPoint:
    return point(mem, loss, budget=None, method=f"onnxruntime {name}", **more)


SMALL = Sweep(
    f"models/{HOSTILE}.onnx",
    "output",
    (
        point(0.1, 0.5),
        point(0.3, 0.01, front=False),
        point(0.6, 0.0),
        SweepPoint(Budget(mem=0.01), refused=HOSTILE),
        other("static QDQ, U8S8", 0.26, 0.02),
        other("quantize_dynamic", 0.25, 0.0201),
        other("float16", 0.59, 1e-6),
        SweepPoint(None, refused="needs onnx-ir", method="onnxruntime MatMulNBits, 4 bits"),
    ),
    100_000,
)


def test_the_page_needs_nothing_else_and_shows_all_points():
    text = SMALL.to_html()
    page = Strict(text)
    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "form"}
    assert {a["href"] for _, a in page.elements if "href" in a} == {"data:,"}
    assert "\x1b" not in text
    for name in ("mem 0.1", "mem 0.3", "static QDQ, U8S8", "needs onnx-ir", "Agreement"):
        assert name in page.text
    assert "measured on 40 held-back samples. One of these positions is 2.50 %." in page.text


def test_each_point_is_drawn_once_in_each_chart():
    charts = front_charts(SMALL)
    assert [chart.title for chart in charts] == [
        "Agreement against bytes of the file", "Loss against bytes of the file"
    ]  # fmt: skip
    for chart in charts:
        kinds = [place.kind for place in chart.places]
        assert sorted(kinds) == ["dominated", "front", "front", *["other"] * 3]
        assert all(0 <= p.x <= WIDTH and 0 <= p.y <= HEIGHT for p in chart.places)
        assert len(chart.line.split()) == 2
    # Fewer bytes stand left, less loss stands low.
    first = {place.title.partition(":")[0]: place for place in charts[1].places}
    assert first["mem 0.1"].x < first["mem 0.6"].x
    assert first["mem 0.1"].y < first["mem 0.6"].y


def test_names_beside_points_do_not_cover_each_other():
    crowd = [other(f"method {n}", 0.25, 0.02) for n in range(5)]
    (_, chart) = front_charts(replace(SMALL, points=(*SMALL.points, *crowd)))
    labels = [place.label for place in chart.places if place.label is not None]
    for number, one in enumerate(labels):
        for two in labels[:number]:
            near = abs(one.x - two.x) < LETTER * min(len(one.text), len(two.text))
            assert not (near and abs(one.y - two.y) < LINE)


def test_the_chart_is_a_file_of_its_own():
    text = SMALL.to_svg()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    marks = [e for e in root.iter() if e.get("class") in ("front", "dominated", "other")]
    assert len(marks) == 2 * 6
    assert SMALL.to_svg() == text


def test_where_measures_differ_the_drop_is_shown():
    mixed = replace(
        SMALL, points=(point(0.1, 0.5), other("a", 0.2, 0.1, quality=quality(0.3, "other")))
    )
    assert mixed.measure == "drop"
    assert mixed.quality_of(mixed.points[1]) == pytest.approx(0.7)
    assert "the drop is the agreement that is lost" in Strict(mixed.to_html()).text
    assert replace(SMALL, points=SMALL.points[:1]).measure == "agreement"
    assert replace(SMALL, points=()).to_svg().startswith("<svg")


def test_models_that_are_written_have_pages_and_links(tmp_path):
    models = tmp_path / "models: a"
    found = sweep(
        small_network(), [Budget(mem=0.6)], threads=1, solver="milp", out_dir=models,
        report=tmp_path / "sweep.html",
    )  # fmt: skip
    own = page_of(found.points[0])
    assert own == models / "model-mem-0.6.html"
    assert "Compression report" in own.read_text(encoding="utf-8")
    page = Strict((tmp_path / "sweep.html").read_text(encoding="utf-8"))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["models%3A%20a/model-mem-0.6.html"]
    assert "which says little of the answers" in page.text
    found.save_report(models / "s.html", ["cobla-onnx", "sweep", "in put.onnx"])
    again = (models / "s.html").read_text(encoding="utf-8")
    assert 'href="model-mem-0.6.html"' in again
    assert "cobla-onnx sweep &#39;in put.onnx&#39;" in again
    with pytest.raises(UsageError, match=r"ends in \.html"):
        found.save_report(tmp_path / "sweep.md")
    with pytest.raises(UsageError, match=r"ends in \.html"):
        check_page(tmp_path / "sweep")
    assert page_of(replace(found.points[0], file=None)) is None
    assert small_report().to_html()
