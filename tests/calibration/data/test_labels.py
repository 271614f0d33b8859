"""Labels: read from files, put in the order of the samples, and what they change."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.calibration.data.dataset import Dataset, InputSpec
from cobla_onnx.calibration.data.labels import align_labels, read_labels
from cobla_onnx.calibration.data.readers import open_data
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.evaluation.targets import one_hot
from cobla_onnx.errors import DataError, UsageError
from cobla_onnx.graph.layers import find_layers
from tests.builders import random_array, small_network
from tests.calibration.evaluation.test_probe import samples, softmax

SPECS = (InputSpec("x", np.dtype(np.float32), (None, 2)),)
CLASSES = np.array([3, 1, 2, 0, 1, 2, 3, 0, 1, 1])


def test_files_of_labels(tmp_path):
    np.save(tmp_path / "a.npy", CLASSES)
    np.savez(tmp_path / "one.npz", anything=CLASSES)
    np.savez(tmp_path / "named.npz", image=np.zeros(3), labels=CLASSES)
    (tmp_path / "plain.csv").write_text("class\n" + "\n".join(map(str, CLASSES)))
    for name in ("a.npy", "one.npz", "named.npz", "plain.csv"):
        np.testing.assert_array_equal(read_labels(tmp_path / name), CLASSES)
    (tmp_path / "files.csv").write_text("file,class\nfolder/b.jpg,7\na.jpg, 2\n")
    assert read_labels(tmp_path / "files.csv") == {"folder/b.jpg": 7, "a.jpg": 2}


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("none.csv", None, UsageError, "is not a file"),
        (f"{300 * 'a'}.csv", None, UsageError, "is not a file"),
        ("a.txt", "1", UsageError, "neither .csv"),
        ("empty.csv", "", DataError, "needs a class"),
        ("words.csv", "1\ncat\n", DataError, "'cat'"),
        ("negative.csv", "class\n1\n-1\n", DataError, "line 3 has '-1'"),
        ("mixed.csv", "1\na.jpg,1\n", DataError, "needs a class"),
        ("bad.npy", "not numpy", DataError, "holds no numbers"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, error, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=words):
        read_labels(tmp_path / name)


def test_files_with_a_damaged_byte(tmp_path):
    np.save(tmp_path / "bracket.npy", CLASSES)
    np.savez(tmp_path / "number.npz", labels=CLASSES)
    for name, mark, place in (("bracket.npy", b")", 0), ("number.npz", b"NUMPY", 140)):
        content = bytearray((tmp_path / name).read_bytes())
        content[content.index(mark) + place] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: holds no numbers that numpy reads \(.+\)"):
            read_labels(tmp_path / name)


def test_arrays_that_are_none(tmp_path):
    np.savez(tmp_path / "two.npz", a=CLASSES, b=CLASSES)
    with pytest.raises(DataError, match="no array called"):
        read_labels(tmp_path / "two.npz")
    dataset = open_data({"x": random_array(10, 2)}, SPECS)
    for wrong in (CLASSES + 0.5, np.array(["a"] * 10), np.array(3), np.eye(10) / 2):
        with pytest.raises(DataError, match="whole number"):
            align_labels(wrong, dataset)
    with pytest.raises(DataError, match="fill them up to one length with -100"):
        align_labels([[1, 2], [3]] * 5, dataset)
    with pytest.raises(DataError, match=r"sample 2 \(from 0\) has -1 at \[1\]"):
        align_labels([[1, 2], [3, 4], [5, -1]], dataset)
    with pytest.raises(DataError, match=r"sample 3 \(from 0\) has -1"):
        align_labels(CLASSES - 1, dataset)
    with pytest.raises(DataError, match="are 9, the data has 10"):
        align_labels(CLASSES[:9], dataset)
    with pytest.raises(DataError, match="by file name"):
        align_labels({"a": 1}, dataset)


@pytest.mark.parametrize(
    "labels",
    [
        CLASSES[:, None],
        CLASSES.astype(np.float32),
        CLASSES.astype(np.float64)[:, None],
        CLASSES.tolist(),
    ],
)
def test_arrays_that_people_have(labels):
    dataset = open_data({"x": random_array(10, 2)}, SPECS)
    np.testing.assert_array_equal(align_labels(labels, dataset).ravel(), CLASSES)


LINES = [str(c) for c in CLASSES]
TABLES = {
    "plain": "\n".join(LINES),
    "mark": "\ufeff" + "\n".join(LINES),
    "mark and heading": "\ufeffclass\n" + "\n".join(LINES),
    "windows": "\r\n".join(LINES) + "\r\n",
    "floats": "\n".join(f"{c}.0" for c in CLASSES),
    "empty lines": "\n\n" + "\n\n".join(LINES) + "\n,\n",
    "numbered": "id,class\n" + "\n".join(f"{i},{c}" for i, c in enumerate(CLASSES)),
    "semicolons": "id;class\n" + "\n".join(f"{i};{c}" for i, c in enumerate(CLASSES)),
    "tabs": "\n".join(reversed([f"{i}\t{c}" for i, c in enumerate(CLASSES)])),
    "quotes": "\n".join(f'"{i}","{c}"' for i, c in enumerate(CLASSES)),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_as_programs_save_them(tmp_path, table):
    (tmp_path / "y.csv").write_bytes(TABLES[table].encode())
    np.testing.assert_array_equal(read_labels(tmp_path / "y.csv"), CLASSES)


def files(tmp_path, *names: str) -> Dataset:
    """A dataset as of images, without reading any."""
    records = [{"x": np.zeros((1, 2), np.float32)} for _ in names]
    return Dataset(str(tmp_path), records, SPECS, names=names)


def test_files_of_the_same_name_are_told_apart(tmp_path):
    dataset = files(tmp_path / "val", "cat/1.png", "dog/1.png", "dog/2.png")

    def of(**labels: int) -> list[int]:
        return align_labels(labels, dataset)[:, 0].tolist()

    wanted = [0, 1, 2]
    assert of(**{"cat/1.png": 0, "dog/1.png": 1, "2.png": 2}) == wanted
    assert of(**{"./cat/1.png": 0, "dog\\1.png": 1, "val/dog/2.png": 2}) == wanted
    full = tmp_path.as_posix()
    assert of(**{f"{full}/val/{name}": i for i, name in enumerate(dataset.names)}) == wanted
    # Of two folders' files those of this one.
    both = {f"{top}/{n}": i for top in ("train", "val") for i, n in enumerate(dataset.names)}
    assert of(**{key: y if "val" in key else 9 for key, y in both.items()}) == wanted
    assert of(**{f"elsewhere/{name}": i for i, name in enumerate(dataset.names)}) == wanted
    with pytest.raises(DataError, match=r"'1\.png' is 'cat/1\.png' as well as 'dog/1\.png'"):
        of(**{"1.png": 0, "2.png": 1})
    with pytest.raises(DataError, match=r"'cat/1\.png' may be 'a/cat/1\.png' or 'b/cat/1\.png'"):
        of(**{"a/cat/1.png": 0, "b/cat/1.png": 1, "dog/1.png": 1, "dog/2.png": 1})
    with pytest.raises(DataError, match=r"none for 'dog/1\.png'"):
        of(**{"cat/1.png": 0, "dog/2.png": 1})


def test_a_file_with_two_classes_is_refused(tmp_path):
    (tmp_path / "y.csv").write_text("file,class\na.png,1\nb.png,1\na.png,0\n")
    with pytest.raises(DataError, match=r"line 4 gives 'a\.png' a second class"):
        read_labels(tmp_path / "y.csv")


@pytest.mark.parametrize("kind", ["arrays", "npz", "npy", "iterable"])
def test_labels_stay_with_their_samples(tmp_path, kind):
    rows = np.stack([CLASSES, CLASSES], axis=1).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=rows)
    np.save(tmp_path / "d.npy", rows)
    data = {
        "arrays": {"x": rows},
        "npz": tmp_path / "d.npz",
        "npy": tmp_path / "d.npy",
        "iterable": [row[None] for row in rows[:6]],
    }[kind]
    dataset = open_data(data, SPECS, samples=6)
    labels = align_labels(CLASSES[:6] if kind == "iterable" else CLASSES, dataset)
    assert len(dataset) == 6
    for index in range(6):
        (feeds,) = dataset.batches([index], 1)
        assert feeds["x"][0, 0] == labels[index, 0]


def test_labels_of_a_fixed_batch_and_of_images(tmp_path):
    specs = (InputSpec("x", np.dtype(np.float32), (2, 2)),)
    rows = np.stack([CLASSES, CLASSES], axis=1).astype(np.float32)
    dataset = open_data({"x": rows}, specs, samples=3)
    labels = align_labels(CLASSES, dataset)
    for index in range(3):
        (feeds,) = dataset.batches([index], 1)
        np.testing.assert_array_equal(feeds["x"][:, 0], labels[index])
    image = pytest.importorskip("PIL.Image")
    for name, level in (("a.png", 10), ("b.png", 20), ("c.png", 30)):
        image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / name)
    specs = (InputSpec("x", np.dtype(np.float32), (None, 3, 4, 4)),)
    dataset = open_data(tmp_path, specs, samples=2)
    labels = align_labels({"c.png": 30, "a.png": 10, "b.png": 20}, dataset)
    for index in range(2):
        (feeds,) = dataset.batches([index], 1)
        assert feeds["x"].mean() == labels[index, 0]
    with pytest.raises(DataError, match=r"'a\.png'"):
        align_labels({"c.png": 30}, dataset)


def test_the_loss_is_the_cross_entropy_of_the_labels():
    model = small_network()
    layers = find_layers(model).layers
    data = samples(5)["x"]
    classes = np.array([[1], [0], [2], [1], [0]])
    probe = Probe(
        model,
        layers,
        [{"x": data[:3]}, {"x": data[3:]}],
        "ce",
        1,
        labels=[classes[:3], classes[3:]],
    )
    from cobla_onnx.runtime.session import open_session, run_session

    (logits,) = run_session(open_session(model, 1), {"x": data}).values()
    expected = -np.log(softmax(logits.astype(np.float64)))[np.arange(5), classes[:, 0]]
    np.testing.assert_allclose(probe.losses({}), expected, rtol=1e-4)
    with pytest.raises(DataError, match="counted from"):
        Probe(model, layers, [{"x": data}], "ce", 1, labels=[classes + 1000])


def test_one_hot_of_the_output_itself():
    output = random_array(3, 4, 2)
    found = one_hot(output, None)
    assert found.sum(axis=1).tolist() == [[1, 1]] * 3
    np.testing.assert_array_equal(found.argmax(axis=1), output.argmax(axis=1))
    losses = sample_losses({"y": "ce-logits"}, {"y": found}, {"y": output})
    assert (losses > 0).all()


def test_compress_with_labels():
    data = samples(20)["x"]
    labels = np.arange(20) % 3
    model = small_network()
    result = compress(model, Budget(mem=0.6), data={"x": data}, labels=labels, threads=1)
    assert set(result.report.calibration.outputs.values()) == {"ce-logits"}
    assert result.report.calibration.loss > 0
    loss = compress(
        model, Budget(mem=0.6), data={"x": data}, labels=labels, objective="loss", threads=1
    )
    # On labels without meaning, chance and versions decide whether the plan without data is taken.
    taken = {rival.origin for rival in loss.report.calibration.rivals if rival.taken}
    assert loss.report.solver.objective == ("weights" if "weights alone" in taken else "loss")
    with pytest.raises(UsageError, match="give data="):
        compress(model, Budget(mem=0.6), labels=labels)


def test_datasets_know_where_samples_come_from():
    dataset = Dataset("d", ({"x": row[None]} for row in random_array(5, 2)), SPECS)
    assert list(dataset.positions) == [0, 1, 2, 3, 4]
    assert dataset.source_samples == 5
    spread = open_data({"x": random_array(10, 2)}, SPECS, samples=3)
    assert list(spread.positions) == [0, 4, 9]
    assert spread.source_samples == 10
