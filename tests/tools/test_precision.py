"""The comparison of ranks and bits at equal bytes: what is run, what is kept, the tables."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import typer

from tests.builders import random_array


@pytest.fixture
def tool(precision):
    """The tool, with a small model as the only one."""
    return precision


def judged(agreement: float, mem: float = 0.5, seed: int = 0) -> dict[str, object]:
    same = np.random.default_rng(seed).random(50) < agreement
    quality = {
        "agreement": float(same.mean()), "loss": 0.125, "samples": 50, "losses": [0.125] * 50,
        "same": np.packbits(same).tobytes().hex(),
    }  # fmt: skip
    spent = {"exit_code": 0, "cpu_seconds": 12.0, "peak_mb": 345, "seconds": 9.0}
    return {**spent, "mem": mem, "file": mem + 0.01, "held": 1.0, "quality": quality}


def test_the_row_beside_an_alternative_never_has_more_bytes(tool):
    for mem in np.random.default_rng(0).uniform(1e-4, 1, 2000):
        budget = tool.equal_bytes({"mem": mem})
        assert mem - 1.1e-5 < budget <= mem
        # Rows are found again by what is written of the budget.
        assert float(f"{budget:g}") == budget


def test_what_saves_nothing_or_failed_has_no_row_beside_it(tool):
    assert tool.equal_bytes({"mem": 1.002}) is None
    assert tool.equal_bytes({"exit_code": 1}) is None


def test_alternatives_are_first_and_auto_has_their_bytes(tool):
    rows = {"m | float16 | as it is": judged(0.9, 0.50123456)}
    found = list(tool.entries("m", ["auto", "float16"], (0.3, 0.2), lambda: rows))
    assert found == [("float16", None), ("auto", 0.3), ("auto", 0.2), ("auto", 0.50123)]
    found = list(tool.entries("m", ["ranks alone", "float16"], (0.3,), lambda: rows))
    assert found == [("float16", None), ("ranks alone", 0.3)]


def test_methods_are_named_singly_or_in_groups(tool):
    assert tool.chosen_methods("auto;alternatives")[0] == "auto"
    assert set(tool.chosen_methods("alternatives;ours")) == {*tool.ALTERNATIVES, *tool.OURS}
    with pytest.raises(typer.BadParameter, match="no method 'fewer'; there are ours; alt"):
        tool.chosen_methods("auto;fewer")


def test_a_row_is_measured_once_and_shown_between_the_markers(tool, tmp_path, monkeypatch):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    tool.run(results, models=tmp_path / "models", methods="float16")
    row = json.loads(results.read_text())["small | float16 | as it is"]
    assert row["exit_code"] == 0
    assert 0.45 < row["mem"] < 0.55
    assert 0.45 < row["file"] < 0.8
    assert 0.9 < row["quality"]["agreement"] <= 1
    assert 30 < row["peak_mb"] < 2000

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(tool, "measure", never)
    tool.run(results, models=tmp_path / "models", methods="float16")
    page.write_text(f"before\n\n{tool.BEGIN}\nold\n{tool.END}\n\nafter\n")
    tool.table(results, page=page)
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "### small, in bits" in text
    assert "| float16 | 0.5" in text


def test_a_model_that_does_not_run_was_not_made(tool, tmp_path, monkeypatch):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    monkeypatch.setattr(tool.field, "run_child", lambda *_: {"exit_code": 0, "cpu_seconds": 1.0})
    monkeypatch.setattr(tool, "sizes", lambda *_: {"mem": 0.5})
    subject = tool.Subject(broken, broken, tool.onnxruntime.InferenceSession)
    row = tool.measure(subject, "float16", None, broken, 9.0)
    assert row["exit_code"] == 1
    assert "broken.onnx" in row["said"]
    assert tool.quality_of(row) == "fails"


def test_what_is_not_there_is_left_out_with_a_reason(tool, tmp_path, capsys):
    tool.run(tmp_path / "results.json", models=tmp_path / "nowhere", methods="float16")
    assert "small: left out, small.onnx is not in" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_the_tables_pair_auto_with_what_has_as_many_bytes(tool, tools):
    codes = tools("precision_methods")
    rows = {
        "small | auto | 0.3": judged(0.98),
        "small | ranks alone | 0.3": judged(0.2),
        "small | ranks alone | 0.2": {"exit_code": codes.UNREACHABLE, "said": "no"},
        "small | float16 | as it is": judged(0.3, 0.500017, seed=1),
        "small | auto | 0.50001": judged(0.99),
        "small | quantize_dynamic | as it is": {"exit_code": 1, "said": "no"},
        "small | MatMulNBits, 4 bits | as it is": {"exit_code": codes.NOT_APPLICABLE},
    }
    first, second = tool.print_tables(rows, tool.NAMES).split("\n\n")[1:]
    for text in (first, second):
        lines = text.splitlines()
        assert len({line.count("|") for line in lines}) == 1
    assert first.startswith("| method | 0.3 | 0.2 |")
    by = {line.split("|")[1].strip(): line for line in (first + "\n" + second).splitlines()}
    assert by["ranks alone"].endswith("| not reachable |")
    assert "*auto less bits alone, 95 %*" not in by
    # Worse on most samples: the interval says so, and only where both rows are.
    low = by["*auto less ranks alone, 95 %*"].split("|")[2].split("%")[0].strip()
    assert 50 < float(low) < 100
    assert by["*auto less ranks alone, 95 %*"].endswith("|  |")
    beside = [cell.strip() for cell in by["float16"].split("|")]
    assert beside[2:5] == ["0.500", "0.510", "1.000"]
    quality = rows["small | auto | 0.50001"]["quality"]["agreement"]
    assert beside[6] == f"{quality:.1%} / 0.125"
    assert beside[7].startswith("+")
    assert "| fails |" in by["quantize_dynamic"]
    assert "| does not apply |" in by["MatMulNBits, 4 bits"]


def test_what_has_learned_stands_beside_what_it_has_learned_from(tool):
    rows = {
        "small | auto | 0.1": {**judged(0.5), "seconds": 7.0},
        "small | auto, distilled | 0.1": {**judged(0.75, seed=1), "seconds": 20.0},
        "small | ranks alone, distilled in 10 minutes | 0.1": {**judged(0.75), "seconds": 20.0},
    }
    *_, line = tool.print_learned(rows, tool.NAMES).splitlines()
    cells = line.split(" | ")
    assert cells[:3] == ["| small", "0.1", "auto, distilled"]
    assert [cell[-5:] for cell in cells[3:5]] == ["0.125", "0.125"]
    assert cells[-2:] == ["7", "20 |"]
    assert len(tool.print_learned(rows, tool.NAMES).splitlines()) == 3


def test_with_ranks_left_out_only_stored_weights_are_proposed(tools, monkeypatch, demo_model):
    from cobla_onnx.graph.io.model_file import load_model
    from cobla_onnx.pipeline.analysis import analyse
    from cobla_onnx.variants.base import Asked
    from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
    from cobla_onnx.variants.registry import FAMILIES

    def proposed() -> set[str]:
        found = analyse(load_model(demo_model), asked=Asked("auto", EVERY_RANK, (4, 8)))
        return {form.name for layer in found.variants for form in layer.forms}

    for family in FAMILIES.values():
        monkeypatch.setattr(family, "propose", family.propose)
    assert len(proposed()) > 1
    tools("precision_methods").no_ranks()
    assert proposed() == {"stored"}


def test_without_compensation_the_inputs_do_not_matter(tools, monkeypatch):
    import cobla_onnx.variants.registry  # noqa: F401
    from cobla_onnx.variants.storage import from_data, rounding

    # All that the switch changes is put back: it is meant for a process of its own.
    for name, module in list(sys.modules.items()):
        if name.startswith("cobla_onnx.") and hasattr(module, "round_weight"):
            monkeypatch.setattr(module, "round_weight", rounding.round_weight)
    rows, mixed = random_array(1, 6, 20, seed=0), random_array(20, 50, seed=1)
    inputs = rounding.Compensation((mixed @ mixed.T)[None].astype(np.float64))
    compensated = from_data.round_weight(rows, inputs, 3).codes
    tools("precision_methods").no_compensation()
    nearest = from_data.round_weight(rows, inputs, 3).codes
    np.testing.assert_array_equal(nearest, from_data.round_weight(rows, None, 3).codes)
    assert (nearest != compensated).any()


def test_a_row_that_found_a_cache_makes_the_same_model_and_says_so(tool, tmp_path):
    results, models = tmp_path / "results.json", tmp_path / "models"
    tool.run(results, models=models, methods="ranks alone", budgets="0.5,0.3", cache=True)
    tool.run(tmp_path / "fresh.json", models=models, methods="ranks alone", budgets="0.3")
    first, second = json.loads(results.read_text()).values()
    assert "cached" not in first
    assert second["cached"] is True
    made = [folder / "small___ranks_alone___0.3.onnx" for folder in tmp_path.glob("*.data")]
    assert made[0].read_bytes() == made[1].read_bytes()
    shown = [line for line in tool.print_tables(tool.field.read(results), tool.NAMES).splitlines()
             if line.startswith("| *CPU s")]  # fmt: skip
    assert [cell.strip()[:1] == "(" for cell in shown[0].split("|")[2:4]] == [False, True]


def test_a_package_that_is_not_there_is_no_result(tool, tmp_path, monkeypatch, capsys):
    said = {"exit_code": tool.NOT_INSTALLED, "said": "pip install onnx-ir"}
    monkeypatch.setattr(tool, "measure", lambda *_: said)
    tool.run(tmp_path / "r.json", models=tmp_path / "models", methods="MatMulNBits, 4 bits")
    assert "left out, pip install onnx-ir" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
