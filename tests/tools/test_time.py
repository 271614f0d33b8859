"""The benchmark of time: what is timed, and what the table says of it."""

from __future__ import annotations

import pytest


@pytest.fixture
def tool(tools, precision):
    """The tool, which takes its models from the other benchmark."""
    return tools("benchmark_time")


def test_seconds_belong_to_the_stage_that_was_named_last(tool, monkeypatch):
    now = iter([0.0, 1.0, 5.0, 7.0, 8.0])
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(now))
    clock = tool.StageClock()
    clock("a", 0, 1)
    clock("a", 1, 1)
    clock("b", 0, 1)
    clock("a", 0, 1)
    clock("end")
    assert clock.seconds == {"start": 1.0, "a": 4.0 + 1.0, "b": 2.0}


def test_the_table_tells_stages_in_passes_and_the_rest(tool):
    stages = {"start": 0.5, "refit": 6.0, "verify": 2.0}
    whole = {"exit_code": 0, "passes": [1.0, 3.0], "stages": stages, "peak_mb": 500}
    rows = {
        tool.key_of("m", 2, "all"): whole,
        tool.key_of("m", 2, "other"): whole | {"stages": {"start": 1.0}},
        tool.key_of("m", 2, "slow"): {"exit_code": -9, "stopped_after": 10},
        tool.key_of("m", 2, "bad"): {"exit_code": 3},
    }
    lines = [line.split("|")[3:-1] for line in tool.print_table(rows).splitlines()]
    found = {line[0].strip(): dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    told = {name: cell.strip() for name, cell in found["all"].items() if cell.strip()}
    assert {name.strip(): cell for name, cell in told.items()} == {
        "method": "all", "a pass, s": "2.00", "all, passes": "4.2", "refit": "3.0",
        "verify": "1.0", "other": "0.2", "peak MB": "500",
    }  # fmt: skip
    assert [found[name][" all, passes "].strip() for name in ("other", "slow", "bad")] == [
        "0.5", "not finished", "exit 3",
    ]  # fmt: skip


@pytest.mark.slow
def test_every_method_is_timed_once(tool, tmp_path, capfd):
    models, results = tmp_path / "models", tmp_path / "results.json"
    given = {"assets": tmp_path, "wheels": tmp_path, "models": models, "threads": "1"}
    for _ in range(2):
        tool.run(results, **given, only="", limit=100)
    rows = tool.field.read(results)
    assert len(rows) == len(tool.METHODS)
    assert {row["exit_code"] for row in rows.values()} == {0}
    for row in rows.values():
        assert all(seconds > 0 for seconds in row["passes"])
        assert sum(row["stages"].values()) < row["seconds"]
    # Nothing is measured twice.
    assert len([line for line in capfd.readouterr().err.splitlines() if " | 1 | " in line]) == 5
