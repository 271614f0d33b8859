"""What is stored for layers on disk is the same, and memory holds no second copy of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.variants import offload
from cobla_onnx.variants.offload import Spill
from cobla_onnx.variants.replacement import Replacement
from tests.builders import random_array, small_network
from tests.lookups import text_model

# Bytes of more than tables of levels, shapes and scales.
LARGE = 600
SAMPLES = {"x": random_array(24, 3, 12, 12, seed=5)}


def arrays_of(value: Any) -> Iterator[np.ndarray]:
    """Find all arrays in an object, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from arrays_of(entry)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from arrays_of(getattr(value, field.name))


@pytest.mark.parametrize("precision", ["keep", "auto", (16,), (8,), (4,), (3,)])
@pytest.mark.parametrize("opset", [17, 21])
def test_replacements_on_disk_are_the_same(monkeypatch, tmp_path, precision, opset) -> None:
    held: list[Replacement] = []
    before = Spill.replacements

    def replacements(self, given):
        held.extend(before(self, given))
        return list(held)

    monkeypatch.setattr(Spill, "replacements", replacements)

    def made(model: onnx.ModelProto, **options: Any) -> bytes:
        held.clear()
        model.opset_import[0].version = opset
        model.ir_version = 10
        result = compress(model, Budget(mem=0.6), precision=precision, threads=1, **options)
        result.save(tmp_path / "out.onnx", external_data="never")
        return (tmp_path / "out.onnx").read_bytes()

    models = [(small_network, {"data": SAMPLES})]
    if opset < 18:
        # ReduceMean's axes are an attribute there.
        models.append((text_model, {}))
    for model, options in models:
        whole = made(model(), **options)
        apart = [each.dense() for each in held]
        assert held
        with monkeypatch.context() as patch:
            patch.setattr(offload, "SPILL_FROM", 0)
            patch.setattr(offload, "MAPPED_FROM", LARGE)
            assert made(model(), **options) == whole
        every: list[np.ndarray] = []
        for replacement, dense in zip(held, apart, strict=True):
            np.testing.assert_array_equal(replacement.dense(), dense)
            large = [array for array in arrays_of(replacement) if array.nbytes >= LARGE]
            assert all(isinstance(array, np.memmap) for array in large)
            every += large
        assert every
