"""How many samples run at a time, and what memory a run takes then."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx import Budget, compare, compress
from cobla_onnx.calibration import batching
from cobla_onnx.calibration.batching import TapLimit, choose_batching, mixes_samples, run_sizes
from cobla_onnx.calibration.data.dataset import Dataset, input_specs
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.options import Settings
from cobla_onnx.options.values import memory_bytes
from cobla_onnx.pipeline.verification import verify
from cobla_onnx.runtime.temporary import Shelf
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.rewrite import rewrite

SIDE = 256


def _model(nodes, weights, shape, batch="n", outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "batches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="test"
    )


def _weight(generator, *shape):
    """A weight whose singular values fall, so that there is something to cut."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    matrix = generator.standard_normal((rows, columns))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    falling = values[0] * 0.6 ** np.arange(len(values))
    return ((left * falling) @ right).reshape(shape).astype(np.float32)


def _pictures(side=SIDE):
    """Few weights, and for each of six tensors of a sample 128 bytes times the side's square."""
    generator = np.random.default_rng(0)
    nodes, weights, last, channels = [], {}, "x", 3
    for number in range(3):
        weights[f"w{number}"] = _weight(generator, 32, channels, 3, 3) / 4
        nodes.append(
            helper.make_node(
                "Conv", [last, f"w{number}"], [f"c{number}"], f"conv{number}", pads=[1] * 4
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}"))
        last, channels = f"r{number}", 32
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"], "pool"))
    return _model(nodes, weights, (3, side, side))


def _data(count, *shape):
    generator = np.random.default_rng(1)
    return generator.standard_normal((count, *shape)).astype(np.float32)


def _dataset(model, array):
    return Dataset("data", [{"x": array}], input_specs(model))


def _written_in(target):
    generator = np.random.default_rng(2)
    weights = {
        "w": _weight(generator, 8, 3, 3, 3),
        "shape": np.array(target, np.int64),
        "v": _weight(generator, 800, 6),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Reshape", ["c", "shape"], ["f"], "view"),
        helper.make_node("MatMul", ["f", "v"], ["y"], "head"),
    ]
    return _model(nodes, weights, (3, 10, 10))


def _centred():
    """Takes off the mean over the batch: runs with any, and mixes its samples."""
    weights = {"w": _weight(np.random.default_rng(3), 12, 12)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["d"], "centre"),
        helper.make_node("Add", ["d", "x"], ["a"], "both"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "head"),
    ]
    return _model(nodes, weights, (12,))


def _chosen(model, dataset, limit=None, batch="auto"):
    layers = find_layers(model).layers
    return choose_batching(model, model, layers, dataset, batch, limit, threads=1)


def test_sizes_of_a_run_are_those_of_its_tensors():
    model = _pictures()
    sizes = run_sizes(model, {"x": _data(1, 3, SIDE, SIDE)}, 1)
    tensor = 4 * 32 * SIDE * SIDE
    assert sizes.tensors["c0"] == sizes.tensors["r2"] == tensor
    assert sizes.tensors["y"] == 4 * 32
    # A convolution's input and output, and the picture no longer.
    assert 2 * tensor <= sizes.peak <= 2 * tensor + 4 * 3 * SIDE * SIDE
    assert sizes.total == 6 * tensor + sizes.tensors["x"] + sizes.tensors["y"]


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (_written_in([1, -1]), (3, 10, 10), "batch of one written into it"),
        (_centred(), (12,), "of two together is not what each gives alone"),
    ],
)
def test_samples_that_must_not_run_together_run_one_at_a_time(model, shape, why):
    array = _data(12, *shape)
    with _dataset(model, array) as dataset:
        found = _chosen(model, dataset)
        assert found.size == 1
        assert why in found.notes[0]
    first = compress(model, Budget(mem=0.7), data={"x": array}, threads=1)
    second = compress(model, Budget(mem=0.7), data={"x": array}, threads=1, batch=1)
    assert any(why in note for note in first.report.notes)
    assert first.plan == second.plan
    assert first.model.SerializeToString() == second.model.SerializeToString()


