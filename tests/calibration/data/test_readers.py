"""Calibration data of all kinds, the same samples from each, and what is wrong with it."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.calibration.data.dataset import Dataset, InputSpec, input_specs
from cobla_onnx.calibration.data.images import read_image
from cobla_onnx.calibration.data.readers import ImageOptions, open_data
from cobla_onnx.errors import DataError, ModelError, UsageError
from tests.builders import random_array, small_network

F32 = np.dtype(np.float32)
X = InputSpec("x", F32, (None, 3, 4))
IDS = InputSpec("ids", np.dtype(np.int64), (None, 5))
DECODER = [
    InputSpec("ids", np.dtype(np.int64), (None, None)),
    InputSpec("past", F32, (None, None, 4)),
]
IMAGE = InputSpec("image", F32, (None, 3, 8, 8))


def everything(dataset: Dataset, name: str = "x") -> np.ndarray:
    feeds = dataset.batches(range(len(dataset)), 4)
    return np.concatenate([batch[name] for batch in feeds])


def test_inputs_of_a_model():
    (spec,) = input_specs(small_network())
    assert spec == InputSpec("x", F32, (None, 3, 12, 12))
    value = onnx.helper.make_tensor_value_info("a", 1, ["N", 3, "H", "W"])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], []))
    (spec,) = input_specs(model, {"a": (1, 3, 32, 48)})
    assert spec.shape == (None, 3, None, None)
    assert spec.filled == (None, 3, 32, 48)
    text = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.STRING, [1])
    (spec,) = input_specs(onnx.helper.make_model(onnx.helper.make_graph([], "g", [text], [])))
    assert spec.dtype.kind == "U"
    kind = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, None))
    several = onnx.helper.make_value_info("a", kind)
    with pytest.raises(ModelError, match="not a tensor"):
        input_specs(onnx.helper.make_model(onnx.helper.make_graph([], "g", [several], [])))


class Reader:
    """Like onnxruntime's CalibrationDataReader."""

    def __init__(self, array: np.ndarray) -> None:
        self.batches = iter(np.array_split(array, 3))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch}


def sources(array: np.ndarray, folder: Path) -> dict[str, object]:
    np.save(folder / "a.npy", array)
    np.save(folder / "fortran.npy", np.asfortranarray(array))
    np.savez(folder / "plain.npz", x=array, labels=np.arange(len(array)))
    np.savez_compressed(folder / "packed.npz", x=np.asfortranarray(array))
    # By their numbers: 9, 10, 11.
    for number, part in enumerate(np.array_split(array, 3), 9):
        where = folder / "sets" / f"test_data_set_{number}"
        where.mkdir(parents=True)
        tensor = onnx.numpy_helper.from_array(part, "other name")
        (where / "input_0.pb").write_bytes(tensor.SerializeToString())
    return {
        "npy": folder / "a.npy",
        "fortran": folder / "fortran.npy",
        "npz": str(folder / "plain.npz"),
        "compressed": folder / "packed.npz",
        "sets": folder / "sets",
        "mapping": {"x": array},
        "reader": Reader(array),
        "dicts": ({"x": part} for part in np.array_split(array, 4)),
        "arrays": [array[:5], array[5:]],
    }


def test_every_source_gives_the_same_samples(tmp_path):
    array = random_array(11, 3, 4)
    for kind, source in sources(array, tmp_path).items():
        with open_data(source, [X]) as dataset:
            np.testing.assert_array_equal(everything(dataset), array, err_msg=kind)
    with open_data(tmp_path / "sets" / "test_data_set_9", [X]) as dataset:
        np.testing.assert_array_equal(everything(dataset), array[:4])


def test_fewer_samples_are_spread_where_their_number_is_known(tmp_path):
    array = random_array(101, 3, 4)
    for kind, source in sources(array, tmp_path).items():
        with open_data(source, [X], samples=5) as dataset:
            found = everything(dataset)
            spread = kind in ("npy", "fortran", "npz", "compressed", "mapping")
            wanted = array[[0, 25, 50, 75, 100]] if spread else array[:5]
            np.testing.assert_array_equal(found, wanted, err_msg=kind)


