"""What is stored learns from the original's outputs, and is kept only where it helps others."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.allocation import Choice
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.distillation import stages, training
from cobla_onnx.distillation.block_lessons import BlockLessons
from cobla_onnx.distillation.distil import Distilled, Part, distil
from cobla_onnx.distillation.lessons import Lessons, Split, taught_by
from cobla_onnx.distillation.parameters import Parameters
from cobla_onnx.distillation.record import Distillation, Stage
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.layers import read_weight
from cobla_onnx.pipeline import max_drop, session
from cobla_onnx.pipeline.search.data import Factors, distil_factors
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.plan import Decision
from cobla_onnx.report.charts import checkpoints_chart
from cobla_onnx.runtime.pool import Pool, open_pool
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.coded_factors.form import coded_name
from cobla_onnx.variants.registry import require_family
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import FLOAT, model_of, random_array, small_network
from tests.cli.test_command import run_here
from tests.pipeline.search.test_network_loss import evidence_for
from tests.recurrent_models import sequence_model

DATA = Path("models/digits_calibration.npz")
SMALL = {"x": random_array(160, 3, 12, 12, seed=11)}


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return evidence_for(small_network(), 200)


@pytest.fixture(scope="module")
def factors(evidence: Evidence) -> Factors:
    choices = [Choice(0, int(layer.curves[0].levels[1])) for layer in evidence.analysis.curves]
    chosen = evidence.finisher().chosen(evidence.analysis.plan(choices))
    return Factors(chosen, [entry.approximation for entry in chosen])


def parts_of(evidence: Evidence, factors: Factors) -> Callable[[], Sequence[Part]]:
    """The same replacements for both halves, so that they differ in what is learned alone."""
    first, second = evidence.crossfit(evidence.finisher()).halves
    splits = Split(first, second), Split(second, first)
    return lambda: [Part(split, factors.replacements()) for split in splits]


def of_model(evidence: Evidence, factors: Factors, pool: Pool) -> tuple[Parameters, Lessons]:
    taught = taught_by(evidence.judge)
    parameters = Parameters(taught.model, factors.replacements())
    return parameters, Lessons(evidence.judge, taught, parameters, pool)


def held_back_losses(evidence: Evidence, made: Distilled) -> np.ndarray:
    """The loss that decisions follow, as a session of the rewritten model gives it."""
    model, measures = evidence.judge.follows
    session = open_session(rewrite(model, list(made.replacements)), 1)
    probe = evidence.judge.followed
    return np.concatenate(
        [
            sample_losses(measures, expected, run_session(session, feeds))
            for feeds, expected in zip(probe.batches, probe.expected, strict=True)
        ]
    )


def test_gradients_of_factors_and_biases_are_those_of_finite_differences(evidence, factors):
    parameters, lessons = of_model(evidence, factors, Pool())
    start, chosen = parameters.start(), range(11)
    loss, gradient = lessons.gradient(start, chosen)
    assert loss > 0
    # Factors of two convolutions and a Gemm, and the biases of those that have one.
    assert len(parameters.names) == 8
    rng = np.random.default_rng(0)
    for name, its in parameters.feeds(np.arange(len(start), dtype=np.float32)).items():
        places = its.astype(int).reshape(-1)
        direction = np.zeros_like(start)
        direction[places] = rng.standard_normal(len(places)) * np.abs(start[places]).mean()
        step = np.float32(3e-2)
        above, below = (lessons.gradient(start + s * step * direction, chosen)[0] for s in (1, -1))
        slope = (above - below) / (2 * float(step))
        assert slope == pytest.approx(float(gradient @ direction), rel=0.03, abs=2e-4), name


def test_the_gradient_is_the_same_on_any_number_of_threads(evidence, factors):
    found = []
    for threads in (1, 3):
        with open_pool(threads) as pool:
            parameters, lessons = of_model(evidence, factors, pool)
            found.append(lessons.gradient(parameters.start(), range(30))[1].tobytes())
    assert found[0] == found[1]


def test_what_is_learned_lowers_the_loss_of_the_model_that_is_written(evidence, factors):
    before = Distilled(factors.replacements(), Distillation())
    given = factors.replacements()
    made = distil(evidence.judge, given, 4, parts_of(evidence, factors))
    record = made.record
    assert record.kept
    # The last layers have a block of their own each.
    assert record.blocks == 3
    assert [stage.name for stage in record.stages] == ["blocks", "network"]
    assert any(
        stage.loss_after < stage.loss_before - stage.standard_error for stage in record.stages
    )
    assert record.samples == 160
    start, end = record.checkpoints[0].held_back, record.checkpoints[-1].held_back
    assert held_back_losses(evidence, before).mean() == pytest.approx(start, rel=1e-3)
    assert held_back_losses(evidence, made).mean() == pytest.approx(end, rel=1e-3)
    assert end < start
    assert record.text.startswith("distilled: in trials, the loss on 160 samples not learned from")
    assert {trial.part for trial in record.trials} == {1, 2}


def test_halves_judge_what_was_made_without_them(evidence, factors):
    plan = evidence.analysis.plan(
        [Choice(0, int(layer.curves[0].levels[1])) for layer in evidence.analysis.curves]
    )
    crossfit = evidence.crossfit(evidence.finisher())
    made = crossfit.parts(plan, True)
    calibration = set(evidence.dataset.calibration)
    assert set(made[0].split.judged) | set(made[1].split.judged) == calibration
    for part in made:
        assert set(part.split.learned).isdisjoint(part.split.judged)
        assert set(part.split.learned) | set(part.split.judged) == calibration
        assert [r.layer.name for r in part.replacements] == [e.layer.name for e in factors.chosen]
    # Other samples have made other factors, and refit has changed those of the layers behind.
    dense = [[r.dense() for r in part.replacements] for part in made]
    assert all(not np.allclose(*pair) for pair in zip(*dense, strict=True))
    plain = crossfit.parts(plan, False)[0].replacements
    same = [np.array_equal(r.dense(), d) for r, d in zip(plain, dense[0], strict=True)]
    assert same[0]
    assert not all(same)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(evidence, factors):
    judge, given, parts = evidence.judge, factors.replacements(), parts_of(evidence, factors)

    def learned(seed: int, threads: int) -> bytes:
        made = distil(judge, given, 1, parts, seed=seed, threads=threads)
        return b"".join(a.tobytes() for each in made.replacements for a in each.arrays.values())

    first = learned(0, 1)
    assert learned(0, 2) == first
    assert learned(1, 1) != first


@pytest.mark.parametrize("stated", [0.0, 5.0, np.nan])
def test_what_gains_is_not_kept_if_the_stated_loss_rises(evidence, factors, monkeypatch, stated):
    """The loss that decisions follow gains in all cases; the stated one is made to rise."""
    before = []

    def told(self: Lessons, values):
        # Both halves are asked for their beginnings first.
        before.append(values)
        return np.full(8, 1.0 if len(before) <= 2 else 1.0 + stated)

    monkeypatch.setattr(Lessons, "stated", told)
    given = factors.replacements()
    made = distil(evidence.judge, given, 4, parts_of(evidence, factors))
    gained = [s for s in made.record.stages if s.loss_after < s.loss_before - s.standard_error]
    assert gained
    assert made.record.kept == (stated == 0)
    assert all(stage.stated_loss_is_higher == (stated != 0) for stage in gained)
    if stated:
        assert all(old is new for old, new in zip(given, made.replacements, strict=True))
        assert "not kept: the stated loss on them rose" in made.record.text


def test_what_gains_nothing_on_the_samples_held_back_leaves_all_as_it_was(
    evidence, factors, monkeypatch
):
    """Trained to be as far from the original as it can."""
    for lessons in (Lessons, BlockLessons):

        def upwards(self, values, chosen: Sequence[int], gradient=lessons.gradient):
            loss, found = gradient(self, values, chosen)
            return loss, -found

        monkeypatch.setattr(lessons, "gradient", upwards)
    given = factors.replacements()
    made = distil(evidence.judge, given, 2, parts_of(evidence, factors))
    assert not made.record.kept
    assert all(old is new for old, new in zip(given, made.replacements, strict=True))
    assert made.record.text.startswith("not distilled")
    # Nothing was to be gained by a training on all samples.
    assert made.record.checkpoints == ()


@pytest.mark.parametrize("bits", [16, 8, 5])
@pytest.mark.parametrize("scheme", ["stored", "channel"])
def test_what_is_stored_in_few_bits_learns(evidence, bits, scheme):
    layer = next(layer for layer in evidence.analysis.layers if layer.name == "conv2")
    name = "stored" if scheme == "stored" else coded_name(scheme, bits)
    family = require_family(name)
    form = next(form for form in family.forms(layer) if form.name == name)
    level, weight = bits if scheme == "stored" else 6, read_weight(evidence.model, layer)
    given = family.replace(layer, form, family.from_weights(layer, form, level, weight, None))
    taught = taught_by(evidence.judge)
    parameters = Parameters(taught.model, [given])
    lessons = Lessons(evidence.judge, taught, parameters, Pool())
    values = 1.1 * parameters.start()
    (learned,) = parameters.replacements(values)
    parts = {part.rpartition("/")[2] for part in given.learnable}
    assert parts == ({"half"} if bits == 16 else {"level", "scale"})
    kinds = [{n: (a.dtype, a.shape) for n, a in r.arrays.items()} for r in (given, learned)]
    assert kinds[0] == kinds[1]
    # Scales grow as they were told to, and numbers go to the level nearest to 1.1 times theirs.
    power = (1 if bits == 16 else 2) * (1 if scheme == "stored" else 2)
    apart = learned.dense() - 1.1**power * given.dense()
    least = {16: 1e-3, 8: 0.1, 5: 0.2}[bits]
    assert np.abs(apart).mean() < least * np.abs(given.dense()).mean()
    # What is decoded from the arrays is what the loss is measured with.
    found = held_back_losses(evidence, Distilled([learned], Distillation()))
    np.testing.assert_allclose(lessons.held_back(values), found, rtol=1e-3, atol=1e-7)
    gradient = lessons.gradient(values, range(8))[1]
    # Rounding hides what small steps of the numbers do, and scales show it.
    coded = np.concatenate(
        [np.full(array.size, part.endswith("level")) for part, array in given.learnable.items()]
    )
    steps = np.where(np.append(coded, np.ones(len(values) - len(coded), bool)), 0, 0.02 * values)
    above, below = (lessons.gradient(values + s * steps, range(8))[0] for s in (1, -1))
    assert (above - below) / 2 == pytest.approx(float(gradient @ steps), rel=0.1)


def test_bits_learn_within_the_budget_that_they_were_chosen_for(monkeypatch):
    """Also where so little is lost that what is learned is within the noise."""
    monkeypatch.setattr(stages, "BETTER", -np.inf)
    options = {"data": SMALL, "precision": "auto", "refit": False, "threads": 1}
    found = compress(small_network(), Budget(mem=0.12), distil=2, solver="milp", **options)
    assert found.report.budget["mem"].reached <= 0.12
    record = found.report.calibration.distillation
    assert record.kept
    assert record.stages[-1].loss_after < record.stages[0].loss_before
    without = compress(small_network(), Budget(mem=0.12), solver="milp", **options)
    assert found.plan == without.plan
    assert found.report.budget["mem"].after == without.report.budget["mem"].after


def test_what_makes_the_stated_loss_worse_is_not_kept(evidence, factors, monkeypatch):
    """The loss that is followed gains, and that at temperature 1 would not."""
    asked = []

    def worse_after(self: Lessons, values):
        asked.append(values)
        return np.linspace(0.9, 1.1, 80) + (len(asked) > 2)

    monkeypatch.setattr(Lessons, "stated", worse_after)
    made = distil(evidence.judge, factors.replacements(), 2, parts_of(evidence, factors))
    gained = [s for s in made.record.stages if s.loss_after < s.loss_before - s.standard_error]
    assert not made.record.kept
    # Of both halves, in the beginning and where a stage led.
    assert len(asked) == 2 + 2 * len(gained) > 2


def test_time_that_is_up_ends_it(evidence, factors):
    parts = parts_of(evidence, factors)
    made = distil(evidence.judge, factors.replacements(), "auto", parts, seconds=0.0)
    assert made.record.steps == 0
    assert "more time" in made.record.text
    assert not made.record.kept


def test_numbers_that_overflow_what_they_are_stored_in_end_a_trial(evidence, factors, monkeypatch):
    held_back = Lessons.held_back

    def overflown(self, values):
        if not np.array_equal(values, self.parameters.start()):
            raise ModelError("a number overflows float16")
        return held_back(self, values)

    monkeypatch.setattr(Lessons, "held_back", overflown)
    made = distil(evidence.judge, factors.replacements(), 1, parts_of(evidence, factors))
    assert not made.record.kept
    assert made.record.undone == len(made.record.trials) > 0


def test_an_interrupt_in_the_trials_of_blocks_ends_those_of_the_whole(
    evidence, factors, monkeypatch
):
    def interrupted(self, values, chosen):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockLessons, "gradient", interrupted)
    made = distil(evidence.judge, factors.replacements(), 2, parts_of(evidence, factors))
    assert made.record.steps == 0
    assert not made.record.kept


def test_a_model_without_gradients_is_left_and_says_why():
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], "hidden"),
        onnx.helper.make_node("Det", ["h"], ["y"], "last"),
    ]
    weights = {"w": random_array(12, 12, seed=3)}
    model = model_of(nodes, weights, {"x": ["N", 12, 12]}, ["y"], elem_type=FLOAT)
    data = {"x": random_array(40, 12, 12, seed=4)}
    found = compress(model, Budget(mem=0.6), data=data, distil=1, threads=1)
    without = compress(model, Budget(mem=0.6), data=data, threads=1)
    assert "Det" in found.report.calibration.distillation.reason
    assert found.model.SerializeToString() == without.model.SerializeToString()
    assert "not distilled: " in found.report.to_markdown()


def test_layers_behind_one_without_a_derivative_learn_and_those_before_it_stay():
    model = sequence_model("GRU")
    data = {"x": random_array(40, 12, 24, seed=4)}
    options = {"data": data, "precision": "auto", "refit": False, "threads": 1}
    plan = compress(model, Budget(mem=0.5), **options).plan
    last = Decision("after", "stored", 4)
    plan = replace(plan, decisions=(*(d for d in plan.decisions if d.layer != "after"), last))
    record = compress(model, plan=plan, distil=2, **options).report.calibration.distillation
    # Its numbers, and the scales of its columns.
    assert record.parameters == 80 + 5
    assert record.steps > 0


def test_samples_of_many_shapes_run_one_at_a_time_and_the_rarest_are_left_out():
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["h"], ["r"]),
        onnx.helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        onnx.helper.make_node("Flatten", ["p"], ["y"]),
    ]
    weights = {"w": random_array(24, 6, 3, 3, seed=1), "b": random_array(24, seed=2)}
    model = model_of(nodes, weights, {"x": ["N", 6, "H", "W"]}, ["y"])
    sizes = [6] * 12 + [8] * 12 + [9] * 6 + [7] * 6 + [5] * 2
    data = [{"x": random_array(1, 6, s, s, seed=i)} for i, s in enumerate(sizes)]
    found = compress(model, Budget(mem=0.4), data=data, distil=1, threads=1)
    record = found.report.calibration.distillation
    assert 0 < record.left_out <= 2
    assert record.steps > 0


def test_a_plan_learns_as_the_budget_that_made_it_did():
    options = {"data": SMALL, "refit": False, "threads": 1, "distil": 2}
    first = compress(small_network(), Budget(mem=0.3), solver="milp", **options)
    assert first.report.calibration.distillation.kept
    again = compress(small_network(), plan=first.plan, **options)
    assert again.model.SerializeToString() == first.model.SerializeToString()
    page = first.report.to_html()
    assert "<dt>Distillation</dt><dd>distilled: " in page
    assert "loss on the samples held back" in page
    assert checkpoints_chart(first.report.calibration.distillation.checkpoints[:1]) is None
    assert first.report.budget["mem"].reached <= 0.3
    loss = first.report.calibration.loss
    assert loss < first.report.calibration.loss_before_refit


def test_the_smallest_model_that_is_good_enough_is_judged_after_it(monkeypatch):
    """Of two budgets the smaller one is good enough, since all that is tried has learned."""
    monkeypatch.setattr(max_drop, "COARSE", 3)
    monkeypatch.setattr(max_drop, "FINE", 0)
    tried = []

    def learned(*arguments):
        tried.append(distil_factors(*arguments))
        return tried[-1]

    monkeypatch.setattr(session, "distil_factors", learned)
    options = {"data": SMALL, "refit": False, "solver": "milp", "threads": 1, "samples": 60}
    calibration = compress(small_network(), max_drop=0.9, distil=1, **options).report.calibration
    assert len(tried) == 2
    assert calibration.distillation in [factors.distilled.record for factors in tried]
    assert calibration.quality.drop <= 0.9


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([Stage("blocks", True, 1, 0.003, 0.5, 0.25, 0.01)],
         "distilled: in trials, the loss on 40 samples not learned from: block by block 0.5 → 0.25 "
         "(lower by 0.25, standard error 0.01) by 1 pass at a rate of 0.003"),
        ([Stage("network", True, 2, 0.01, None, 0.25)],
         "distilled: in trials, the loss on 40 samples not learned from: as a whole infinite → "
         "0.25 by 2 passes at a rate of 0.01"),
        ([Stage("blocks", True, 2, 0.01, 0.5, 0.4, 0.01),
          Stage("network", False, 2, 0.01, 0.4, 0.39, 0.01)],
         "distilled: in trials, the loss on 40 samples not learned from: block by block 0.5 → 0.4 "
         "(lower by 0.1, standard error 0.01) by 2 passes at a rate of 0.01; as a whole 0.4 → 0.39 "
         "(lower by 0.01, standard error 0.01) by 2 passes at a rate of 0.01, not kept: not beyond "
         "the noise"),
        ([Stage("network", False, 2, 0.01, 0.5, 0.25, went_wrong=True)],
         "not distilled: in trials, the loss on 40 samples not learned from: as a whole 0.5 → 0.25 "
         "by 2 passes at a rate of 0.01, not kept: the training on all samples ended early, or "
         "went wrong"),
        ([Stage("network", False, 2, 0.01, 0.5, 0.25, stated_loss_is_higher=True)],
         "not distilled: in trials, the loss on 40 samples not learned from: as a whole 0.5 → 0.25 "
         "by 2 passes at a rate of 0.01, not kept: the stated loss on them rose"),
        ([Stage("blocks", False), Stage("network", False, 2, 0.01, 0.5, 0.5)],
         "not distilled: in trials, the loss on 40 samples not learned from: block by block no "
         "trial came to a good end; as a whole it lost no less"),
        ([Stage("network", False)],
         "not distilled: no trial came to a good end; give it more time"),
    ],
)  # fmt: skip
def test_what_it_did_is_told_in_a_line(stages, text):
    kept = any(stage.kept for stage in stages)
    assert Distillation(kept, tuple(stages), samples=40).text == text


def test_a_reason_is_told_alone():
    assert Distillation(reason="no gradient").text == "not distilled: no gradient"


def test_where_all_layers_stay_whole_nothing_learns_and_the_report_says_so():
    found = compress(small_network(), Budget(mem=1.0), data=SMALL, distil=1, threads=1)
    assert found.report.unchanged
    expected = "not distilled: no layer was changed, so that none has anything to learn"
    assert found.report.calibration.distillation.text == expected


def test_too_few_samples_are_not_learned_from():
    options = {"data": {"x": SMALL["x"][:18]}, "refit": False, "solver": "milp", "threads": 1}
    found = compress(small_network(), Budget(mem=0.3), distil=1, **options)
    assert "too few samples" in found.report.calibration.distillation.text


def test_the_command_says_what_it_did(tmp_path):
    onnx.save(small_network(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **SMALL)
    done = run_here(
        "compress", tmp_path / "model.onnx", tmp_path / "small.onnx", "--mem", 0.3,
        "--data", tmp_path / "data.npz", "--no-refit", "--distil", 2, "--solver", "milp",
        "--report", tmp_path / "r.json", "--threads", 1, "--history", tmp_path / "h.csv",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "distilled: " in " ".join(done.stdout.split())
    told = json.loads((tmp_path / "r.json").read_text())["calibration"]["distillation"]
    assert told["kept"] is True
    steps = {"blocks": told["blocks"], "network": 2}
    kept = [stage["name"] for stage in told["stages"] if stage["kept"]]
    assert len(told["checkpoints"]) == 1 + sum(steps[name] for name in kept)
    assert told["trials"][0]["rate"] == 0.003
    with (tmp_path / "h.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows[:2]] == ["distil, start", f"distil, {kept[0]}"]
    assert [float(row["selection_loss"]) for row in rows] == [
        point["held_back"] for point in told["checkpoints"]
    ]


@pytest.mark.parametrize("passes", [0, -1, 1.5, "many", True])
def test_a_number_of_passes_is_checked(demo_model, passes):
    with pytest.raises(UsageError, match="give auto, or a whole number of at least 1"):
        compress(demo_model, Budget(mem=0.5), data=DATA, distil=passes)


def test_without_data_there_is_nothing_to_learn_from(demo_model):
    with pytest.raises(UsageError, match=r"distil=.auto.: learns from .* give data= too"):
        compress(demo_model, Budget(mem=0.5), distil="auto")


def test_steps_are_of_as_many_samples_as_there_are(evidence, factors, monkeypatch):
    monkeypatch.setattr(training, "BATCH", 1000)
    record = distil(evidence.judge, factors.replacements(), 1, parts_of(evidence, factors)).record
    kept = [stage.name for stage in record.stages if stage.kept]
    trainings = [*(trial.stage for trial in record.trials), *kept]
    assert record.steps == sum(record.blocks if each == "blocks" else 1 for each in trainings)
