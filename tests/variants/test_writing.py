"""How codes are written: what decides it, and what onnxruntime makes of each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx import Budget, Plan, compress
from cobla_onnx.errors import VerificationError
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.io.model_file import stored_bytes as model_bytes
from cobla_onnx.graph.io.save import save_model
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.plan import Decision
from cobla_onnx.variants import writing
from cobla_onnx.variants.base import OnlyForm
from cobla_onnx.variants.coded_factors.family import CodedFactorsFamily
from cobla_onnx.variants.coded_factors.stored import pair_bytes
from cobla_onnx.variants.offload import Spill
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.storage.family import STORED, StorageFamily
from cobla_onnx.variants.storage.from_data import rounded
from cobla_onnx.variants.storage.stored import stored_bytes
from cobla_onnx.variants.writing import FUSED, Storage, Writing, dequantizes_axis, takes_nibbles
from tests.builders import model_of, random_array, small_network
from tests.variants.storage.test_family import LAYERS, one_layer

STORAGES: tuple[Storage, ...] = ("auto", "cast", "qdq")
LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
FAMILY = CodedFactorsFamily()


def run(model: onnx.ModelProto, level: Any, x: np.ndarray, written: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    if written is not None:
        options.optimized_model_filepath = str(written)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def replaced(model: onnx.ModelProto, bits: int, rank: int | None, pick: int) -> Replacement:
    """The layer's weight in fewer bits or, with a rank, its factors."""
    (layer,) = find_layers(model).layers
    weight = read_weight(model, layer)
    if rank is None:
        made = rounded(layer, weight, bits, None)
        return StorageFamily().replace(layer, OnlyForm(STORED), made)
    forms = [form for form in FAMILY.forms(layer) if form.bits == bits]
    form = forms[pick % len(forms)]
    rank = min(rank, FAMILY.most(layer, form))
    pair = FAMILY.replace(layer, form, FAMILY.from_weights(layer, form, rank, weight, None))
    assert sum(a.nbytes for a in pair.arrays.values()) <= pair_bytes(layer, form, rank)
    return pair


@settings(deadline=None, max_examples=60)
@given(
    case=st.integers(0, len(LAYERS) - 1),
    bits=st.sampled_from((4, 8)),
    rank=st.sampled_from((None, 1, 3)),
    pick=st.integers(0, 3),
    storage=st.sampled_from(STORAGES),
    opset=st.sampled_from((13, 21)),
)
def test_each_way_decodes_the_same_weight(
    case: int, bits: int, rank: int | None, pick: int, storage: Storage, opset: int
) -> None:
    model = one_layer(case, opset)
    model.ir_version = 10
    plain = replaced(model, bits, rank, pick)
    replacement = plain.written(Writing.into(model, storage))
    np.testing.assert_array_equal(replacement.dense(), plain.dense())
    assert replacement.nbytes <= plain.nbytes
    result, expected = rewrite(model, [replacement]), rewrite(model, [plain])
    onnx.checker.check_model(result, full_check=True)
    assert model_bytes(result) <= model_bytes(expected)
    kinds = {node.op_type for node in result.graph.node}
    assert ("DequantizeLinear" in kinds) == (replacement.optimized_tolerance is not None)
    types = {tensor.data_type for tensor in result.graph.initializer}
    assert (TensorProto.UINT4 in types) == (opset == 21 and bits == 4 and storage != "cast")
    x = random_array(*LAYERS[case][3], seed=5)
    reference = run(expected, LEVELS[0], x)
    np.testing.assert_array_equal(run(result, LEVELS[0], x), reference)
    size = float(np.abs(reference).max())
    for level in LEVELS[1:]:
        allowed = replacement.optimized_tolerance or 1e-5
        assert np.abs(run(result, level, x) - reference).max() <= allowed * size
    if LAYERS[case][0] != "ConvTranspose":
        (found,) = ReferenceEvaluator(result).run(None, {"x": x})
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize(("opset", "expected"), [(12, False), (13, True), (21, True)])
def test_scales_along_an_axis_need_opset_13(opset: int, expected: bool) -> None:
    model = one_layer(0, opset)
    replacement = replaced(model, 8, None, 0).written(Writing.into(model, "qdq"))
    assert (replacement.optimized_tolerance is not None) == expected
    kinds = [node.op_type for node in rewrite(model, [replacement]).graph.node]
    assert ("DequantizeLinear" in kinds) == expected


@pytest.mark.parametrize(
    ("shape", "opset", "axis"),
    [
        ((1, 7), 13, 1),
        ((5, 1, 1, 1), 13, 0),
        ((1, 1), 10, 0),
        ((1, 1), 9, None),
        ((2, 1, 7), 21, None),
    ],
)
def test_dequantize_linear_has_one_scale_or_one_axis(
    shape: tuple[int, ...], opset: int, axis: int | None
) -> None:
    assert dequantizes_axis(Writing("qdq", opset, 8), shape) == axis
    assert dequantizes_axis(Writing("auto", opset, 8), shape) is None


