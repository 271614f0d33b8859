"""A short, repeatable run of the fuzz harness; the long one is tools/fuzz.py itself."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from pathlib import Path

SPEC = importlib.util.spec_from_file_location(
    "fuzz", Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"
)
assert SPEC is not None
assert SPEC.loader is not None
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)


def test_mutants_are_refused_or_right(tmp_path):
    originals = fuzz.seeds()
    counts: Counter[str] = Counter()
    for number in range(300):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fuzz.run(number, originals, tmp_path)
        assert not found.startswith(("BUG", "VerificationError")), (number, found)
        counts[found] += 1
    assert {"ModelError", "BudgetError", "compressed"} <= counts.keys()


def test_a_mutant_follows_from_its_number():
    originals = fuzz.seeds()
    assert fuzz.mutant(7, originals) == fuzz.mutant(7, originals)
