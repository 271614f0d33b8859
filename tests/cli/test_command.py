"""The installed command, as a user runs it, and the Python API beside it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cobla_onnx
from cobla_onnx import Budget, Plan, Result, compress, errors
from cobla_onnx.cli import main
from cobla_onnx.graph.io import model_file
from cobla_onnx.graph.io.model_file import write_atomically
from cobla_onnx.pipeline.result import check_paths
from cobla_onnx.plan import Decision
from cobla_onnx.text import safe_text
from tests.builders import model_of, random_array, small_network

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).parent / "cobla-onnx"


def run(*arguments: object, module: bool = False) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "cobla_onnx"] if module else [str(COMMAND)]
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, for what does not depend on how it is started."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.setattr(sys, "argv", [str(COMMAND), *map(str, arguments)])
        # It takes the process's own stdout, which is pytest's.
        patched.setattr(sys.modules[main.__module__], "_keep_stdout", lambda: None)
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(sys.argv, ended.value.code, out.getvalue(), err.getvalue())


def count_initializers(path: Path) -> int:
    """Independent count, from the raw data of the file."""
    return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


def test_an_interrupted_import_of_a_native_module_is_an_interrupt(monkeypatch):
    def interrupted(**options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(sys.modules[main.__module__], "app", interrupted)
    ended = run_here()
    assert ended.returncode == 130
    assert "interrupted" in ended.stderr


def test_an_interrupt_after_the_model_was_written_says_so(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Result, "save_report", interrupted)
    onnx.save(small_network(), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    ended = run_here(tmp_path / "in.onnx", out, "--mem", 0.6, "--report", tmp_path / "r.json")
    assert ended.returncode == 130
    assert f"interrupted; written before: {out}" in ended.stderr
    onnx.checker.check_model(onnx.load(out))


def test_the_main_job(demo_model, tmp_path):
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    done = run_here(demo_model, out, "--mem", 0.3, "--report", report)
    assert done.returncode == 0, done.stderr
    assert "kept 0.2" in done.stdout
    assert "x smaller" in done.stdout
    assert "random data" in done.stdout
    assert done.stderr == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "report.json"]
    content = json.loads(report.read_text())
    before, after = count_initializers(demo_model), count_initializers(out)
    assert content["budget"]["mem"]["limit"] == 0.3
    assert content["budget"]["mem"]["reached"] == pytest.approx(after / before, abs=1e-12)
    assert after <= 0.3 * before
    assert content["budget"]["mac"]["limit"] is None
    keys = {"input", "output", "budget", "layers", "solver", "verification", "seconds"}
    assert keys <= content.keys()
    assert (content["input"], content["output"]) == (str(demo_model), str(out))
    for layer in content["layers"]:
        fields = {"name", "op", "decision", "scheme", "rank", "params", "macs", "reason"}
        assert fields <= layer.keys()
        assert layer["decision"] == "factorised" or layer["reason"]
    assert {"objective", "value", "lower_bound", "gap"} <= content["solver"].keys()
    assert content["verification"]["rewrite_max_error"] < 1e-5
    assert content["verification"]["data"] == "random"
    with np.load(ROOT / "models" / "digits_test.npz") as test:
        images, labels = test["image"], test["labels"]
    logits = onnxruntime.InferenceSession(out).run(None, {"image": images})[0]
    assert (logits.argmax(1) == labels).mean() >= 0.98


def test_the_same_bytes_twice_and_in_another_folder(tmp_path, monkeypatch):
    onnx.save(small_network(), tmp_path / "in.onnx")
    written = []
    for name, seed in (("a", "0"), ("b", "1")):
        (tmp_path / name).mkdir()
        out = tmp_path / name / f"{name}.onnx"
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        done = run(tmp_path / "in.onnx", out, "--mem", 0.5, "--mac", 0.6, "-q")
        assert done.returncode == 0, done.stderr
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_a_model_that_meets_its_budget_is_copied_unchanged(demo_model, tmp_path):
    done = run(demo_model, tmp_path / "out.onnx", "--mem", 1, module=True)
    assert done.returncode == 0, done.stderr
    assert "copied unchanged" in done.stdout
    assert (tmp_path / "out.onnx").read_bytes() == demo_model.read_bytes()


def test_the_main_command_may_be_named_and_options_may_come_first(demo_model, tmp_path):
    for number, words in enumerate((["compress"], [])):
        out = tmp_path / f"{number}.onnx"
        done = run_here(*words, "--mem", 0.5, "--quiet", demo_model, out)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_dry_run_writes_nothing_and_quiet_prints_nothing(demo_model, tmp_path):
    done = run(demo_model, tmp_path / "out.onnx", "--mem", 0.5, "--dry-run", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_options_about_layers(demo_model, tmp_path):
    report = tmp_path / "r.json"
    done = run(
        demo_model, tmp_path / "o.onnx", "--mem", 0.8, "--report", report, "--solver", "milp",
        "--scheme", "channel", "--include", "stage*", "--exclude", "*/conv1", "--min-size", 20000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    layers = {layer["name"]: layer for layer in json.loads(report.read_text())["layers"]}
    assert layers["stem/conv"]["reason"] == "excluded by option"
    assert layers["stage1/conv1"]["reason"] == "excluded by option"
    assert layers["stage1/conv2"]["reason"] == "smaller than --min-size"
    chosen = {layer["scheme"] for layer in layers.values() if layer["decision"] == "factorised"}
    assert chosen == {"channel"}


def test_help_and_version_are_quick_and_load_nothing_heavy():
    assert run("--version").stdout.strip() == f"cobla-onnx {cobla_onnx.__version__}"
    assert "--mem" in run("--help").stdout
    code = (
        "import sys, cobla_onnx.cli\n"
        "heavy = {'onnx', 'onnxruntime', 'scipy', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# More digits than Python reads at once.
MANY = "9" * 5000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["IN", "OUT"], 2, "--mem, --mac or --latency"),
        (["IN", "OUT", "--mem", "nan"], 2, "--mem nan"),
        (["IN", "OUT", "--mem", "0"], 2, "above 0"),
        (["IN", "OUT", "--mem", "1.5"], 2, "at most 1"),
        (["IN", "OUT", "--mem", "much"], 2, ""),
        (["IN", "OUT", "--mem", "0.5", "--nonsense"], 2, ""),
        (["missing.onnx", "OUT", "--mem", "0.5"], 2, "missing.onnx: cannot be read"),
        (["IN", "IN", "--mem", "0.5"], 2, "--in-place"),
        (["IN", "OUT", "--mem", "0.5", "--exclude", "stge*"], 2, "matches no layer"),
        (["IN", "OUT", "--mem", "0.5", "--input-shape", "image"], 2, "NAME:SIZE"),
        (["IN", "OUT", "--mem", "0.5", "--input-shape", "image:1,1,8,8"], 2, "declares image"),
        (["IN", "OUT", "--mem", "0.5", "--input-shape", f"image:1,{MANY},8,8"], 2, "NAME:SIZE"),
        (["IN", "OUT", "--mem", "0.5", "--rank-multiple", MANY], 2, "give auto, or a whole"),
        (["IN", "OUT", "--mem", "0.5", "--report", "r.txt"], 2, ".json"),
        (["TEXT", "OUT", "--mem", "0.5"], 3, "not an ONNX model"),
        (["IN", "OUT", "--mem", "0.001"], 4, "below the least reachable 0.0"),
        (["IN", "OUT", "--mem", "0.5", "--exclude", "*"], 4, "least reachable 1"),
        (
            ["IN", "OUT", "--mem", "0.1", "--exclude", "stage3*"],
            4,
            "of which there is 0.30",
        ),
        (
            ["IN", "OUT", "--mem", "0.1", "--include", "h*"],
            4,
            "layers left out by --include; leave",
        ),
        (["IN", "OUT", "--mem", "0.1", "--min-size", "40000"], 4, "lower --min-size"),
        (["IN", "no/such/folder/out.onnx", "--mem", "0.5"], 6, "folder does not exist"),
        (["IN", ".", "--mem", "0.5"], 6, "is a directory"),
    ],
)
def test_bad_requests_get_one_clear_line_and_write_nothing(
    demo_model, tmp_path, arguments, code, message
):
    text = tmp_path / "text.onnx"
    text.write_text("hello" * 50)
    old = tmp_path / "out.onnx"
    old.write_text("what was there")
    names = {"IN": demo_model, "OUT": old, "TEXT": text}
    original = demo_model.read_bytes()
    done = run_here(*[names.get(a, a) for a in arguments])
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if message:
        assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "text.onnx"]
    assert old.read_text() == "what was there"
    assert demo_model.read_bytes() == original


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(tmp_path):
    nodes, weights = [], {}
    for number in range(6):
        nodes.append(
            onnx.helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"])
        )
        weights[f"w{number}"] = random_array(2000, 2000, seed=number)
    onnx.save(model_of(nodes, weights, {"x0": [1, 2000]}, ["x6"]), tmp_path / "in.onnx")
    child = subprocess.Popen(
        [COMMAND, tmp_path / "in.onnx", tmp_path / "out.onnx", "--mem", "0.3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    _, message = child.communicate(timeout=60)
    assert child.returncode == 130
    assert message == "error: interrupted; nothing was written\n"
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


@pytest.mark.skipif(os.name == "nt", reason="not tried on Windows")
@pytest.mark.parametrize("what", [["--mem", "0.6"], ["--help"]])
def test_a_reader_that_goes_away_does_not_end_the_work(tmp_path, what):
    onnx.save(small_network(), tmp_path / "in.onnx")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [COMMAND, tmp_path / "in.onnx", tmp_path / "out.onnx", *what],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.onnx").exists() == (what != ["--help"])


def test_in_place_is_allowed_when_asked_for(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(small_network(), path)
    before = count_initializers(path)
    assert run(path, path, "--mem", 0.6, "--in-place").returncode == 0
    assert count_initializers(path) <= 0.6 * before


def test_every_error_has_an_exit_code_of_its_own():
    kinds = [getattr(errors, name) for name in errors.__all__ if name != "CoblaError"]
    assert sorted(kind.exit_code for kind in kinds) == [1, 2, 3, 3, 4, 5, 6]


@given(st.floats(0.25, 1.0), st.floats(0.25, 1.0))
@settings(max_examples=12)
def test_budgets_hold_in_the_result_itself(mem, mac):
    model = small_network()
    result = compress(model, Budget(mem=mem, mac=mac), threads=1, rank_multiple=1)
    before = sum(len(t.raw_data) for t in model.graph.initializer)
    assert sum(len(t.raw_data) for t in result.model.graph.initializer) <= mem * before
    assert result.report.budget["mac"].reached <= mac


def test_python_api_returns_a_plan_that_can_be_applied_again(demo_model):
    first = compress(demo_model, Budget(mem=0.4))
    assert isinstance(first, Result)
    plan = Plan.from_json(first.plan.to_json())
    assert plan == first.plan
    second = compress(demo_model, Budget(mem=0.4), plan=plan)
    assert second.model == first.model
    assert second.report.solver is None
    with pytest.raises(errors.BudgetError, match="the plan costs"):
        compress(demo_model, Budget(mem=0.3), plan=plan)
    for decision, message in (
        (Decision("nowhere", "channel", 3), "there is no layer 'nowhere'"),
        (Decision("stage1/conv1", "matrix", 3), "no scheme 'matrix'"),
        (Decision("stage1/conv1", "channel", 1000), "ranks 1 to 32"),
    ):
        with pytest.raises(errors.UsageError, match=message):
            compress(demo_model, Budget(mem=0.3), plan=Plan((decision,)))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "layers": [3]}',
     '{"version": 1, "layers": [{"layer": "a", "rank": 2}]}',
     '{"version": 1, "layers": [{"layer": "a", "keep": true}, {"layer": "a", "keep": true}]}'],
)  # fmt: skip
def test_damaged_plans_are_refused(text):
    with pytest.raises(errors.UsageError, match="plan"):
        Plan.from_json(text)


def test_macs_that_cannot_be_known_name_the_shape_to_give():
    model = small_network()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "size"
    del model.graph.value_info[:]
    with pytest.raises(errors.UsageError, match=r"input_shapes=\{'x': \(1, 3, \?, \?\)\}"):
        compress(model, Budget(mac=0.5), rank_multiple=1)
    given_shape = compress(
        model, Budget(mac=0.5), rank_multiple=1, input_shapes={"x": (1, 3, 20, 20)}
    )
    assert given_shape.report.budget["mac"].reached <= 0.5
    memory_only = compress(model, Budget(mem=0.5))
    assert memory_only.report.budget["mac"].reached is None
    assert any("MACs are not known" in note for note in memory_only.report.notes)


def test_the_public_names_are_these():
    names = ["Budget", "Plan", "Report", "Result", "advise", "compare", "compress"]
    names += ["gradient_graph", "inspect", "sweep"]
    assert cobla_onnx.__all__ == names
    for name in cobla_onnx.__all__:
        assert getattr(cobla_onnx, name).__name__ == name
    with pytest.raises(AttributeError):
        cobla_onnx.nothing  # noqa: B018


def test_names_are_shown_safely():
    assert safe_text("a\x1b[31mb\u202ec\n") == "a\\x1b[31mb\\x202ec\\x0a"
    assert len(safe_text("x" * 10_000)) <= 48


def test_hostile_names_do_not_break_the_table(tmp_path):
    model = small_network()
    model.graph.node[0].name = "[bold]\x1b[2J[/nothing]"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    done = run(path, tmp_path / "out.onnx", "--mem", 0.6)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "[bold]" in done.stdout


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file.os, "fsync", full)
    with pytest.raises(errors.WriteError, match="No space left"):
        write_atomically(target, b"newer")
    assert target.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_a_result_that_changed_on_disk_is_not_kept(demo_model, tmp_path):
    result = compress(demo_model, Budget(mem=0.5))
    del result.model.graph.initializer[-1].dims[:]
    with pytest.raises((errors.VerificationError, errors.ModelError)):
        result.save(tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_paths_are_checked_before_the_work(tmp_path):
    with pytest.raises(errors.UsageError, match="--report"):
        check_paths(tmp_path / "a", tmp_path / "b", [("--report", tmp_path / "b")])


def test_progress_is_reported(demo_model):
    seen = set()
    compress(
        demo_model, Budget(mem=0.5), progress=lambda stage, done, total: seen.add((stage, done))
    )
    assert {"singular values", "factorise"} <= {stage for stage, _ in seen}


@pytest.mark.slow
def test_a_latency_budget_from_the_command_line(demo_model, tmp_path):
    """Timing is real here: only what does not depend on it is asserted."""
    report, profile = tmp_path / "r.json", tmp_path / "p.json"
    options = ["--mac", 0.6, "--measure-latency", "--profile", profile, "--threads", 1]
    done = run(demo_model, tmp_path / "o.onnx", *options, "--report", report, "--provider", "cpu")
    assert done.returncode == 0, done.stderr
    assert "latency: " in done.stdout
    content = json.loads(report.read_text())
    time = content["latency"]
    assert (time["threads"], time["provider"]) == (1, "CPUExecutionProvider")
    assert content["provider"] == "CPUExecutionProvider"
    for spread in (time["before_ms"], time["after_ms"]):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert time["ratio"] == pytest.approx(time["after_ms"]["median"] / time["before_ms"]["median"])
    assert time["predicted_ratio"] is None
    assert time["repeats"] >= 9
    assert 1 <= len(time["layers"]) <= 10
    assert set(time["layers"][0]) == {"name", "before_ms", "after_ms"}
    chosen = [la["rank"] for la in content["layers"] if la["op"] == "Conv" and la["rank"]]
    assert chosen
    assert all(rank % 8 == 0 for rank in chosen)
    assert json.loads(profile.read_text())["conditions"]["threads"] == 1
    refused = run(demo_model, tmp_path / "p.onnx", "--latency", 0.001, "--threads", 1, "-q")
    assert refused.returncode == 4
    assert "--latency 0.001: the fastest of" in refused.stderr
    assert not (tmp_path / "p.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latency", "nan"], "--latency nan"),
        (["--latency", 1.5], "--latency 1.5"),
        (["--mac", 0.5, "--rank-multiple", 0], "--rank-multiple 0"),
        (["--mac", 0.5, "--rank-multiple", "x"], "--rank-multiple x"),
        (["--mac", 0.5, "--provider", "quantum"], "it has "),
        (["--mac", 0.5, "--profile", "p.json"], "--profile: is of times"),
        (["--latency", 0.5, "--profile", "missing/p.json"], "missing/p.json: its folder"),
        (["--latency", 0.5, "--profile", "IN"], "is a model's path"),
    ],
)
def test_bad_options_about_time(demo_model, tmp_path, options, message):
    options = [str(demo_model) if option == "IN" else option for option in options]
    done = run_here(demo_model, tmp_path / "o.onnx", *options)
    assert done.returncode in (2, 6), done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o.onnx").exists()