def test_a_model_that_takes_any_batch_takes_many():
    model = _written_in([0, -1])
    with _dataset(model, _data(20, 3, 10, 10)) as dataset:
        assert mixes_samples(model, dataset, 0, 1, 1) == ""
        assert _chosen(model, dataset).size == 16
        assert _chosen(model, dataset).notes == ()
        assert _chosen(model, dataset, batch=5).size == 5


def test_the_batch_falls_with_the_limit():
    model = _pictures()
    with _dataset(model, _data(4, 3, SIDE, SIDE)) as dataset:
        sizes = [_chosen(model, dataset, limit * 10**6).size for limit in (800, 1700, 4000, 16000)]
        assert sizes == sorted(sizes)
        assert sizes[0] == 1
        assert sizes[-1] == 16
        (note,) = _chosen(model, dataset, 100 * 10**6).notes
        assert "--memory-limit" in note


@pytest.mark.parametrize("limit", ["30MB", "60MB", "200MB", "1GB"])
def test_sessions_at_a_time_hold_their_copies_of_the_weights_within_the_limit(monkeypatch, limit):
    monkeypatch.setattr(batching, "PROCESS", 1_000_000)
    model = _pictures(16)
    model.graph.node[-1].output[0] = "p"
    model.graph.node.append(helper.make_node("Flatten", ["p"], ["f"], "flat"))
    model.graph.node.append(helper.make_node("MatMul", ["f", "large"], ["y"], "head"))
    model.graph.initializer.append(numpy_helper.from_array(_data(32, 40_000), "large"))
    weights = stored_bytes(model)
    assert weights > 5_000_000
    dataset = _dataset(model, _data(40, 3, 16, 16))
    found = _chosen(model, dataset, memory_bytes(limit))
    sizes = run_sizes(model, {"x": _data(1, 3, 16, 16)}, 1)
    held = batching.COPIES * weights + batching.PROCESS
    each = batching.SESSION_COPIES * weights + found.size * sizes.peak
    assert found.at_once == 1 or held + found.at_once * each <= memory_bytes(limit)
    # Two units run wherever there is room for their sessions.
    assert found.at_once >= 2 or memory_bytes(limit) < held + 2 * batching.SESSION_COPIES * weights
    monkeypatch.setattr(batching, "BY_FILE", 1)
    # Mapped weights are not counted.
    assert _chosen(model, dataset, memory_bytes(limit)).size >= found.size


def test_outputs_that_do_not_follow_from_the_samples_do_not_count():
    """A weight that is an output, and noise, say nothing about whether samples are mixed."""
    generator = np.random.default_rng(4)
    weights = {"w": _weight(generator, 12, 12), "scale": np.full((1, 12), 3.0, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "head"),
        helper.make_node("RandomNormalLike", ["y"], ["noise"], "noise"),
        helper.make_node("Identity", ["scale"], ["constant"], "same"),
    ]
    model = _model(nodes, weights, (12,), outputs=("y", "noise", "constant"))
    with _dataset(model, _data(4, 12)) as dataset:
        assert mixes_samples(model, dataset, 0, 1, 1) == ""


