"""The benchmark's bookkeeping: times, intervals, tables; parts that can be switched off."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TOOLS


def row(method: str, losses: np.ndarray, same: np.ndarray | None) -> dict[str, object]:
    found = {
        "task": "digits", "method": method, "kind": "mem", "value": 0.5, "sqnr_db": 9.0,
        "losses": losses.tolist(), "loss": float(losses.mean()), "samples": len(losses),
    }  # fmt: skip
    if same is not None:
        found |= {"agreement": float(same.mean()), "same": np.packbits(same).tobytes().hex()}
    return found


def test_time_between_the_variants_does_not_count(tools):
    def made():
        time.sleep(0.02)
        yield "first", None
        time.sleep(0.02)
        yield "second", None

    seconds = {}
    for variant, _, spent in tools("benchmark").timed(made()):
        seconds[variant] = spent
        time.sleep(0.5)
    assert 0.02 <= seconds["first"] < seconds["second"] < 0.4


def test_intervals_are_paired_and_need_what_both_rows_have(tools):
    benchmark_table = tools("benchmark_table")
    generator = np.random.default_rng(0)
    hard = generator.exponential(size=200)
    same = generator.random(200) < 0.6
    # Samples differ a lot, but each is worse by a little: only pairing can tell.
    by = {
        ("a", "mem", 0.5): row("a", hard, same),
        ("b", "mem", 0.5): row("b", hard + 0.01 + 0.001 * generator.random(200), same),
        ("c", "mem", 0.5): row("c", hard, None),
    }
    low, high = benchmark_table.bootstrap(hard, np.array(by["b", "mem", 0.5]["losses"]))
    assert -0.011 < low < high < -0.01
    assert benchmark_table._gap(by, ("a", "b"), "mem", 0.5).startswith("+0.0% to +0.0% / -0.01")
    assert "%" not in benchmark_table._gap(by, ("a", "c"), "mem", 0.5)
    del by["b", "mem", 0.5]["losses"]
    assert benchmark_table._gap(by, ("a", "b"), "mem", 0.5) == "+0.0% to +0.0%"
    assert benchmark_table._gap(by, ("a", "missing"), "mem", 0.5) == ""


def test_what_has_learned_stands_beside_what_it_was(tools, tmp_path, capsys):
    benchmark = tools("benchmark")
    generator = np.random.default_rng(0)
    for name in ("ours, without refit", "ours", "ours, distilled"):
        line = row(name + benchmark.of_samples(40, 1), generator.random(20), np.ones(20, bool))
        line |= {"top1": 0.5, "seconds": 3.0, "analysis_seconds": 1.0}
        benchmark.append(tmp_path / "r.jsonl", line)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark.DISTILLED_BEGIN}\n{benchmark.DISTILLED_END}\n")
    benchmark.distilled(tmp_path / "r.jsonl", page)
    lines = [x for x in page.read_text().splitlines() if x.startswith("| digits")]
    assert [line.split(" | ")[2] for line in lines] == [
        "ours, 40 samples, seed 1", "ours, distilled, 40 samples, seed 1",
    ]  # fmt: skip
    assert lines[0].endswith("| 100.0% | " + lines[0].split(" | ")[4] + " | 50.0% | 4 |")


def test_tables_have_as_many_cells_as_columns(tools, tmp_path, capsys):
    benchmark = tools("benchmark")
    names = [v for n in benchmark.METHODS for v in benchmark.VARIANTS.get(n, (n,))]
    generator = np.random.default_rng(0)
    for name in (*names, "ours" + benchmark.of_samples(40)):
        for value in (0.5, 0.3):
            line = row(name, generator.random(20), generator.random(20) < 0.5)
            benchmark.append(tmp_path / "r.jsonl", line | {"value": value})
    benchmark.table(tmp_path / "r.jsonl")
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert {line.count("|") for line in lines} == {4}
    for name in (
        *names,
        "ours, 40 samples",
        "*ours less BALF's, 95 %*",
        "*loss less output, 95 %*",
    ):
        assert any(line.startswith(f"| {name} |") for line in lines)


def test_a_repeated_line_replaces_the_first(tools, tmp_path):
    benchmark = tools("benchmark")
    for loss in (0.5, 0.25):
        benchmark.append(tmp_path / "r.jsonl", row("ours", np.array([loss]), None))
    assert [x["loss"] for x in benchmark.read(tmp_path / "r.jsonl")] == [0.25]


@pytest.mark.slow
def test_what_is_distilled_learns_from_as_many_samples_as_are_asked_for(tools, tmp_path):
    benchmark = tools("benchmark")
    paths = tmp_path / "r.jsonl", Path(), Path()
    for name in ("ours", "ours, distilled"):
        benchmark.measure("digits", name, [("mem", 0.1)], paths, 1, benchmark.of_samples(150), 150)
    found = {line["method"]: line for line in benchmark.read(paths[0])}
    assert set(found) == {
        "ours, without refit, 150 samples", "ours, 150 samples", "ours, distilled, 150 samples"
    }  # fmt: skip
    refitted, distilled = (found[f"{n}, 150 samples"] for n in ("ours", "ours, distilled"))
    assert distilled["mem"] == refitted["mem"]
    assert distilled["loss"] != refitted["loss"]


SWITCHED = """
import sys
sys.path.insert(0, sys.argv[1])
import ablation, benchmark
import cobla_onnx.calibration.evaluation.temperature
# The highest temperature: the demo model's own is 1, with nothing to switch off.
cobla_onnx.calibration.evaluation.temperature.EVEN = 2.0
from dataclasses import replace
from pathlib import Path
from cobla_onnx import Budget
method, switch_off = ablation.PARTS[sys.argv[2]]
switch_off()
(task,) = [replace(t, calibration=40) for t in benchmark.TASKS if t.name == "digits"]
bench = benchmark.Bench(task, Path(), Path(), 1)
made = benchmark.prepare(bench, method)(Budget(mem=0.15))
print([bench.figures(model)["loss"] for _, model in made][-1])
"""


def loss_without(part: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", SWITCHED, str(TOOLS), part], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_every_part_of_the_output_objective_can_be_switched_off(tools):
    ablation = tools("ablation")
    parts = [part for part, (method, _) in ablation.PARTS.items() if method == "ours"]
    with ThreadPoolExecutor(2) as pool:
        losses = dict(zip(parts, pool.map(loss_without, parts), strict=True))
    whole = losses.pop("all parts")
    assert losses["plain SVD"] > 2 * whole
    # A switch that does nothing would go unnoticed in a table. One round may well be enough.
    losses.pop("one round")
    assert all(loss != pytest.approx(whole, rel=1e-6) for loss in losses.values()), losses