def test_one_shot_iterators_are_asked_no_further_than_needed():
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield {"x": random_array(2, 3, 4)}

    with open_data(endless(), [X], samples=7) as dataset:
        assert len(dataset) == 7
    assert len(asked) == 4


@given(st.integers(2, 300))
def test_the_split_is_complete_and_leaves_enough_on_both_sides(count):
    with Dataset("d", [{"x": np.zeros((count, 3, 4), np.float32)}], [X]) as dataset:
        assert sorted(dataset.calibration + dataset.selection) == list(range(count))
        assert not set(dataset.calibration) & set(dataset.selection)
        assert len(dataset.selection) == max(count // 5, min(4, count // 2))
        assert dataset.calibration


@given(st.lists(st.integers(0, 19), max_size=30), st.integers(1, 7))
def test_batches_give_the_samples_asked_for(indices, size):
    array = random_array(20, 3, 4)
    with Dataset("d", [{"x": array}], [X]) as dataset:
        found = list(dataset.batches(indices, size))
    assert all(len(batch["x"]) <= size for batch in found)
    joined = np.concatenate([batch["x"] for batch in found]) if found else array[:0]
    np.testing.assert_array_equal(joined, array[indices])


def test_a_fixed_batch_takes_its_rows_together(tmp_path):
    spec = InputSpec("x", F32, (4, 3))
    array = random_array(14, 3)
    np.save(tmp_path / "a.npy", array)
    with open_data(tmp_path / "a.npy", [spec]) as dataset:
        assert len(dataset) == 3
        batches = [feeds["x"] for feeds in dataset.batches(range(3), 16)]
    np.testing.assert_array_equal(np.stack(batches), array[:12].reshape(3, 4, 3))
    whole = random_array(5, 4, 3)
    with open_data({"x": whole}, [spec]) as dataset:
        np.testing.assert_array_equal(everything(dataset), whole.reshape(20, 3))


def test_records_of_different_shapes_are_not_joined():
    spec = InputSpec("x", F32, (None, None))
    parts = [random_array(2, 3), random_array(2, 5), random_array(3, 5)]
    with open_data(parts, [spec]) as dataset:
        shapes = [feeds["x"].shape for feeds in dataset.batches(range(7), 16)]
    assert shapes == [(2, 3), (5, 5)]


def test_inputs_without_a_batch_are_whole_records():
    specs = [InputSpec("x", F32, (None, 3)), InputSpec("s", F32, ())]
    records = [{"x": random_array(2, 3, seed=i), "s": np.float32(i)} for i in range(5)]
    with open_data(records, specs) as dataset:
        assert len(dataset) == 5
        found = [feeds["s"] for feeds in dataset.batches(range(5), 3)]
    assert found == [0, 1, 2, 3, 4]


def test_types_are_converted_where_nothing_is_lost():
    with open_data({"x": random_array(4, 3, 4, dtype="float64")}, [X]) as dataset:
        assert everything(dataset).dtype == F32
    with open_data({"ids": np.ones((4, 5), np.int32)}, [IDS]) as dataset:
        assert everything(dataset, "ids").dtype == np.int64


GOOD = np.ones((4, 3, 4), np.float32)
SMALL = InputSpec("m", np.dtype(np.int8), (None,))
HALF = InputSpec("x", np.dtype(np.float16), (None, 3, 4))


@pytest.mark.parametrize(
    ("data", "specs", "message"),
    [
        ({"x": np.ones((4, 3, 4), np.uint8)}, [X], "uint8, the model wants float32.*normalise"),
        ({"x": GOOD * np.nan}, [X], "NaN"),
        ({"x": GOOD * np.inf}, [X], "infinity"),
        ({"x": GOOD * 1e30}, [HALF], "overflow float16"),
        ({"x": np.ones((4, 4, 3), np.float32)}, [X], r"shape.*wants \[\?, 3, 4\]"),
        ({"x": np.ones((4, 12), np.float32)}, [X], "layout"),
        ({"z": GOOD}, [X], r"nothing for input 'x' \[\?, 3, 4\]; it has 'z'"),
        ({"x": GOOD, "z": GOOD}, [X], "'z' is not an input"),
        ({"x": GOOD, "ids": np.ones((3, 5), np.int64)}, [X, IDS], "different numbers"),
        ([{"x": GOOD, "ids": np.ones((3, 5), np.int64)}], [X, IDS], "different numbers"),
        ({"ids": np.ones((4, 5), np.float32)}, [IDS], "float32, the model wants int64"),
        ({"ids": np.ones((4, 5), bool)}, [IDS], "bool"),
        ({"m": np.full(4, 300)}, [SMALL], "do not fit"),
        ({"x": np.array([["a"]])}, [X], "not numbers"),
        ({"x": GOOD[:0]}, [X], "0 samples"),
        ({"x": GOOD[:1]}, [X], "at least 2"),
        ([], [X], "0 samples"),
        ({}, [X], "has no array for an input"),
        ([GOOD], [X, IDS], "give dicts"),
        ({"x": [[1.0, 2.0], [3.0]]}, [X], "^data: input 'x': is a list that cannot be read"),
        ([{"x": [[1.0], [2.0, 3.0]]}], [X], "input 'x': is a list .* give an array of numbers"),
        ([("x", GOOD)], [X], "input 'x': is a tuple that cannot be read"),
        ([{"ids": [[1], [2, 3]]}], DECODER, "input 'ids': is a list that cannot"),
    ],
)
def test_what_does_not_fit_is_refused(data, specs, message):
    with pytest.raises(DataError, match=message):
        open_data(data, specs)


def hostile_npz(path: Path, shape: tuple[int, ...]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 64)


def test_files_that_are_not_what_they_seem(tmp_path):
    np.savez(tmp_path / "good.npz", x=GOOD)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.npy").write_text("hello")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    hostile_npz(tmp_path / "huge.npz", (1 << 40, 1 << 20))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x.npy", "hello")
    for name in ("cut.npz", "text.npz", "text.npy", "pickled.npz", "pickled.npy", "huge.npz",
                 "other.npz"):  # fmt: skip
        with pytest.raises(DataError, match=name):
            open_data(tmp_path / name, [X])
    (tmp_path / "what.csv").write_text("1,2")
    missing = ("missing.npz", f"{300 * 'a'}.npz")
    for name, message in (("what.csv", "neither"), *((name, "does not exist") for name in missing)):
        with pytest.raises(UsageError, match=message):
            open_data(tmp_path / name, [X])
    with pytest.raises(DataError, match=r"an \.npz with an array for each"):
        open_data(tmp_path / "text.npy", [X, IDS])
    with pytest.raises(UsageError, match="int; give a path"):
        open_data(7, [X])
    with pytest.raises(UsageError, match="images: is a dict; give e"):
        open_data(tmp_path, [X], images={"mean": 1})
    sample = {0: np.zeros((1, 3, 4), np.float32)}
    for numbered in (sample, [sample]):
        with pytest.raises(DataError, match="named by a int; give arrays by input name"):
            everything(open_data(numbered, [X]))


