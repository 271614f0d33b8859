"""Text of Python's standard library as numbers of tokens, for the decoder of this repository.

Docstrings are of this Python's library, and differ a little from version to version: what a
model was trained and judged on is kept beside it. Modules that are held back are never trained
on, nor is a docstring that stands in one of them and elsewhere.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["END", "Tokens", "docstrings", "learn_tokens", "windows"]

END = 0
"""Number of the token between two docstrings."""
SHORTEST = 40
"""Characters of a docstring that counts."""
HELD_BACK = 8
"""One of so many modules is held back."""
WORDS = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n+ *| +")
"""Pieces that no token goes beyond, each with the blank before it."""


def docstrings() -> tuple[list[str], list[str]]:
    """Return docstrings to train on, and those of modules that are held back."""
    library = Path(sysconfig.get_path("stdlib"))
    train, held = dict[str, None](), dict[str, None]()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"site-packages", "dist-packages"} & set(parts) or "test" in str(parts):
            continue
        module = next((part for part in parts if part != "__init__"), "")
        where = train if zlib.crc32(module.encode()) % HELD_BACK else held
        where.update(dict.fromkeys(_documented(path)))
    return [text for text in train if text not in held], list(held)


def _documented(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST and text.isascii() and re.fullmatch(r"[ -~\n]+", text):
                yield text


class Tokens:
    """Pairs of tokens that are merged in turn, beginning with characters (Sennrich et al. 2016).

    Parameters
    ----------
    characters : sequence of str
        Numbered from 1; 0 is the end of a text.
    merges : sequence of (str, str)
        Numbered after them.
    """

    def __init__(self, characters: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        self.characters, self.merges = list(characters), list(merges)
        self.texts = ["", *characters, *(a + b for a, b in merges)]
        self._numbers = {text: number for number, text in reversed(list(enumerate(self.texts)))}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text's tokens; characters without one are left out."""
        return [number for word in WORDS.findall(text) for number in self._word(word)]

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the text of numbers."""
        return "".join(self.texts[number] for number in numbers)

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = [c for c in word if c in self._numbers]
            while ranks := [self._ranks[p] for p in _pairs(parts) if p in self._ranks]:
                parts = _merged(parts, self.merges[min(ranks)])
            self._known[word] = [self._numbers[part] for part in parts]
        return self._known[word]


def learn_tokens(texts: Iterable[str], count: int) -> Tokens:
    """Merge the most frequent pair of tokens until there are `count` tokens."""
    frequencies = Counter(word for text in texts for word in WORDS.findall(text))
    characters = sorted({c for word in frequencies for c in word})
    words = {word: list(word) for word in frequencies}
    pairs, places = Counter[tuple[str, str]](), defaultdict[tuple[str, str], set[str]](set)

    def tell(word: str, sign: int) -> None:
        for pair in _pairs(words[word]):
            pairs[pair] += sign * frequencies[word]
            places[pair].add(word)

    for word in words:
        tell(word, 1)
    merges: list[tuple[str, str]] = []
    while len(merges) + len(characters) + 1 < count:
        # The pair itself decides between equals, so that the result is always the same.
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in places.pop(best):
            tell(word, -1)
            words[word] = _merged(words[word], best)
            tell(word, 1)
    return Tokens(characters, merges)


def _pairs(parts: Sequence[str]) -> Iterable[tuple[str, str]]:
    return pairwise(parts)


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join a pair wherever it stands, from the left."""
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
            # A merged token is no half of the same pair.
            result.append("")
        else:
            result.append(part)
    return [part for part in result if part]


def windows(tokens: Tokens, texts: Iterable[str], length: int) -> NDArray[np.int64]:
    """Return texts one after another, `END` before each, in rows of a length (rows, length)."""
    stream = [number for text in texts for number in (END, *tokens.encode(text))]
    return np.array(stream[: len(stream) // length * length], np.int64).reshape(-1, length)
