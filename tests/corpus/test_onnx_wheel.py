"""The test models of the onnx wheel: left alone byte by byte, or compressed and right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator

from cobla_onnx import Budget, compress, errors
from cobla_onnx.graph.check.structure import check_structure
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import differences

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FILES = sorted(DATA.rglob("*.onnx"))
KINDS = ("light", "pytorch-converted", "pytorch-operator", "simple")


def files(kind: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(DATA).parts[0] == kind]


@pytest.fixture(scope="module")
def node_tests():
    """Models in memory, with inputs and known outputs."""
    with warnings.catch_warnings():
        # Its own casts overflow on purpose.
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    if any(case.model is None for case in cases):
        pytest.skip("older wheels keep these models on disk")
    return cases


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_need_nothing_are_copied_byte_by_byte(kind, tmp_path):
    assert files(kind)
    for path in files(kind):
        result = compress(path, Budget(mem=1.0), threads=1)
        result.save(tmp_path / "out.onnx")
        assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes(), path
        again = rewrite(result.model, []).SerializeToString()
        assert again == result.model.SerializeToString(), path


@pytest.mark.slow
def test_node_models_that_need_nothing_are_the_same(node_tests):
    assert len(node_tests) > 1000
    for case in node_tests:
        before = case.model.SerializeToString()
        result = compress(case.model, Budget(mem=1.0), threads=1)
        assert result.model.SerializeToString() == before, case.name
        assert rewrite(case.model, []).SerializeToString() == before, case.name


def test_files_are_compressed_or_refused_with_a_reason(tmp_path):
    compressed = []
    for path in (p for kind in KINDS[1:] for p in files(kind)):
        original = onnx.load(path)
        try:
            result = compress(path, Budget(mem=0.7), threads=1)
        except (errors.BudgetError, errors.ModelError):
            continue
        if result.report.unchanged:
            continue
        compressed.append(path.parent.name)
        assert result.report.budget["mem"].reached <= 0.7
        result.save(tmp_path / "out.onnx")
        written = onnx.load(tmp_path / "out.onnx")
        onnx.checker.check_model(written)
        changed = differences(original, written)
        listed = {"-node", "+node", "-initializer", "+initializer", "graph.input"}
        assert {line.split()[0] for line in changed} <= listed, (path, changed)
    assert len(compressed) >= 20


FROZEN = ("Conv", "Gemm", "MatMul")
RECURRENT = ("LSTM", "GRU", "RNN")


def frozen(
    case, op_types: Sequence[str] = FROZEN
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[np.ndarray]] | None:
    """Turn the weight inputs of a single-operator test into initializers."""
    model = copy.deepcopy(case.model)
    ((inputs, outputs),) = case.data_sets[:1]
    if len(model.graph.node) != 1 or model.graph.node[0].op_type not in op_types:
        return None
    arrays = dict(zip([v.name for v in model.graph.input], inputs, strict=True))
    for value in list(model.graph.input)[1:]:
        tensor = onnx.numpy_helper.from_array(arrays.pop(value.name), value.name)
        model.graph.initializer.append(tensor)
        model.graph.input.remove(value)
    return model, arrays, outputs


@pytest.mark.slow
def test_frozen_operators_at_full_rank_give_the_known_outputs(node_tests):
    done = []
    for case in node_tests:
        found = frozen(case)
        if found is None:
            continue
        model, feeds, (expected, *_) = found
        check_structure(model)
        layers = find_layers(model).layers
        # A vector that meets a stack of matrices is left alone: see `analyse`.
        data = feeds[model.graph.input[0].name]
        if not layers or (data.ndim < 2 < len(layers[0].shape)):
            continue
        for scheme in schemes_for(layers[0]):
            weight = scheme.matrix(read_weight(model, layers[0]))
            factors = factorize(weight, min(weight.shape[1:]))
            changed = rewrite(model, [make_replacement(layers[0], scheme, factors)])
            (actual,) = run_session(open_session(changed, 1), feeds).values()
            np.testing.assert_allclose(
                actual, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max()
            )
            done.append(f"{case.name} {scheme.name}")
    assert len(done) >= 18


@pytest.mark.slow
def test_frozen_recurrent_operators_at_full_rank_give_the_known_outputs(node_tests):
    done = set()
    for case in node_tests:
        found = frozen(case, RECURRENT)
        if found is None:
            continue
        model, feeds, expected = found
        check_structure(model)
        read, _ = find_layers(model).layers
        (scheme,) = schemes_for(read)
        weight = scheme.matrix(read_weight(model, read))
        factors = factorize(weight, min(weight.shape[1:]))
        changed = rewrite(model, [make_replacement(read, scheme, factors)])
        onnx.checker.check_model(changed, full_check=True)
        names = [value.name for value in changed.graph.output]
        # onnxruntime does not know the other layout on a CPU.
        batchwise = any(a.name == "layout" and a.i for a in model.graph.node[0].attribute)
        actual = (
            dict(zip(names, ReferenceEvaluator(changed).run(None, feeds), strict=True))
            if batchwise
            else run_session(open_session(changed, 1), feeds)
        )
        for name, wanted in zip(names, expected, strict=True):
            np.testing.assert_allclose(
                actual[name], wanted, rtol=2e-5, atol=2e-6, err_msg=case.name
            )
        done.add(case.name)
    # Each operator with and without a bias, and batches first.
    assert len(done) >= 10
    assert {name.split("_")[1] for name in done} >= {"lstm", "gru", "rnn"}