def test_sets_that_are_not_complete(tmp_path):
    (tmp_path / "test_data_set_0").mkdir()
    with pytest.raises(DataError, match=r"no input_0\.pb"):
        open_data(tmp_path, [X])
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match=r"input_0\.pb: is not an ONNX tensor"):
        open_data(tmp_path, [X])


def peak_of(source: object) -> int:
    tracemalloc.start()
    with open_data(source, [InputSpec("x", F32, (None, 1000))]) as dataset:
        for _ in dataset.batches(range(len(dataset)), 8):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    peaks = {}
    for count in (200, 4000):
        array = np.zeros((count, 1000), np.float32)
        np.save(tmp_path / f"{count}.npy", array)
        np.savez_compressed(tmp_path / f"{count}.npz", x=array)
        del array
        batches = ({"x": np.zeros((10, 1000), np.float32)} for _ in range(count // 10))
        peaks[count] = [
            peak_of(tmp_path / f"{count}.npy"), peak_of(tmp_path / f"{count}.npz"),
            peak_of(batches),
        ]  # fmt: skip
    # 16 MB are read in the end; only the places of the samples may take memory.
    assert all(b - a < 2_500_000 for a, b in zip(*peaks.values(), strict=True)), peaks


def picture(path: Path, height: int, width: int) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), np.uint8)
    image.fromarray(pixels).save(path)
    return pixels


