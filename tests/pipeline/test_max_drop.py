"""``--max-drop``: the smallest model that is still good enough."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress, errors
from cobla_onnx.calibration.data.arrays import array_samples
from cobla_onnx.calibration.data.fitting import InputSpec
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.cli.parsing import fraction
from cobla_onnx.pipeline.max_drop import smallest
from tests.builders import random_array, small_network
from tests.cli.test_command import run, run_here

DATA = {"x": random_array(40, 3, 12, 12, seed=3)}


SPEC = InputSpec("x", np.dtype(np.float32), (None, 3, 12, 12))


class Curve:
    """A session whose quality is any function of the memory budget."""

    evidence = SimpleNamespace(dataset=array_samples("data", DATA, [SPEC], None))

    def __init__(self, drop, least=0.1):
        self.drop, self.least, self.tried = drop, least, []

    def notify(self, stage, done, total):
        pass

    def least_memory(self):
        return self.least

    def solve(self, budget, plan=None):
        from cobla_onnx.allocation import Allocation
        from cobla_onnx.allocation.solve import Certificate
        from cobla_onnx.pipeline.session import Solution
        from cobla_onnx.plan import Plan
        from cobla_onnx.report.model import CalibrationReport
        from cobla_onnx.variants.offload import Spill

        if budget.mem < self.least:
            raise errors.BudgetError("below the least", {"mem": self.least})
        self.tried.append(budget.mem)
        drop = self.drop(budget.mem)
        quality = Quality("agreement", 1.0, 1.0 - drop, drop, 1000)
        report = CalibrationReport("data", 4000, 1000, {}, 0.0, 0.0, quality)
        proof = Certificate("milp", "output", 0.0, 0.0, 0.0, {}, {})
        return Solution(budget, Plan(()), Allocation((), proof), [], Spill(), report, (), 0.0)


def found(curve, max_drop, limits=None):
    solution = smallest(curve, max_drop, limits)
    good = [mem for mem in curve.tried if curve.drop(mem) <= max_drop]
    assert solution.calibration.quality.drop == curve.drop(min(good)) <= max_drop
    assert solution.budget is limits
    return min(good)


def test_no_budget_above_the_limits_is_tried():
    curve = Curve(lambda mem: 0.0, least=0.001119402985074627)
    found(curve, 0.1, Budget(mac=0.7))
    assert max(curve.tried) == 1.0


def test_it_closes_in_on_the_edge():
    for edge in (0.15, 0.4, 0.6, 0.95):
        curve = Curve(lambda mem, edge=edge: 0.0 if mem >= edge else 0.5)
        assert edge <= found(curve, 0.01) <= edge + 0.9 / 5 / 16
        assert len(curve.tried) <= 9


def test_a_quality_that_goes_up_and_down_still_satisfies_the_limit():
    # Good at 0.46, bad at 0.64 and 0.82: halving from above alone would not look there.
    curve = Curve(lambda mem: 0.0 if 0.42 < mem < 0.5 else 0.2)
    assert 0.42 < found(curve, 0.01) <= 0.46


def test_a_limit_on_memory_holds_and_refuses_honestly():
    curve = Curve(lambda mem: max(0.0, 0.6 - mem))
    assert found(curve, 0.2, Budget(mem=0.5)) <= 0.5
    with pytest.raises(errors.BudgetError, match="no smaller model keeps it within the limits"):
        smallest(Curve(lambda mem: max(0.0, 0.6 - mem)), 0.05, Budget(mem=0.5))
    with pytest.raises(errors.BudgetError, match="below the least"):
        smallest(Curve(lambda mem: 0.0), 0.05, Budget(mem=0.05))


def test_a_limit_below_an_estimate_of_the_least_is_tried_once_and_none_above():
    """In 8 bits the least is about what is told."""

    class Estimated(Curve):
        def least_memory(self):
            return 0.4

    curve = Estimated(lambda mem: 0.0, least=0.1)
    assert found(curve, 0.05, Budget(mem=0.3)) == 0.3
    assert curve.tried == [0.3, 0.3]


def test_where_nothing_smaller_is_good_enough_it_says_what_was_best():
    with pytest.raises(errors.BudgetError, match=r"the best, memory 0\.\d+, loses 0\.3 of"):
        smallest(Curve(lambda mem: 0.3), 0.05)


def test_a_drop_that_the_samples_cannot_show_is_noted():
    solution = smallest(Curve(lambda mem: 0.0), 0.0001)
    assert any("cannot be told from none" in note for note in solution.allocation.certificate.notes)


def test_the_note_bounds_the_true_drop():
    """Of 1,000 samples none differs: (1 - p)^1000 = 0.05 at p = 0.003."""
    solution = smallest(Curve(lambda mem: 0.0), 0.01)
    (note,) = [n for n in solution.allocation.certificate.notes if "true drop" in n]
    assert note.startswith("a true drop of up to 0.003 can look like that on 1000 samples")


def test_agreement_on_real_factors():
    result = compress(small_network(), max_drop=0.2, data=DATA, threads=1, solver="milp")
    quality = result.report.calibration.quality
    assert (quality.measure, quality.samples) == ("agreement", 8)
    assert quality.drop <= 0.2
    assert result.report.budget["mem"].limit is None
    assert result.report.budget["mem"].reached < 1
    output = result.report.verification.outputs[0]
    assert output.argmax_agreement == pytest.approx(quality.after)


@pytest.mark.parametrize(
    ("sample", "said"), [(0.0, "all samples are zeros"), (1.0, "all samples are the same")]
)
def test_samples_that_are_all_alike_cut_nothing(sample, said):
    data = {"x": np.full((12, 3, 12, 12), sample, np.float32)}
    options = {"data": data, "threads": 1, "solver": "milp"}
    report = compress(small_network(), max_drop=0.2, **options).report
    assert report.budget["mem"].reached == 1.0
    assert any(f"{said}, so that nothing can be judged" in note for note in report.notes)
    report = compress(small_network(), Budget(mem=0.5), max_drop=0.2, **options).report
    assert 0.4 < report.budget["mem"].reached <= 0.5


def test_accuracy_with_labels_and_relative_error_without_classes():
    labels = np.arange(40) % 10
    options = {"data": DATA, "threads": 1, "solver": "milp", "refit": False}
    quality = compress(small_network(), Budget(mem=0.6), labels=labels, **options)
    quality = quality.report.calibration.quality
    session = onnx.reference.ReferenceEvaluator(small_network())
    logits = session.run(None, DATA)[0]
    held_back = (logits.argmax(axis=1) == labels)[4::5]
    assert quality.measure == "accuracy"
    assert quality.samples == len(held_back) == 8
    assert quality.before in {k / 8 for k in range(9)}
    assert quality.drop == pytest.approx(quality.before - quality.after)
    result = compress(small_network(), Budget(mem=0.6), loss="mse", **options)
    quality = result.report.calibration.quality
    output = result.report.verification.outputs[0]
    assert quality.measure == "relative error"
    assert quality.drop == pytest.approx(output.slice_error, rel=1e-3)


def test_bad_requests():
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(errors.UsageError, match=r"max_drop=.* is not a fraction"):
            compress(small_network(), max_drop=bad, data=DATA)
    with pytest.raises(errors.UsageError, match="give data="):
        compress(small_network(), max_drop=0.1, threads=1)
    assert fraction("--max-drop", "1%") == 0.01
    assert fraction("--max-drop", "0.02") == 0.02
    for bad in ("1%%", "much", "1%x", "nan", ""):
        with pytest.raises(errors.UsageError, match="is not a fraction"):
            fraction("--max-drop", bad)


def test_the_command(tmp_path):
    onnx.save(small_network(), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", **DATA)
    out = tmp_path / "out.onnx"
    done = run(
        tmp_path / "in.onnx", out, "--max-drop", "20%", "--data", tmp_path / "data.npz",
        "--solver", "milp",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: --max-drop 0.2: agreement" in done.stdout
    assert out.exists()
    done = run_here(tmp_path / "in.onnx", tmp_path / "b.onnx", "--max-drop", "20%")
    assert done.returncode == 2
    assert "give --data" in done.stderr
