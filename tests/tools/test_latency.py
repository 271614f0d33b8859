"""The benchmark of predicted and measured times: a small model at one budget of each kind."""

from __future__ import annotations

import onnx
import pytest

from tests.builders import small_network
from tests.latency.fakes import FakeStopwatch

# MACs of the small network.
WHOLE = 62208 + 124416 + 240


@pytest.fixture
def tool(tools, monkeypatch, tmp_path):
    """The tool, with a small model as the only one and times that follow its MACs."""
    found = tools("benchmark_latency")
    monkeypatch.setattr(found, "NAMES", ("small",))
    task = found.TASKS[0].__class__("small", "small.onnx", lambda assets: None, 0)
    monkeypatch.setattr(found, "TASKS", (task,))
    make = lambda threads: FakeStopwatch(threads, whole=WHOLE, overhead=20.0)  # noqa: E731
    monkeypatch.setattr(found, "Stopwatch", make)
    onnx.save(small_network(), tmp_path / "small.onnx")
    return found


def run(tool, folder, budgets):
    results = folder / "results.jsonl"
    given = {"assets": folder, "wheels": folder, "tasks": "", "grids": "1", "threads": 1}
    tool.run(results, kinds="mac,latency", budgets=budgets, **given)
    return {(key[3], key[4]): row for key, row in tool.read(results).items()}


def test_a_model_is_measured_under_each_kind_of_budget(tool, tmp_path, capsys):
    rows = run(tool, tmp_path, "0.7")
    assert set(rows) == {("mac", 0.7), ("latency", 0.7)}
    assert rows["mac", 0.7]["macs"] <= 0.7
    assert rows["mac", 0.7]["predicted"] is None
    timed = rows["latency", 0.7]
    assert timed["ratio"] <= 0.7
    assert timed["predicted"] == pytest.approx(timed["ratio"], abs=0.1)
    assert all(row["ranks"] for row in rows.values())
    assert (tmp_path / "results.1.profile.json").exists()
    capsys.readouterr()
    tool.table(tmp_path / "results.jsonl")
    lines = [line for line in capsys.readouterr().out.splitlines() if "small" in line]
    assert len(lines) == 2
    assert f"{timed['ratio']:.3f} (" in lines[1]


def test_what_is_too_slow_is_told(tool, tmp_path, capsys):
    rows = run(tool, tmp_path, "0.02")
    assert "fastest of" in rows["latency", 0.02]["unreachable"]
    tool.table(tmp_path / "results.jsonl")
    assert "not reachable" in capsys.readouterr().out


def test_nothing_is_measured_twice(tool, tmp_path, monkeypatch):
    first = run(tool, tmp_path, "0.7")
    monkeypatch.setattr(tool, "Bench", None)
    assert run(tool, tmp_path, "0.7") == first
