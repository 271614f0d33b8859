"""Python's audit events while a model is compressed: no network, no process, no other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx

from tests.builders import small_network

WATCHED = """
import json, sys
seen = []
BAD = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
       "pickle.find_class", "urllib.", "http.", "ftplib.", "webbrowser.")
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        seen.append(["open", str(arguments[0]), str(arguments[1])])
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir"):
        seen.append([event, str(arguments[0])])
    elif event.startswith(BAD):
        seen.append([event, repr(arguments)[:200]])
import cobla_onnx.pipeline.compress, onnx, onnxruntime, onnx_graphsurgeon
import scipy.optimize, rich.table
from cobla_onnx import Budget, compress
sys.addaudithook(watch)
compress(sys.argv[1], Budget(mem=0.6)).save(sys.argv[2])
print(json.dumps(seen))
"""


def test_only_the_two_folders_and_the_temporary_one_are_touched(tmp_path):
    for name in ("in", "out", "temporary"):
        (tmp_path / name).mkdir()
    source, out = tmp_path / "in" / "in.onnx", tmp_path / "out" / "out.onnx"
    onnx.save(small_network(), source, save_as_external_data=True, location="w", size_threshold=0)
    child = subprocess.run(
        [sys.executable, "-c", WATCHED, source, out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )
    seen = json.loads(child.stdout)
    installed = (
        sys.prefix,
        sys.base_prefix,
        str(Path(onnx.__file__).parent.parent),
        "/proc/self",
        "/proc/cpuinfo",
    )
    package = str(Path(__file__).resolve().parents[2] / "cobla_onnx")
    read = (str(tmp_path / "in"), *installed, package)
    assert any(entry[1] == str(source) for entry in seen), "the hook sees nothing"
    written = (str(tmp_path / "out"), str(tmp_path / "temporary"))
    for kind, path, *mode in seen:
        if kind == "open":
            reading = mode[0] in ("r", "rb")
            allowed = path.startswith((*written, *(read if reading else ())))
            # Files opened through a descriptor have no mode; they may only be read.
            assert allowed or (mode[0] == "None" and path.startswith(read)), (kind, path, mode)
        else:
            assert kind.startswith("os."), (kind, path)
            # What removes a folder names its entries by themselves.
            assert path.startswith(written) or "/" not in path, (kind, path)
    allowed_kinds = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir"}
    assert {entry[0] for entry in seen} <= allowed_kinds
    # onnxruntime leaves a file of its own there.
    assert not list((tmp_path / "temporary").glob("cobla-onnx*"))
