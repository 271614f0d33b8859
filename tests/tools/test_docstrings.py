"""Text as tokens: merges by frequency, nothing is lost, modules that are held back stay apart."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT

TOKENS = json.loads((ROOT / "models" / "docstring_gpt.tokens.json").read_text())


@pytest.fixture
def tool(tools):
    return tools("docstrings")


def test_the_most_frequent_pair_is_merged_first(tool):
    tokens = tool.learn_tokens(["abab abab ac"], 7)
    assert tokens.characters == [" ", "a", "b", "c"]
    assert tokens.merges == [("a", "b"), ("ab", "ab")]
    assert tokens.encode("abab ab") == [6, 1, 5]


@given(st.text(alphabet=st.sampled_from(TOKENS["characters"])))
def test_a_text_comes_back(text):
    from tools.docstrings import Tokens

    tokens = Tokens(TOKENS["characters"], [tuple(pair) for pair in TOKENS["merges"]])
    assert tokens.decode(tokens.encode(text)) == text


def test_rows_are_texts_one_after_another(tool):
    tokens = tool.learn_tokens(["ab", "b"], 3)
    rows = tool.windows(tokens, ["ab", "b", "a"], 2)
    assert rows.tolist() == [[tool.END, 1], [2, tool.END], [2, tool.END]]


def test_no_docstring_is_both_trained_on_and_held_back(tool, monkeypatch, tmp_path):
    for number in range(16):
        text = "Said in many modules, so that it may be in both." if number % 2 else "x" * 50
        path = tmp_path / f"module{number}.py"
        path.write_text(f'"""{text} {number // 4}"""\n')
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda _: str(tmp_path))
    train, held = tool.docstrings()
    assert train
    assert held
    assert not set(train) & set(held)
