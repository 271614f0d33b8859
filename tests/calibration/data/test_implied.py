"""Token ids alone are enough for a decoder with a cache."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx import Budget, compress
from cobla_onnx.calibration.data.dataset import InputSpec
from cobla_onnx.calibration.data.implied import implied
from cobla_onnx.errors import DataError
from tests.builders import model_of, random_array


def decoder() -> onnx.ModelProto:
    """Ids, a mask and positions; a past that is joined before what is new."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], "embed"),
        helper.make_node("Gather", ["places", "position_ids"], ["p"], "position"),
        helper.make_node("Add", ["x", "p"], ["xp"], "add"),
        helper.make_node("MatMul", ["xp", "w1"], ["a"], "fc1"),
        helper.make_node("Concat", ["past.0", "a"], ["present"], "join", axis=1),
        helper.make_node("Cast", ["attention_mask"], ["m"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"], "unsqueeze"),
        helper.make_node("Mul", ["present", "m3"], ["masked"], "mask"),
        helper.make_node("ReduceSum", ["masked", "time"], ["b"], "sum", keepdims=1),
        helper.make_node("Add", ["a", "b"], ["c"], "join_sum"),
        helper.make_node("MatMul", ["c", "w2"], ["logits"], "fc2"),
    ]
    weights = {
        "table": random_array(50, 24, seed=0),
        "places": random_array(16, 24, seed=3),
        "w1": random_array(24, 32, seed=1),
        "w2": random_array(32, 24, seed=2),
        "last": np.array([2], np.int64),
        "time": np.array([1], np.int64),
    }
    model = model_of(nodes, weights, {"past.0": ["batch", "past", 32]}, ["logits", "present"])
    for name, length in (("input_ids", "seq"), ("position_ids", "seq"), ("attention_mask", "all")):
        model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
        )
    return model


def ids(count: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 50, (count, length))


def everything(tokens: np.ndarray) -> dict[str, np.ndarray]:
    count, length = tokens.shape
    return {
        "input_ids": tokens,
        "attention_mask": np.ones((count, length), np.int64),
        "position_ids": np.tile(np.arange(length), (count, 1)),
        "past.0": np.zeros((count, 0, 32), np.float32),
    }


def test_ids_alone_give_what_all_inputs_of_the_first_step_give(tmp_path):
    tokens = ids(24, 6)
    np.savez(tmp_path / "ids.npz", input_ids=tokens)
    made = [
        compress(decoder(), Budget(mem=0.7), data=data, threads=1)
        for data in (everything(tokens), {"input_ids": tokens}, tmp_path / "ids.npz")
    ]
    assert len({each.model.SerializeToString() for each in made}) == 1
    said = [any("the past empty" in note for note in each.report.notes) for each in made]
    assert said == [False, True, True]


def test_lengths_may_differ():
    records = [{"input_ids": row[None]} for length in (4, 7) for row in ids(10, length)]
    report = compress(decoder(), Budget(mem=0.7), data=records, threads=1).report
    assert report.calibration.calibration_samples + report.calibration.selection_samples == 20


def write_sets(folder, records) -> None:
    """Write records as sets, tensors numbered as they come."""
    for number, record in enumerate(records):
        place = folder / f"test_data_set_{number:02}"
        place.mkdir(parents=True)
        for index, (name, array) in enumerate(record.items()):
            tensor = numpy_helper.from_array(array, name)
            (place / f"input_{index}.pb").write_bytes(tensor.SerializeToString())


def test_folders_of_ids_alone_are_read_in_several_lengths(tmp_path):
    rows = [row[None] for length in (4, 7) for row in ids(10, length)]
    write_sets(tmp_path / "ids", [{"input_ids": row} for row in rows])
    write_sets(tmp_path / "all", [everything(row) for row in rows])
    made = [
        compress(decoder(), Budget(mem=0.7), data=tmp_path / folder, threads=1)
        for folder in ("ids", "all")
    ]
    assert made[0].model == made[1].model
    assert any("the past empty" in note for note in made[0].report.notes)


def test_folders_that_lack_more_are_refused(tmp_path):
    masks = [{"attention_mask": np.ones((1, 4), np.int64)} for _ in range(4)]
    write_sets(tmp_path / "masks", masks)
    with pytest.raises(DataError, match=r"has no input_1\.pb, the model has 4 inputs"):
        compress(decoder(), Budget(mem=0.7), data=tmp_path / "masks", threads=1)


def test_what_does_not_follow_is_asked_for():
    model = decoder()
    model.graph.input.append(helper.make_tensor_value_info("seed", TensorProto.FLOAT, ["batch"]))
    with pytest.raises(DataError, match="'seed'"):
        compress(model, Budget(mem=0.7), data={"input_ids": ids(24, 6)}, threads=1)


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    sizes=st.lists(st.one_of(st.none(), st.integers(1, 5)), min_size=1, max_size=4),
    fixed=st.booleans(),
)
def test_a_past_is_made_where_one_axis_can_be_that_of_time(rows, length, sizes, fixed):
    batch = rows if fixed else None
    past = InputSpec("past_key", np.dtype(np.float16), (batch, *sizes))
    specs = [InputSpec("input_ids", np.dtype(np.int64), (batch, None)), past]
    found = implied({"input_ids": np.zeros((rows, length), np.int64)}, specs)
    if sizes.count(None) != 1:
        assert found == {}
    else:
        assert found["past_key"].shape == (rows, *(size or 0 for size in sizes))
        assert found["past_key"].dtype == np.float16


def test_nothing_is_made_without_a_past_or_when_nothing_lacks():
    tokens = np.zeros((2, 3), np.int64)
    two = (None, None)
    encoder = [InputSpec(name, np.dtype(np.int64), two) for name in ("input_ids", "attention_mask")]
    assert implied({"input_ids": tokens}, encoder) == {}
    assert implied({"input_ids": tokens, "attention_mask": tokens}, encoder) == {}
    past = InputSpec("cache", np.dtype(np.float32), (None, None, 4))
    assert set(implied({"input_ids": tokens}, [*encoder, past])) == {"attention_mask", "cache"}
    elsewhere = InputSpec("cache", np.dtype(np.float32), (None, None, 4), "other")
    assert implied({"input_ids": tokens}, [*encoder, elsewhere]) == {}
