"""Rules of operators that move numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.autodiff.differences import check, ints, normal

node = helper.make_node


@pytest.mark.parametrize(
    ("operator", "settings", "constants"),
    [
        ("Reshape", {}, [ints(0, -1)]),
        ("Flatten", {"axis": 2}, []),
        ("Squeeze", {}, [ints(1)]),
        ("Squeeze", {}, []),
        ("Unsqueeze", {}, [ints(0, -1)]),
        ("Transpose", {"perm": [2, 0, 3, 1]}, []),
        ("Transpose", {}, []),
        ("Expand", {}, [ints(2, 2, 3, 3, 4)]),
        ("Tile", {}, [ints(1, 3, 2, 1)]),
        ("CumSum", {"exclusive": 1}, [np.array(2)]),
        ("CumSum", {"reverse": 1}, [np.array(-1)]),
        ("Trilu", {"upper": 0}, [np.array(1)]),
    ],
    ids=str,
)
def test_moving(operator, settings, constants):
    names = [f"c{i}" for i in range(len(constants))]
    known = dict(zip(names, constants, strict=True))
    x = {"x": normal(2, 1, 3, 4)}
    check(node(operator, ["x", *names], ["y"], **settings), x, constants=known)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis):
    shapes = [[2, 3, 4], [2, 3, 4], [2, 3, 4]]
    shapes[1][axis] = 2
    inputs = {f"x{i}": normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    check(node("Concat", list(inputs), ["y"], axis=axis), inputs)
    check(node("Concat", list(inputs), ["y"], axis=axis), inputs, ["x2"])


def test_split_with_an_unread_part():
    split = node("Split", ["x", "sizes"], ["a", "b", "c"], axis=1)
    nodes = [split, node("Mul", ["a", "a"], ["y"]), node("Neg", ["c"], ["z"])]
    check(nodes, {"x": normal(2, 6)}, outputs=("y", "z"), constants={"sizes": ints(2, 1, 3)})
    even = node("Split", ["x"], ["y", "z"], num_outputs=2)
    check(even, {"x": normal(6, 2)}, outputs=("y", "z"))


@given(st.data())
@settings(max_examples=25)
def test_slice(data):
    sizes = [5, 4, 6]
    axes = data.draw(
        st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda a: a % 3)
    )
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
    starts, ends = [], []
    for axis, step in zip(axes, steps, strict=True):
        low = data.draw(st.integers(0, sizes[axis] - 1))
        high = data.draw(st.integers(low, sizes[axis] - 1))
        starts.append(low if step > 0 else high)
        before = low - 1 if low else -100
        ends.append(high + 1 if step > 0 else before)
    constants = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}
    slice_ = node("Slice", ["x", "s", "e", "a", "t"], ["y"])
    check(slice_, {"x": normal(*sizes)}, constants=constants)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(0, 1, 2, 0, 2, 1), (0, 0, 0, 0, 0, 2), (0, 2, 2, 0, 2, 2)])
def test_pad(mode, pads):
    pad = node("Pad", ["x", "p"], ["y"], mode=mode)
    check(pad, {"x": normal(2, 3, 4)}, constants={"p": ints(*pads)}, opset=19)


def test_pad_of_some_axes():
    pad = node("Pad", ["x", "p", "", "a"], ["y"])
    constants = {"p": ints(1, 2, 0, 3), "a": ints(-1, 0)}
    check(pad, {"x": normal(2, 3, 4)}, constants=constants)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [[2, 0, -1, 0], [[1, 1], [0, 2]], 1, [0] * 40])
@pytest.mark.parametrize("known", [True, False])
def test_gather(axis, indices, known):
    gather = node("Gather", ["x", "i"], ["y"], axis=axis)
    inputs, at = {"x": normal(3, 4, 3)}, {"i": np.array(indices, dtype=np.int64)}
    if known:
        check(gather, inputs, constants=at)
    elif np.ndim(indices):
        # The reference ScatterND, unlike onnxruntime, counts in arrays only.
        check(gather, {**inputs, **at}, ["x"])


def test_gather_elements_and_tuples():
    x = {"x": normal(3, 4)}
    at = {"i": np.array([[0, 1], [2, 2], [0, 0]], dtype=np.int64)}
    check(node("GatherElements", ["x", "i"], ["y"], axis=1), x, constants=at)
    check(node("GatherND", ["x", "i"], ["y"]), x, constants=at)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode):
    back = node("DepthToSpace", ["x"], ["y"], blocksize=2, mode=mode)
    check(back, {"x": normal(2, 8, 2, 3)})
    check(node("SpaceToDepth", ["x"], ["y"], blocksize=2), {"x": normal(2, 3, 4, 2)})
