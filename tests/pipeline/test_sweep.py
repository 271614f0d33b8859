"""``cobla-onnx sweep`` and `cobla_onnx.sweep`."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress, errors, sweep
from cobla_onnx.cli.parsing import spread
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline import sweep as sweeping
from cobla_onnx.pipeline.sweep import _with_front
from cobla_onnx.report.sweep import COLUMNS, SweepPoint
from tests.builders import random_array, small_network
from tests.cli.test_command import run, run_here

DATA = {"x": random_array(30, 3, 12, 12, seed=3)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    budgets = [Budget(mem=m) for m in (0.01, 0.5, 0.8, 1.0)]
    return sweep(small_network(), budgets, data=DATA, threads=1, solver="milp", out_dir=folder)


def test_each_point_is_what_compress_gives(found):
    for point in found.points[1:]:
        alone = compress(small_network(), point.budget, data=DATA, threads=1, solver="milp")
        assert alone.plan == point.plan
        assert alone.report.calibration == point.report.calibration
        written = onnx.load(point.file)
        assert point.file_bytes == Path(point.file).stat().st_size
        assert point.method == "cobla-onnx"
        assert written.SerializeToString() == alone.model.SerializeToString()
        assert stored_bytes(written) <= point.budget.mem * stored_bytes(small_network())
        assert point.mem == alone.report.budget["mem"].reached
        assert point.report.verification is not None or point.report.unchanged


def test_what_is_out_of_reach_says_so_and_the_rest_goes_on(found):
    first = found.points[0]
    assert first.mem is first.file is None
    assert "below the least reachable" in first.refused
    assert not first.front
    with pytest.raises(errors.BudgetError, match="no budget of the sweep is within reach"):
        sweep(small_network(), [Budget(mem=0.01)], threads=1)


@pytest.mark.parametrize(
    "budgets",
    [[Budget(mem=0.01)], [Budget(mac=0.001)], [Budget(mem=0.01), Budget(mem=0.4, mac=0.01)]],
)
def test_what_is_out_of_reach_is_refused_before_the_model_runs_on_data(monkeypatch, budgets):
    def looked_at(*arguments, **options):
        raise AssertionError("the data was looked at")

    monkeypatch.setattr("cobla_onnx.pipeline.looking.Seen", looked_at)
    monkeypatch.setattr("cobla_onnx.pipeline.looking.look_at", looked_at)
    with pytest.raises(errors.BudgetError, match=r"no budget .* below the least reachable 0\."):
        sweep(small_network(), budgets, data=DATA, threads=1)
    if len(budgets) == 1:
        with pytest.raises(errors.BudgetError, match="below the least reachable") as caught:
            compress(small_network(), budgets[0], data=DATA, threads=1)
        assert "rank_multiple=1" not in str(caught.value)
        monkeypatch.undo()
        within = Budget(**caught.value.least)
        assert compress(small_network(), within, data=DATA, threads=1).report.budget


def test_a_budget_that_some_rank_reaches_is_not_refused_because_of_the_grid(monkeypatch):
    """Layers of at most 24 channels have no multiple of 16 that is worth it."""
    monkeypatch.setattr("cobla_onnx.pipeline.open_session.convolution_block", lambda: 16)
    with pytest.raises(errors.BudgetError) as caught:
        compress(small_network(), Budget(mac=0.4), rank_multiple=16, threads=1)
    assert "rank_multiple=1" in str(caught.value)
    result = compress(small_network(), Budget(mac=0.4), threads=1)
    assert result.report.budget["mac"].reached <= 0.4
    assert any("smaller ones were added" in note for note in result.report.notes)
    ranks = {d.rank for d in result.plan.decisions if d.rank is not None}
    assert ranks <= {1, 2, 4, 8, 12, 16, 20}
    on_grid = compress(small_network(), Budget(mac=0.99), threads=1)
    assert not any("smaller ones" in note for note in on_grid.report.notes)


def test_the_front_holds_exactly_what_nothing_dominates():
    generator = np.random.default_rng(0)
    points = [
        SweepPoint(Budget(mem=1.0), mem=float(a), mac=float(b), loss=float(c))
        for a, b, c in generator.integers(1, 6, (60, 3))
    ]
    for point in _with_front(points):
        own = np.array([point.mem, point.mac, point.loss])
        others = np.array([[p.mem, p.mac, p.loss] for p in points])
        dominated = ((others <= own).all(axis=1) & (others < own).any(axis=1)).any()
        assert point.front == (not dominated)


def test_csv_and_json_hold_the_points(found):
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [row["mem"] for row in rows] == ["", *(str(p.mem) for p in found.points[1:])]
    content = json.loads(found.to_json())
    assert [p["front"] for p in content["points"]] == [p.front for p in found.points]
    assert content["points"][1]["report"]["schema_version"] == 1


def test_the_folder_has_the_table_and_the_chart_of_the_front(found):
    folder = Path(found.points[1].file).parent
    assert (folder / "front.csv").read_text() == found.to_csv()
    assert (folder / "front.svg").read_text() == found.to_svg()


def test_bytes_of_the_file_are_counted_where_none_is_kept(found, tmp_path):
    budget = found.points[1].budget
    (point,) = sweep(small_network(), [budget], data=DATA, threads=1, solver="milp").points
    assert point.file is None
    assert point.file_bytes == found.points[1].file_bytes
    onnx.save(small_network(), tmp_path / "in.onnx")
    again = sweep(tmp_path / "in.onnx", [Budget(mem=1.0)], threads=1)
    assert again.points[0].file_bytes == again.file_bytes == (tmp_path / "in.onnx").stat().st_size


def test_plots_are_the_same_again_and_refused_where_they_cannot_be(found, tmp_path, monkeypatch):
    for kind, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        path = tmp_path / f"plot.{kind}"
        found.save_plot(path)
        first = path.read_bytes()
        assert first.startswith(start)
        found.save_plot(path)
        assert path.read_bytes() == first
    assert b"Pareto front" in (tmp_path / "plot.svg").read_bytes()
    with pytest.raises(errors.UsageError, match=r"\.svg or \.png"):
        found.save_plot(tmp_path / "plot.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.UsageError, match=r'pip install "cobla-onnx\[plot\]"'):
        found.save_plot(tmp_path / "other.svg")


def test_the_package_loads_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import cobla_onnx.pipeline.sweep"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_time_is_measured_where_it_is_asked_for():
    budgets = [Budget(mem=0.8)]
    (point,) = sweep(small_network(), budgets, threads=1, measure_latency=True).points
    assert point.latency == point.report.latency.ratio


def test_ranges():
    assert spread("--mem", "0.3:0.9:7") == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert spread("--mem", "0.1,0.3:0.5:2,0.3") == (0.1, 0.3, 0.5)
    for bad in ("", "a", "0.3:0.9", "0.3:0.9:1", "0.3:0.9:1e9", "0.3:0.9:9999", "1:2:3:4"):
        with pytest.raises(errors.UsageError, match="--mem"):
            spread("--mem", bad)


def test_the_command(tmp_path):
    onnx.save(small_network(), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", **DATA)
    table, plot, folder = tmp_path / "t.csv", tmp_path / "p.svg", tmp_path / "out"
    done = run(
        "sweep", tmp_path / "in.onnx", "--mem", "0.01,0.75:0.9:2", "--mac", "0.9",
        "--solver", "milp", "--data", tmp_path / "data.npz", "--csv", table, "--plot", plot,
        "--out-dir", folder, "--rank-multiple", 1,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "out of reach" in done.stdout
    assert sorted(p.name for p in folder.iterdir()) == [
        "front.csv",
        "front.svg",
        "in-mem-0.75-mac-0.9.onnx",
        "in-mem-0.9-mac-0.9.onnx",
    ]
    assert len(table.read_text().splitlines()) == 4
    assert plot.exists()
    for arguments, code, message in (
        ([], 2, "no budget"),
        (["--mem", "0.5", "--plot", tmp_path / "p.pdf"], 2, ".svg or .png"),
        (["--mem", "0.5", "--csv", tmp_path / "in.onnx"], 2, "a model's path"),
        (["--mem", "0.5", "--report", tmp_path / "p.md"], 2, "a name that ends in .html"),
        (["--mem", "0.5", "--compare-with", "onnxruntime"], 2, "give --data too"),
        (["--mem", "0.01"], 4, "no budget of the sweep is within reach"),
    ):
        done = run_here("sweep", tmp_path / "in.onnx", *arguments)
        assert done.returncode == code
        assert message in done.stderr


def test_an_interrupt_tells_what_was_written_before(tmp_path, monkeypatch):
    inner = sweeping._point

    def stop(session, budget, folder, external_data):
        if budget.mem == 0.7:
            raise KeyboardInterrupt
        return inner(session, budget, folder, external_data)

    monkeypatch.setattr(sweeping, "_point", stop)
    budgets = [Budget(mem=m) for m in (0.8, 0.7)]
    with pytest.raises(KeyboardInterrupt, match="written before: 1 model in"):
        sweep(small_network(), budgets, threads=1, out_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        sweep(small_network(), budgets, threads=1)
    assert str(caught.value) == ""
