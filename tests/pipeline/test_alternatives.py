"""``compare_with="onnxruntime"``: others' models are points, judged as our own are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cobla_onnx import Budget, compare, sweep
from cobla_onnx.arithmetic import quantisers
from cobla_onnx.arithmetic.quantisers import QUANTISERS, Quantiser
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline import alternatives
from tests.builders import random_array, small_network

DATA = {"x": random_array(30, 3, 12, 12, seed=3)}
NAMES = [quantiser.name for quantiser in QUANTISERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def found(folder):
    model, budgets = small_network(), [Budget(mem=0.6)]
    return sweep(
        model, budgets, data=DATA, threads=1, solver="milp", compare_with="onnxruntime",
        out_dir=folder,
    )  # fmt: skip


def by_name(found):
    return {point.name: point for point in found.points if not point.ours}


def test_each_quantiser_is_a_point_or_says_why_not(found):
    others = by_name(found)
    assert list(others) == NAMES
    for point in others.values():
        assert point.method == f"onnxruntime {point.name}"
        assert point.budget is None
        assert (point.refused is None) == (point.loss is not None)
    for name in ("static QDQ, U8S8", "quantize_dynamic", "float16"):
        assert others[name].refused is None, others[name].refused


def test_they_are_measured_on_the_files_that_are_written(found):
    own = found.points[0].quality
    for point in by_name(found).values():
        if point.refused:
            continue
        written = onnx.load(point.file)
        assert point.file_bytes == Path(point.file).stat().st_size
        assert point.mem == stored_bytes(written) / stored_bytes(small_network())
        assert [o.name for o in written.graph.output] == ["logits"]
        assert point.quality.samples == own.samples
        assert point.mac == 1.0
        assert np.isfinite(point.loss)
    half = by_name(found)["float16"]
    assert half.mem == pytest.approx(0.5, abs=0.01)
    assert half.loss < by_name(found)["static QDQ, U8S8"].loss


def test_the_loss_is_that_of_the_samples_held_back(found):
    """Judged by another way: `compare` on all samples sees a model that is about as near."""
    point = by_name(found)["quantize_dynamic"]
    (output,) = compare(small_network(), point.file, data=DATA, threads=1).outputs
    assert output.relative_l2 < 0.1
    assert point.quality.drop < 0.2


def test_the_front_takes_them_as_it_takes_our_own(found):
    for point in found.points:
        others = [p for p in found.points if not p.refused and p is not point]
        beaten = any(
            p.mem <= point.mem and p.mac <= point.mac and p.loss <= point.loss
            for p in others
            if not point.refused
        )
        assert point.front == (not point.refused and not beaten)


def failing(source, target, samples):
    raise RuntimeError("cannot do that\nat all")


def lacking(source, target, samples):
    raise ImportError("none", name="onnx_ir")


def damaged(source, target, samples):
    target.write_bytes(b"no model")


def endless(source, target, samples):
    """Write a model that gives no numbers."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor) * np.float32(np.inf)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, target)


def test_what_fails_is_a_point_that_says_why(monkeypatch):
    made = {"a": failing, "b": lacking, "c": damaged, "d": endless}
    monkeypatch.setattr(
        alternatives, "QUANTISERS", [Quantiser(name, name, make) for name, make in made.items()]
    )
    found = sweep(
        small_network(), [Budget(mem=0.6)], data=DATA, threads=1, solver="milp",
        compare_with="onnxruntime",
    )  # fmt: skip
    said = {name: point.refused for name, point in by_name(found).items()}
    assert said["a"] == "fails: RuntimeError, cannot do that"
    assert said["b"] == "needs onnx-ir, which is not installed"
    assert "is not an ONNX model" in said["c"]
    assert said["d"] == "on the samples held back its outputs are no numbers"
    assert all(reason in found.to_csv() for reason in (said["a"], said["b"], said["d"]))


def test_without_data_or_with_another_name_it_is_refused():
    with pytest.raises(UsageError, match="give data= too"):
        sweep(small_network(), [Budget(mem=0.6)], compare_with="onnxruntime")
    with pytest.raises(UsageError, match="give compare_with='onnxruntime'"):
        sweep(small_network(), [Budget(mem=0.6)], data=DATA, compare_with="olive")


def integer_output() -> onnx.ModelProto:
    """Return a classifier whose only output is the number of the class."""
    model = small_network()
    graph = model.graph
    name = graph.output[0].name
    graph.node.append(helper.make_node("ArgMax", [name], ["class"], axis=1, keepdims=0))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("class", onnx.TensorProto.INT64, None))
    return model


def test_where_the_loss_is_taken_inside_the_file_has_the_outputs_of_the_original(tmp_path):
    found = sweep(
        integer_output(), [Budget(mem=0.6)], data=DATA, threads=1, solver="milp",
        compare_with="onnxruntime", out_dir=tmp_path,
    )  # fmt: skip
    for name in ("static QDQ, U8S8", "quantize_dynamic", "float16"):
        point = by_name(found)[name]
        assert point.refused is None, point.refused
        written = onnx.load(point.file)
        assert [output.name for output in written.graph.output] == ["class"]
        read = {name for node in written.graph.node for name in node.input} | {"class"}
        assert all(read & set(node.output) for node in written.graph.node)
        assert compare(integer_output(), point.file, threads=1).outputs


def test_old_models_are_lifted_to_scales_by_channel(tmp_path):
    source, lifted = tmp_path / "old.onnx", tmp_path / "lifted.onnx"
    model = small_network()
    model.opset_import[0].version = 12
    onnx.save(model, source)
    assert quantisers._raised(source, lifted) == lifted
    assert onnx.load(lifted).opset_import[0].version == 13
    onnx.save(small_network(), source)
    assert quantisers._raised(source, lifted) == source


def test_a_model_without_products_has_no_matmul_nbits(tmp_path, monkeypatch):
    pytest.importorskip("onnx_ir")
    onnx.save(small_network(), tmp_path / "in.onnx")
    quantiser = next(q for q in QUANTISERS if q.name == "MatMulNBits, 4 bits")
    with pytest.raises(ModelError, match="finds nothing to do"):
        quantiser.write(tmp_path / "in.onnx", tmp_path / "out.onnx", list)


def test_time_is_measured_where_ours_is(monkeypatch):
    monkeypatch.setattr(alternatives, "QUANTISERS", QUANTISERS[-1:])
    found = sweep(
        small_network(), [Budget(mem=0.6)], data=DATA, threads=1, solver="milp",
        compare_with="onnxruntime", measure_latency=True,
    )  # fmt: skip
    assert all(point.latency is not None for point in found.points)
