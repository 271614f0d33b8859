"""What `advise` predicts, and what it suggests."""

from __future__ import annotations

import shlex

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, advise, compress
from cobla_onnx.calibration.data.images import ImageOptions
from cobla_onnx.report.advice import Advice
from tests.builders import model_of, random_array, small_network

SAMPLES = {"x": random_array(24, 3, 12, 12, seed=5)}


@pytest.fixture(scope="module")
def found() -> Advice:
    """Advice for a small network with data."""
    return advise(small_network(), data=SAMPLES, threads=1)


def by_budget(found: Advice, resource: str, lever: str) -> list[float]:
    """Losses of a lever by descending budgets, of those within its reach."""
    losses = (getattr(x, lever) for x in found.outlooks if x.resource == resource)
    return [loss for loss in losses if loss is not None]


@pytest.mark.parametrize("resource", ["mem", "mac"])
@pytest.mark.parametrize("lever", ["ranks", "bits", "both"])
def test_smaller_budgets_lose_more(found, resource, lever):
    losses = by_budget(found, resource, lever)
    assert losses == sorted(losses)
    # Bits save no multiplications.
    assert bool(losses) == ((resource, lever) != ("mac", "bits"))


def test_both_levers_lose_no_more_than_one(found):
    for each in found.outlooks:
        alone = [loss for loss in (each.ranks, each.bits) if loss is not None]
        if alone:
            assert each.both is not None
            assert each.both <= min(alone) * (1 + 1e-9)


def test_predictions_are_near_to_what_the_programme_finds():
    # It measures what it chooses, which the advice does not. A single draw of samples says
    # little: a layer's loss is told by whichever curve is cheapest.
    factors = []
    for seed in (5, 6, 7):
        data = {"x": random_array(24, 3, 12, 12, seed=seed)}
        told = advise(small_network(), data=data, threads=1).outlooks
        (each,) = [x for x in told if (x.resource, x.kept) == ("mem", 0.5)]
        options = {"data": data, "refit": False, "threads": 1}
        result = compress(small_network(), Budget(mem=0.5), solver="milp", **options)
        assert each.ranks is not None
        assert result.report.solver is not None
        factors.append(abs(np.log(each.ranks / result.report.solver.value)))
    assert np.exp(np.mean(factors)) < 1.5
    assert np.exp(np.max(factors)) < 2


def test_bytes_are_all_of_the_weights(found):
    told = sum(found.bytes_by_operator.values()) + sum(found.elsewhere.values())
    assert told == found.mem_total
    assert sum(found.macs_by_operator.values()) == found.mac_total


def test_shares_are_of_the_loss(found):
    shares = [each.share for each in found.limiting]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1 + 1e-9


def test_commands_name_the_file_and_the_data(tmp_path):
    np.savez(tmp_path / "some data.npz", **SAMPLES)
    (tmp_path / "a model.onnx").write_bytes(small_network().SerializeToString())
    found = advise(tmp_path / "a model.onnx", data=tmp_path / "some data.npz", threads=1)
    assert len(found.suggestions) > 1
    for suggestion in found.suggestions:
        words = shlex.split(suggestion.command)
        assert words[:2] == ["cobla-onnx", str(tmp_path / "a model.onnx")]
        assert words[-2:] == ["--data", str(tmp_path / "some data.npz")]


def test_data_without_a_name_stand_for_themselves(found):
    assert all("--data SAMPLES" in each.command for each in found.suggestions)


def test_what_was_stored_twice_is_saved_before_any_loss():
    weights = {name: random_array(48, 48, seed=3) for name in ("first", "second")}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["h"], "one"),
        onnx.helper.make_node("Relu", ["h"], ["r"]),
        onnx.helper.make_node("MatMul", ["r", "second"], ["y"], "two"),
    ]
    model = model_of(nodes, weights, {"x": ["N", 48]}, ["y"])
    told = {x.kept: x for x in advise(model, threads=1).outlooks if x.resource == "mem"}
    assert told[0.5].both == told[0.5].ranks == told[0.75].bits == 0.0
    assert told[0.35].ranks > 0
    apart = advise(model, threads=1, deduplicate=False)
    assert next(x.both for x in apart.outlooks if x.kept == 0.5) > 0


def test_without_data_it_asks_for_some():
    found = advise(small_network(), threads=1)
    assert found.measured_by == "weights"
    assert found.limiting == ()
    assert "--data" in found.suggestions[0].command


def test_a_model_without_layers_has_no_outlook():
    from onnx import helper

    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["N", 4]}, ["y"])
    for data in (None, {"x": random_array(8, 4, seed=1)}):
        found = advise(model, data=data, threads=1)
        assert found.outlooks == ()
        assert found.suggestions == ()
        assert found.bytes_by_operator == {}


def test_commands_have_the_options_of_layers_and_data(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pip install '.[images]'")
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = (random_array(12, 12, 3, seed=number) * 60 + 128).clip(0, 255).astype(np.uint8)
        image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "model.onnx").write_bytes(small_network().SerializeToString())
    found = advise(
        tmp_path / "model.onnx",
        data=tmp_path / "photos",
        images=ImageOptions(scale=1 / 255, mean=(0.5,), channel_order="bgr"),
        exclude=("conv*1",),
        deduplicate=False,
        input_shapes={"x": (1, 3, 12, 12)},
        outputs={"logits": "classes"},
        threads=1,
    )
    for suggestion in found.suggestions:
        assert (
            "--input-shape x:1,3,12,12 --exclude 'conv*1' --no-deduplicate --mean 0.5 "
            f"--scale {1 / 255!r} --channel-order bgr --output logits=classes --data "
        ) in suggestion.command
        words = shlex.split(suggestion.command)
        told = words[words.index("--input-shape") :]
        assert told[-2:] == ["--data", str(tmp_path / "photos")]
    assert not any("pixels go in" in note for note in found.notes)


def test_without_data_no_budget_out_of_reach_is_suggested():
    # Half of the bytes are read by an operator that nothing compresses.
    model = small_network()
    before = advise(model, threads=1)
    assert "--mem 0.26 " in before.suggestions[1].command
    size = before.mem_total // 4
    values = random_array(size)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "table"))
    model.graph.node.append(onnx.helper.make_node("ReduceMax", ["table"], ["most"]))
    model.graph.output.append(onnx.ValueInfoProto(name="most"))
    found = advise(model, threads=1)
    words = shlex.split(found.suggestions[1].command)
    kept = float(words[words.index("--mem") + 1])
    reachable = {each.kept for each in found.outlooks if each.both is not None}
    assert kept in reachable
    assert kept > 0.5
    compress(model, Budget(mem=kept), precision="auto", threads=1)
