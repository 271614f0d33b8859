"""How each output is compared is decided by evidence, on the axis that holds the classes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.choosing import Chooser
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.calibration.evaluation.makers import Made, made_by
from cobla_onnx.calibration.evaluation.output_choice import resolve_outputs
from cobla_onnx.calibration.evaluation.survey import Survey
from cobla_onnx.errors import DataError, UsageError
from tests.builders import random_array


def softmax(values: np.ndarray, axis: int = 1) -> np.ndarray:
    shifted = np.exp(values - values.max(axis=axis, keepdims=True))
    return shifted / shifted.sum(axis=axis, keepdims=True)


def decided(value: np.ndarray, name: str = "y", **given) -> Measure:
    found = Survey()
    found.add({name: value, "n": np.arange(3)}, {})
    return Chooser(**given).measures(found)[name]


def test_kinds_of_outputs():
    rows, frames, maps = random_array(5, 4), random_array(3, 6, 9), random_array(2, 3, 8, 8)
    assert decided(rows).kind == "either"
    assert decided(softmax(rows)).kind == "probabilities"
    assert decided(softmax(rows)[:, :, None, None]).kind == "probabilities"
    assert decided(rows, "start_logits").kind == "logits"
    assert decided(1 / (1 + np.exp(-rows)), "logits").kind == "mse"
    found = decided(softmax(frames, 2))
    assert (found.kind, found.axis) == ("probabilities", 2)
    assert (decided(softmax(maps)).kind, decided(softmax(maps)).axis) == ("probabilities", 1)
    assert (decided(frames, "logits").axis, decided(maps, "logits").axis) == (2, 1)
    assert decided(frames).kind == decided(maps).kind == "mse"
    assert decided(np.log(softmax(frames, 2))).kind == "logits"
    assert decided(softmax(rows), loss="mse").kind == "mse"
    assert decided(softmax(rows), loss="ce").kind == "ce-probabilities"
    assert decided(rows, loss="kl").kind == "logits"
    with pytest.raises(UsageError, match="loss='mse'"):
        decided(random_array(7), loss="kl")
    with pytest.raises(DataError, match="floating"):
        decided(np.arange(3))


def test_what_the_user_says_comes_first():
    rows, frames = random_array(5, 4), random_array(3, 6, 9)

    def told(value, entry, name="y"):
        return decided(value, name, choices=resolve_outputs([entry], [name]))

    assert told(rows, "y=classes").kind == "logits"
    assert told(rows, "logits=values", "logits").kind == "mse"
    assert (told(frames, "y=classes:1").kind, told(frames, "y=classes:1").axis) == ("logits", 1)
    assert told(frames, "y=values:-2").axis == 1
    with pytest.raises(UsageError, match="axis 3"):
        told(frames, "y=classes:3")
    with pytest.raises(DataError, match="counts"):
        told(frames, "y=ignore")


def test_names_of_outputs_may_hold_anything():
    names = ["y:0", "a=classes", "feat"]
    assert resolve_outputs(["y:0"], names)["feat"].how == "ignore"
    assert "feat" not in resolve_outputs(["y:0=values"], names)
    assert resolve_outputs(["a=classes=values:-1"], names)["a=classes"].axis == -1
    assert resolve_outputs({"feat": "classes:1"}, names)["feat"].how == "classes"
    wrong = [("faet", "'feat'"), ("feat=clases", "clases"), ("q=values", "'q'")]
    # An axis of more digits than Python reads at once.
    wrong += [(f"feat{how}:{'9' * 5000}", "has no output") for how in ("", "=values")]
    for entry, message in wrong:
        with pytest.raises(UsageError, match=message):
            resolve_outputs([entry], names)
    with pytest.raises(UsageError, match="twice"):
        resolve_outputs(["feat", "feat=values"], names)


@pytest.mark.parametrize(
    ("opset", "nodes", "expected"),
    [
        (13, [("Softmax", {})], Made("Softmax", -1)),
        (11, [("Softmax", {})], Made("Softmax", 1)),
        (13, [("Softmax", {"axis": 1}), ("Transpose", {"perm": [0, 2, 1]})], Made("Softmax", 2)),
        (13, [("LogSoftmax", {"axis": -1}), ("Identity", {})], Made("LogSoftmax", -1)),
        (13, [("Softmax", {"axis": 2}), ("Flatten", {})], Made("Softmax", None)),
        (13, [("Softmax", {}), ("Sigmoid", {})], Made("Sigmoid")),
    ],
)
def test_the_softmax_is_found_behind_what_moves_values(opset, nodes, expected):
    made = [
        onnx.helper.make_node(op, [f"t{i}"], [f"t{i + 1}"], **given)
        for i, (op, given) in enumerate(nodes)
    ]
    x, y = (onnx.helper.make_tensor_value_info(n, 1, None) for n in ("t0", f"t{len(nodes)}"))
    graph = onnx.helper.make_graph(made, "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    assert made_by(model)[f"t{len(nodes)}"] == expected


def test_scores_of_a_detector_count_as_much_as_its_pixels():
    generator = np.random.default_rng(0)
    boxes = generator.uniform(0, 640, (16, 4, 30))
    scores = 10.0 ** generator.uniform(-5, -2, (16, 8, 30))
    values = np.concatenate([boxes, scores], axis=1).astype(np.float32)
    measure = decided(values)
    assert (measure.kind, measure.axis) == ("mse", 1)
    gone = values.copy()
    gone[:, 4:] = 0
    assert sample_losses({"y": measure}, {"y": values}, {"y": gone}).mean() > 0.5
    # Every slice weighs the same, and none has a say by its unit.
    moved = values * (1 + 0.1 * generator.standard_normal(values.shape)).astype(np.float32)
    factor = np.geomspace(1e-4, 1e4, 12).astype(np.float32)[:, None]
    other = decided(values * factor)
    np.testing.assert_allclose(
        sample_losses({"y": measure}, {"y": values}, {"y": moved}),
        sample_losses({"y": other}, {"y": values * factor}, {"y": moved * factor}),
        rtol=1e-2,
    )


def test_slices_that_never_vary_are_left_out():
    values = random_array(40, 5).astype(np.float32)
    values[:, 2] = 7.0
    values[:, 3] = 0.0
    measure = decided(values, loss="mse")
    assert measure.scale is not None
    assert [value > 0 for value in measure.scale] == [True, True, False, False, True]
    still = np.full((6, 3), 2.0, np.float32)
    constant = decided(still, loss="mse")
    (loss,) = set(sample_losses({"y": constant}, {"y": still}, {"y": still * 1.1}).round(4))
    assert loss == pytest.approx(0.01, rel=0.02)


@given(st.integers(0, 1000), st.sampled_from(["mse", "kl", "auto"]))
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(seed, loss):
    before, after = random_array(8, 5, seed=seed), random_array(8, 5, seed=seed + 1)
    measures = {"y": decided(before, loss=loss)}
    whole = sample_losses(measures, {"y": before}, {"y": after})
    parts = [
        sample_losses(measures, {"y": before[i : i + 3]}, {"y": after[i : i + 3]})
        for i in range(0, 8, 3)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole)


def test_infinity_at_the_same_place_is_equal_and_elsewhere_is_not():
    logits = random_array(4, 6)
    logits[:, 2] = -np.inf
    other = logits + 0.1 * random_array(4, 6, seed=1)
    measures = {"y": decided(logits, "y", loss="kl")}
    kept = np.delete(np.arange(6), 2)
    found = sample_losses(measures, {"y": logits}, {"y": other})
    without = sample_losses(measures, {"y": logits[:, kept]}, {"y": other[:, kept]})
    np.testing.assert_allclose(found, without)
    other[:, 3] = -np.inf
    assert np.isinf(sample_losses(measures, {"y": logits}, {"y": other})).all()


def test_padded_positions_do_not_count():
    values = random_array(3, 4, 5)
    measure = Measure("mse", 2, (1.0,) * 5, mask="mask")
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    after = values + np.where(mask, 0, 100)[:, :, None]
    expected = {"y": values, "mask": mask}
    assert sample_losses({"y": measure}, expected, {"y": after}).tolist() == [0, 0, 0]
    found = sample_losses({"y": measure}, expected, {"y": values + 1})
    np.testing.assert_allclose(found, 5.0, rtol=1e-5)
