"""The golden record is the same when made twice, and notices what is not."""

from __future__ import annotations

import json

from typer.testing import CliRunner


def test_a_run_is_the_same_twice_and_any_change_is_noticed(tools, tmp_path):
    golden, file = tools("golden"), tmp_path / "golden.json"

    def call(*arguments: str):
        return CliRunner().invoke(golden.app, [*arguments, "--only", "latency"])

    assert call("record", str(file)).exit_code == 0
    again = call("check", str(file))
    assert (again.exit_code, "1 runs are the same, 0 differ" in again.stdout) == (0, True)

    content = json.loads(file.read_text())
    assert content["runs"]["latency"].keys() >= {"model", "plan", "html", "file profile.json"}
    content["runs"]["latency"]["model"] = "0" * 64
    file.write_text(json.dumps(content))
    changed = call("check", str(file), "--seed", "1")
    assert changed.exit_code == 1
    assert "latency: report: differs" in changed.stdout
    assert "latency:   seed: 0 -> 1" in changed.stdout
    assert "latency: model: differs" in changed.stdout
    assert "plan: differs" not in changed.stdout


def test_a_run_that_is_missing_is_noticed(tools, tmp_path):
    golden, file = tools("golden"), tmp_path / "golden.json"
    file.write_text(json.dumps({"made_with": {}, "runs": {"gone": {}}}))
    found = CliRunner().invoke(golden.app, ["check", str(file), "--only", "gone"])
    assert found.exit_code == 1
    assert "gone: only in the record" in found.stdout
