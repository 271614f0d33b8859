"""Compression with data: the command, the API, and what the data is good for."""

from __future__ import annotations

import csv
import gc
import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx import Budget, Plan, compress, errors
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline.search.sensitivity import enough_samples
from cobla_onnx.plan import Decision
from tests.builders import random_array, small_network
from tests.cli.test_command import ROOT, run, run_here

DATA = ROOT / "models" / "digits_calibration.npz"
TEST = ROOT / "models" / "digits_test.npz"


def logits(model: onnx.ModelProto) -> np.ndarray:
    with np.load(TEST) as content:
        return logits_of(model.SerializeToString(), content["image"])


def logits_of(model: bytes | Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model).run(None, {"image": images})[0]


def divergence(model: onnx.ModelProto, demo_model) -> float:
    """Mean Kullback-Leibler divergence on the test images, by its definition."""
    p, q = (logits(m).astype(np.float64) for m in (onnx.load(demo_model), model))
    p, q = (v - np.log(np.exp(v).sum(axis=1, keepdims=True)) for v in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.slow
def test_the_command_with_data(demo_model, tmp_path):
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    done = run(
        demo_model, out, "--mem", 0.3, "--data", DATA, "--samples", 50, "--report", report
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "calibrated on 40 samples" in done.stdout
    assert "verified in onnxruntime on 10 samples of held-back data" in done.stdout
    assert "no data was given" not in done.stdout
    content = json.loads(report.read_text())
    assert content["solver"]["objective"] == "output"
    calibration = content["calibration"]
    assert calibration["calibration_samples"] == 40
    assert calibration["selection_samples"] == content["verification"]["samples"] == 10
    assert calibration["outputs"] == {"logits": "logits"}
    assert calibration["loss"] <= calibration["loss_before_refit"] <= calibration["candidates"][0]
    assert content["budget"]["mem"]["reached"] <= 0.3
    assert stored_bytes(onnx.load(out)) <= 0.3 * stored_bytes(onnx.load(demo_model))


@pytest.mark.slow
def test_data_makes_a_small_model_good(demo_model):
    budget = Budget(mem=0.15)
    blind = divergence(compress(demo_model, budget).model, demo_model)
    options = {"data": DATA, "samples": 60}
    seen = divergence(compress(demo_model, budget, **options, refit=False).model, demo_model)
    refitted = divergence(compress(demo_model, budget, **options).model, demo_model)
    # Measured: 0.32, 0.12 and 0.008.
    assert seen < 0.5 * blind
    assert refitted < seen


def test_both_budgets_and_a_plan_with_data(demo_model):
    budget = Budget(mem=0.4, mac=0.5)
    result = compress(demo_model, budget, data=DATA, samples=40, solver="milp")
    assert result.report.budget["mem"].reached <= 0.4
    assert result.report.budget["mac"].reached <= 0.5
    plan = Plan.from_json(result.plan.to_json())
    again = compress(demo_model, budget, data=DATA, samples=40, plan=plan)
    assert again.plan == plan
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_ranks_by_weights_with_factors_by_data(demo_model):
    budget = Budget(mem=0.3)
    blind = compress(demo_model, budget)
    mixed = compress(demo_model, budget, data=DATA, samples=60, objective="weights")
    assert mixed.plan == blind.plan
    assert mixed.report.solver.objective == "weights"
    assert divergence(mixed.model, demo_model) < divergence(blind.model, demo_model)


@pytest.mark.slow
def test_the_network_loss_from_the_command_line(demo_model, tmp_path):
    """With labels, a history and a report; the written budget holds."""
    with np.load(DATA) as content:
        images = content["image"][:60]
    np.savez(tmp_path / "data.npz", image=images)
    np.save(tmp_path / "labels.npy", logits_of(demo_model, images).argmax(axis=1))
    out, report, history = (tmp_path / name for name in ("o.onnx", "r.json", "h.csv"))
    done = run(
        demo_model, out, "--mem", 0.15, "--data", tmp_path / "data.npz",
        "--labels", tmp_path / "labels.npy", "--objective", "loss", "--no-refit",
        "--report", report, "--history", history,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert content["solver"]["objective"] == "loss"
    assert content["solver"]["lower_bound"] is None
    assert content["calibration"]["outputs"] == {"logits": "ce-logits"}
    assert stored_bytes(onnx.load(out)) <= 0.15 * stored_bytes(onnx.load(demo_model))
    rows = list(csv.DictReader(history.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    assert {"output's knapsack", "slsqp"} <= {row["stage"] for row in rows}
    scored = [row for row in rows if row["selection_loss"]]
    assert all(float(row["mem"]) <= 0.15 for row in scored)
    assert len(scored) > 1


def test_loss_without_data_or_with_misplaced_paths_is_refused(demo_model, tmp_path):
    for arguments, words in (
        (("--objective", "loss"), "needs data"),
        (("--labels", "labels.csv"), "give --data too"),
        (("--history", tmp_path / "out.onnx"), "give another"),
        (("--report", tmp_path / "a.json", "--history", tmp_path / "a.json"), "give another"),
    ):
        done = run_here(demo_model, tmp_path / "out.onnx", "--mem", 0.5, *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert not list(tmp_path.iterdir())


def test_nothing_to_do_copies_the_model(demo_model, tmp_path):
    result = compress(demo_model, Budget(mem=1.0), data=DATA, samples=40)
    assert result.report.unchanged
    assert result.report.solver.objective == "output"
    result.save(tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == demo_model.read_bytes()


def test_the_answer_is_the_last_round_or_a_rival_that_was_taken(demo_model):
    found = compress(demo_model, Budget(mem=0.25), data=DATA, samples=60, refit=False, loss="kl")
    calibration = found.report.calibration
    assert calibration.loss == pytest.approx(calibration.candidates[0]) or any(
        rival.taken for rival in calibration.rivals
    )
    assert calibration.loss == calibration.loss_before_refit
    assert calibration.refitted == 0


def test_selection_samples_never_make_factors(demo_model, monkeypatch):
    """Poison what is held back: factors and plan candidates stay as they are."""
    with np.load(DATA) as content:
        images = content["image"][:30]
    plan = compress(demo_model, Budget(mem=0.3)).plan

    def factors(array: np.ndarray) -> list[bytes]:
        result = compress(
            demo_model, Budget(mem=0.3), data={"image": array}, plan=plan, refit=False
        )
        return [t.SerializeToString() for t in result.model.graph.initializer]

    seen: dict[str, tuple[int, ...]] = {}

    def remember(self: Judge) -> None:
        seen["selection"] = self.dataset.selection
        original(self)

    original = Judge.__post_init__
    monkeypatch.setattr(Judge, "__post_init__", remember)
    before = factors(images)
    changed = images.copy()
    changed[list(seen["selection"])] = 0.0
    assert factors(changed) == before
    changed = images * 0.5
    assert factors(changed) != before


def test_several_inputs_and_outputs():
    helper = onnx.helper
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["h"], "one"),
        helper.make_node("Add", ["h", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"], "two"),
        helper.make_node("ReduceSum", ["s"], ["z"], keepdims=0),
    ]
    from tests.builders import model_of

    weights = {"w": random_array(24, 24), "v": random_array(24, 24, seed=1)}
    model = model_of(nodes, weights, {"a": ["N", 7, 24], "b": ["N", 7, 24]}, ["y", "z"])
    data = {"a": random_array(40, 7, 24), "b": random_array(40, 7, 24, seed=2)}
    result = compress(model, Budget(mem=0.6), data=data)
    assert set(result.report.calibration.outputs.values()) == {"mse"}
    assert len(result.report.verification.outputs) == 2


@pytest.mark.parametrize(("head", "fewer"), [("image", True), ("classes", False)])
def test_losses_of_images_need_fewer_samples_than_those_of_classes(head, fewer):
    helper = onnx.helper
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "one", **same),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"], "two", **same),
    ]
    if head == "classes":
        nodes[2].output[0] = "c"
        nodes.append(helper.make_node("GlobalMaxPool", ["c"], ["p"]))
        nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
        nodes.append(helper.make_node("Softmax", ["f"], ["y"]))
    from tests.builders import model_of

    weights = {"w": random_array(16, 8, 3, 3), "v": random_array(16, 16, 3, 3, seed=1)}
    model = model_of(nodes, weights, {"x": ["N", 8, 20, 20]}, ["y"])
    data = {"x": random_array(40, 8, 20, 20)}
    told = []
    for budget in (Budget(mem=0.6), Budget(mem=0.4)):
        calibration = compress(model, budget, data=data).report.calibration
        told.append((calibration.calibration_samples, calibration.probe_samples))
    # Whatever the budget, so that a sweep and single runs come to the same.
    assert told[0] == told[1]
    samples, probed = told[0]
    assert 4 <= probed < samples if fewer else probed == samples


@given(
    losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=60).map(np.array),
    scale=st.floats(1e-3, 1e3),
)
def test_enough_samples_bring_the_mean_within_three_tenths(losses, scale):
    count = enough_samples(losses)
    assert min(4, len(losses)) <= count <= len(losses)
    if count < len(losses):
        assert losses.std(ddof=1) / np.sqrt(count) <= 0.3 * losses.mean() * (1 + 1e-9)
    assert abs(enough_samples(losses * scale) - count) <= 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--data", "missing.npz"], 2, "does not exist"),
        (["--objective", "output"], 2, "needs data"),
        (["--data", DATA, "--loss", "nonsense"], 2, "nonsense"),
        (["--data", DATA, "--mean", "a,b"], 2, "--mean a,b"),
        (["--data", "bad.npz"], 3, "bad.npz"),
        (["--data", "nan.npz"], 3, "NaN"),
        (["--data", "other.npz"], 3, "'image'"),
        (["--data", DATA, "--samples", 1], 2, "samples"),
    ],
)
def test_bad_data_is_one_clear_line(demo_model, tmp_path, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 hello")
    np.savez(tmp_path / "nan.npz", image=np.full((4, 1, 16, 16), np.nan, np.float32))
    np.savez(tmp_path / "other.npz", pictures=np.zeros((4, 1, 16, 16), np.float32))
    before = sorted(p.name for p in tmp_path.iterdir())
    done = run_here(demo_model, "out.onnx", "--mem", 0.3, *options)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("data", [{"x": random_array(8, 3, 12, 12)}, None])
@pytest.mark.parametrize("name", ["w1", "b3"])
def test_nan_in_a_model_is_not_blamed_on_the_data(name, data):
    model = small_network()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.ravel()[1] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    node = {"w1": "conv1", "b3": "fc"}[name]
    cause = f"weight '{name}' of node '{node}' holds NaN.*; export the model again"
    with pytest.raises(errors.ModelError, match=cause):
        compress(model, Budget(mem=0.5), data=data, threads=1)


def test_a_refused_file_of_samples_is_closed(demo_model, tmp_path):
    path = tmp_path / "nan.npz"
    np.savez(path, image=np.full((4, 1, 16, 16), np.nan, np.float32))
    with pytest.raises(errors.DataError, match="NaN") as refusal:
        compress(demo_model, Budget(mem=0.5), data=path)
    assert refusal.traceback  # It holds the reader that the error left halfway.
    held = [o for o in gc.get_objects() if isinstance(o, io.IOBase) and not o.closed]
    assert not [o for o in held if str(path) == str(getattr(o, "name", ""))]


def test_data_of_the_wrong_size_is_refused_before_the_work():
    with pytest.raises(errors.DataError, match="layout"):
        compress(small_network(), Budget(mem=0.5), data={"x": random_array(8, 12, 12, 3)})


def test_a_plan_in_bits_that_nobody_asked_for_counts_its_macs(demo_model: Path) -> None:
    macs = []
    for scheme in ("input", "input@4"):
        plan = Plan((Decision("stage1/conv1", scheme, 8),))
        macs.append(compress(demo_model, plan=plan).report.budget["mac"].after)
    assert macs[0] == macs[1]
