"""Wheel and sdist hold what they should and nothing else, and pass the index's checks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_contents(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and "hatchling" in built.stderr:
        pytest.skip("the build backend cannot be fetched")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cobla_onnx").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources
    assert "cobla_onnx/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert any(name.endswith("entry_points.txt") for name in metadata)


@pytest.mark.slow
def test_sdist_contents(tmp_path):
    for name in ("build", "twine"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install '.[release]'")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and "hatchling" in built.stdout + built.stderr:
        pytest.skip("the build backend cannot be fetched")
    assert built.returncode == 0, built.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        rooms = ("cobla_onnx/", "tests/", "tools/", "scripts/", "models/", "docs/")
        wanted = {name for name in tracked.stdout.splitlines() if name.startswith(rooms)}
        assert wanted - names == set()
    assert not any("node_modules" in name or "_build" in name for name in names)
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", sdist], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_extras_name_each_other_rightly():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    declared = {line.partition(" = ")[0] for line in extras.splitlines() if " = [" in line}
    used = {
        name for part in extras.split("cobla-onnx[")[1:] for name in part.split("]")[0].split(",")
    }
    assert used <= declared
    assert {"all", "dev", "release"} <= declared