def test_images_are_cropped_and_normalised(tmp_path):
    wide = picture(tmp_path / "a.png", 8, 12)
    tall = picture(tmp_path / "bb.png", 10, 8)
    (tmp_path / "readme.txt").write_text("not an image")
    options = ImageOptions((1, 2, 3), (4, 5, 6), 0.5, "bgr")
    with open_data(tmp_path, [IMAGE], images=options) as dataset:
        found = everything(dataset, "image")
        assert any("no images" in note for note in dataset.notes)
    for values, pixels in zip(found, (wide[:, 2:10], tall[1:9]), strict=True):
        expected = (pixels[..., ::-1] * 0.5 - [1, 2, 3]) / [4, 5, 6]
        np.testing.assert_allclose(values, expected.transpose(2, 0, 1), rtol=1e-5)
    last = InputSpec("image", F32, (None, 8, 8, 3))
    with open_data(tmp_path, [last], images=ImageOptions(layout="nhwc")) as dataset:
        np.testing.assert_array_equal(everything(dataset, "image")[0], wide[:, 2:10])
    grey = InputSpec("image", F32, (None, 1, 4, 4))
    with open_data(tmp_path, [grey]) as dataset:
        assert everything(dataset, "image").shape == (2, 1, 4, 4)


def test_pictures_as_people_see_them(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)

    def read(name: str, channels: int = 3) -> np.ndarray:
        found = read_image(tmp_path / name, channels, 8, 8, ImageOptions())
        return found.transpose(1, 2, 0).squeeze()

    deep = np.random.default_rng(1).integers(0, 65536, (8, 8), np.uint16)
    image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read("deep.png", 1), (deep / 257).round())
    np.testing.assert_array_equal(read("deep.png")[..., 2], (deep / 257).round())
    turned = image.Exif()
    turned[0x112] = 6
    image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=turned)
    np.testing.assert_array_equal(read("turned.png"), pixels)
    clear = np.dstack([pixels, np.where(np.arange(8) < 4, 255, 0) * np.ones((8, 1))])
    seen = np.where(np.arange(8)[None, :, None] < 4, pixels, 255)
    image.fromarray(clear.astype(np.uint8)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read("clear.png"), seen)
    grey = image.fromarray(pixels[..., 0])
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read("grey.png"), pixels[..., :1].repeat(3, axis=2))
    grey.convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read("palette.png"), pixels[..., :1].repeat(3, axis=2))
    image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    assert np.abs(read("print.jpg") - [255, 0, 0]).max() < 8


def test_what_lies_beside_pictures(tmp_path):
    pytest.importorskip("PIL")
    folder = tmp_path / "img"
    for place in ("sub/deep", ".thumbs", "__MACOSX"):
        (folder / place).mkdir(parents=True)
        picture(folder / place / "p.png", 8, 8)
    (tmp_path / "else").mkdir()
    picture(tmp_path / "else" / "b.png", 8, 8)
    picture(folder / "z.png", 8, 8)
    (folder / "linked").symlink_to("../else")
    (folder / "sub" / "up").symlink_to("..")
    for name in ("._z.png", "Thumbs.db", ".DS_Store"):
        (folder / name).write_text("no image")
    unit = ImageOptions(scale=1 / 255)
    with open_data(folder, [IMAGE], images=unit) as dataset:
        assert dataset.names == ("linked/b.png", "sub/deep/p.png", "z.png")
        assert dataset.notes == ()
    (folder / "lost.png").symlink_to("nowhere.png")
    with open_data(folder, [IMAGE], images=unit, samples=2) as dataset:
        assert dataset.names == ("linked/b.png", "z.png")
        assert dataset.source_names == ("linked/b.png", "sub/deep/p.png", "z.png")
        assert dataset.notes == (f"{folder}/lost.png: is a link that leads nowhere; left out",)


