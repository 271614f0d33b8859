"""Entries are found by content alone, and damaged or foreign ones never reach a result."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx import Budget, Result, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.digest import model_content
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.runtime.cache import ABANDONED, Cache, digest, fetch
from cobla_onnx.runtime.damaged import DAMAGED
from cobla_onnx.variants.low_rank.matricisation import ConvScheme
from tests.cli.test_command import COMMAND

ARRAYS = {"values": np.arange(3.0), "count": np.array(7)}


def scalars() -> st.SearchStrategy[object]:
    return st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_byte_changes_the_digest(content, data):
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    assert digest(content) != digest(bytes(changed))
    arrays = [np.frombuffer(bytes(raw), np.uint8) for raw in (content, changed)]
    assert digest(arrays[0]) != digest(arrays[1])


@given(st.lists(scalars(), max_size=4), st.lists(scalars(), max_size=4))
def test_different_parts_have_different_digests(one, other):
    same = [(type(a), repr(a)) for a in one] == [(type(b), repr(b)) for b in other]
    assert (digest(*one) == digest(*other)) == same


def test_type_shape_and_nesting_count():
    array = np.zeros((2, 3), np.float32)
    alike = [
        array,
        array.reshape(3, 2),
        array.view(np.int32),
        array.reshape(-1),
        [array],
        (array,),
        {"a": array},
        ConvScheme("channel", (2, 3), 1, ()),
        ConvScheme("input", (2, 3), 1, ()),
    ]
    assert len({digest(value) for value in alike}) == len(alike)
    assert digest(array) == digest(np.asfortranarray(array)), "the layout in memory does not count"
    with pytest.raises(TypeError, match="no defined content"):
        digest(object())


def test_what_was_put_comes_back(tmp_path):
    cache = Cache(tmp_path)
    assert cache.get("values", "key") is None
    cache.put("values", "key", ARRAYS)
    found = cache.get("values", "key")
    assert found is not None
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert cache.get("values", "other") is None
    assert cache.get("other", "key") is None
    assert (cache.hits, cache.misses, cache.notes) == (1, 3, [])


def entry(folder: Path) -> Path:
    (path,) = folder.glob("*.npz")
    return path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def _no_bracket(path: Path) -> None:
    # So large that its header is read before all of it is, and before its sum is checked.
    np.savez(path, values=np.zeros(5000))
    data = path.read_bytes()
    place = data.index(b")", data.index(b"'shape': ("))
    path.write_bytes(data[:place] + b" " + data[place + 1 :])


def _another_array(path: Path) -> None:
    stored = dict(np.load(path))
    stored["values"] = stored["values"] + 1
    np.savez(path, **stored)


def _an_array_less(path: Path) -> None:
    stored = dict(np.load(path))
    del stored["count"]
    np.savez(path, **stored)


def _no_checksum(path: Path) -> None:
    np.savez(path, **ARRAYS)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not an archive")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


class Trap:
    """Unpickled, it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, (str(TRAP),)


TRAP = Path("/nonexistent")


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def _pickle_inside(path: Path) -> None:
    np.savez(path, values=np.array([Trap()], dtype=object))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip,
        _no_bracket,
        _another_array,
        _an_array_less,
        _no_checksum,
        _empty,
        _text,
        _folder,
        _pickle,
        _pickle_inside,
    ],
)
def test_damaged_and_foreign_entries_are_computed_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(f"{__name__}.TRAP", tmp_path / "trap")
    cache = Cache(tmp_path / "cache")
    cache.put("values", "key", ARRAYS)
    damage(entry(tmp_path / "cache"))
    found = fetch(cache, "values", "key", lambda: {"values": np.ones(2)})
    np.testing.assert_array_equal(found["values"], np.ones(2))
    assert not (tmp_path / "trap").exists()
    assert "damaged and was computed anew" in cache.notes[0]
    if damage is not _folder:
        # The next run finds what was computed.
        np.testing.assert_array_equal(Cache(tmp_path / "cache").get("values", "key")["values"], 1)


@given(st.data())
def test_whatever_bytes_are_damaged_has_a_known_error(data):
    written = io.BytesIO()
    data.draw(st.sampled_from([np.savez, np.savez_compressed]))(written, **ARRAYS)
    content = bytearray(written.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(b"()[]{},':"))
    with (
        contextlib.suppress(*DAMAGED),
        np.load(io.BytesIO(content), allow_pickle=False) as stored,
    ):
        for name in stored.files:
            assert isinstance(stored[name], np.ndarray)


def test_an_entry_under_another_key_is_not_taken(tmp_path):
    cache = Cache(tmp_path)
    cache.put("values", "key", ARRAYS)
    other = Cache(tmp_path / "other")
    other.put("values", "another", {"values": np.ones(2)})
    entry(tmp_path / "other").replace(entry(tmp_path))
    assert cache.get("values", "key") is None
    assert "does not fit its checksum" in cache.notes[0]