def test_nibbles_need_opset_ir_version_and_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes_nibbles(Writing("auto", 21, 10))
    assert takes_nibbles(Writing("qdq", 21, 10))
    assert not takes_nibbles(Writing("cast", 21, 10))
    assert not takes_nibbles(Writing("auto", 20, 10))
    assert not takes_nibbles(Writing("auto", 21, 9))
    monkeypatch.setattr(writing.onnxruntime, "__version__", "1.22.1")
    assert not takes_nibbles(Writing("auto", 21, 10))


def skip_if_never_fused(node: onnx.NodeProto) -> None:
    """onnxruntime 1.23, the last for Python 3.10, leaves 8 bits as they are; 1.32 fuses them."""
    if node.op_type == "MatMul" and tuple(map(int, ort.__version__.split(".")[:2])) < (1, 32):
        pytest.skip(f"onnxruntime {ort.__version__} fuses no products of 8 bits")


@pytest.mark.parametrize(("storage", "left"), [("qdq", "MatMulNBits"), ("auto", "MatMul")])
def test_onnxruntime_fuses_a_product_that_dequantises(
    tmp_path: Path, storage: Storage, left: str
) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    model = model_of([node], {"w": random_array(100, 30)}, {"x": [4, 100]}, ["y"], opset=13)
    replacement = replaced(model, 8, None, 0).written(Writing.into(model, storage))
    result = rewrite(model, [replacement])
    run(result, LEVELS[2], random_array(4, 100, seed=1), tmp_path / "open.onnx")
    opened = onnx.load(tmp_path / "open.onnx").graph.node
    found = opened[-1]
    if left != "MatMul":
        skip_if_never_fused(found)
    assert len(opened) == 1
    assert found.op_type == left


def products(**options: Any) -> Any:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("MatMul", ["a", "v"], ["y"], "two"),
    ]
    weights = {"w": random_array(64, 48), "v": random_array(48, 40, seed=1)}
    model = model_of(nodes, weights, {"x": [5, 64]}, ["y"], opset=21, ir_version=10)
    plan = Plan((Decision("one", "stored", 8), Decision("two", "matrix@8", 12)))
    return compress(model, plan=plan, threads=1, **options)


def test_the_run_says_what_products_in_8_bits_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = products(storage="qdq")
    run(result.model, LEVELS[2], random_array(5, 64), tmp_path / "open.onnx")
    skip_if_never_fused(onnx.load(tmp_path / "open.onnx").graph.node[-1])
    assert result.report.verification.rewrite_max_error < 1e-6
    (note,) = result.report.verification.notes
    assert note.startswith("2 of 2 layers read DequantizeLinear")
    assert products(storage="auto").report.verification.notes == ()
    # The check of optimised layers can fail, and that of others is no looser.
    monkeypatch.setattr("cobla_onnx.variants.storage.stored.FUSED", FUSED / 1e4)
    with pytest.raises(VerificationError, match="its new nodes differ"):
        products(storage="qdq")


def test_what_has_no_such_form_is_named() -> None:
    plan = Plan((Decision("conv2", "stored", 5),))
    report = compress(small_network(), plan=plan, storage="qdq", threads=1).report
    assert any(note.startswith("--storage qdq: no layer is dequantised") for note in report.notes)


def test_what_computes_in_8_bits_reads_such_forms() -> None:
    data = {"x": random_array(16, 3, 12, 12)}
    options = {"data": data, "arithmetic": "int8", "threads": 1}
    report = compress(small_network(), Budget(mac=0.5), storage="qdq", **options).report
    assert any(layer.rank for layer in report.layers)
    assert not any("no layer is dequantised" in note for note in report.notes)


@pytest.mark.parametrize("external", ["never", "always"])
@pytest.mark.parametrize("spilled", [False, True])
def test_packed_codes_are_saved_as_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: Any, spilled: bool
) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    weights = {"w": random_array(51, 61)}
    model = model_of([node], weights, {"x": [4, 51]}, ["y"], opset=21, ir_version=10)
    (layer,) = find_layers(model).layers
    made = replaced(model, 4, None, 0).written(Writing.into(model, "auto"))
    spill = Spill()
    if spilled:
        monkeypatch.setattr("cobla_onnx.variants.offload.SPILL_FROM", 0)
        (made,) = spill.replacements([made])
    result = rewrite(model, [made])
    # Two of the 3,111 codes in a byte, 16 levels, a scale for each column.
    assert model_bytes(result) == 1556 + 4 * 16 + 4 * 61 <= stored_bytes(layer, 4)
    path = tmp_path / "saved.onnx"
    save_model(result, path, external, lambda _: None)
    (data,) = list(tmp_path.glob("*.data")) or [path]
    assert data.stat().st_size >= 1556
    x = random_array(4, 51, seed=2)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, x @ made.dense(), rtol=1e-4, atol=1e-4)
    assert model_bytes(load_model(path)) == model_bytes(result)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_numbers_of_4_bits_that_a_model_brings_are_half_a_byte(count: int, kind: int) -> None:
    model = small_network()
    before = model_bytes(model)
    model.graph.initializer.append(helper.make_tensor("q", kind, [count], [1] * count))
    assert model_bytes(model) == before + (count + 1) // 2
    raw = numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[-1]), "q")
    model.graph.initializer[-1].CopyFrom(raw)
    assert model_bytes(model) == before + len(raw.raw_data)
