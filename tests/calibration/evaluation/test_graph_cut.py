"""Going on from where the samples are gives what a run from the inputs gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from cobla_onnx.calibration.evaluation import graph_cut as frontier_module
from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store
from cobla_onnx.calibration.moments import Taps

# A skip over several nodes, a weight in a Constant node, a scalar, integers and a sequence.
GRAPH = parser.parse_model("""
    <ir_version: 8, opset_import: ["": 18]>
    skips (float[N, 3] x, float[N, 3] late) => (float[N, 3] y, float[N, 3] z)
    <float[3, 3] w = {1, 2, 0, 0, 1, 3, 1, 0, 1}> {
        scale = Constant <value = float[3, 3] {2, 0, 1, 1, 1, 0, 0, 3, 1}> ()
        a = MatMul(x, w)
        b = Relu(a)
        mean = ReduceMean <keepdims = 0> (b)
        c = MatMul(b, scale)
        n = Shape(c)
        parts = SequenceConstruct(c, a)
        d = Add(c, a)
        again = ConcatFromSequence <axis = 0, new_axis = 0> (parts)
        total = ReduceSum <keepdims = 0> (again)
        e = Mul(d, mean)
        f = Reshape(e, n)
        g = Add(f, late)
        y = MatMul(g, w)
        z = Add(y, total)
    }""")
NAMES = [n for node in GRAPH.graph.node for n in node.output if n not in ("scale", "parts")]
PRODUCER = {name: i for i, node in enumerate(GRAPH.graph.node) for name in node.output}


def batches(sizes):
    generator = np.random.default_rng(0)
    return [
        {name: generator.standard_normal((n, 3)).astype(np.float32) for name in ("x", "late")}
        for n in sizes
    ]


def move(frontier, node, limit):
    """Move all batches before a node; return the frontier there."""
    crossing = frontier.crossing(node)
    taps, store = frontier.taps(crossing), Store(limit)
    for feeds in frontier.batches():
        store.put(taps.run(feeds))
    return frontier.moved_to(store)


@given(
    stops=st.lists(st.integers(0, len(GRAPH.graph.node) - 1), max_size=4),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    limit=st.sampled_from([0, 100, 1 << 20]),
)
@settings(max_examples=60)
def test_tensors_are_the_same_from_any_line(stops, sizes, limit):
    data = batches(sizes)
    frontier = Frontier(GRAPH, lambda: data)
    for stop in sorted(stops):
        frontier = move(frontier, stop, limit)
    names = [name for name in NAMES if PRODUCER[name] >= max(stops, default=0)]
    whole, rest = Taps(GRAPH, names, 1), frontier.taps(names)
    for feeds, here in zip(data, frontier.batches(), strict=True):
        expected, found = whole.run(feeds), rest.run(here)
        for name in names:
            np.testing.assert_array_equal(found[name], expected[name])


def test_only_what_varies_and_is_read_again_crosses():
    frontier = Frontier(GRAPH, lambda: batches([2]))
    assert frontier.crossing(0) == ["late", "x"]
    assert frontier.crossing(PRODUCER["d"]) == ["a", "c", "late", "mean", "n", "parts"]
    assert frontier.crossing(PRODUCER["e"]) == ["d", "late", "mean", "n", "total"]


def test_a_piece_holds_no_node_from_before_the_line():
    frontier = move(Frontier(GRAPH, lambda: batches([2])), PRODUCER["e"], 1 << 20)
    assert frontier.crossing(PRODUCER["y"]) == ["g", "total"]
    (here,) = frontier.batches()
    # Not even x is there any more, from which all of them come.
    assert sorted(here) == ["d", "late", "mean", "n", "total"]
    assert frontier.taps(["y"]).run(here)["y"].shape == (2, 3)


def test_a_line_that_cannot_be_stored_stays_behind():
    start = Frontier(GRAPH, lambda: batches([2, 2]))
    # A sequence crosses it.
    assert move(start, PRODUCER["d"], 1 << 20) is start
    # It takes two batches of d, late (24 bytes each), mean, total (4) and n (16).
    assert move(start, PRODUCER["e"], 143) is start
    assert move(start, PRODUCER["e"], 144) is not start


def test_weights_come_from_outside():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        line (float[N, 3] x) => (float[N, 3] y) { a = MatMul(x, first) y = MatMul(a, second) }""")
    (data,) = batches([4])
    feeds = {"x": data["x"]}
    first, second = np.eye(3, dtype=np.float32) * 2, np.eye(3, dtype=np.float32) * 5
    frontier = Frontier(model, lambda: [feeds])
    store = Store()
    store.put(frontier.taps(["a"], {"first": first, "second": second}).run(feeds))
    (here,) = (moved := frontier.moved_to(store)).batches()
    values = moved.taps(["y"], {"second": second}).run(here)
    np.testing.assert_allclose(values["y"], 10 * data["x"], rtol=1e-6)


# The sizes of a Resize come from shapes, as in a ViT that resizes its position embedding.
RESIZED = parser.parse_model("""
    <ir_version: 8, opset_import: ["": 14]>
    resized (float[N, 2, H, W] x) => (float[A, B, C, D] y) <
        float[2, 2, 1, 1] w = {1, 2, 3, 4}, int64[1] zero = {0}, int64[1] two = {2},
        int64[2] twice = {8, 8}
    > {
        c = Conv(x, w)
        shape = Shape(c)
        head = Slice(shape, zero, two, zero)
        sizes = Concat <axis = 0> (head, twice)
        r = Relu(c)
        big = Resize <mode = "nearest"> (r, , , sizes)
        y = Conv(big, w)
    }""")


def images(sizes):
    generator = np.random.default_rng(1)
    return [{"x": generator.standard_normal((n, 2, 3, 4)).astype(np.float32)} for n in sizes]


@pytest.mark.parametrize("line", range(1, len(RESIZED.graph.node)))
def test_computed_sizes_are_known_behind_every_line(line):
    frontier = move(Frontier(RESIZED, lambda: images([2, 1])), line, 1 << 20)
    taps = frontier.taps(["y"])
    expected = Taps(RESIZED, ["y"], 1)
    here = list(frontier.batches())
    # The samples did move on.
    assert here[0].keys() == set(frontier.crossing(line))
    for feeds, data in zip(here, images([2, 1]), strict=True):
        np.testing.assert_array_equal(taps.run(feeds)["y"], expected.run(data)["y"])


def test_samples_go_back_to_the_inputs_where_a_part_does_not_open(monkeypatch):
    # Without lengths of computed shapes onnxruntime does not open the part with the Resize.
    monkeypatch.setattr(frontier_module, "infer_shapes", lambda model, inputs: {})
    line = next(i for i, n in enumerate(RESIZED.graph.node) if n.op_type == "Slice")
    frontier = move(Frontier(RESIZED, lambda: images([2, 1])), line, 1 << 20)
    assert next(frontier.batches()).keys() == {"c", "shape"}
    taps = frontier.taps(["y"])
    here = list(frontier.batches())
    assert [sorted(feeds) for feeds in here] == [["x"], ["x"]]
    expected = Taps(RESIZED, ["y"], 1)
    for feeds in here:
        np.testing.assert_array_equal(taps.run(feeds)["y"], expected.run(feeds)["y"])
