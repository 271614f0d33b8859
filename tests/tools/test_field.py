"""The tool for models in the field: measures by definition, runs that are kept, the table."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import random_array, small_network

WORDS = st.lists(st.integers(0, 3), max_size=6)


@pytest.fixture
def field(tools, monkeypatch, tmp_path):
    """The tool, with a small model as the only one, and its data in a folder."""
    field = tools("field")
    monkeypatch.setattr(field, "TASKS", (field.Task("small", "classes"),))
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(small_network(), folder / "small.onnx")
    for seed, part in enumerate(("calibration", "test")):
        np.savez(folder / f"small_{part}.npz", x=random_array(40, 3, 12, 12, seed=seed))
    return field


def test_a_run_is_measured_once_and_shown(field, tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    field.run(results, models=tmp_path / "models", budgets="mem=0.6,mem=0.00001")
    row = json.loads(results.read_text())["small --mem 0.6"]
    assert row["exit_code"] == 0
    assert 0.2 <= row["quality"]["agreement"] <= 1
    assert row["bytes"] < 0.75
    assert 30 < row["peak_mb"] < 2000
    assert row["stated"]["calibration"]["loss"] > 0
    out_of_reach = json.loads(results.read_text())["small --mem 1e-05"]
    assert out_of_reach["exit_code"] == 4
    assert "least reachable" in " ".join(out_of_reach["said"].split())

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(field, "measure", never)
    field.run(results, models=tmp_path / "models", budgets="mem=0.6")
    page.write_text(f"before\n\n{field.BEGIN}\nold\n{field.END}\n\nafter\n")
    field.table(results, page=page)
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({line.count("|") for line in rows}) == 1
    assert "| small | `--mem 0.6` | agreement " in text
    assert "exit 4" in text


def test_what_is_not_there_is_left_out_with_a_reason(field, tmp_path, capsys):
    (tmp_path / "models" / "small_test.npz").unlink()
    field.run(tmp_path / "results.json", models=tmp_path / "models")
    field.run(tmp_path / "results.json", models=tmp_path / "nowhere")
    said = capsys.readouterr().err
    assert "left out, small_calibration.npz and small_test.npz are not there" in said
    assert "left out, small.onnx is not in" in said
    assert not (tmp_path / "results.json").exists()


def test_a_run_that_takes_too_long_is_stopped(field):
    row = field.run_child(["sleep", "60"], limit=0.2)
    assert row["stopped_after"] == 0.2
    assert row["exit_code"] < 0
    assert row["cpu_seconds"] < row["seconds"] < 30


@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_metric_of_single_changes(a, b, c):
    from tools.field_quality import edit_distance

    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert edit_distance([*a, *b], [*a, 9, *b]) == 1
    assert edit_distance([*a, 8, *b], [*a, 9, *b]) == 1


def test_texts_are_read_without_blanks_and_repetitions(tools):
    quality = tools("field_quality")

    def frames(*characters: int) -> np.ndarray:
        return np.eye(4)[list(characters)][None]

    same = quality.ctc(frames(1, 1, 0, 1, 2), frames(0, 1, 0, 1, 2))
    assert same == {"equal_text": 1.0, "character_error": 0.0}
    other = quality.ctc(frames(1, 1, 0, 1, 2), frames(1, 1, 1, 1, 2))
    assert other == {"equal_text": 0.0, "character_error": pytest.approx(1 / 3)}


def detector_output(boxes: list[tuple[float, float, float, float, int, float]]) -> np.ndarray:
    """One picture's (4 + 3, boxes) from centre, size, class and score."""
    output = np.zeros((7, len(boxes)))
    for place, (*box, label, score) in enumerate(boxes):
        output[:4, place] = box
        output[4 + label, place] = score
    return output


def test_boxes_are_counted_as_a_detector_is_read(tools):
    quality = tools("field_quality")
    before = detector_output(
        [
            (50, 50, 20, 20, 0, 0.9),
            (51, 50, 20, 20, 0, 0.8),  # the same thing again
            (51, 50, 20, 20, 1, 0.7),  # of another class
            (20, 20, 10, 10, 2, 0.2),  # not sure enough
        ]
    )
    found, labels = quality.detections(before)
    assert labels.tolist() == [0, 1]
    np.testing.assert_allclose(found, [[40, 40, 60, 60], [41, 40, 61, 60]])
    # 5 of 20 pixels away: IoU 0.6; 7 away: 0.48.
    near, far = (before + np.array([d, 0, 0, 0, 0, 0, 0])[:, None] for d in (5, 7))
    assert quality.boxes(before[None], near[None])["f1"] == 1
    assert quality.boxes(before[None], far[None])["f1"] == 0
    nothing = np.zeros_like(before)
    assert quality.boxes(before[None], nothing[None])["f1"] == 0
    both = quality.boxes(np.stack([before, before]), np.stack([before, nothing]))
    assert both == {"f1": pytest.approx(2 * 2 / (4 + 2)), "boxes": 4}


