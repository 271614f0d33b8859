import math
import pickle
import shutil
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.errors import ModelError
from cobla_onnx.runtime.temporary import (
    MAPPED,
    ArrayFile,
    Rows,
    Shelf,
    SpareFiles,
    ValueFile,
    owned,
    temporary_folder,
)


def test_what_a_shelf_keeps_holds_no_other_memory():
    whole = np.zeros((1000, 8))
    shelf = Shelf([{"x": whole[:2], "words": np.array(["a"])}])
    assert all(array.base is None for array in shelf[0].values())
    np.testing.assert_array_equal(shelf[0]["x"], whole[:2])


def test_values_that_are_no_arrays_stay_as_they_are():
    own, sequence = np.ones(3), [np.ones(2)]
    kept = owned({"own": own, "sequence": sequence})
    assert kept["own"] is own
    assert kept["sequence"] is sequence


def test_a_temporary_folder_goes_with_an_error():
    with pytest.raises(FileNotFoundError), temporary_folder("test") as folder:
        (folder / "absent" / "file").touch()
    assert not folder.exists()


def test_an_interrupt_waits_until_a_temporary_folder_is_gone(monkeypatch):
    remove = shutil.rmtree

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_folder("test") as folder:
        (folder / "file").touch()
    assert not folder.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 200)), max_size=20))
def test_values_come_back_as_they_were_put_in(wanted):
    """Against a dictionary, in which the first value of a key stays."""
    file, expected = ValueFile(1 << 20), {}
    for key, size in wanted:
        value = {"array": np.arange(size, dtype=np.float32).reshape(-1, 1).T, "key": key}
        file.put(key, value)
        expected.setdefault(key, value)
    for key in range(5):
        assert (key in file) == (key in expected)
        if key in expected:
            found = file.get(key)
            np.testing.assert_array_equal(found["array"], expected[key]["array"])
            assert found["key"] == key


def test_a_file_of_values_takes_none_beyond_its_limit():
    file = ValueFile(150)
    file.put("first", bytes(90))
    file.put("second", bytes(90))
    file.put("third", bytes(90))
    assert [key in file for key in ("first", "second", "third")] == [True, True, False]


def test_on_a_full_disk_values_are_missing(monkeypatch):
    file = ValueFile(1 << 20)
    file.put("first", b"one")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pickle, "dump", full)
        file.put("second", b"two")
    file.put("third", b"three")
    assert not any(key in file for key in ("first", "second", "third"))


@pytest.mark.parametrize("count", [0, 3, MAPPED // 8, MAPPED])
def test_views_are_what_was_put_in_and_cannot_be_changed(count):
    file = ArrayFile()
    arrays = [np.arange(count, dtype=np.float64).reshape(1, -1), np.ones(5, np.int8)]
    places = [file.put(array) for array in [*arrays, *arrays]]
    for place, array in zip(places, [*arrays, *arrays], strict=True):
        found = file.view(place)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
        np.testing.assert_array_equal(file.get(place), array)
    if count * 8 >= MAPPED:
        with pytest.raises(ValueError, match="read-only"):
            file.view(places[0])[0, 0] = 1.0


def test_a_file_is_written_over_when_nobody_looks_at_it():
    spare = SpareFiles()
    large = np.arange(MAPPED, dtype=np.float64)
    first = ArrayFile(spare)
    view = first.view(first.put(large))
    raw = first._file
    del first
    # Its view is still in use.
    second = ArrayFile(spare)
    assert second._file is not raw
    second.put(-large)
    np.testing.assert_array_equal(view, large)
    del view
    third = ArrayFile(spare)
    assert third._file is raw
    assert third.size == 0
    place = third.put(2 * large[:-1])
    np.testing.assert_array_equal(third.view(place), 2 * large[:-1])
    files = [raw, second._file]
    del third, second, spare
    assert all(file.closed for file in files)


@pytest.mark.parametrize("shape", [(), (3, 2), (0,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_rows_are_taken_in_any_order(shape, dtype):
    whole = np.arange(7 * math.prod(shape)).reshape(7, *shape).astype(dtype)
    rows = Rows({"x": part, "y": part + part} for part in (whole[:4], whole[4:]))
    assert len(rows) == 7
    found = rows.take([6, 0, 0])
    assert found["x"].dtype == dtype
    np.testing.assert_array_equal(found["x"], whole[[6, 0, 0]])
    np.testing.assert_array_equal(rows[-1]["y"], (whole + whole)[-1:])
    assert [len(row["x"]) for row in rows[2:4]] == [1, 1]
    with pytest.raises(IndexError):
        rows[7]


def test_rows_may_follow_those_that_were_read():
    rows = Rows([{"x": np.zeros((2, 3))}])
    rows.take([1])
    rows.append({"x": np.ones((1, 3))})
    np.testing.assert_array_equal(rows.take([2, 1])["x"], [[1] * 3, [0] * 3])
    assert len(Rows()) == 0


def test_rows_of_another_shape_are_refused():
    rows = Rows([{"x": np.zeros((2, 3))}])
    with pytest.raises(ModelError, match=r"x.*\(3,\).*\(4,\)"):
        rows.append({"x": np.zeros((1, 4))})
    assert len(rows) == 2
