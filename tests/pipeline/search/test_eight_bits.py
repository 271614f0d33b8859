"""8-bit arithmetic through the whole path: budgets, choices, the file, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress, sweep
from cobla_onnx.errors import BudgetError, ModelError, UsageError, VerificationError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.options import Settings, values
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.search import eight_bit_search, eight_bits, floating
from cobla_onnx.pipeline.search.eight_bits import in_eight_bits
from cobla_onnx.pipeline.search.memory import EightBitMemory
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.report.arithmetic import ArithmeticReport
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from tests.bodies import choice
from tests.builders import model_of, random_array, small_network

QUICK = {"solver": "milp", "refit": False, "threads": 1}


@pytest.fixture
def data():
    return {"x": random_array(24, 3, 12, 12)}


@pytest.mark.parametrize("precision", ["auto", (8, 4)])
def test_what_ranks_alone_meet_in_8_bits_they_meet_beside_fewer_bits(data, precision):
    """Factors are not multiplied out: what is made as a session opens is not in 8 bits."""
    for mem in (0.15, 0.22):
        options = {"data": data, "arithmetic": "int8", "precision": precision, **QUICK}
        result = compress(small_network(), Budget(mem=mem), **options)
        assert result.report.budget["mem"].reached <= mem
        assert stored_bytes(result.model) <= mem * stored_bytes(small_network())
        assert result.report.arithmetic.nodes > 1


def test_of_few_layers_budgets_are_used_up():
    """Where one plan is the best of several limits, limits just below it give the next one."""
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 8, 3, 3), "b": (16,), "v": (8, 16, 1, 1), "x": (32, 8, 9, 9)}
    weights = {name: rng.standard_normal(shape, np.float64) for name, shape in shapes.items()}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    samples = {"x": weights.pop("x")}
    weights |= {name: np.float32(0.2) * weights[name] for name in "wv"}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w", "b"], ["h"], "one", pads=[1] * 4),
        onnx.helper.make_node("Relu", ["h"], ["r"]),
        onnx.helper.make_node("Conv", ["r", "v"], ["y"], "two"),
    ]
    model = model_of(nodes, weights, {"x": ["N", 8, 9, 9]}, ["y"])
    for mem in (0.2, 0.25, 0.3):
        result = compress(model, Budget(mem=mem), data=samples, arithmetic="int8", threads=1)
        assert 0.9 * mem <= result.report.budget["mem"].reached <= mem


def test_ranks_are_chosen_then_nodes_compute_in_eight_bits(data, tmp_path):
    result = compress(
        small_network(), Budget(mac=0.6), data=data, arithmetic="int8", rank_multiple=1, **QUICK
    )
    report, said = result.report, result.report.arithmetic
    assert isinstance(said, ArithmeticReport)
    assert report.budget["mac"].reached <= 0.6
    assert report.budget["mem"].after == stored_bytes(result.model)
    assert report.budget["mem"].reached < 0.35
    assert not report.unchanged
    factors = sum(layer.decision == "factorised" for layer in report.layers)
    assert factors
    assert said.nodes + len(said.left) == 3 + factors
    assert set(said.candidates) >= {"min-max", "entropy", "percentile"}
    assert min(said.candidates.values()) == said.loss
    assert report.calibration.loss == said.loss
    assert report.calibration.quality == said.quality
    assert report.verification.data == "held-back"
    assert 0 < report.verification.rewrite_max_error <= 1e-4
    assert 0 < report.verification.outputs[0].relative_l2 < 0.2
    for text in (said.text, report.to_markdown(), report.to_html()):
        assert "8-bit arithmetic" in text
    result.save(tmp_path / "small.onnx")
    written = onnx.load(tmp_path / "small.onnx")
    assert sum(t.data_type == onnx.TensorProto.INT8 for t in written.graph.initializer) > 3


def test_a_model_of_matrix_products_takes_the_ranges_of_each_run():
    nodes, weights = [], {}
    for number in range(3):
        read, written = ("x", "ab", "ac")[number], ("ab", "ac", "y")[number]
        nodes.append(onnx.helper.make_node("MatMul", [read, f"w{number}"], [f"m{number}"]))
        nodes.append(onnx.helper.make_node("Tanh", [f"m{number}"], [written]))
        weights[f"w{number}"] = random_array(48, 48, seed=number) / 5
    model = model_of(nodes, weights, {"x": ["N", 48]}, ["y"])
    data = {"x": random_array(40, 48, seed=9)}
    for budget in (Budget(mac=0.7), Budget(mem=0.27), Budget(mem=0.2)):
        result = compress(model, budget, data=data, arithmetic="int8", rank_multiple=1, **QUICK)
        report, said = result.report, result.report.arithmetic
        assert (said.ranges, said.carried, said.biases) == ("dynamic", 0, 0)
        assert set(said.candidates) >= {"dynamic"}
        assert not set(said.candidates) & {"min-max", "entropy", "percentile"}
        assert "ranges of each run" in said.text
        assert report.budget["mem"].after == stored_bytes(result.model)
        assert all(use.reached <= use.limit for use in report.budget.values() if use.limit)
        kinds = [node.op_type for node in result.model.graph.node]
        assert kinds.count("MatMulInteger") == said.nodes >= 3


def test_weights_in_external_data_are_stored_in_eight_bits(data, tmp_path):
    model = small_network()
    onnx.save(model, tmp_path / "given.onnx")
    place = tmp_path / "external.onnx"
    onnx.save(model, place, save_as_external_data=True, location="data.bin", size_threshold=0)
    made = [
        compress(path, Budget(mem=0.4), data=data, arithmetic="int8", **QUICK)
        for path in (tmp_path / "given.onnx", place)
    ]
    for result, name in zip(made, "ab", strict=True):
        result.save(tmp_path / f"{name}.onnx", external_data="never")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_plan_that_keeps_what_is_no_layer_in_eight_bits_is_taken(data):
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], "depthwise", group=3),
        onnx.helper.make_node("Conv", ["a", "v"], ["y"], "mixing"),
    ]
    weights = {"w": random_array(3, 1, 3, 3), "v": random_array(16, 3, 3, 3)}
    model = model_of(nodes, weights, {"x": ["N", 3, 12, 12]}, ["y"])
    plan = Plan((Decision("depthwise"), Decision("mixing", "channel", 2)))
    found = compress(model, plan=plan, data=data, arithmetic="int8", **QUICK)
    assert found.plan.decisions == plan.decisions[1:]
    assert found.report.budget["mac"].after < found.report.budget["mac"].before
    cut = Plan((Decision("depthwise", "stored", 8),))
    with pytest.raises(UsageError, match="to compress; it is left alone: "):
        compress(model, plan=cut, data=data, arithmetic="int8", **QUICK)


def test_a_plan_that_stores_all_layers_in_fewer_bits_is_named(data):
    names = [layer.name for layer in find_layers(small_network()).layers]
    plan = Plan(tuple(Decision(name, "stored", 8) for name in names))
    with pytest.raises(ModelError, match=r"are stored in fewer bits.* or a plan with a layer"):
        compress(small_network(), plan=plan, data=data, arithmetic="int8", **QUICK)
    found = compress(
        small_network(), plan=Plan(plan.decisions[1:]), data=data, arithmetic="int8", **QUICK
    )
    assert found.report.arithmetic.nodes > 0


@pytest.mark.parametrize(("limit", "ranks"), [(0.3, False), (0.24, True)])
def test_a_memory_budget_counts_weights_in_eight_bits(data, limit, ranks):
    """Three tenths are met without any ranks, and the model is verified all the same."""
    result = compress(small_network(), Budget(mem=limit), data=data, arithmetic="int8", **QUICK)
    report, plan = result.report, result.plan
    assert any(decision.scheme is not None for decision in plan.decisions) == ranks
    assert 0.85 * limit < report.budget["mem"].reached <= limit
    assert stored_bytes(result.model) == report.budget["mem"].after
    assert not report.unchanged
    assert report.verification.samples == report.calibration.selection_samples


def test_what_computes_in_eight_bits_is_stored_in_no_others(data):
    """Bits are for what does not compute, such as tables, and for layers of other types."""
    forms = {}
    for arithmetic in ("keep", "int8"):
        settings = Settings(data=data, arithmetic=arithmetic, precision="auto")
        with open_session(small_network(), settings) as session:
            curves = [curve for layer in session.analysis.curves for curve in layer.curves]
        forms[arithmetic] = {curve.scheme for curve in curves}
    assert "stored" in forms["keep"]
    assert not {f for f in forms["int8"] if f == "stored" or "@" in f}
    asked = Asked("auto", EVERY_RANK, (4,), ("Conv",))
    conv, _, gemm = find_layers(small_network()).layers
    assert (asked.of(conv).bits, asked.of(gemm).bits) == ((), (4,))


def test_what_options_leave_out_is_left_in_floating_point(data):
    options = {"data": data, "arithmetic": "int8", "exclude": ["conv1"], **QUICK}
    result = compress(small_network(), Budget(mem=0.5), **options)
    stored = {tensor.name for tensor in result.model.graph.initializer}
    assert {"w1", "b1", "w2_quantized", "w3_quantized"} <= stored
    assert result.report.arithmetic.nodes == 2
    assert result.report.budget["mem"].reached <= 0.5


def test_what_no_ranks_reach_is_refused_with_the_least():
    model = small_network()
    with open_session(model, Settings()) as session:
        memory, choose = EightBitMemory(session.followed, session.analysis), session.chooser(None)

        def search(budget):
            return choose(session.analysis.constraints(budget))

        assert memory.original == memory.under(Plan(()))
        with pytest.raises(BudgetError, match=r"mem=0.01.*least that was reached in 8") as caught:
            memory.meet(Budget(mem=0.01), search)
        least = caught.value.least["mem"]
        found = memory.meet(Budget(mem=least), search)
        total = session.analysis.mem_total
    assert memory.under(found.plan(session.analysis)) <= least * total


def test_branches_that_the_data_never_takes_count():
    """What computes in a branch stays in floating point; both are stored."""
    model, total = choice(), stored_bytes(choice())
    data = [{"x": np.abs(random_array(2, 16, seed=seed))} for seed in range(24)]
    options = {"data": data, "arithmetic": "int8", **QUICK}
    for mem in (0.6, 0.7, 0.85):
        result = compress(model, Budget(mem=mem), **options)
        assert 0.9 * mem * total <= stored_bytes(result.model) <= mem * total
    with pytest.raises(BudgetError, match="least that was reached in 8 bits") as caught:
        compress(model, Budget(mem=0.5), **options)
    assert 0.5 < caught.value.least["mem"] < 0.6


@pytest.mark.parametrize("mac", [0.3, 0.9])
def test_a_looser_budget_is_met_as_well(mac):
    """Smaller ranks are added where bytes in 8 bits need them, whatever else is asked for."""
    weights = {
        "a": random_array(32, 4, 3, 3, seed=1) / 6,
        "c": random_array(32, 32, 3, 3, seed=2) / 17,
        "e": random_array(32, 10, seed=3) / 6,
    }
    nodes = [
        onnx.helper.make_node("Conv", ["x", "a"], ["h"], "one", pads=[1] * 4),
        onnx.helper.make_node("Relu", ["h"], ["r"]),
        onnx.helper.make_node("Conv", ["r", "c"], ["g"], "two", pads=[1] * 4),
        onnx.helper.make_node("GlobalAveragePool", ["g"], ["p"]),
        onnx.helper.make_node("Flatten", ["p"], ["f"]),
        onnx.helper.make_node("Gemm", ["f", "e"], ["y"], "three"),
    ]
    model = model_of(nodes, weights, {"x": ["N", 4, 12, 12]}, ["y"])
    options = {"data": {"x": random_array(24, 4, 12, 12)}, "arithmetic": "int8", **QUICK}
    report = compress(model, Budget(mem=0.1, mac=mac), **options).report
    assert report.budget["mem"].reached <= 0.1


def test_no_more_bytes_are_spent_on_nodes_left_in_floating_point(data, monkeypatch):
    monkeypatch.setattr(floating, "paired_gain", _always_better)
    monkeypatch.setattr(floating, "MOST_MACS", 1.0)
    with open_session(small_network(), Settings(data=data, arithmetic="int8")) as session:
        free = in_eight_bits(session.evidence, session.model)
        assert free.report.left == ("conv1", "conv2")
        assert free.report.nodes == 1
        most = stored_bytes(free.model) - 1
        other = in_eight_bits(session.evidence, session.model, most)
    assert other.report.left == ("conv1", "fc")
    assert stored_bytes(other.model) <= most


def test_nodes_with_many_macs_compute_in_eight_bits_whatever_that_loses(data, monkeypatch):
    monkeypatch.setattr(floating, "paired_gain", _always_better)
    with open_session(small_network(), Settings(data=data, arithmetic="int8")) as session:
        # Of the MACs, conv1 has 62 200, the classifier 240.
        assert in_eight_bits(session.evidence, session.model).report.left == ("fc",)


def test_the_one_node_that_takes_back_much_is_not_judged_again(data, monkeypatch):
    monkeypatch.setattr(floating, "paired_gain", _always_better)
    judge, seen = eight_bit_search.EightBitSearch._judge, []

    def watched(its, model):
        seen.append(model.SerializeToString(deterministic=True))
        return judge(its, model)

    monkeypatch.setattr(eight_bit_search.EightBitSearch, "_judge", watched)
    with open_session(small_network(), Settings(data=data, arithmetic="int8")) as session:
        assert in_eight_bits(session.evidence, session.model).report.left == ("fc",)
    assert len(set(seen)) == len(seen)


def test_what_is_pooled_next_is_not_left_in_floating_point(data, monkeypatch):
    """Bytes would then be pooled in a slow layout, which takes longer than all the rest."""
    monkeypatch.setattr(floating, "paired_gain", _always_better)
    monkeypatch.setattr(floating, "MOST_MACS", 1.0)
    model = small_network()
    model.graph.node[1].output[0] = "unpooled"
    pool = onnx.helper.make_node(
        "MaxPool", ["unpooled"], ["r1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]
    )
    model.graph.node.insert(2, pool)
    with open_session(model, Settings(data=data, arithmetic="int8")) as session:
        assert in_eight_bits(session.evidence, session.model).report.left == ("conv2", "fc")


@pytest.fixture
def judged(monkeypatch):
    """Let models lose so many times what they do, of which the fifth has other biases."""

    def set_up(factor):
        def judge(its, model):
            found = real(its, model)
            return replace(found, losses=found.losses * factor) if its.done == 5 else found

        real = eight_bit_search.EightBitSearch._judge
        monkeypatch.setattr(eight_bit_search.EightBitSearch, "_judge", judge)
        monkeypatch.setattr(floating, "MOST_MACS", 0.0)

    return set_up


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_biases_are_corrected_where_that_loses_less(data, judged, factor):
    judged(factor)
    with open_session(small_network(), Settings(data=data, arithmetic="int8")) as session:
        found = in_eight_bits(session.evidence, session.model)
    said = found.report
    before, after = (said.candidates[said.ranges + end] for end in ("", ", biases corrected"))
    better = factor < 1
    assert (after < before) == better
    assert said.loss == min(before, after)
    # conv2 has no bias, and gets none.
    assert said.biases == (2 if better else 0)
    assert ("2 biases corrected" in said.text) == better
    assert stored_bytes(found.model) == stored_bytes(eight_bits.stand_in_eight_bits(session.model))
    # What is proved is the model as it was.
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in found.source.graph.initializer}
    np.testing.assert_array_equal(stored["b1"], random_array(16, seed=2))


def test_nodes_that_options_leave_out_keep_their_biases(data, judged):
    judged(0.01)
    options = {"data": data, "arithmetic": "int8", "exclude": ["conv1"], **QUICK}
    result = compress(small_network(), plan=Plan(()), **options)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    np.testing.assert_array_equal(stored["b1"], random_array(16, seed=2))
    assert result.report.arithmetic.biases == 1


def test_without_biases_there_is_nothing_to_correct(data):
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["y"])]
    model = model_of(nodes, {"w": random_array(8, 3, 3, 3)}, {"x": ["N", 3, 12, 12]}, ["y"])
    said = compress(model, plan=Plan(()), data=data, arithmetic="int8", **QUICK).report.arithmetic
    assert said.biases == 0
    assert not [name for name in said.candidates if "biases" in name]


def _always_better(before, after):
    from cobla_onnx.allocation.paired import PairedGain

    return PairedGain(1e9, 0.1, len(before))


def test_samples_are_needed_and_times_for_auto(data):
    with pytest.raises(UsageError, match=r"arithmetic='int8'.*follow from samples; give data"):
        compress(small_network(), Budget(mac=0.5), arithmetic="int8")
    with pytest.raises(UsageError, match=r"arithmetic='auto'.*measured times; give latency"):
        compress(small_network(), Budget(mac=0.5), arithmetic="auto", data=data)
    with pytest.raises(UsageError, match=r"measured times"):
        sweep(small_network(), [Budget(latency=0.5), Budget(mac=0.5)], arithmetic="auto", data=data)
    assert values.memory_bytes("1KB") == 1000


def test_old_opsets_and_models_without_weights_for_it_are_refused(data):
    model = small_network()
    model.opset_import[0].version = 12
    with pytest.raises(ModelError, match="LIFTED"):
        compress(model, Budget(mac=0.9), data=data, arithmetic="int8", **QUICK)
    halves = small_network()
    halves.opset_import[0].version = 13
    for node in halves.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            halves.graph.node.add(
                op_type="Identity", input=[node.input[1]], output=[f"{node.name}/w"]
            )
            node.input[1] = f"{node.name}/w"
    with pytest.raises(ModelError, match="no Conv, ConvTranspose, Gemm or MatMul with a stored"):
        eight_bits.stand_in_eight_bits(halves)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("a missing scale", "does not run the model in 8 bits"),
        ("a wrong type", "does not run the model in 8 bits"),
        ("no number", "gives outputs that are no numbers"),
    ],
)
def test_what_does_not_run_or_gives_no_numbers_is_not_written(data, monkeypatch, fault, words):
    def broken(*args, **options):
        model = real(*args, **options)
        scale = next(t for t in model.graph.initializer if t.name.endswith("_scale"))
        if fault == "a missing scale":
            model.graph.initializer.remove(scale)
        elif fault == "a wrong type":
            scale.data_type = onnx.TensorProto.INT32
        else:
            model.graph.node.add(op_type="Log", input=["minus one"], output=["no number"])
            made = next(node for node in model.graph.node if "logits" in node.output)
            made.output[0] = "before"
            model.graph.node.add(op_type="Add", input=["before", "no number"], output=["logits"])
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(np.float32([-1.0]), "minus one")
            )
        return model

    real = eight_bit_search.quantised
    monkeypatch.setattr(eight_bit_search, "quantised", broken)
    with pytest.raises(VerificationError, match=words) as caught:
        compress(small_network(), Budget(mac=1.0), data=data, arithmetic="int8", **QUICK)
    assert caught.value.exit_code == 5


def test_masks_that_take_away_the_largest_number_disturb_no_ranges():
    # As transformers' exporters write attention masks; they are in no node that computes in 8 bits.
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["scores"]),
        onnx.helper.make_node("Mul", ["mask", "lowest"], ["taken"]),
        onnx.helper.make_node("Add", ["scores", "taken"], ["left"]),
        onnx.helper.make_node("Softmax", ["left"], ["weights"]),
        # Not plain, so that ranges are those of the samples.
        onnx.helper.make_node("Gemm", ["weights", "v"], ["y"], alpha=2.0),
    ]
    lowest = np.array(np.finfo(np.float32).min, np.float32)
    weights = {"w": random_array(16, 16), "v": random_array(16, 8, seed=1), "lowest": lowest}
    model = model_of(nodes, weights, {"x": ["N", 16], "mask": ["N", 16]}, ["y"])
    mask = (np.arange(16) >= np.random.default_rng(2).integers(8, 16, (24, 1))).astype(np.float32)
    data = {"x": random_array(24, 16), "mask": mask}
    report = compress(model, Budget(mem=0.6), data=data, arithmetic="int8", **QUICK).report
    assert None not in report.arithmetic.candidates.values()
    assert len(report.arithmetic.candidates) >= 3


def test_a_method_that_gives_no_ranges_is_left_out(data, monkeypatch):
    def some(prepared, batches, method, operators):
        found = calibrated(prepared, batches, method, operators)
        return found if method == "min-max" else None

    calibrated = eight_bit_search.calibrated
    monkeypatch.setattr(eight_bit_search, "calibrated", some)
    model = small_network()
    said = compress(model, Budget(mem=0.6), data=data, arithmetic="int8", **QUICK).report.arithmetic
    assert said.ranges == "min-max"
    assert said.candidates["entropy"] is said.candidates["percentile"] is None


@pytest.mark.parametrize("beta", [2.0, 0.5, -1.0])
def test_beta_is_not_lost_in_eight_bits(beta):
    nodes = [onnx.helper.make_node("Gemm", ["x", "w", "c"], ["y"], alpha=0.5, beta=beta)]
    weights = {"w": random_array(32, 24) / 6, "c": random_array(24, seed=1)}
    model = model_of(nodes, weights, {"x": ["N", 32]}, ["y"])
    data = {"x": random_array(40, 32, seed=2)}
    result = compress(model, Budget(mem=0.6), data=data, arithmetic="int8", **QUICK)
    assert result.report.verification.outputs[0].relative_l2 < 0.05
    assert stored_bytes(result.model) == result.report.budget["mem"].after


def test_a_weight_that_is_an_output_is_neither_said_to_be_nor_in_eight_bits():
    nodes = [onnx.helper.make_node("MatMul", [r, w], [y]) for r, w, y in ("xah", "hby")]
    weights = {"a": random_array(16, 16), "b": random_array(16, 8, seed=1)}
    model = model_of(nodes, weights, {"x": ["N", 16]}, ["y", "a"])
    data = {"x": random_array(24, 16, seed=2)}
    result = compress(model, Budget(mem=0.8), data=data, arithmetic="int8", **QUICK)
    assert result.report.arithmetic.nodes == 1
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    np.testing.assert_array_equal(stored["a"], weights["a"])
    assert not [name for name in stored if name.startswith("a_")]
    model = model_of(nodes[:1], {"a": weights["a"]}, {"x": ["N", 16]}, ["h", "a"])
    with pytest.raises(ModelError, match="that nothing else reads"):
        compress(model, Budget(mem=1.0), data=data, arithmetic="int8", **QUICK)


def test_nodes_that_share_a_weight_are_left_in_floating_point_together_or_not(data, monkeypatch):
    monkeypatch.setattr(floating, "paired_gain", _always_better)
    monkeypatch.setattr(floating, "MOST_MACS", 1.0)
    model = small_network()
    model.graph.node.add(op_type="Gemm", input=["logits", "v"], output=["a"], name="a")
    model.graph.node.add(op_type="Gemm", input=["a", "v"], output=["b"], name="b")
    model.graph.initializer.append(onnx.numpy_helper.from_array(random_array(10, 10), "v"))
    model.graph.output[0].name = "b"
    with open_session(model, Settings(data=data, arithmetic="int8")) as session:
        left = in_eight_bits(session.evidence, session.model).report.left
    assert left == ("conv1", "conv2", "fc")


@pytest.mark.parametrize("batch", ["N", 4, 1])
def test_ranges_of_each_run_are_said_to_be_those_of_a_batch(batch):
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = model_of(nodes, {"w": random_array(16, 16)}, {"x": [batch, 16]}, ["y"])
    data = {"x": random_array(24, 16, seed=2)}
    report = compress(model, Budget(mem=0.6), data=data, arithmetic="int8", **QUICK).report
    assert report.arithmetic.ranges == "dynamic"
    told = [note for note in report.notes if "all its samples together" in note]
    assert len(told) == (batch != 1)
    assert all(note.endswith("or give --arithmetic keep") for note in told)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_that_are_listed_as_inputs_are_not_warned_of(data, capfd, ir_version):
    model = small_network()
    model.opset_import[0].version, model.ir_version = 13, ir_version
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in model.graph.initializer
    )
    result = compress(model, Budget(mem=0.6), data=data, arithmetic="int8", **QUICK)
    assert result.report.arithmetic.ranges in ("min-max", "entropy", "percentile")
    assert capfd.readouterr() == ("", "")
