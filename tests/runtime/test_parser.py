"""Threads read arrays at once; Python 3.11.7 fails where two are in its parser."""

from __future__ import annotations

import gc
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cobla_onnx.calibration.data.arrays import open_npy, open_npz
from cobla_onnx.calibration.data.fitting import InputSpec
from cobla_onnx.calibration.data.labels import read_labels
from cobla_onnx.runtime import parser
from cobla_onnx.runtime.cache import Cache

SPEC = InputSpec("x", np.dtype(np.float32), (None, 3), "batch")


@pytest.fixture(autouse=True)
def hasty_threads():
    """Switch threads wherever Python can, with garbage collected all the time."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()

    def collected(phase, info):
        sum(range(50))

    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    gc.callbacks.append(collected)
    yield
    gc.callbacks.remove(collected)
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


def entry(folder: Path):
    cache = Cache(folder)
    cache.put("values", "key", {str(n): np.zeros(3) for n in range(40)})
    return lambda: len(cache.fresh().get("values", "key") or ())


def array(folder: Path):
    np.save(folder / "x.npy", np.zeros((40, 3), np.float32))
    return lambda: len(open_npy(folder / "x.npy", [SPEC], None))


def archive(folder: Path):
    np.savez(folder / "x.npz", x=np.zeros((40, 3), np.float32))
    return lambda: len(open_npz(folder / "x.npz", [SPEC], None))


def labels(folder: Path):
    np.save(folder / "labels.npy", np.zeros(40, np.int64))
    return lambda: len(read_labels(folder / "labels.npy"))


def named_labels(folder: Path):
    np.savez(folder / "labels.npz", labels=np.zeros(40, np.int64))
    return lambda: len(read_labels(folder / "labels.npz"))


@pytest.mark.parametrize("kind", [entry, array, archive, labels, named_labels])
def test_threads_read_at_once(tmp_path, kind):
    read = kind(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: read(), range(200))) == {40}


@pytest.mark.parametrize(
    ("version", "waits"),
    [((3, 10, 13), False), ((3, 11, 7), True), ((3, 11, 8), False), ((3, 12, 1), False)],
)
def test_threads_wait_only_where_they_must(monkeypatch, version, waits):
    monkeypatch.setattr(sys, "version_info", version)
    held = runpy.run_path(str(parser.__file__))["PARSER"]
    assert hasattr(held, "acquire") == waits
