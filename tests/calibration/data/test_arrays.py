"""Arrays become samples of the model's type and shape, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.calibration.data.arrays import (
    array_samples,
    evenly,
    open_npy,
    open_npz,
    spread_over,
)
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.data.evidence import lack_of_evidence
from cobla_onnx.calibration.data.fitting import InputSpec, check_shape, converted
from cobla_onnx.errors import DataError
from tests.builders import random_array

F32 = np.dtype("float32")
SPEC = InputSpec("x", F32, (None, 4), "batch")


@given(st.integers(1, 500), st.integers(2, 500) | st.none())
def test_some_of_many_are_spread_evenly(count, samples):
    chosen = evenly(count, samples)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, samples or count)
    assert chosen[0] == 0
    assert samples is None or len(chosen) == 1 or chosen[-1] == count - 1


@given(st.lists(st.integers(-300, 300), min_size=1), st.sampled_from(["int8", "uint8", "int16"]))
def test_integers_fit_or_are_refused(values, dtype):
    array, limits = np.array(values), np.iinfo(dtype)
    if limits.min <= min(values) and max(values) <= limits.max:
        np.testing.assert_array_equal(converted(array, np.dtype(dtype), "x"), array)
    else:
        with pytest.raises(DataError, match="do not fit"):
            converted(array, np.dtype(dtype), "x")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([1, 2]), "normalise"),
        (np.array([np.nan]), "NaN"),
        (np.array([1e300]), "overflow"),
        (np.array([object()]), "not numbers"),
    ],
)
def test_what_is_no_data_of_the_type_is_refused(array, words):
    with pytest.raises(DataError, match=words):
        converted(array, F32, "x")


def test_files_and_arrays_give_the_same_samples(tmp_path):
    array = random_array(6, 4)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array, labels=np.arange(6))
    opened = [
        array_samples("data", {"x": array}, [SPEC], None),
        open_npy(tmp_path / "x.npy", [SPEC], None),
        open_npz(tmp_path / "x.npz", [SPEC], None),
    ]
    for dataset in opened:
        assert isinstance(dataset, Dataset)
        found = np.concatenate([f["x"] for f in dataset.batches(range(6), 2)])
        np.testing.assert_array_equal(found, array)
    check_shape(array, SPEC, True, "x")
    with pytest.raises(DataError, match="x"):
        check_shape(random_array(6, 5), SPEC, True, "x")


def changed(path: Path, place: int, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] = byte
    path.write_bytes(data)


def test_files_with_a_damaged_byte_are_named(tmp_path):
    array = random_array(6, 4)
    np.save(tmp_path / "x.npy", array)
    # A bracket of the header, of which Python's tokens are read.
    changed(tmp_path / "x.npy", (tmp_path / "x.npy").read_bytes().index(b")"), ord(" "))
    with pytest.raises(DataError, match=r"x\.npy: is not an \.npy file of numbers"):
        open_npy(tmp_path / "x.npy", [SPEC], None)
    # The array's place in the archive, the archive's directory, and the last of the numbers.
    for name, mark, place in (
        ("place", b"PK\1\2", 42),
        ("end", b"PK\5\6", 16),
        ("sum", b"PK\1\2", -9),
    ):
        path = tmp_path / f"{name}.npz"
        np.savez(path, x=array)
        at = path.read_bytes().rindex(mark) + place
        changed(path, at, path.read_bytes()[at] ^ 0x40)
        with pytest.raises(DataError, match=rf"{name}\.npz: .*damaged \(.+\); save it again"):
            open_npz(path, [SPEC], None)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((8, 4), F32), "all samples are zeros"),
        (np.ones((8, 4), F32), "all samples are the same"),
        (np.tile(random_array(2, 4), (4, 1)), "only 2 different samples"),
    ],
)
def test_too_little_evidence_is_said(array, said):
    (note,) = lack_of_evidence(array_samples("data", {"x": array}, [SPEC], None))
    assert said in note
    assert lack_of_evidence(array_samples("data", {"x": random_array(8, 4)}, [SPEC], None)) == ()


@pytest.mark.parametrize("count", [7, 13, 47, 48, 94, 95, 96])
def test_some_samples_are_spread_over_all(count):
    """Not the first ones, though there are fewer than twice as many."""
    indices = range(100, 195)
    chosen = spread_over(indices, count)
    assert len(chosen) == min(count, len(indices))
    assert chosen[0] == 100
    assert chosen[-1] > 194 - 2 * len(indices) / count
    steps = np.diff(chosen)
    assert steps.max() - steps.min() <= 1


def test_arrays_of_labels_alone_are_named(tmp_path):
    """Where an input has another name, ``y`` is taken for labels."""
    path = tmp_path / "y.npz"
    np.savez(path, y=random_array(8, 4))
    words = "has no array for an input of the model, whose inputs are 'x'; name it after its input"
    for read in (
        lambda: open_npz(path, [SPEC], None),
        lambda: array_samples("d", {}, [SPEC], None),
    ):
        with pytest.raises(DataError, match=words):
            read()
