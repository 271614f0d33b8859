"""Tables in few bits, looked up row by row, from the option to the file."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx import Budget, Plan, compress
from cobla_onnx.calibration.frequencies import RowCounts
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.io.model_file import stored_bytes as model_bytes
from cobla_onnx.graph.layers import Layer, find_layers, read_weight
from cobla_onnx.plan import Decision
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, OnlyForm
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.storage import rows as rows_module
from cobla_onnx.variants.storage import rows_family
from cobla_onnx.variants.storage.packing import PLANES, pack_rows, packed_bytes
from cobla_onnx.variants.storage.precision import FORMATS
from cobla_onnx.variants.storage.row_decoding import RowFormat, row_decoder
from cobla_onnx.variants.storage.rows import (
    RoundedTable,
    best_rows,
    round_table,
    stored_rows,
    table_bytes,
)
from cobla_onnx.variants.storage.rows_family import ROWS, RowStorageFamily, RowsUnit
from tests.builders import random_array
from tests.lookups import few_directions, lookup_model, text_model, texts
from tests.variants.low_rank.test_tables import LEVELS, run

BITS = st.sampled_from(FORMATS)


def rounded(layer: Layer, table: np.ndarray, bits: int) -> RoundedTable:
    return round_table(table, bits, None, best_rows(layer.shape, bits), layer.type)


@pytest.mark.parametrize(("opset", "shape"), [(9, [0, 3]), (14, [2, 0]), (17, [1, 0, 2])])
@pytest.mark.parametrize("bits", [5, 8, 16])
def test_lookups_of_nothing_give_nothing(bits, opset, shape):
    model = lookup_model(random_array(9, 7), shape, opset=opset, kind=TensorProto.INT64)
    (layer,) = find_layers(model).layers
    result = rewrite(model, [stored_rows(layer, rounded(layer, read_weight(model, layer), bits))])
    for level in LEVELS:
        assert run(result, {"ids": np.zeros(shape, np.int64)}, level).shape == (*shape, 7)


@settings(max_examples=60, deadline=None)
@given(
    bits=BITS,
    opset=st.sampled_from([7, 8, 9, 10, 11, 13, 17, 21]),
    shape=st.sampled_from([[], [5], [2, 3], [1, 2, 2]]),
    size=st.tuples(st.just(9), st.integers(1, 17)) | st.tuples(st.just(70), st.integers(64, 70)),
    half=st.booleans(),
    narrow=st.booleans(),
    function=st.booleans(),
    opened=st.booleans(),
)
def test_lookups_give_the_rows_that_are_stated(
    bits, opset, shape, size, half, narrow, function, opened
):
    rows, _ = size
    table = random_array(*size, dtype="float16" if half else "float32")
    kind = TensorProto.INT32 if narrow else TensorProto.INT64
    model = lookup_model(table, shape, opset=opset, kind=kind)
    model.ir_version = 10 if opset > 20 else 8 if function else 7
    (layer,) = find_layers(model).layers
    made = rounded(layer, read_weight(model, layer), bits)
    replacement = stored_rows(layer, made)
    np.testing.assert_array_equal(replacement.dense(), made.weight)
    with mock.patch.object(rows_module, "OPENED", table.size if opened else 0):
        result = rewrite(model, [replacement])
    onnx.checker.check_model(result, full_check=True)
    decoded_first = opened and opset >= 11
    assert ("Range" in {node.op_type for node in result.graph.node}) == decoded_first
    mixed = rows == 70 and bits < 8
    cut = bits < 8 and layer.shape[1] * min(PLANES[bits]) % 8 > 0
    name = f"Rows{bits}{'Mixed' * mixed}{'Cut' * cut}{'Half' * half}"
    assert [f.name for f in result.functions] == [name] * (model.ir_version >= 8 and opset > 9)
    assert len(made.best) == 2 * mixed
    assert table_bytes(layer, bits) == model_bytes(result)
    least = -rows if opset >= 11 else 0
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    ids = np.random.default_rng(bits).integers(least, rows, shape, dtype)
    if mixed and shape:
        ids.flat[-1] = made.best[0]
    for level in LEVELS:
        found = run(result, {"ids": ids}, level)
        assert found.dtype == table.dtype
        np.testing.assert_array_equal(found, made.weight[ids])


@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([2, 3, 4, 5, 6]), st.integers(0, 99))
def test_rows_are_packed_one_by_one(rows, width, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, width)).astype(np.uint8)
    planes = pack_rows(codes, bits)
    assert sum(plane.shape[1] for plane in planes) == packed_bytes(width, bits)
    for number in range(rows):
        alone = pack_rows(codes[number : number + 1], bits)
        for plane, (of_row,) in zip(planes, alone, strict=True):
            np.testing.assert_array_equal(plane[number], of_row)


@pytest.mark.parametrize("bits", [2, 5])
def test_the_rows_that_count_most_are_stored_in_8_bits(bits):
    table = random_array(320, 64)
    drawn = np.random.default_rng(0).zipf(1.4, 4000) % 320
    frequencies = RowCounts(np.bincount(drawn, minlength=320).astype(np.float64)).frequencies()
    plain = round_table(table, bits, frequencies, 0, TensorProto.FLOAT)
    mixed = round_table(table, bits, frequencies, 10, TensorProto.FLOAT)
    lost = np.square(plain.weight - table).sum(axis=1)
    assert set(mixed.best) == set(np.argsort(-lost * frequencies)[:10])
    others = np.setdiff1d(np.arange(320), mixed.best)
    np.testing.assert_array_equal(mixed.weight[others], plain.weight[others])
    of_best = round_table(table[mixed.best], 8, None, 0, TensorProto.FLOAT)
    np.testing.assert_array_equal(mixed.weight[mixed.best], of_best.weight)
    # Where all count alike, it is those that lose most.
    worst = round_table(table, bits, None, 10, TensorProto.FLOAT).best
    assert set(worst) == set(np.argsort(-lost)[:10])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [(50, 16), (4200, 64)])
def test_a_large_table_is_not_expanded_when_the_model_opens(bits, size, tmp_path):
    model = lookup_model(random_array(*size), [3])
    result = compress(model, plan=Plan((Decision("embedding", "rows", bits),)), threads=1).model
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "open.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(result.SerializeToString(), options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "open.onnx").graph
    floats = [t.dims for t in opened.initializer if t.data_type == TensorProto.FLOAT]
    if np.prod(size) <= rows_module.OPENED:
        # Nothing but the lookup is left to do in a run.
        assert [node.op_type for node in opened.node] == ["Gather"]
        assert list(size) in floats
    else:
        assert all(np.prod(dims) <= 2 * size[0] for dims in floats)


def test_one_function_serves_all_tables_of_a_format():
    plan = Plan((Decision("tokens", "rows", 8), Decision("positions", "rows", 8)))
    result = compress(text_model(), plan=plan, threads=1)
    assert [f.name for f in result.model.functions] == ["Rows8"]
    assert result.report.verification.rewrite_max_error == 0
    names = {node.name for node in result.model.graph.node}
    assert {node.name for node in text_model().graph.node} < names
    assert names > {"tokens/decode", "positions/decode"}
    # Too few rows for some of them to be better than the others.
    plan = Plan((Decision("tokens", "rows", 4), Decision("positions", "rows", 4)))
    result = compress(text_model(), plan=plan, threads=1)
    assert [f.name for f in result.model.functions] == ["Rows4Mixed", "Rows4"]
    inputs = list(row_decoder(RowFormat(4), 17).input)
    assert inputs == ["ids", "plane_0", "levels", "scale", "width"]


@pytest.mark.parametrize("bits", FORMATS)
def test_the_predicted_error_is_the_measured_one(bits):
    model, data = text_model(), texts(30)
    layer = find_layers(model).layers[0]
    table = read_weight(model, layer)
    seen = Seen(model, find_layers(model).layers, lambda: [data])
    maker = FromData(seen).maker(RowStorageFamily())
    counts = seen.counts(layer)
    assert counts is not None
    proposals = RowStorageFamily().propose(layer, None, Asked("auto", EVERY_RANK, (bits,)))
    (of_data,) = maker.approximate(layer, OnlyForm(ROWS), [bits])
    alone = RowStorageFamily().from_weights(layer, OnlyForm(ROWS), bits, table, None)
    for its_maker, made, frequencies in (
        (maker, of_data, counts.frequencies()),
        (None, alone, np.full(len(table), 1 / len(table))),
    ):
        unit = RowStorageFamily().unit(layer, proposals, Carried(table, False), None, its_maker)
        (errors,) = unit.measure().errors
        lost = frequencies @ np.square(made.weight.astype(np.float64) - table).sum(axis=1)
        energy = frequencies @ np.square(table.astype(np.float64)).sum(axis=1)
        assert errors[bits] == pytest.approx(lost / energy, rel=1e-6)
        assert np.all(np.diff(errors) <= 0)
        assert (errors[0], errors[-1]) == (1, 0)


def test_of_a_large_table_some_rows_stand_for_all(monkeypatch):
    model = lookup_model(few_directions(900, 16, 4, seed=1), [3])
    (layer,) = find_layers(model).layers
    weight = Carried(read_weight(model, layer), False)
    drawn = np.random.default_rng(0).zipf(1.3, 5000) % 900
    frequencies = RowCounts(np.bincount(drawn, minlength=900).astype(np.float64)).frequencies()
    unit = RowsUnit(weight, layer, (3, 8), frequencies, None)
    (exact,) = unit.measure().errors
    monkeypatch.setattr(rows_family, "MEASURED", 300 * 16)
    (estimated,) = unit.measure().errors
    assert estimated[3] != exact[3]
    np.testing.assert_allclose(estimated[[3, 8]], exact[[3, 8]], rtol=0.2)


def test_an_empty_table_loses_nothing():
    model = lookup_model(np.zeros((6, 8), np.float32), [3])
    (layer,) = find_layers(model).layers
    unit = RowsUnit(Carried(read_weight(model, layer), False), layer, (4,), None, None)
    assert unit.measure().errors[0][4] < 1e-9


def test_a_table_that_overflows_half_precision_is_not_stored_in_it():
    table = random_array(40, 8)
    table[7, 3] = 1e6
    model = lookup_model(table, [3])
    (layer,) = find_layers(model).layers
    unit = RowsUnit(Carried(read_weight(model, layer), False), layer, (8, 16), None, None)
    (errors,) = unit.measure().errors
    assert errors[8] < 1e-3
    assert errors[16] == np.inf
    made = compress(model, Budget(mem=0.6), precision=(8, 16), threads=1)
    assert {d.rank for d in made.plan.decisions} <= {8, None}


@pytest.mark.parametrize("objective", ["weights", "output"])
def test_tables_and_layers_share_one_budget_of_bits(objective):
    options: dict[str, Any] = {} if objective == "weights" else {"data": texts(40)}
    model = text_model()
    result = compress(
        model, Budget(mem=0.35), precision="auto", objective=objective, threads=1, **options
    )
    chosen = {d.layer: d.scheme for d in result.plan.decisions}
    assert chosen["tokens"] in ("rows", "table")
    assert model_bytes(result.model) <= 0.35 * model_bytes(model)
    again = compress(model, plan=Plan.from_json(result.plan.to_json()), threads=1, **options)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    macs = compress(model, Budget(mem=0.35, mac=1.0), precision="auto", threads=1)
    assert {d.scheme for d in macs.plan.decisions if d.layer == "tokens"} == {"rows"}


def test_only_formats_that_there_are_and_numbers_that_fit():
    with pytest.raises(UsageError, match="cannot be stored in 7 bits"):
        compress(text_model(), plan=Plan((Decision("tokens", "rows", 7),)), threads=1)
    model = lookup_model(np.full((6, 8), 1e6, np.float32), [3])
    (layer,) = find_layers(model).layers
    with pytest.raises(ModelError, match="its table overflows float16"):
        stored_rows(layer, rounded(layer, read_weight(model, layer), 16))
