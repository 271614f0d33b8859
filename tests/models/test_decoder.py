"""The repository's own decoder: perplexity on other docstrings stays, and so does its cache."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.runtime.session import open_session, run_session
from tests.conftest import ROOT

DECODER = ROOT / "models" / "docstring_gpt.onnx"
LENGTHS = (16, 32, 48)


def token_ids(part: str) -> np.ndarray:
    with np.load(DECODER.with_name(f"docstring_gpt_{part}.npz")) as data:
        return data["input_ids"]


class Decoder:
    """A model with a cache, as a generation loop runs it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.session = open_session(model, 1)
        self.pasts = [n.name for n in self.session.get_inputs() if n.name.startswith("past")]

    def run(self, ids: np.ndarray, past: dict[str, np.ndarray] | None = None) -> dict:
        rows, length = ids.shape
        past = past or {name: np.zeros((rows, 5, 0, 16), np.float32) for name in self.pasts}
        begun = next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, begun + length), np.int64),
            "position_ids": np.tile(np.arange(begun, begun + length), (rows, 1)),
        }
        return run_session(self.session, {**feeds, **past})

    def step_by_step(self, ids: np.ndarray, first: int) -> np.ndarray:
        """Logits of a prompt, and of each token after it with the past in the cache."""
        logits, past, begun = [], None, 0
        for end in (first, *range(first + 1, ids.shape[1] + 1)):
            outputs = self.run(ids[:, begun:end], past)
            logits.append(outputs["logits"])
            past = {n: outputs[n.replace("past_key_values", "present")] for n in self.pasts}
            begun = end
        return np.concatenate(logits, 1)


@pytest.fixture
def perplexity(tools):
    surprises = tools("field_quality").surprises

    def measure(model: onnx.ModelProto, ids: np.ndarray) -> float:
        return float(np.exp(surprises(Decoder(model).run(ids)["logits"], ids).mean()))

    return measure


def check_cache(model: onnx.ModelProto, ids: np.ndarray) -> None:
    decoder = Decoder(model)
    whole = decoder.run(ids)["logits"]
    steps = decoder.step_by_step(ids, 5)
    np.testing.assert_allclose(steps, whole, atol=1e-4 * np.abs(whole).max())


def test_it_predicts_docstrings_that_it_was_not_trained_on(perplexity):
    model, ids = onnx.load(DECODER), token_ids("test")[:64]
    tokens = json.loads(DECODER.with_suffix(".tokens.json").read_text())
    assert len(tokens["characters"]) + len(tokens["merges"]) + 1 == 896
    # On all rows 36.2, on these 40.3.
    assert perplexity(model, ids) < 42
    shuffled = np.random.default_rng(0).permutation(ids.ravel()).reshape(ids.shape)
    assert perplexity(model, shuffled) > 300
    check_cache(model, ids[:2, :16])


def test_perplexity_stays_with_token_ids_alone(perplexity):
    rows = token_ids("calibration")[:18]
    data = [{"input_ids": row[None, : LENGTHS[n % 3]]} for n, row in enumerate(rows)]
    result = compress(DECODER, Budget(mem=0.3), data=data, precision="auto", threads=1)
    assert result.report.budget["mem"].reached <= 0.3
    assert any("the past empty" in note for note in result.report.notes)
    # Keys and values of the past are seen by what is said next.
    assert result.report.calibration.outputs == {"logits": "logits"}
    ids = token_ids("test")[:64]
    before, after = (perplexity(m, ids) for m in (onnx.load(DECODER), result.model))
    # Measured on all rows with 128 samples: +0.03 %.
    assert after <= 1.01 * before
    check_cache(result.model, ids[:2, :16])
