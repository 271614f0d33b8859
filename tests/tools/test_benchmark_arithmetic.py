"""The benchmark of arithmetic: what is compared with what, and that all methods run."""

from __future__ import annotations

from types import SimpleNamespace

import onnx
import pytest

from cobla_onnx.errors import BudgetError
from tests.builders import small_network


@pytest.fixture
def tool(tools, precision, monkeypatch):
    """The tool, with a small model as the only one."""
    tool = tools("benchmark_arithmetic")
    monkeypatch.setattr(tool, "NAMES", ("small",))
    return tool


def made(ratio: float, agreement: float, loss: float = 0.1) -> dict:
    return {
        "exit_code": 0,
        "latency": {"ratio": ratio},
        "quality": {"agreement": agreement, "loss": loss},
    }


def rows_of(tool, found: dict) -> dict:
    return {tool.key_of("small", 2, *key): row for key, row in found.items()}


def test_ours_stands_beside_the_best_of_those_that_are_as_fast(tool):
    rows = {
        (tool.BOTH, "0.5"): made(0.5, 0.9),
        (tool.RANKS, "0.5"): made(0.5, 0.7),
        ("static QDQ", tool.ALONE): made(0.51, 0.8),
        ("static QDQ, entropy", tool.ALONE): made(0.6, 0.99),
        ("8 bits, ours", tool.ALONE): made(0.4, 0.95),
        (tool.BOTH, "0.3"): made(0.3, 0.5),
        (tool.RANKS, "0.3"): {"refused": "too slow"},
    }
    assert tool._beside(rows, "0.5") == "(static QDQ)"
    assert tool._beside(rows, "0.3") == "no other is"
    shown = tool.print_tables(rows_of(tool, rows))
    assert "| method | as it is | 0.5 | 0.3 |" in shown
    assert "| ours |  | 0.500: 90.0% / 0.1 | 0.300: 50.0% / 0.1 |" in shown
    assert "| ranks alone |  | 0.500: 70.0% / 0.1 | not reachable |" in shown


def test_the_fastest_plan_stands_in_brackets_where_none_is_fast_enough(tool):
    rows = {
        (tool.BOTH, "0.3"): made(0.4, 0.5) | {"refused": "too slow"},
        (tool.RANKS, "0.3"): made(0.45, 0.9) | {"refused": "too slow"},
        ("static QDQ", tool.ALONE): made(0.39, 0.8),
    }
    # Beside it stands what takes no longer.
    assert tool._beside(rows, "0.3") == "(static QDQ)"
    assert "| ours |  | (0.400: 50.0% / 0.1) |" in tool.print_tables(rows_of(tool, rows))


def test_the_short_table_has_the_best_of_those_that_are_as_fast(tool, monkeypatch):
    rows = {
        (tool.BOTH, "0.5"): made(0.5, 0.9),
        (tool.RANKS, "0.5"): made(0.5, 0.7),
        ("static QDQ", tool.ALONE): made(0.45, 0.95),
        (tool.BOTH, "0.4"): made(0.4, 0.8),
        (tool.BOTH, "0.2"): made(0.3, 0.5) | {"refused": "too slow"},
    }
    lines = tool.print_short(rows_of(tool, rows)).splitlines()
    assert lines[0] == "| model, threads | 0.5 | 0.4 | 0.2 |"
    assert lines[2] == "| small, 2 | static QDQ: 95.0% | ours: 80.0% | none |"
    monkeypatch.setattr(tool, "NAMES", ("small", "large"))
    large = {tool.key_of("large", 2, tool.BOTH, "0.1"): made(0.1, 0.4)}
    lines = tool.print_short(large | rows_of(tool, rows)).splitlines()
    assert lines[2].endswith("| static QDQ: 95.0% | ours: 80.0% | none | not measured |")
    assert lines[3].endswith("| not measured | not measured | not measured | ours: 40.0% |")
    # What was made for no latency has no line.
    alone = {("static QDQ", tool.ALONE): made(0.45, 0.95)}
    assert len(tool.print_short(rows_of(tool, alone)).splitlines()) == 2


def test_one_figure_stands_for_a_task(tool):
    assert tool.figure_of({"loss": 0.1, "psnr_db": 23.04}) == "23.0 dB"
    assert tool.figure_of({"same_ten": 0.9, "losses": [0.1]}) == "same ten 0.900"


def test_a_task_without_classes_is_compared_by_its_figure_then_by_what_samples_lose(tool):
    better, worse = {"perplexity": 3.0, "losses": [0.1]}, {"perplexity": 9.0, "losses": [0.1]}
    assert tool._lost(better) < tool._lost(worse)
    masks = {"iou": 0.981, "losses": [0.2]}, {"iou": 0.979, "losses": [0.1]}
    assert tool._lost(masks[0]) < tool._lost(masks[1])
    assert tool._lost(masks[0]) < tool._lost({"iou": 0.981, "losses": [0.3]})


def test_of_as_many_answers_the_lesser_loss_is_better(tool):
    few, many = made(0.5, 0.9, loss=0.1)["quality"], made(0.5, 0.9, loss=0.2)["quality"]
    assert tool._lost(few) < tool._lost(many) < tool._lost(made(0.5, 0.8, loss=0.0)["quality"])


def test_models_whose_opset_is_too_old_are_lifted_for_all_methods(tool, tmp_path):
    path = tmp_path / "old.onnx"
    old = small_network()
    old.opset_import[0].version = 12
    onnx.save(old, path)
    subject = tool.Subject(path, tmp_path, lambda out: {})
    lifted = tool.with_scales(subject, "an old one", tmp_path)
    assert onnx.load(lifted.model).opset_import[0].version >= 13
    assert tool.with_scales(lifted, "an old one", tmp_path) == lifted


def test_what_was_reached_is_made_where_the_latency_is_not(tool, tmp_path):
    asked = []

    class Session:
        def compress(self, budget):
            asked.append(budget.latency)
            if budget.latency < 0.5:
                raise BudgetError("too slow", {"latency": 0.5})
            return SimpleNamespace(save=lambda path: path.touch())

    row = tool.within(Session(), 0.25, tmp_path)
    assert asked == [0.25, 0.5 * tool.NOISE]
    assert row["refused"] == "too slow"
    assert (tmp_path / "0.25.onnx").samefile(row["file"])
    assert tool.within(Session(), 0.6, tmp_path) == {"file": str(tmp_path / "0.6.onnx")}


@pytest.mark.parametrize(
    ("row", "said"),
    [({"exit_code": -9, "stopped_after": 9}, "not finished"), ({"exit_code": 1}, "fails")],
)
def test_what_was_not_made_says_so(tool, row, said):
    shown = tool.print_tables(rows_of(tool, {("static QDQ", tool.ALONE): row}))
    assert f"| static QDQ | {said} |" in shown


@pytest.mark.slow
def test_every_method_is_measured_once(tool, tmp_path, capfd):
    models, results = tmp_path / "models", tmp_path / "results.json"
    given = {"assets": tmp_path, "wheels": tmp_path, "models": models, "threads": "1"}
    for _ in range(2):
        tool.run(results, **given, only="", methods="", latencies="0.9", limit=100)
    rows = tool.field.read(results)
    assert {key.split(" | ")[2] for key in rows} == set(tool.METHODS)
    for row in rows.values():
        assert row["exit_code"] == 0
        assert row.get("refused") or row["latency"]["ratio"] > 0
    # Nothing is measured twice.
    assert len([line for line in capfd.readouterr().err.splitlines() if " | 1 | " in line]) == len(
        rows
    )