def test_a_search_finds_the_same_among_unit_vectors(tools):
    quality = tools("field_quality")
    generator = np.random.default_rng(0)
    states, mask = generator.normal(size=(40, 5, 8)), np.ones((40, 5))
    mask[:, 3:] = 0
    vectors = quality.mean_over_mask(states, mask)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    np.testing.assert_allclose(
        vectors, quality.mean_over_mask(np.where(mask[..., None] > 0, states, 1e3), mask)
    )
    turned = vectors @ np.linalg.qr(generator.normal(size=(8, 8)))[0]
    found = quality.embedding(vectors, turned)
    assert found["same_nearest"] == found["same_ten"] == 1
    assert found["cosine"] < 0.9
    away = np.concatenate([vectors[:20], -vectors[20:]])
    assert quality.embedding(vectors, away)["same_nearest"] == 0


def test_samples_are_read_as_they_were_written(tools, tmp_path):
    data = tools("field_data")
    feeds = [
        {"state": random_array(2, 1, 3, seed=n)[:, :, ::-1], "sr": np.array(n)} for n in range(11)
    ]
    for number, arrays in enumerate(feeds):
        data._write_set(tmp_path / "sets" / f"test_data_set_{number}", arrays)
    for arrays, found in zip(feeds, data.read_feeds(tmp_path / "sets", 4, False), strict=True):
        assert found["sr"].shape == ()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    np.savez(tmp_path / "data.npz", x=np.arange(11))
    read = [f["x"].tolist() for f in data.read_feeds(tmp_path / "data.npz", 4, True)]
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(list(data.read_feeds(tmp_path / "data.npz", 4, False))) == 3


def test_the_same_seed_draws_the_same_data(tools):
    shapes, data = tools("field_shapes"), tools("field_data")
    first, second = (shapes.draw_scenes(6, 5) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    assert first.images.min() >= 0
    assert first.images.max() <= 1
    known = first.labels >= 0
    assert known[:, 0].all()
    sides = first.boxes[known]
    assert (sides[:, :2] < sides[:, 2:]).all()
    assert sides.min() >= 0
    assert sides.max() <= shapes.SIZE
    one, two = (data._recording(np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert 0.05 < np.abs(one).max() < 2


def test_the_memory_is_that_of_the_run_and_not_of_who_starts_it(field):
    # Touched, so that this process is at least so large.
    held = np.ones(40_000_000)
    assert (
        field.run_child([sys.executable, "-c", ""], limit=60)["peak_mb"] < 100 < held.nbytes / 1e6
    )


def test_perplexity_is_of_tokens_given_those_before(tools):
    quality = tools("field_quality")
    ids = np.array([[2, 0, 1], [1, 1, 1]])
    # The right next token has the odds of e to the others' 1, whatever stands last.
    logits = random_array(2, 3, 4)
    logits[:, :2] = np.eye(4)[ids[:, 1:]]
    costs = quality.surprises(logits, ids)
    np.testing.assert_allclose(costs, np.full((2, 2), np.log(np.e + 3) - 1))
    found = quality.perplexity(costs, costs + np.log(1.05))
    assert found["rise"] == pytest.approx(0.05)
    assert found["perplexity"] == pytest.approx(1.05 * (np.e + 3) / np.e)


def test_a_decoder_is_judged_by_token_ids_alone(tools):
    field = tools("field")
    (task,) = [each for each in field.TASKS if each.name == "docstring_gpt"]
    model = task.folder / "docstring_gpt.onnx"
    _, test = field.data_of(task, model, task.folder)
    found = field.judge(task.measure, model, model, test)
    assert found["rise"] == 0
    # The figure that models/README.md states.
    assert found["perplexity"] == pytest.approx(36.22, abs=0.02)


def test_what_samples_lose_is_nothing_where_nothing_changed(tools):
    found = tools("field_quality")
    rng = np.random.default_rng(0)
    outputs = {
        "embedding": found.mean_over_mask(rng.normal(size=(6, 4, 8)), np.ones((6, 4))),
        "ctc": rng.random((6, 5, 7)),
        "map": rng.random((6, 1, 4, 4)),
        "classes": rng.normal(size=(6, 3)),
        "event": rng.random((6, 1)),
        "perplexity": rng.random((6, 9)),
    }
    for kind, before in outputs.items():
        assert found.losses_by_sample(kind, before, before) == pytest.approx([0.0] * 6, abs=1e-6)
        after = before.copy()
        after[2] = before[2] + 1 if kind == "perplexity" else -before[2]
        losses = found.losses_by_sample(kind, before, after)
        assert losses[2] > 0.01
        assert losses[:2] + losses[3:] == pytest.approx([0.0] * 5, abs=1e-6)
