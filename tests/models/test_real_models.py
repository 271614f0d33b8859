"""Real models go through, and the report agrees with independent counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from tests.cli.test_command import run

FAST = ["squeezenet1.1_fp32", "cifar_resnet20-12fca82f", "mobilenet_v1_0.25_128_quant"]
BUDGETS = [{"mem": 0.7}, {"mac": 0.7}, {"mem": 0.7, "mac": 0.7}]


def weight_bytes(path: Path) -> int:
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in onnx.load(path).graph.initializer)


@pytest.fixture(scope="module")
def spectra(tmp_path_factory):
    """Singular values of a model, computed for its first budget and kept for the others."""
    return tmp_path_factory.mktemp("spectra")


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *((name, budget) for name in FAST for budget in BUDGETS),
        # Half a million pixels an image: one run takes as long as all others.
        pytest.param("candy", BUDGETS[-1], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_real_models_reach_their_budgets(assets, tmp_path, spectra, name, budget):
    model, out = assets / "models" / f"{name}.onnx", tmp_path / "out.onnx"
    options = [part for key, value in budget.items() for part in (f"--{key}", value)]
    done = run(model, out, *options, "--report", tmp_path / "r.json", "--cache", spectra)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    reached = weight_bytes(out) / weight_bytes(model)
    assert report["budget"]["mem"]["reached"] == pytest.approx(reached, abs=1e-12)
    for key, limit in budget.items():
        assert report["budget"][key]["reached"] <= limit
    # The tighter of the budgets is used up.
    assert max(report["budget"][k]["reached"] - limit for k, limit in budget.items()) > -0.02
    before, after = onnx.load(model), onnx.load(out)
    for field in ("ir_version", "opset_import", "metadata_props", "producer_name", "doc_string"):
        assert getattr(before, field) == getattr(after, field)
    stored = {t.name for t in before.graph.initializer}
    assert before.graph.output == after.graph.output
    assert [i for i in before.graph.input if i.name not in stored] == [
        i for i in after.graph.input if i.name in {v.name for v in before.graph.input} - stored
    ]


def test_awkward_files_go_through(assets, tmp_path):
    for name in ("SqueezeNet_fp16", "mnist", "mltiny_pretrainedResnet"):
        done = run(assets / "models" / f"{name}.onnx", tmp_path / "o.onnx", "--mem", 0.7)
        assert done.returncode == 0, (name, done.stderr)


def test_unchanged_models_are_byte_identical(assets, tmp_path):
    for path in sorted((assets / "models").glob("*.onnx")):
        if path.stem == "candy":
            continue
        compress(path, Budget(mem=1.0)).save(tmp_path / "o.onnx")
        assert (tmp_path / "o.onnx").read_bytes() == path.read_bytes()


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
LIGHT_MODELS = sorted(path.name for path in LIGHT.glob("*.onnx"))
CHAINS = ("light_bvlc_alexnet.onnx", "light_vgg19.onnx", "light_zfnet512.onnx")


def narrowed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Divide all widths by four, of a plain chain of layers.

    Spectra of the full widths alone would take as long as half of all other tests.
    """
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.int64:
            # Shapes, of weights or of what is flattened; kernels are smaller than any width.
            array = np.where(array >= 48, array // 4, array)
        else:
            array = array[tuple(slice(n // 4 if n >= 48 else n) for n in array.shape)]
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    stored = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for value in model.graph.input:
        # Older files list initializers among the inputs.
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            size.dim_value = stored[value.name][axis] if value.name in stored else size.dim_value
    for value in model.graph.output:
        for size in value.type.tensor_type.shape.dim[1:]:
            size.dim_value //= 4
    return model


def with_random_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace weights made by ConstantOfShape by random ones of full rank."""
    generator = np.random.default_rng(0)
    stored = {t.name: t for t in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in stored:
            kept.append(node)
            continue
        shape = onnx.numpy_helper.to_array(stored[node.input[0]])
        size = max(1, int(np.prod(shape[1:])))
        array = np.abs(generator.standard_normal(shape)) if len(shape) == 1 else (
            generator.standard_normal(shape) * np.sqrt(2 / size)
        )  # fmt: skip
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(array.astype(np.float32), node.output[0])
        )
        if model.ir_version < 4:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(node.output[0], 1, shape.tolist())
            )
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_topologies_of_the_onnx_wheel(name):
    model = onnx.load(LIGHT / name)
    model = with_random_weights(narrowed(model) if name in CHAINS else model)
    result = compress(model, Budget(mem=0.7, mac=0.8))
    assert result.report.verification is not None
    assert result.report.budget["mem"].reached <= 0.7
    assert result.report.budget["mac"].reached <= 0.8
