"""The picture of quality against bytes."""

from __future__ import annotations

import json

import pytest
import typer


def row(mem: float, agreement: float) -> dict[str, object]:
    return {"exit_code": 0, "mem": mem, "quality": {"agreement": agreement}}


@pytest.fixture
def results(tmp_path):
    rows = {
        "m | auto | 0.5": row(0.49, 0.99),
        "m | auto | 0.1": row(0.1, 0.9),
        "m | auto | 0.01": {"exit_code": 4},
        "m | float16 | as it is": row(0.5, 1.0),
        "other | auto | 0.3": row(0.3, 0.5),
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_points_are_of_models_that_were_made(tools, results):
    tool = tools("draw_front")
    found = tool.read_points(tool.field.read(results), "m", "agreement")
    assert found == {"auto": [(0.1, 0.9), (0.49, 0.99)], "float16": [(0.5, 1.0)]}


def test_the_same_results_give_the_same_picture(tools, results, tmp_path):
    pytest.importorskip("matplotlib")
    tool, pictures = tools("draw_front"), []
    for name in ("a.svg", "b.svg"):
        tool.main(results, "m", tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert b"</svg>" in pictures[0]


def test_a_model_that_is_not_there_is_named(tools, results, tmp_path):
    with pytest.raises(typer.BadParameter, match="no row of 'x'"):
        tools("draw_front").main(results, "x", tmp_path / "c.svg")
