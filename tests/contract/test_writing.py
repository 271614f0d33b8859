"""Whatever happens while writing: the old file is whole, or the new one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress, errors
from cobla_onnx.graph.io.model_file import load_model, write_atomically
from cobla_onnx.graph.io.save import save_model
from cobla_onnx.pipeline.result import check_paths
from tests.builders import random_array, small_network
from tests.cli.test_command import COMMAND, run_here

resource = pytest.importorskip("resource", reason="needs POSIX")
ROOT = Path(__file__).resolve().parents[2]

# A child that saves a model and is killed at the stage given as second argument.
KILLED = """
import os, pathlib, signal, sys
from cobla_onnx.graph.io import model_file
from cobla_onnx.graph.io import save as saving
from tests.builders import small_network
out, stage, form = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

counts = {}
def at(name, original, number):
    def call(*arguments, **options):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] == number:
            die()
        return original(*arguments, **options)
    return call

kind, _, number = stage.partition(":")
number = int(number or 1)
check = lambda path: None
if kind == "open":
    os.open = at("open", os.open, number)
elif kind == "write":
    real = os.fdopen
    def half(descriptor, mode):
        file = real(descriptor, mode)
        class Half:
            def __enter__(self): return self
            def __exit__(self, *rest): file.close()
            def write(self, data):
                file.write(bytes(data)[: len(data) // 2]); file.flush(); die()
        return Half()
    os.fdopen = half
elif kind == "flush":
    os.fsync = at("fsync", os.fsync, number)
elif kind == "check":
    check = die
elif kind == "rename":
    pathlib.Path.replace = at("replace", pathlib.Path.replace, number)
saving.save_model(small_network(), out, form, check)
if kind == "end":
    die()
"""

ONE_FILE = ["open", "write", "flush:1", "check", "rename:1", "flush:2", "end"]
WITH_DATA = ["write", "rename:1", "rename:2", "check", "rename:3", "end"]


@pytest.mark.parametrize(
    ("form", "stage"),
    [("never", stage) for stage in ONE_FILE] + [("always", stage) for stage in WITH_DATA],
)
def test_killed_at_any_stage_the_output_is_old_or_new(tmp_path, form, stage):
    out = tmp_path / "out.onnx"
    save_model(onnx.load(ROOT / "models" / "digits.onnx"), out, form, lambda path: None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    child = subprocess.run([sys.executable, "-c", KILLED, str(out), stage, form], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole_new = stage in ("end", "flush:2")
    assert (after["out.onnx"] == before["out.onnx"]) is not whole_new
    for name, content in before.items():
        assert name == "out.onnx" or after[name] == content
    nodes = load_model(out).graph.node
    assert len(nodes) == (
        7 if whole_new else len(onnx.load(ROOT / "models/digits.onnx").graph.node)
    )
    left = [name for name in after if name not in before and not name.endswith(".data")]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
    # And the next run is not disturbed by what was left.
    save_model(small_network(), out, form, lambda path: None)
    assert len(load_model(out).graph.node) == 7


def test_a_full_disk_leaves_the_old_file(tmp_path, demo_model):
    out = tmp_path / "out.onnx"
    out.write_text("old")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    # A measurement of coverage would run into the limit too.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    # Bytecode that the limit cuts off would stay behind.
    plain["PYTHONDONTWRITEBYTECODE"] = "1"
    for options in ([], ["--external-data", "always"]):
        done = subprocess.run(
            [COMMAND, demo_model, out, "--mem", "0.8", "--solver", "milp", *options],
            capture_output=True, text=True, preexec_fn=limit, env=plain,
        )  # fmt: skip
        assert done.returncode == 6, done.stderr
        assert done.stderr.endswith("give another output path or free some space\n")
        assert len(done.stderr.splitlines()) == 1
        assert out.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("comparing", [False, True])
def test_a_full_temporary_folder_is_named(tmp_path, demo_model, comparing):
    out = tmp_path / "out.onnx"
    what = ["compare", demo_model, demo_model] if comparing else [demo_model, out, "--mem", "0.8"]
    data = demo_model.with_name("digits_calibration.npz")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    # Bytecode that the limit cuts off would stay behind.
    plain["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [COMMAND, *what, "--data", data],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        env={**plain, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 6, done.stderr
    assert done.stderr == (
        f"error: {tmp_path}: has no room for temporary files (File too large); "
        "free some space, or name another folder in TMPDIR\n"
    )
    # The one file is onnxruntime's.
    assert {path.name for path in tmp_path.iterdir()} <= {".ses"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(errors.WriteError, match="folder cannot be written to"):
        check_paths(tmp_path / "in", tmp_path / "out")
    with pytest.raises(errors.WriteError, match="Permission denied"):
        write_atomically(tmp_path / "out", b"new")
    tmp_path.chmod(0o755)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a device file")
def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (Path(os.devnull), tmp_path / "pipe"):
        with pytest.raises(errors.WriteError, match="is not a regular file"):
            check_paths(tmp_path / "in", target)
        with pytest.raises(errors.WriteError, match="not a regular file"):
            write_atomically(target, b"new")
    assert not Path(os.devnull).is_file()


def test_names_that_the_system_cannot_have_are_refused_before_the_work(tmp_path):
    long = tmp_path / f"{300 * 'a'}.onnx"
    with pytest.raises(errors.WriteError, match="File name too long; give another path"):
        check_paths(tmp_path / "in", long)
    with pytest.raises(errors.WriteError, match="File name too long; give another path"):
        check_paths(tmp_path / "in", tmp_path / "out", [("--report", long)])
    # Reading says what is wrong with the name of an input.
    check_paths(long, tmp_path / "out")


def test_links_are_written_through_even_where_nothing_is_yet(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out.onnx"
    link.symlink_to(tmp_path / "elsewhere" / "real.onnx")
    save_model(small_network(), link, "always", lambda path: None)
    assert link.is_symlink()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
    assert len(load_model(tmp_path / "elsewhere" / "real.onnx").graph.node) == 7
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_atomically(tmp_path / "loop", b"new")
    assert (tmp_path / "loop").read_bytes() == b"new"


def test_nothing_is_written_to_the_current_or_the_temporary_folder(tmp_path, monkeypatch):
    for name in ("here", "temporary", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    save_model(small_network(), tmp_path / "out" / "out.onnx", "always", lambda path: None)
    assert list((tmp_path / "here").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


def save_apart(model: onnx.ModelProto, path: Path, weights: str) -> None:
    onnx.save(model, path, save_as_external_data=True, location=weights, size_threshold=0)


@pytest.mark.parametrize(
    "given",
    [
        ["IN", "DATA", "--data", "DATA"],
        ["IN", "WEIGHTS"],
        ["IN", "OUT", "--plan-out", "DATA", "--data", "DATA"],
        ["IN", "OUT", "--report", "CONFIG", "--config", "CONFIG"],
        ["IN", "OUT", "--history", "NAMES", "--include", "@NAMES"],
        ["IN", "OUT", "--report", "WEIGHTS"],
        ["IN", "IN", "--in-place", "--plan-out", "WEIGHTS"],
        ["IN", "LINK", "--data", "DATA"],
    ],
)
def test_no_file_that_is_read_is_written_over(given, tmp_path):
    files = {
        "IN": tmp_path / "in.onnx",
        "OUT": tmp_path / "out.onnx",
        "DATA": tmp_path / "data.npz",
        "WEIGHTS": tmp_path / "weights.html",
        "CONFIG": tmp_path / "config.md",
        "NAMES": tmp_path / "names.csv",
        "LINK": tmp_path / "link.npz",
    }
    save_apart(small_network(), files["IN"], files["WEIGHTS"].name)
    np.savez(files["DATA"], x=random_array(20, 3, 12, 12))
    files["CONFIG"].write_text("mem = 0.5")
    files["NAMES"].write_text("name\nconv*\n")
    os.link(files["DATA"], files["LINK"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    at = ["@" * w.startswith("@") + str(files.get(w.lstrip("@"), w)) for w in given]
    ended = run_here(*at, "--mem", 0.5)
    assert ended.returncode == 2, ended.stderr
    assert "; give another" in ended.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_weights_of_the_original_are_not_written_over_from_python(tmp_path):
    save_apart(small_network(), tmp_path / "in.onnx", "in.data")
    result = compress(tmp_path / "in.onnx", Budget(mem=0.6), threads=1)
    with pytest.raises(errors.UsageError, match=r"in\.data: holds weights of .*in\.onnx"):
        result.save(tmp_path / "in.data")