def test_pixels_that_nobody_scaled_are_noted(tmp_path):
    pytest.importorskip("PIL")
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, 8, 8)
    for images in (None, ImageOptions(), ImageOptions(channel_order="bgr")):
        with open_data(tmp_path, [IMAGE], images=images) as dataset:
            (note,) = dataset.notes
            assert "from 0 to 255; for a model that takes 0 to 1 give --scale 0.00392157" in note
    for images in (ImageOptions(scale=0.5), ImageOptions(std=(2.0,)), ImageOptions((1.0, 2.0, 0))):
        with open_data(tmp_path, [IMAGE], images=images) as dataset:
            assert dataset.notes == ()
    spec = InputSpec("image", np.dtype(np.uint8), (None, 8, 8, 3))
    with open_data(tmp_path, [spec], images=ImageOptions(layout="nhwc")) as dataset:
        assert dataset.notes == ()


def test_pixels_for_inputs_of_integers(tmp_path):
    pixels = picture(tmp_path / "a.png", 8, 8)
    picture(tmp_path / "b.png", 8, 8)
    spec = InputSpec("image", np.dtype(np.uint8), (None, 8, 8, 3))
    as_is = ImageOptions(layout="nhwc")
    with open_data(tmp_path, [spec], images=as_is) as dataset:
        found = everything(dataset, "image")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], pixels)
    with pytest.raises(UsageError, match="gets pixels as they are; leave these options out"):
        open_data(tmp_path, [spec], images=ImageOptions(scale=1 / 255, layout="nhwc"))
    signed = InputSpec("image", np.dtype(np.int8), (None, 8, 8, 3))
    with pytest.raises(DataError, match=r"is int8.*give an \.npz"):
        open_data(tmp_path, [signed], images=as_is)


def test_images_that_cannot_be_used(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match="holds neither images"):
        open_data(tmp_path, [IMAGE])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff hello")
    with pytest.raises(DataError, match=r"broken\.jpg: cannot be read"):
        open_data(tmp_path, [IMAGE])
    for spec, message in (
        (InputSpec("image", F32, (None, 3, None, None)), "input_shapes="),
        (InputSpec("image", F32, (None, 8, 8, 3)), "layout="),
        (X, "4 axes"),
    ):
        with pytest.raises(DataError, match=message):
            open_data(tmp_path, [spec])
    with pytest.raises(UsageError, match="mean: has 2 numbers"):
        open_data(tmp_path, [IMAGE], images=ImageOptions(mean=(1, 2)))
    with pytest.raises(UsageError, match="std= not 0"):
        ImageOptions(std=(0.0,))


def test_pillow_is_only_needed_for_images(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cobla-onnx\[images\]"):
        open_data(tmp_path, [IMAGE])


def test_options_of_images_are_refused_for_what_is_no_image(tmp_path):
    array = np.zeros((4, *IMAGE.shape[1:]), np.float32)
    np.save(tmp_path / "a.npy", array)
    for data in (tmp_path / "a.npy", {IMAGE.name: array}, [array[:1]] * 4):
        assert len(open_data(data, [IMAGE], images=ImageOptions()).calibration)
        with pytest.raises(UsageError, match=r"say how images become inputs, and .* is no folder"):
            open_data(data, [IMAGE], images=ImageOptions(scale=1 / 255))
