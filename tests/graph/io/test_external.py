"""Weights in files beside the model: read lazily, written by content, never appended to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, Plan, compress, errors
from cobla_onnx.graph.io import save as saving
from cobla_onnx.graph.io.external import is_external
from cobla_onnx.graph.io.model_file import load_model, stored_bytes
from cobla_onnx.pipeline import proof
from cobla_onnx.plan import Decision
from cobla_onnx.variants import offload as spill
from tests.builders import differences, small_network
from tests.cli.test_command import run


def external_network(folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(small_network(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(path: Path) -> onnx.ModelProto:
    """Read a model whole, as if its weights had never been outside."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
    return model


def test_large_weights_stay_on_disk_and_small_ones_are_read(tmp_path):
    model = load_model(external_network(tmp_path))
    mapped = [tensor.name for tensor in model.graph.initializer if is_external(tensor)]
    assert mapped == ["w2"]
    assert stored_bytes(model) == stored_bytes(small_network())


def test_the_result_is_the_same_as_without_external_data(tmp_path):
    inside = compress(small_network(), Budget(mem=0.6), threads=1)
    outside = compress(external_network(tmp_path), Budget(mem=0.6), threads=1)
    assert outside.plan == inside.plan
    outside.save(tmp_path / "out.onnx", external_data="never")
    assert load(tmp_path / "out.onnx") == inside.model
    assert names(tmp_path) == ["in.onnx", "out.onnx", "w.bin"]


def test_auto_keeps_the_form_and_names_the_data_by_content(tmp_path):
    source = external_network(tmp_path)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "model.onnx"
    for _ in range(2):
        assert run(source, out, "--mem", 0.6, "-q").returncode == 0
        data = [name for name in names(out.parent) if name != "model.onnx"]
        assert len(data) == 1, "a second run neither appends nor adds"
        assert data[0].startswith("model-")
        assert data[0].endswith(".data")
    onnx.checker.check_model(str(out), full_check=True)
    written = onnx.load(out)
    assert stored_bytes(written) <= 0.6 * stored_bytes(small_network())
    size = (out.parent / data[0]).stat().st_size
    assert size < stored_bytes(written) + 4096 * len(written.graph.initializer)


