"""Walk samples through the original and the compressed model side by side."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation import graph_cut
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.patches import read_patch_of
from cobla_onnx.graph.layers import find_layers, read_bias, read_weight
from cobla_onnx.pipeline.search import refit, walk
from cobla_onnx.pipeline.search.walk import Request, Walk
from tests.builders import model_of, random_array

SIZES = [3, 2, 3, 1]
# Batches of the calibration split.
MADE = 3


def _network() -> onnx.ModelProto:
    """Three convolutions that read one tensor, and two layers after them."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w1"], ["b1"], "one"),
        helper.make_node("Relu", ["b1"], ["r1"]),
        helper.make_node("Conv", ["r", "w2", "c2"], ["b2"], "three", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["r", "w3"], ["b3"], "other"),
        helper.make_node("Concat", ["r1", "b2", "b3"], ["joined"], axis=1),
        helper.make_node("Conv", ["joined", "w4"], ["d"], "second"),
        helper.make_node("GlobalAveragePool", ["d"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w5", "b5"], ["y"], "last"),
    ]
    shapes = {
        "w0": (6, 3, 3, 3),
        "w1": (5, 6, 1, 1),
        "w2": (4, 6, 3, 3),
        "c2": (4,),
        "w3": (3, 6, 1, 1),
        "w4": (8, 12, 1, 1),
        "w5": (8, 7),
        "b5": (7,),
    }
    weights = {n: random_array(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    return model_of(nodes, weights, {"x": ["N", 3, 8, 8]}, ["y"])


MODEL = _network()
LAYERS = find_layers(MODEL).layers


def _batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(n, 3, 8, 8)).astype(np.float32)} for n in SIZES]


def _weights(seed: int) -> dict[int, tuple[np.ndarray, np.ndarray | None]]:
    rng = np.random.default_rng(seed)
    found = {}
    for index, layer in enumerate(LAYERS):
        weight = read_weight(MODEL, layer)
        moved = weight + 0.1 * rng.normal(size=weight.shape).astype(weight.dtype)
        found[index] = moved, read_bias(MODEL, layer)
    return found


def _request(layer) -> Request:
    patch = read_patch_of(MODEL, layer, layer.uses[0])
    outputs = layer.shape[0] if layer.op == "Conv" else layer.shape[1]
    shape = patch.groups, outputs // patch.groups, patch.size
    return Request(layer, [partial(refit._paired, patch, None)], shape, exact=True)


REQUESTS = [_request(layer) for layer in LAYERS]


def _walk(threads: int = 1, first: int = 0) -> Walk:
    batches = _batches()
    layers = dict(list(enumerate(LAYERS))[first:])
    return Walk(MODEL, layers, lambda: batches[:MADE], batches[MADE:], threads)


def _all(walk: Walk, *, beside: bool) -> dict[str, tuple]:
    """Ask for all layers but the first, each with other weights than the one before."""
    found = {}
    weights = _weights(1)
    for number, request in enumerate(REQUESTS[1:], 1):
        following = REQUESTS[number + 1 :]
        count = len(following) if beside else 0
        found[request.layer.name] = walk.joint(request, dict(weights), following, count)
        weights[number] = _weights(2)[number]
    return found


def _assert_same(found, expected) -> None:
    for name, joints in expected.items():
        for one, other in zip(found[name], joints, strict=True):
            np.testing.assert_allclose(one.cross, other.cross, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(one.inputs.second, other.inputs.second, rtol=1e-4, atol=1e-5)
            assert one.inputs.count == other.inputs.count


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_that_are_seen_in_one_go_have_the_same_moments(threads, monkeypatch):
    groups = []
    seen = Walk._joints

    def noticed(self, group, *arguments):
        groups.append([request.layer.name for request in group])
        return seen(self, group, *arguments)

    monkeypatch.setattr(Walk, "_joints", noticed)
    expected = _all(_walk(), beside=False)
    assert [len(group) for group in groups] == [1] * 5
    groups.clear()
    _assert_same(_all(_walk(threads), beside=True), expected)
    # Those that read one tensor; the next ones read what these make.
    assert groups == [["one", "three", "other"], ["second"], ["last"]]


def test_no_more_are_seen_in_one_go_than_there_is_memory_for(monkeypatch):
    expected = _all(_walk(), beside=False)
    monkeypatch.setattr(walk, "SUMS", 1)
    _assert_same(_all(_walk(), beside=True), expected)


def test_the_samples_need_not_be_kept(monkeypatch):
    """Where tensors are too large to be kept, they are made again from the inputs."""
    expected = _all(_walk(), beside=True)
    monkeypatch.setattr(walk, "Store", lambda **options: graph_cut.Store(0, **options))
    _assert_same(_all(_walk(), beside=True), expected)


def test_what_comes_before_the_first_layer_is_the_same_for_both(monkeypatch):
    """It runs once, for the original and the compressed model."""
    opened = []
    taps = graph_cut.Frontier.taps

    def noticed(self, names, *arguments, **options):
        opened.append(sorted(names))
        return taps(self, names, *arguments, **options)

    weights = _weights(1) | {0: (read_weight(MODEL, LAYERS[0]), None)}
    expected = _walk().joint(REQUESTS[4], weights, REQUESTS[5:])
    monkeypatch.setattr(graph_cut.Frontier, "taps", noticed)
    found = _walk(first=1).joint(REQUESTS[4], weights, REQUESTS[5:])
    assert opened == [["r"], ["d", "d"], ["joined", "joined"]]
    _assert_same({"second": found}, {"second": expected})


def test_a_place_that_was_left_gives_the_same_moments_again():
    samples = _walk()
    weights = _weights(1)
    place = samples.place
    first = samples.joint(REQUESTS[1], weights, REQUESTS[2:])
    start = samples.place
    assert start is not place
    expected = samples.joint(REQUESTS[4], weights, REQUESTS[5:])
    other = _walk()
    other.joint(REQUESTS[1], weights, REQUESTS[2:])
    back = other.place
    other.joint(REQUESTS[3], _weights(3), REQUESTS[4:])
    other.place = back
    _assert_same({"second": other.joint(REQUESTS[4], weights, REQUESTS[5:])}, {"second": expected})
    assert first[0].inputs.count > 0


def test_outputs_from_any_place_are_those_of_the_whole_model():
    samples = _walk()
    probe = Probe(MODEL, LAYERS, _batches()[MADE:], {"y": Measure("mse", None, (1.0,))}, 1)
    weights = _weights(1)
    for number, request in enumerate(REQUESTS[1:], 1):
        samples.joint(request, weights, REQUESTS[number + 1 :], len(REQUESTS))
        # Layers from the place on may have any weights.
        weights[number] = _weights(5)[number]
        assert not samples.place.at_start
        found = probe.loss_of(samples.outputs(samples.place, weights, probe.measures))
        assert found == pytest.approx(probe.loss(weights), rel=1e-4)
