"""Damaged and hostile files: one clear line, nothing written, in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import ModelError
from cobla_onnx.graph import layers
from cobla_onnx.graph.io import model_file
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.wording import in_flags
from tests.builders import model_of, random_array, small_network
from tests.cli.test_command import COMMAND
from tests.contract.hostile import CASES, DATA_CASES, with_external_data

resource = pytest.importorskip("resource", reason="limits of memory are set by POSIX calls")


def run_limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command with 4 GB of address space and 20 seconds."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=20,
        preexec_fn=limit,
    )


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged_models_get_their_message(case, tmp_path):
    model = small_network()
    case.damage(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError) as caught:
        compress(path, Budget(mem=0.5), threads=1)
    assert caught.value.message == f"{path}: {case.message}"
    assert listing(tmp_path) == [str(path)]


@pytest.mark.parametrize("case", DATA_CASES, ids=lambda case: case.name)
def test_hostile_external_data_gets_its_message(case, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = with_external_data(folder, case.entries)
    case.prepare(folder)
    before = listing(tmp_path)
    with pytest.raises(ModelError) as caught:
        compress(path, Budget(mem=0.5), threads=1)
    assert str(caught.value) == f"{path}: initializer 'w1': {case.message}"
    assert listing(tmp_path) == before


def cache(root: Path) -> Path:
    """Lay a model with external data out as a Hugging Face cache does."""
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abc" / "onnx"
    snapshot.mkdir(parents=True)
    with_external_data(snapshot, {})
    for name, blob in (("model.onnx", "b0"), ("w.bin", "b1")):
        (snapshot / name).rename(root / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    return snapshot


def test_models_in_a_cache_of_links_are_read(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    with_external_data(plain, {})
    path = cache(tmp_path / "models--a--b") / "model.onnx"
    done = run_limited(path, tmp_path / "linked.onnx", "--mem", 0.5, "--threads", 1)
    assert done.returncode == 0, done.stderr
    done = run_limited(plain / "model.onnx", tmp_path / "plain.onnx", "--mem", 0.5, "--threads", 1)
    written = [onnx.load(tmp_path / name) for name in ("linked.onnx", "plain.onnx")]
    assert written[0] == written[1]
    assert sorted((tmp_path / "models--a--b" / "blobs").iterdir()) == [
        tmp_path / "models--a--b" / "blobs" / name for name in ("b0", "b1")
    ]


def _relink(snapshot: Path, target: str | Path) -> None:
    (snapshot / "w.bin").unlink()
    (snapshot / "w.bin").symlink_to(target)


def _blobs_elsewhere(snapshot: Path) -> None:
    root = snapshot.parents[2]
    (root / "blobs").rename(root.parent / "private")
    (root / "blobs").symlink_to("../private")


def _link_as_blob(snapshot: Path) -> None:
    blob = snapshot.parents[2] / "blobs" / "b1"
    blob.rename(blob.parents[2] / "secret")
    blob.symlink_to("../../secret")


def _without_snapshots(snapshot: Path) -> None:
    (snapshot.parents[1]).rename(snapshot.parents[2] / "versions")


HOSTILE_LINKS = {
    "out of the cache": lambda s: (
        (s.parents[2] / "blobs" / "b1").rename(s.parents[3] / "secret"),
        _relink(s, "../../../../secret"),
    ),
    "absolute": lambda s: _relink(s, s.parents[2] / "blobs" / "b1"),
    "to a link": lambda s: (
        (s / "again").symlink_to("../../../blobs/b1"),
        _relink(s, "again"),
    ),
    "to a blob that is a link": _link_as_blob,
    "to a blob with a second name": lambda s: os.link(
        s.parents[2] / "blobs" / "b1", s.parents[3] / "other"
    ),
    "to blobs that are a link": _blobs_elsewhere,
    "below blobs": lambda s: (
        (s.parents[2] / "blobs" / "sub").mkdir(),
        (s.parents[2] / "blobs" / "b1").rename(s.parents[2] / "blobs" / "sub" / "b1"),
        _relink(s, "../../../blobs/sub/b1"),
    ),
    "to another repository's blobs": lambda s: (
        (s.parents[3] / "other" / "blobs").mkdir(parents=True),
        (s.parents[2] / "blobs" / "b1").rename(s.parents[3] / "other" / "blobs" / "b1"),
        _relink(s, "../../../../other/blobs/b1"),
    ),
    "to a folder of nearly that name": lambda s: (
        (s.parents[2] / "blobs").rename(s.parents[2] / "Blobs"),
        (s / "model.onnx").unlink(),
        (s / "model.onnx").symlink_to("../../../Blobs/b0"),
        _relink(s, "../../../Blobs/b1"),
    ),
    "outside of snapshots": _without_snapshots,
    "to a pipe": lambda s: (
        os.mkfifo(s.parents[2] / "blobs" / "pipe"),
        _relink(s, "../../../blobs/pipe"),
    ),
    "to nothing": lambda s: _relink(s, "../../../blobs/b2"),
}


@pytest.mark.parametrize("case", HOSTILE_LINKS)
def test_other_links_in_a_cache_are_refused(case, tmp_path):
    snapshot = cache(tmp_path / "hub" / "models--a--b")
    HOSTILE_LINKS[case](snapshot)
    (path,) = (tmp_path / "hub").rglob("model.onnx")
    with pytest.raises(ModelError, match=r"its external data '(w\.bin|b1|b2|pipe)'"):
        load_model(path)


@pytest.mark.parametrize(
    "name",
    ["giant dims, little data", "group 0", "cycle", "ConstantOfShape of 2^40", "hostile name"],
)
def test_the_command_says_it_in_one_line(name, tmp_path):
    (case,) = [case for case in CASES if case.name == name]
    model = small_network()
    case.damage(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    done = run_limited(path, tmp_path / "out.onnx", "--mem", 0.5, "--threads", 1)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"error: {path}: {in_flags(case.message)}\n"
    assert listing(tmp_path) == [str(path)]


def test_a_pipe_as_external_data_does_not_hang(tmp_path):
    (case,) = [case for case in DATA_CASES if case.name == "pipe"]
    path = with_external_data(tmp_path, case.entries)
    case.prepare(tmp_path)
    done = run_limited(path, tmp_path / "out.onnx", "--mem", 0.5)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)


def test_truncated_files_are_refused_at_any_length(tmp_path):
    content = small_network().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(0, len(content), 331):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"model\.onnx: "):
            compress(path, Budget(mem=0.5), threads=1)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    content = small_network().SerializeToString().replace(b"documented", b"docu\xff\xfented")
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"field onnx\.ModelProto\.doc_string: holds text that"):
        compress(path, Budget(mem=0.5))


def test_a_loaded_model_may_not_point_to_files(tmp_path):
    path = with_external_data(tmp_path, {"basepath": "/etc"})
    model = onnx.load(path, load_external_data=False)
    with pytest.raises(ModelError, match=r"the model: initializer 'w1'.*pass the path of the file"):
        compress(model, Budget(mem=0.5))


def test_a_folder_noted_in_the_file_is_not_believed(tmp_path):
    path = with_external_data(tmp_path, {"basepath": "/etc"})
    assert compress(path, Budget(mem=0.6), threads=1).report.budget["mem"].reached <= 0.6


def test_weights_that_are_all_zero_go_through():
    model = small_network()
    for tensor in model.graph.initializer:
        zeros = np.zeros(tuple(tensor.dims), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
    assert compress(model, Budget(mem=0.3), threads=1).report.budget["mem"].reached <= 0.3


def test_weights_without_elements_and_scalars_are_left_alone():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "empty"),
        helper.make_node("ReduceSum", ["a"], ["s"], "sum", keepdims=0),
        helper.make_node("MatMul", ["x", "v"], ["b"], "real"),
        helper.make_node("Mul", ["b", "scalar"], ["c"]),
        helper.make_node("Add", ["c", "s"], ["y"]),
    ]
    weights = {"w": random_array(8, 0), "v": random_array(8, 8), "scalar": np.float32([2])[0]}
    model = model_of(nodes, weights, {"x": [2, 8]}, ["y"])
    result = compress(model, Budget(mem=0.9), threads=1)
    assert [layer.reason for layer in result.report.layers if layer.name == "empty"] == [
        "weight has no elements (shape [8, 0])"
    ]
    assert result.report.budget["mem"].reached <= 0.9


def test_thirty_thousand_nodes(tmp_path):
    nodes = [helper.make_node("Relu", [f"r{i}"], [f"r{i + 1}"]) for i in range(30_000)]
    nodes.append(helper.make_node("MatMul", ["r30000", "w"], ["y"], "last"))
    model = model_of(nodes, {"w": random_array(32, 32)}, {"r0": [2, 32]}, ["y"])
    onnx.save(model, tmp_path / "model.onnx")
    loaded = model_file.load_model(tmp_path / "model.onnx")
    assert [layer.name for layer in layers.find_layers(loaded).layers] == ["last"]


def test_a_loop_without_end_is_stopped(monkeypatch):
    from cobla_onnx.runtime import session as runtime

    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["more_out"]),
            helper.make_node("Add", ["a", "a"], ["a_out"]),
        ],
        "body",
        [value("i", 7, []), value("more", 9, []), value("a", 1, [2, 8])],
        [value("more_out", 9, []), value("a_out", 1, [2, 8])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Loop", ["", "true", "m"], ["y"], "loop", body=body),
    ]
    weights = {"w": random_array(8, 8), "true": np.array(True)}
    model = model_of(nodes, weights, {"x": [2, 8]}, ["y"])
    monkeypatch.setattr(runtime, "RUN_LIMIT", 0.5)
    with pytest.raises(ModelError, match=r"the model: onnxruntime cannot run .*terminate"):
        compress(model, Budget(mem=0.7), threads=1)