def test_always_and_unchanged(tmp_path):
    onnx.save(small_network(), tmp_path / "in.onnx")
    result = compress(tmp_path / "in.onnx", Budget(mem=1.0), threads=1)
    result.save(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    result.save(tmp_path / "b.onnx", external_data="always")
    assert differences(small_network(), load(tmp_path / "b.onnx")) == []
    assert len(names(tmp_path)) == 4


def test_an_unchanged_model_takes_its_data_along(tmp_path):
    source = external_network(tmp_path)
    (tmp_path / "out").mkdir()
    compress(source, Budget(mem=1.0), threads=1).save(tmp_path / "out" / "out.onnx")
    assert differences(small_network(), load(tmp_path / "out" / "out.onnx")) == []


def test_in_place_leaves_the_old_data_alone(tmp_path):
    source = external_network(tmp_path)
    before = (tmp_path / "w.bin").read_bytes()
    assert run(source, source, "--mem", 0.6, "--in-place", "-q").returncode == 0
    assert (tmp_path / "w.bin").read_bytes() == before
    assert stored_bytes(load_model(source)) <= 0.6 * stored_bytes(small_network())


def test_a_failed_check_leaves_no_data_file(tmp_path):
    result = compress(external_network(tmp_path), Budget(mem=0.6), threads=1)
    before = names(tmp_path)

    def fail(path: Path) -> None:
        raise errors.VerificationError("no")

    result._check = fail
    with pytest.raises(errors.VerificationError):
        result.save(tmp_path / "out.onnx")
    assert names(tmp_path) == before


def test_a_data_file_that_is_not_ours_is_not_touched(tmp_path):
    result = compress(external_network(tmp_path), Budget(mem=0.6), threads=1)
    result.save(tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out-*.data")
    data.write_bytes(b"something else")
    with pytest.raises(errors.WriteError, match="other content than its name says"):
        result.save(tmp_path / "out.onnx")
    assert data.read_bytes() == b"something else"


def test_one_file_cannot_hold_more_than_two_gigabytes(monkeypatch, tmp_path):
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", saving.RESERVE + 4000)
    result = compress(small_network(), Budget(mem=0.6), threads=1)
    with pytest.raises(errors.UsageError, match="external_data='never': the result holds"):
        result.save(tmp_path / "out.onnx", external_data="never")
    result.save(tmp_path / "out.onnx")
    assert len(names(tmp_path)) == 2


def test_large_models_are_verified_in_groups_with_factors_on_disk(monkeypatch, tmp_path):
    plan = Plan((Decision("conv2", "channel", 4), Decision("fc", "matrix", 2)))
    plain = compress(small_network(), Budget(mem=0.9), plan=plan, threads=1)
    monkeypatch.setattr(proof, "DENSE_AT_ONCE", 1)
    monkeypatch.setattr(spill, "SPILL_FROM", 1)
    result = compress(external_network(tmp_path), Budget(mem=0.9), plan=plan, threads=1)
    assert result.report.verification.network_error is None
    assert result.report.verification.rewrite_max_error < 1e-5
    result.save(tmp_path / "out.onnx", external_data="never")
    assert load(tmp_path / "out.onnx") == plain.model


def test_packed_types_pass_through(tmp_path):
    model = small_network()
    values = np.arange(-8, 8, dtype=np.int8)
    packed = helper.make_tensor("q", TensorProto.INT4, [16, 1024], np.tile(values, 1024))
    model.graph.initializer.append(packed)
    model.opset_import[0].version, model.ir_version = 21, 10
    path = tmp_path / "in.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    compress(path, Budget(mem=0.9), threads=1).save(tmp_path / "out.onnx")
    (after,) = [t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name == "q"]
    assert (
        after.raw_data == onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(packed)).raw_data
    )


LIMIT_SCRIPT = """
import resource, sys
from cobla_onnx.cli import main
try:
    main()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak", peak * (1 if sys.platform == "darwin" else 1024), file=sys.stderr)
"""


def write_giant(path: Path, layers: int, rows: int, columns: int) -> int:
    """Write a chain of products with `layers` x `rows` x `columns` weights; return its bytes."""
    generator = np.random.default_rng(0)
    block = generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(rows**0.5)
    nodes, tensors = [], []
    with path.with_suffix(".bin").open("wb") as data:
        for number in range(layers):
            nodes.append(
                helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"])
            )
            shape = (rows, columns) if number % 2 == 0 else (columns, rows)
            tensor = TensorProto(name=f"w{number}", data_type=1, dims=shape, data_location=1)
            for key, value in (
                ("location", path.with_suffix(".bin").name),
                ("offset", str(data.tell())),
                ("length", str(block.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
            tensors.append(tensor)
            block *= np.float32(0.97)
            data.write(np.roll(block, number, axis=1).tobytes())
    value = helper.make_tensor_value_info
    last = rows if layers % 2 == 0 else columns
    graph = helper.make_graph(
        nodes, "giant", [value("x0", 1, [1, rows])], [value(f"x{layers}", 1, [1, last])], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return layers * block.nbytes


@pytest.mark.slow
def test_more_than_a_message_can_hold(tmp_path):
    # So large that factors wait on disk, too.
    budget = 0.85
    # Long and narrow: as many bytes, but spectra that are quickly computed.
    size = write_giant(tmp_path / "in.onnx", 8, 256, 262144)
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    arguments = [tmp_path / "in.onnx", out, "--mem", budget, "--report", report, "-q"]
    done = subprocess.run(
        [sys.executable, "-c", LIMIT_SCRIPT, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1])
    sys.stdout.write(
        f"\n{size / 1e9:.2f} GB at {budget}: peak {peak / 1e9:.2f} GB, {peak / size:.2f} times\n"
    )
    # Protobuf's limit.
    assert size >= 1 << 31
    assert peak < 2.5 * size
    onnx.checker.check_model(str(out))
    assert json.loads(report.read_text())["budget"]["mem"]["reached"] <= budget
    written = onnx.load(out, load_external_data=False)
    elements = sum(int(np.prod(t.dims)) for t in written.graph.initializer)
    assert 4 * elements <= budget * size


@pytest.mark.parametrize("external_data", ["auto", "always", "never"])
@pytest.mark.parametrize("outside", [False, True])
def test_bytes_are_counted_as_they_are_written(tmp_path, outside, external_data):
    source = external_network(tmp_path) if outside else small_network()
    result = compress(source, Budget(mem=0.6), threads=1)
    counted = result.file_bytes(external_data)
    target = tmp_path / "new" / "model.onnx"
    target.parent.mkdir()
    result.save(target, external_data=external_data)
    assert counted == sum(path.stat().st_size for path in target.parent.iterdir())


def test_bytes_of_a_copy_are_those_of_the_source(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(small_network(), path)
    assert compress(path, Budget(mem=1.0), threads=1).file_bytes() == path.stat().st_size
