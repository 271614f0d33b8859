"""``cobla-onnx compare`` and `cobla_onnx.compare`."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compare, compress, errors, inspect
from cobla_onnx.calibration.data.images import ImageOptions
from cobla_onnx.errors import UsageError
from cobla_onnx.pipeline import compare as module
from cobla_onnx.report.terminal import output_text
from tests.bodies import calls
from tests.builders import model_of, random_array, small_network
from tests.cli.test_command import run, run_here


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.1)


def changed(weight: str, factor: float) -> onnx.ModelProto:
    model = small_network()
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((array * factor).astype(array.dtype), weight))
    return model


def test_differences_are_those_of_the_outputs():
    data = {"x": random_array(10, 3, 12, 12, seed=1)}
    model = small_network()
    found = compare(model, changed("w3", 1.01), data=data, threads=1)
    (output,) = found.outputs
    assert (output.name, found.samples, found.data) == ("logits", 10, "data")
    session = onnx.reference.ReferenceEvaluator(model)
    expected = session.run(None, data)[0]
    bias = next(t for t in model.graph.initializer if t.name == "b3")
    difference = 0.01 * (expected - onnx.numpy_helper.to_array(bias))
    assert output.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-3)
    assert output.relative_l2 == pytest.approx(
        np.linalg.norm(difference) / np.linalg.norm(expected), rel=1e-3
    )
    assert found.first.weight_bytes == found.second.weight_bytes
    assert found.timed_shapes == {"x": (1, 3, 12, 12)}
    assert found.latency.repeats >= 9


def test_sizes_and_macs_are_those_of_the_report():
    result = compress(small_network(), Budget(mem=0.6), threads=1)
    found = compare(small_network(), result.model, threads=1)
    for name, before, after in (
        ("mem", found.first.weight_bytes, found.second.weight_bytes),
        ("mac", found.first.macs, found.second.macs),
    ):
        use = result.report.budget[name]
        assert (use.before, use.after) == (before, after)


def renamed(part: str) -> onnx.ModelProto:
    model = small_network()
    if part == "input":
        model.graph.input[0].name = model.graph.node[0].input[0] = "other"
    elif part == "output":
        model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    else:
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 14
        del model.graph.value_info[:]
    return model


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("input", "inputs differ: the first model has 'x', the second model has 'other'"),
        ("output", "outputs differ: the first model has 'logits'"),
        ("shape", r"takes float32 \[\?, 3, 12, 12\], the second model takes .*14, 12\]"),
    ],
)
def test_other_inputs_or_outputs_are_refused(part, message):
    with pytest.raises(errors.UsageError, match=message):
        compare(small_network(), renamed(part), threads=1)


def test_outputs_of_which_numpy_has_no_type_are_named():
    def ended(kind: int) -> onnx.ModelProto:
        model = small_network()
        (output,) = model.graph.output
        model.graph.node[-1].output[0] = "plain"
        cast = onnx.helper.make_node("Cast", ["plain"], [output.name], "cast", to=kind)
        model.graph.node.append(cast)
        output.type.tensor_type.elem_type = kind
        kept = onnx.helper.make_tensor_value_info("plain", onnx.TensorProto.FLOAT, None)
        model.graph.output.append(kept)
        del model.graph.value_info[:]
        return model

    plain, short = ended(onnx.TensorProto.FLOAT), ended(onnx.TensorProto.BFLOAT16)
    for models, whose in (((plain, short), "the second"), ((short, plain), "the first")):
        with pytest.raises(errors.UsageError, match=f"'logits': {whose} model gives it in a type"):
            compare(*models, threads=1)
    found = compare(short, short, threads=1)
    assert [output.name for output in found.outputs] == ["plain"]
    assert any("'logits'" in note and "not compared" in note for note in found.notes)


def test_a_model_that_overflows_is_named():
    with pytest.raises(errors.ModelError, match="the second model: output 'logits' is not finite"):
        compare(small_network(), changed("w3", 1e38), threads=1)


def test_a_first_model_that_gives_nan_is_named():
    with pytest.raises(errors.ModelError, match="the first model: output 'logits' is NaN where"):
        compare(changed("w3", np.nan), small_network(), threads=1)


def test_nothing_but_nan_is_not_called_the_same_for_all_inputs():
    found = compare(changed("w3", np.nan), changed("w3", np.nan), threads=1)
    (output,) = found.outputs
    assert not output.finite
    assert output_text(output).startswith("the original gives nothing but NaN or infinity, so")
    notes = [note for note in found.notes if "'logits'" in note and "nothing but NaN" in note]
    assert len(notes) == 1
    assert not any("--data" in note or "data=" in note for note in found.notes)


def test_the_command(demo_model, tmp_path):
    out = tmp_path / "small.onnx"
    compress(demo_model, Budget(mem=0.5)).save(out)
    done = run("compare", demo_model, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "latency" in done.stdout
    content = json.loads(run_here("compare", demo_model, out, "--json").stdout)
    assert content["second"]["file_bytes"] == out.stat().st_size
    done = run_here("compare", demo_model, tmp_path / "none.onnx")
    assert done.returncode == 2
    assert "none.onnx" in done.stderr


def test_a_record_that_is_kept_whole_is_one_sample():
    """Its first axis is time, of which nothing but the model knows."""
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = model_of(nodes, {"w": random_array(4, 4)}, {"x": ["time", 4]}, ["y"])
    data = [{"x": random_array(9, 4, seed=seed)} for seed in range(5)]
    assert compare(model, model, data=data, threads=1).samples == 5


def test_layers_in_functions_are_counted():
    model = calls(False)
    macs = inspect(model, threads=1).mac_total
    assert macs
    assert compare(model, model, threads=1).first.macs == macs


@pytest.mark.parametrize("option", [{"samples": 3}, {"images": ImageOptions(scale=1 / 255)}])
def test_options_of_samples_are_refused_without_any(option):
    with pytest.raises(UsageError, match=r"give (data=|a folder of them by data=) too"):
        compare(small_network(), small_network(), **option)