def test_samples_of_which_nothing_is_left_alone_are_mixed_in_any_unit():
    """A deviation from the batch's mean is 0 for a batch of one, in metres and in miles."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["d"], "centre"),
        helper.make_node("MatMul", ["d", "w"], ["y"], "head"),
    ]
    model = _model(nodes, {"w": _weight(np.random.default_rng(3), 12, 12)}, (12,))
    for unit in (1.0, 1e-7):
        with _dataset(model, unit * _data(4, 12)) as dataset:
            assert "is not what each gives alone" in mixes_samples(model, dataset, 0, 1, 1)


@given(
    st.lists(st.sampled_from("abcdef"), max_size=12),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9)),
    st.integers(0, 20),
    st.integers(1, 2),
)
def test_parts_read_no_more_than_they_may(items, tensors, most, times):
    parts = TapLimit(most, tensors).cut(items, str, times)
    assert [item for part in parts for item in part] == items
    assert all(
        len(set(part)) == 1 or times * sum(tensors.get(name, 0) for name in set(part)) <= most
        for part in parts
    )


def test_tensors_that_are_read_in_parts_give_the_same():
    """Moments, factors and the proof of the rewrite, from runs of which one tensor is read."""
    model = _pictures(32)
    layers = find_layers(model).layers
    batches = [{"x": array} for array in np.split(_data(6, 3, 32, 32), 3)]
    one = TapLimit(1, run_sizes(model, batches[0], 1).tensors)
    found = []
    for taps in (None, one):
        with closing(Seen(model, layers, lambda: batches, taps=taps)) as seen:
            replacements = []
            for layer in layers:
                (made,) = FactorsFromData(seen).approximate(layer, schemes_for(layer)[0], [4])
                replacements.append(
                    make_replacement(layer, schemes_for(layer)[0], made.factors, made.bias)
                )
        data = ("some", lambda: [(len(next(iter(b.values()))), b) for b in batches])
        compressed = rewrite(model, replacements)
        checked = verify(model, compressed, replacements, {}, data=data, taps=taps)
        found.append((compressed.SerializeToString(), checked))
    assert found[0] == found[1]


CHILD = """
import sys
from pathlib import Path
from cobla_onnx import Budget, compare, compress
model, data, limit = sys.argv[1:]
result = compress(model, Budget(mem=0.6), data=data, memory_limit=limit, threads=2)
# Of this process alone: ru_maxrss begins with the size of the process that started it.
status = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
peak = 1024 * int(status["VmHWM"].split()[0])
print(peak, *(f"{d.layer}:{d.scheme}:{d.rank}" for d in result.plan.decisions))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process took")
def test_a_run_stays_below_its_limit_and_decides_the_same(tmp_path: Path):
    model, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    onnx.save(_pictures(), model)
    np.savez(data, x=_data(6, 3, SIDE, SIDE))
    decided = []
    for limit in ("900MB", "2GB"):
        command = [sys.executable, "-c", CHILD, str(model), str(data), limit]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, *decisions = done.stdout.split()
        assert int(peak) < memory_bytes(limit)
        decided.append(decisions)
    assert decided[0] == decided[1]


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["f4", "f8", "i8", "?", "u1"])), max_size=5
    ),
    st.integers(0, 40),
)
def test_a_shelf_gives_back_what_was_put_on_it(entries, room):
    batches = [{"a": np.arange(n).astype(kind), "b": np.ones((2, n), kind)} for n, kind in entries]
    shelf = Shelf()
    shelf._room = room
    for batch in batches:
        shelf.append(batch)
    for found in (shelf, pickle.loads(pickle.dumps(shelf))):
        assert len(found) == len(batches)
        for given_, kept in zip(batches, found, strict=True):
            assert given_.keys() == kept.keys()
            assert all(given_[k].dtype == kept[k].dtype for k in given_)
            assert all(np.array_equal(given_[k], kept[k]) for k in given_)


@pytest.mark.parametrize("limit", ["", "2 TBs", "-1GB", "0", "1e9", "GB"])
def test_a_limit_that_is_no_size_is_refused(limit):
    with pytest.raises(UsageError, match="memory_limit="):
        Settings(memory_limit=limit)


@pytest.mark.parametrize("batch", [0, -1, True, "16", 1.5])
def test_a_batch_that_is_no_number_is_refused(batch):
    with pytest.raises(UsageError, match="batch="):
        Settings(batch=batch)


def test_two_models_are_compared_one_sample_at_a_time_where_one_of_them_wants_it():
    array = _data(6, 3, 10, 10)
    found = compare(_written_in([0, -1]), _written_in([1, -1]), data={"x": array})
    assert found.samples == 6
    assert any("one at a time" in note for note in found.notes)
    assert found.outputs[0].max_abs is not None
    assert found.outputs[0].max_abs < 1e-4
