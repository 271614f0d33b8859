"""Labels of tokens, frames and pixels: losses, gradients and accuracy over those that count."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress
from cobla_onnx.autodiff import differentiate
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.gradients import GradientProbe
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.evaluation.quality import measure_quality
from cobla_onnx.calibration.evaluation.targets import IGNORED, binary_targets, one_hot
from cobla_onnx.errors import DataError
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array
from tests.cli.test_command import run as run_command
from tests.cli.test_command import run_here

node = helper.make_node
CLASSES, LENGTH, SAMPLES = 5, 9, 24


def token_classifier() -> onnx.ModelProto:
    """Ids and a mask of padded sequences to class logits of each token."""
    nodes = [
        node("Gather", ["embedding", "ids"], ["found"]),
        node("MatMul", ["found", "w1"], ["a"], "first"),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w2"], ["c"], "second"),
        node("Relu", ["c"], ["d"]),
        node("MatMul", ["d", "w3"], ["e"], "third"),
        node("Cast", ["mask"], ["floating"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["floating", "last"], ["wide"]),
        # What is padded is not simply like the rest.
        node("Sub", ["e", "wide"], ["logits"]),
    ]
    weights = {
        "embedding": random_array(40, 24, seed=1),
        "w1": random_array(24, 48, seed=2) / 5,
        "w2": random_array(48, 48, seed=3) / 5,
        "w3": random_array(48, CLASSES, seed=4) / 3,
        "last": np.array([2]),
    }
    sizes: list[int | str] = ["N", "T"]
    inputs = {"ids": sizes, "mask": sizes}
    return model_of(nodes, weights, inputs, ["logits"], elem_type=TensorProto.INT64)


def tokens() -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Model, samples, logits, and labels that most of the logits agree with."""
    model = token_classifier()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    generator = np.random.default_rng(7)
    ends = generator.integers(3, LENGTH + 1, SAMPLES)
    data = {
        "ids": generator.integers(0, 40, (SAMPLES, LENGTH)),
        "mask": (np.arange(LENGTH) < ends[:, None]).astype(np.int64),
    }
    (logits,) = run_session(open_session(model, 1), data).values()
    labels = logits.argmax(axis=2)
    wrong = generator.random(labels.shape) < 0.2
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    # The first token of each word counts, and the padding has labels of no use.
    labels[generator.random(labels.shape) < 0.3] = IGNORED
    return model, data, logits, labels


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each position from logits with classes last, and which count."""
    scores = scores.astype(np.float64)
    scores = scores - scores.max(axis=-1, keepdims=True)
    log_q = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    counts = labels != IGNORED
    return -np.take_along_axis(log_q, np.where(counts, labels, 0)[..., None], -1)[..., 0], counts


def means(losses: np.ndarray, counts: np.ndarray) -> list[float]:
    """Mean of each sample over what counts, one at a time; 0 where nothing does."""
    return [
        float(one[kept].mean()) if kept.any() else 0.0
        for one, kept in zip(losses, counts, strict=True)
    ]


@given(st.integers(0, 1000), st.integers(2, 5), st.booleans(), st.booleans())
def test_cross_entropies_of_tokens_and_of_pixels(seed, classes, pixels, probabilities):
    generator = np.random.default_rng(seed)
    positions = (3, 4, 2) if pixels else (3, 6)
    scores = generator.standard_normal((*positions, classes)) * 3
    labels = generator.integers(0, classes, positions)
    labels[generator.random(positions) < 0.4] = IGNORED
    losses, counts = cross_entropy(scores, labels)
    axis = 1 if pixels else 2
    actual = np.moveaxis(scores, -1, axis)
    kind = "ce-logits"
    if probabilities:
        actual = np.exp(actual) / np.exp(actual).sum(axis=axis, keepdims=True)
        kind = "ce-probabilities"
    mask = None
    targets = {"y": one_hot(actual, labels, axis)}
    if not pixels:
        mask = (np.arange(6) < generator.integers(1, 7, 3)[:, None]).astype(np.int64)
        counts &= mask.astype(bool)
        targets["mask"] = mask
        # What is padded may be anything.
        actual = np.where(mask[:, :, None].astype(bool), actual, np.nan)
    measure = Measure(kind, axis, labelled=True, mask=None if mask is None else "mask")
    found = sample_losses({"y": measure}, targets, {"y": actual})
    np.testing.assert_allclose(found, means(losses, counts), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["ce-logits", "ce-probabilities", "binary-logits"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_leaves_out_what_does_not_count(kind, masked):
    """By finite differences of the same loss outside of the graph."""
    binary = kind == "binary-logits"
    shape = (3, 6, 1 if binary else 4)
    y = np.abs(random_array(*shape, seed=1)) + 0.1
    labels = np.random.default_rng(2).integers(0, 2 if binary else 4, shape[:2])
    labels[0, 2:5] = labels[2] = IGNORED
    target = binary_targets(y, labels) if binary else one_hot(y, labels, 2)
    measure = Measure(kind, None if binary else 2, labelled=True, mask="mask" if masked else None)  # type: ignore[arg-type]
    mask = (np.arange(6) < np.array([4, 6, 3])[:, None]).astype(np.float32)
    model = model_of(
        [node("Identity", ["x"], ["y"])], {}, {"x": list(shape), "mask": [3, 6]}, ["y"]
    )
    graph = differentiate(model, {"y": measure}, ["x"])
    feeds = {"x": y, "target/y": target, "mask": mask}
    opened = open_session(graph.model, 1, optimized=True)
    names = {value.name for value in opened.get_inputs()}
    results = run_session(opened, {n: v for n, v in feeds.items() if n in names})
    expected = {"y": target, "mask": mask}
    np.testing.assert_allclose(
        results["loss"], sample_losses({"y": measure}, expected, {"y": y}), rtol=1e-5
    )
    assert results["loss"][2] == 0
    gradient = results["gradient/x"]
    assert not gradient[labels == IGNORED].any()
    assert gradient[0, 0].any()
    step, direction = 1e-6, random_array(*shape, seed=3).astype(float)
    ends = [
        sample_losses({"y": measure}, expected, {"y": y + s * step * direction}).sum()
        for s in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_a_token_classifiers_loss_gradient_and_accuracy():
    model, data, logits, labels = tokens()
    layers = [layer for layer in find_layers(model).layers if layer.op == "MatMul"]
    batches = [{n: a[i : i + 8] for n, a in data.items()} for i in range(0, SAMPLES, 8)]
    parts = [labels[i : i + 8] for i in range(0, SAMPLES, 8)]
    measures = {"logits": Measure("ce-logits", 2, mask="mask", labelled=True)}
    probe = Probe(model, layers, batches, measures, 1, labels=parts)
    losses, counts = cross_entropy(logits, labels)
    counts &= data["mask"].astype(bool)
    np.testing.assert_allclose(probe.losses({}), means(losses, counts), rtol=1e-4, atol=1e-6)

    step = random_array(48, 48, seed=9) / 100
    weight = read_weight(model, layers[1])
    assert weight.shape == step.shape
    ends = [probe.loss({1: (weight + sign * step, None)}) for sign in (1, -1)]
    slope = np.vdot(GradientProbe(probe, 1).gradient({})[1][0], step)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=0.02)

    other = {1: (np.roll(weight, 5, axis=0), None)}
    quality = measure_quality(probe, probe.outputs(other))
    after = np.concatenate([actual["logits"] for _, actual in probe.outputs(other)])
    assert quality.measure == "accuracy"
    assert quality.before == pytest.approx((logits.argmax(2) == labels)[counts].mean())
    assert quality.after == pytest.approx((after.argmax(2) == labels)[counts].mean())
    assert quality.after < quality.before < 0.95
    assert (quality.positions, quality.samples) == (counts.sum(), SAMPLES)


def test_the_command_with_labels_of_tokens(tmp_path):
    model, data, logits, labels = tokens()
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **data)
    # Filled up to a longer length than the sequences have; and one sample without labels.
    longer = np.pad(labels, ((0, 0), (0, 3)), constant_values=IGNORED)
    longer[3] = IGNORED
    np.save(tmp_path / "y.npy", longer)
    done = run_command(
        tmp_path / "m.onnx", tmp_path / "o.onnx", "--mem", 0.6, "--data", tmp_path / "d.npz",
        "--labels", tmp_path / "y.npy", "--report", tmp_path / "r.json", "--min-size", 100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    calibration = content["calibration"]
    assert calibration["outputs"] == {"logits": "ce-logits"}
    assert calibration["calibration_samples"] + calibration["selection_samples"] == SAMPLES - 1
    assert any("1 sample has no label that counts" in note for note in content["notes"])
    quality = calibration["quality"]
    assert quality["measure"] == "accuracy"
    assert quality["samples"] == calibration["selection_samples"]
    assert quality["samples"] < quality["positions"] < quality["samples"] * LENGTH
    counts = (labels != IGNORED) & data["mask"].astype(bool)
    share = (logits.argmax(2) == labels)[counts].mean()
    assert quality["before"] == pytest.approx(share, abs=0.15)

    np.save(tmp_path / "y.npy", labels[:, :4])
    done = run_here(
        tmp_path / "m.onnx", tmp_path / "p.onnx", "--mem", 0.6, "--data", tmp_path / "d.npz",
        "--labels", tmp_path / "y.npy",
    )  # fmt: skip
    assert done.returncode == 3
    message = " ".join(done.stderr.split())
    for words in ("[n, 4]", "[n, 9, 5]", "class numbers of shape [n, 9], -100 where"):
        assert words in message
    assert not (tmp_path / "p.onnx").exists()


def test_one_sigmoid_for_each_pixel():
    """[n, 1, h, w] with labels [n, h, w]: as for one of each sample."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["c"], "second", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "w3"], ["e"], "third"),
        node("Sigmoid", ["e"], ["map"]),
    ]
    weights = {
        "w1": random_array(16, 3, 3, 3, seed=1) / 5,
        "w2": random_array(16, 16, 3, 3, seed=2) / 9,
        "w3": random_array(1, 16, 1, 1, seed=3),
    }
    model = model_of(nodes, weights, {"x": ["N", 3, 6, 5]}, ["map"])
    x = random_array(20, 3, 6, 5, seed=4)
    (found,) = run_session(open_session(model, 1), {"x": x}).values()
    labels = (found[:, 0] > 0.5).astype(np.int64)
    labels[:, 0] = IGNORED
    quality = compress(
        model, Budget(mem=0.6), data={"x": x}, labels=labels, threads=1
    ).report.calibration.quality
    assert (quality.measure, quality.before) == ("accuracy", 1.0)
    assert quality.positions == quality.samples * 5 * 5
    assert 0 <= quality.drop < 0.5