def test_other_versions_are_not_asked_for(tmp_path, monkeypatch):
    Cache(tmp_path).put("values", "key", ARRAYS)
    monkeypatch.setattr("cobla_onnx.runtime.cache.VERSION", 1000)
    assert Cache(tmp_path).get("values", "key") is None
    monkeypatch.undo()
    monkeypatch.setattr("cobla_onnx.runtime.cache.environment", lambda: ("another processor",))
    cache = Cache(tmp_path)
    assert cache.get("values", "key") is None
    assert cache.notes == []


WRITER = """
import sys, numpy as np
from cobla_onnx.runtime.cache import Cache
cache = Cache(sys.argv[1])
print("ready", flush=True)
while True:
    cache.put("values", "key", {"values": np.full(1 << 20, 3.0)})
"""


def test_a_killed_writer_leaves_a_whole_entry_or_none(tmp_path):
    for delay in (0.0, 0.01, 0.03, 0.1):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        cache = Cache(tmp_path)
        found = cache.get("values", "key")
        assert cache.notes == []
        assert found is None or (found["values"] == 3.0).all()


def test_two_writers_at_once(tmp_path):
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        cache = Cache(tmp_path)
        deadline = time.monotonic() + 30
        while cache.hits < 5 and time.monotonic() < deadline:
            found = cache.get("values", "key")
            assert found is None or (found["values"] == 3.0).all()
        assert cache.hits == 5
        assert cache.notes == []
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_files_of_killed_writers_go_after_a_day(tmp_path):
    old, new = tmp_path / ".values-a-1.tmp", tmp_path / ".values-b-2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    long_ago = time.time() - ABANDONED - 60
    os.utime(old, (long_ago, long_ago))
    Cache(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cache=.*cannot be used as a folder"):
        Cache(tmp_path / "file")


def test_a_disk_that_cannot_be_written_is_a_note(tmp_path, monkeypatch):
    cache = Cache(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cobla_onnx.runtime.cache.os.replace", full)
    found = fetch(cache, "values", "key", lambda: dict(ARRAYS))
    np.testing.assert_array_equal(found["values"], ARRAYS["values"])
    assert "could not be written (No space left on device)" in cache.notes[0]
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_changed_weight_changes_the_content_of_a_model(demo_model, data):
    model = load_model(demo_model)
    before = model_content(model)
    index = data.draw(st.integers(0, len(model.graph.initializer) - 1))
    tensor = model.graph.initializer[index]
    array = onnx.numpy_helper.to_array(tensor).copy()
    raw = array.reshape(-1).view(np.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert model_content(model) != before


def test_content_does_not_depend_on_where_tensors_lie(demo_model, tmp_path):
    onnx.save(
        onnx.load(demo_model), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0
    )
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "n.onnx"
    for path in list(tmp_path.glob("*")):
        if path.is_file() and path.suffix != ".onnx":
            (moved.parent / path.name).write_bytes(path.read_bytes())
    moved.write_bytes((tmp_path / "m.onnx").read_bytes())
    contents = {model_content(load_model(p)) for p in (tmp_path / "m.onnx", moved)}
    assert len(contents) == 1


def compressed(model: Path, budget: float, cache: Path | None = None) -> Result:
    data = model.with_name("digits_calibration.npz")
    return compress(
        model, Budget(mem=budget), data=data, samples=40, refit=False, solver="milp", cache=cache
    )


@pytest.fixture(scope="module")
def filled(demo_model, tmp_path_factory) -> Path:
    """A cache that one compression has filled; its model is that without a cache."""
    folder = tmp_path_factory.mktemp("cache")
    found = [compressed(demo_model, 0.4, cache) for cache in (None, folder)]
    without, first = (r.model.SerializeToString(deterministic=True) for r in found)
    assert first == without
    (folder / "model").write_bytes(first)
    return folder


@pytest.fixture
def copied(filled, tmp_path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "cache"))


@pytest.mark.parametrize("damage", [None, _truncate])
def test_the_same_model_with_and_without(demo_model, copied, damage):
    if damage is not None:
        for path in copied.glob("*.npz"):
            damage(path)
    second = compressed(demo_model, 0.4, copied)
    assert second.model.SerializeToString(deterministic=True) == (copied / "model").read_bytes()
    noted = [note for note in second.report.notes if "damaged" in note]
    assert len(noted) == (0 if damage is None else len(list(copied.glob("*.npz"))))


def test_another_budget_finds_all_that_does_not_depend_on_it(demo_model, copied):
    before = {path.name for path in copied.iterdir()}
    compressed(demo_model, 0.6, copied)
    new = {path.name.partition("-")[0] for path in copied.iterdir() if path.name not in before}
    # Losses of ranks that this budget alone has chosen are new.
    # So are singular vectors of the weights, to compare with the answer without data.
    assert new <= {"loss", "vectors"}


@pytest.mark.slow
def test_without_data_too_and_by_the_command(demo_model, tmp_path):
    compress(demo_model, Budget(mem=0.5)).save(tmp_path / "0.onnx")
    written = [(tmp_path / "0.onnx").read_bytes()]
    for number in (1, 2):
        out, cache = tmp_path / f"{number}.onnx", tmp_path / "cache"
        done = subprocess.run([COMMAND, demo_model, out, "--mem", "0.5", "-q", "--cache", cache])
        assert done.returncode == 0
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]
    kinds = {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert kinds == {"values", "vectors"}
