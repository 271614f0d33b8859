"""Losses from where the samples are: what the whole model gives, layer after layer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from cobla_onnx.calibration.evaluation import incremental as onward
from cobla_onnx.calibration.evaluation import parallel as spread
from cobla_onnx.calibration.evaluation.graph_cut import Store
from cobla_onnx.calibration.evaluation.incremental import OnwardProbe
from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.runtime.pool import Pool
from tests.builders import random_array

# A skip, an output from early on, a weight used twice with others between, and a sequence.
GRAPH = """
    <ir_version: 8, opset_import: ["": 18]>
    skips (float[N, 4] x) => (float[N, 4] early, float[N, 4] y) {{
        a = MatMul(x, first)
        early = Tanh(a)
        b = Gemm(early, second, bias)
        c = MatMul(b, shared)
        {middle}
        d = Tanh(c)
        e = Add(d, a)
        f = MatMul(e, shared)
        g = MatMul(f, last)
        h = Add(g, kept)
        y = Add(h, x)
    }}"""
PLAIN = "kept = Identity(c)"
SEQUENCE = "s = SequenceConstruct(c, a) kept = ConcatFromSequence <axis = 1, new_axis = 0> (s)"
SHAPES = {"first": (4, 4), "second": (4, 4), "bias": (4,), "shared": (4, 4), "last": (4, 4)}


def build(middle: str) -> onnx.ModelProto:
    model = parser.parse_model(GRAPH.format(middle=middle))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        array = random_array(*shape, seed=seed) / 2
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def sequence_model() -> onnx.ModelProto:
    """The sequence lives from before one layer to after the next."""
    model = build("s = SequenceConstruct(c, a)")
    nodes = list(model.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.output[0] == "h")
    late = onnx.helper.make_node("ConcatFromSequence", ["s"], ["both"], axis=0, new_axis=1)
    total = onnx.helper.make_node("ReduceSum", ["both", "axis"], ["kept"], keepdims=0)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], late, total, *nodes[place:]])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axis"))
    return model


MODELS = {"plain": build(PLAIN), "sequence": sequence_model()}
BATCHES = [{"x": random_array(n, 4, seed=10 + n)} for n in (3, 1, 5)]


def candidates(model, layers, index, seeds):
    """Other weights for a layer, every second with another bias."""
    pairs = []
    for seed in seeds:
        weight = read_weight(model, layers[index])
        changed = weight + 0.3 * random_array(*weight.shape, seed=seed)
        bias = random_array(4, seed=seed) if layers[index].bias is not None and seed % 2 else None
        pairs.append((changed, bias))
    return pairs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [True, False])
@given(
    wanted=st.sets(st.integers(0, 3), min_size=1), seeds=st.lists(st.integers(0, 99), max_size=3)
)
@settings(max_examples=12, deadline=None)
def test_losses_are_those_of_the_whole_model(name, packed, wanted, seeds):
    model = MODELS[name]
    layers = find_layers(model).layers
    assert [layer.source for layer in layers] == ["first", "second", "shared", "last"]
    probe = Probe(model, layers, BATCHES, "mse", 1)
    with pytest.MonkeyPatch.context() as patch:
        if not packed:
            patch.setattr(onward, "PACKED", 0)
        walker = OnwardProbe(probe, 1)
        weights = {}
        for index in sorted(wanted):
            pairs = candidates(model, layers, index, seeds)
            found = walker.losses(index, pairs, weights)
            assert len(found) == len(pairs)
            for losses, pair in zip(found, pairs, strict=True):
                expected = probe.losses({**weights, index: pair})
                np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-9)
            # What comes later sees this layer changed.
            weights[index] = candidates(model, layers, index, [7])[0]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("limits", [(4, 1 << 26), (1, 1 << 26), (4, 100)])
def test_layers_in_any_order_and_number_a_unit(limits, apart, monkeypatch):
    monkeypatch.setattr(spread, "LAYERS_PER_UNIT", limits[0])
    monkeypatch.setattr(spread, "UNIT_BYTES", limits[1])
    model = MODELS["plain"]
    layers = find_layers(model).layers
    probe = Probe(model, layers, BATCHES, "mse", 1)
    monkeypatch.setattr(onward, "SHARED", 0)
    opened, begin = [], onward._Rest.__init__

    def noticed(self, *arguments, **options):
        opened.append(options["own"])
        begin(self, *arguments, **options)

    monkeypatch.setattr(onward._Rest, "__init__", noticed)
    side_by_side = SpreadProbe(Pool(), model, layers, BATCHES, "mse", apart=apart)
    assert side_by_side.original() == (pytest.approx(0, abs=1e-12), 9)
    wanted = [(i, candidates(model, layers, i, [i, i + 1])) for i in (2, 0, 0, 1, 3)]
    found = list(side_by_side.mean_losses(iter(wanted)))
    for (index, pairs), losses in zip(wanted, found, strict=True):
        expected = [probe.loss({index: pair}) for pair in pairs]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert any(len(own) > 1 for own in opened) == (not apart and limits == (4, 1 << 26))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("room", [1 << 20, 1])
def test_a_session_for_a_unit_gives_the_same(name, room, monkeypatch):
    """Also where what crosses the cut is not kept, so that samples stay where they are."""
    model = MODELS[name]
    layers = find_layers(model).layers
    probe = Probe(model, layers, BATCHES, "mse", 1)
    unit = (1, 2, 3)
    pairs = {index: candidates(model, layers, index, [index, 7]) for index in unit}
    alone = OnwardProbe(probe, 1)
    expected = {index: alone.losses(index, pairs[index], {}) for index in unit}
    opened, begin = [], onward._Rest.__init__

    def noticed(self, *arguments, **options):
        opened.append(options["own"])
        begin(self, *arguments, **options)

    monkeypatch.setattr(onward._Rest, "__init__", noticed)
    monkeypatch.setattr(onward, "Store", lambda: Store(room))
    monkeypatch.setattr(onward, "SHARED", 0)
    together = OnwardProbe(probe, 1, unit)
    for index in unit:
        found = together.losses(index, pairs[index], {})
        np.testing.assert_allclose(found, expected[index], rtol=1e-4, atol=1e-9)
    assert {tuple(own) for own in opened} == {unit}
    if name == "plain" and room > 1:
        assert len(opened) == 1


def test_what_comes_before_runs_once(monkeypatch):
    model = MODELS["plain"]
    layers = find_layers(model).layers
    probe = Probe(model, layers, BATCHES, "mse", 1)
    pieces = []
    taps = onward.Frontier.taps

    def recorded(self, names, *arguments, **options):
        found = taps(self, names, *arguments, **options)
        session = found._session
        pieces.append([] if session is None else [v.name for v in session.get_inputs()])
        return found

    monkeypatch.setattr(onward.Frontier, "taps", recorded)
    walker = OnwardProbe(probe, 1)
    walker.losses(2, candidates(model, layers, 2, [1, 2]), {})
    walker.losses(3, candidates(model, layers, 3, [1, 2]), {})
    ahead, rest, further, end = pieces
    assert ahead == ["x"]
    shared, last = (probe.exposed.weights[i] for i in (2, 3))
    # From the line on only what crosses it, and the one weight that differs.
    assert set(rest) == {"a", "b", "early", "x", shared}
    assert set(further) == {"a", "b", "early", "x"}
    assert set(end) == {"f", "kept", "early", "x", last}