TABLE = np.array([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("shape", "axis", "labels", "classes"),
    [
        ((3, 5), 1, np.array([1, 3, 0]), [1, 3, 0]),
        ((3, 5), 1, np.array([[1], [3], [0]]), [1, 3, 0]),
        ((3, 5), 1, TABLE, [1, 3, 0]),
        ((3, 5, 1, 1), 1, TABLE, [1, 3, 0]),
        # A single 1 in each row is one-hot only where it could be the output's own shape.
        ((3, 5, 4), 2, TABLE, TABLE.ravel()),
        ((3, 4, 5), 1, TABLE, TABLE.ravel()),
        # Time first, a record of its own.
        ((5, 1, 4), 2, TABLE[:1], TABLE[0]),
        ((1, 2, 5), 2, np.array([[3, 4, IGNORED]]), [3, 4]),
    ],
)
def test_labels_that_fit(shape, axis, labels, classes):
    found = one_hot(np.zeros(shape, np.float16), labels, axis)
    assert (found.shape, found.dtype) == (shape, np.float16)
    assert (found.sum(axis=axis) == 1).all()
    np.testing.assert_array_equal(found.argmax(axis=axis).ravel(), classes)


@pytest.mark.parametrize(
    ("shape", "axis", "labels"),
    [
        ((3, 4, 5), 2, np.zeros((3, 3), int)),
        ((3, 4, 5), 2, np.zeros((3, 6), int)),
        ((3, 4, 5), 2, np.zeros(3, int)),
        ((3, 5), 1, np.ones((3, 5), int)),
        ((3, 5), 1, TABLE * 2),
        ((3, 2, 6, 4), 1, np.zeros((3, 4, 6), int)),
    ],
)
def test_labels_that_do_not_fit(shape, axis, labels):
    with pytest.raises(DataError, match=r"have shape \[n.*for an output of shape \[n.*give"):
        one_hot(np.zeros(shape), labels, axis)


def test_classes_that_there_are_none_of():
    with pytest.raises(DataError, match="hold class 255, the model has 21"):
        one_hot(np.zeros((1, 21, 2, 2)), np.array([[[0, 255], [1, 2]]]))
    with pytest.raises(DataError, match="give labels of 0 and 1"):
        binary_targets(np.zeros((2, 1)), np.array([0, 2]))
    with pytest.raises(DataError, match="0 or 1"):
        binary_targets(np.zeros((2, 3)), np.array([0, 1]))
    found = binary_targets(np.zeros((3, 1)), np.array([[1, 0], [0, 1], [1, 0]]))
    np.testing.assert_array_equal(found, [[0], [1], [0]])


def test_no_labels_that_count():
    model, data, _, labels = tokens()
    with pytest.raises(DataError, match="give labels for at least 2"):
        compress(model, Budget(mem=0.6), data=data, labels=np.full_like(labels, IGNORED))
