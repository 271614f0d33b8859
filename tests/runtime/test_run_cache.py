"""What a run keeps for itself: some kinds of results, and fewer computations for it."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx import Budget, compress, sweep
from cobla_onnx.runtime import run_cache
from cobla_onnx.runtime.cache import fetch
from cobla_onnx.runtime.run_cache import RunCache
from cobla_onnx.variants.low_rank import units


def ones() -> dict[str, np.ndarray]:
    return {"a": np.ones(3)}


def test_it_keeps_what_it_is_told_to():
    cache = RunCache(["grams"])
    fetch(cache, "grams", "key", ones)
    assert list(fetch(cache.fresh(), "grams", "key", dict)) == ["a"]
    assert cache.get("grams", "other") is None
    fetch(cache, "vectors", "key", ones)
    assert cache.get("vectors", "key") is None
    assert not cache.notes


def test_what_memory_has_no_room_for_comes_back_from_a_file(monkeypatch):
    monkeypatch.setattr(run_cache, "IN_MEMORY", 0)
    cache = RunCache(["grams"])
    for key in "xyz":
        cache.put("grams", key, {"a": np.full(3, ord(key))})
    for key in "xyz":
        np.testing.assert_array_equal(cache.get("grams", key)["a"], np.full(3, ord(key)))


@pytest.fixture
def counts(monkeypatch):
    made = {"gram_matrices": 0, "leading_vectors": 0}
    for name in made:
        function = getattr(units, name)

        def counted(*args, name=name, function=function):
            made[name] += 1
            return function(*args)

        monkeypatch.setattr(units, name, counted)
    return made


def test_a_run_without_data_makes_gram_matrices_once(demo_model, counts):
    result = compress(demo_model, Budget(mem=0.4))
    factorised = [layer for layer in result.report.layers if layer.rank is not None]
    assert counts["leading_vectors"] == len(factorised) > 0
    schemes = counts["gram_matrices"]
    compress(demo_model, Budget(mem=0.3))
    assert counts["gram_matrices"] == 2 * schemes, "of each weight under each scheme"


def test_a_sweep_without_data_decomposes_once_for_all_budgets(demo_model, counts):
    compress(demo_model, Budget(mem=0.3))
    once = dict(counts)
    sweep(demo_model, [Budget(mem=mem) for mem in (0.3, 0.29, 0.28)])
    assert counts["gram_matrices"] == 2 * once["gram_matrices"]
    assert counts["leading_vectors"] <= 2 * once["leading_vectors"] + 2
