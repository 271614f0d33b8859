"""Models are cut where one tensor carries all that changed, and blocks learn one after another."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.distillation import block_training
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.block_lessons import BlockLessons, Posed
from cobla_onnx.distillation.block_training import BlockTrainer, cuts_of
from cobla_onnx.distillation.blocks import Block, find_blocks
from cobla_onnx.distillation.lessons import Lessons, taught_by
from cobla_onnx.distillation.parameters import Parameters
from cobla_onnx.distillation.streams import Stream
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.rewrite import rewrite
from tests.builders import model_of, random_array
from tests.distillation.test_distil import evidence, factors  # noqa: F401

make_node = onnx.helper.make_node


def residual(mask: bool = False) -> onnx.ModelProto:
    """Two units, each the sum of two products and what came before it."""
    nodes, weights = [make_node("MatMul", ["x", "w"], ["h"])], {"w": random_array(8, 8, seed=9)}
    last, inputs = "h", {"x": ["N", 8]}
    for number in range(2):
        for side in "ab":
            weights[f"{side}{number}"] = random_array(8, 8, seed=number)
            nodes.append(make_node("MatMul", [last, f"{side}{number}"], [f"{side}{number}y"]))
        nodes.append(make_node("Add", [f"a{number}y", f"b{number}y"], [f"both{number}"]))
        nodes.append(make_node("Add", [f"both{number}", last], [f"sum{number}"]))
        nodes.append(make_node("Relu", [f"sum{number}"], [f"out{number}"]))
        last = f"out{number}"
        if mask:
            nodes.append(make_node("Mul", [last, "m"], [f"masked{number}"]))
            last = f"masked{number}"
    if mask:
        inputs["m"] = ["N", 1]
    nodes.append(make_node("Softmax", [last], ["y"]))
    return model_of(nodes, weights, inputs, ["y"])


def every_tensor(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


ALL = ["w", "a0", "b0", "a1", "b1"]


def test_a_residual_unit_is_a_block_and_ends_before_what_comes_next():
    model = residual()
    # The last one ends before the probabilities.
    assert find_blocks(model, ALL, every_tensor(model)) == [
        Block("", "h", ("w",)),
        Block("h", "out0", ("a0", "b0")),
        Block("out0", "out1", ("a1", "b1")),
    ]


def test_a_mask_may_cross_a_cut():
    model = residual(mask=True)
    found = find_blocks(model, ALL, every_tensor(model))
    assert [(block.begin, block.end) for block in found] == [
        ("", "h"), ("h", "masked0"), ("masked0", "masked1"),
    ]  # fmt: skip


def test_there_is_no_cut_at_tensors_that_may_not_be_one():
    model = residual()
    assert find_blocks(model, ALL, {"out1"}) == [Block("", "out1", tuple(ALL))]
    assert find_blocks(model, ALL, set()) == [Block("", "", tuple(ALL))]
    assert find_blocks(model, [], every_tensor(model)) == []


def test_before_the_first_learned_and_where_two_things_cross_there_is_no_cut():
    model = residual()
    assert find_blocks(model, ["a1"], every_tensor(model))[0].begin == ""
    # Both outputs carry what has changed.
    model.graph.output.append(onnx.ValueInfoProto(name="out0"))
    *_, first, second = find_blocks(model, ["w", "a0", "a1"], every_tensor(model))
    assert (first.end, second.begin, second.end) == ("out0", "out0", "")


def test_what_two_blocks_read_learns_in_none():
    model = residual()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "b1":
                node.input[place] = "b0"
    found = find_blocks(model, ["a0", "b0", "a1"], every_tensor(model))
    assert [block.names for block in found] == [("a0",), ("a1",)]
    # Without another one in it, a block goes to the one beside it.
    found = find_blocks(model, ["w", "b0", "a1"], every_tensor(model))
    assert [block.names for block in found] == [("w",), ("a1",)]


@pytest.fixture(scope="module")
def lessons(evidence, factors) -> Lessons:  # noqa: F811
    taught = taught_by(evidence.judge)
    parameters = Parameters(taught.model, factors.replacements())
    return Lessons(evidence.judge, taught, parameters, Pool())


def test_samples_at_a_cut_are_what_the_models_give_there(lessons):
    cuts, values = cuts_of(lessons), lessons.parameters.start()
    trainer = BlockTrainer(lessons, cuts, values)
    stream, _ = trainer._stream(1)
    compressed = rewrite(lessons.taught.model, lessons.parameters.replacements(values))
    assert len(cuts.blocks) > 2
    for block in cuts.blocks[:-1]:
        targets = stream.targets(lessons.taught, block.end, lessons.pool)
        stream = stream.moved(block.end, targets, compressed, lessons.pool)
        for model, found in ((lessons.taught.model, stream.original),
                             (compressed, stream.compressed)):  # fmt: skip
            session = open_session(model, 1, [block.end])
            for number in (0, 17, len(found) - 1):
                right = run_session(session, dict(stream.inputs[number]))[block.end]
                np.testing.assert_allclose(found[number][block.end], right, rtol=1e-3, atol=1e-5)


def test_the_error_of_a_block_has_the_derivatives_of_finite_differences(lessons):
    cuts, parameters = cuts_of(lessons), lessons.parameters
    stream, _ = BlockTrainer(lessons, cuts, parameters.start())._stream(1)
    for number, block in enumerate(cuts.blocks):
        targets = stream.targets(lessons.taught, block.end, lessons.pool)
        own = parameters.of(block.names)
        task = BlockLessons(lessons.taught, block, own, Posed(stream, targets), lessons.pool)
        values, chosen = own.start(), range(11)
        loss, gradient = task.gradient(values, chosen)
        assert loss > 0
        direction = np.float32(1e-2) * values
        above, below = (task.gradient(values + s * direction, chosen)[0] for s in (1, -1))
        assert (above - below) / 2 == pytest.approx(float(gradient @ direction), rel=0.05, abs=1e-6)
        if number + 1 < len(cuts.blocks):
            made = rewrite(lessons.taught.model, parameters.replacements(parameters.start()))
            stream = stream.moved(block.end, targets, made, lessons.pool)


def test_blocks_learn_for_others_and_leave_what_they_do_not_read(lessons):
    values = lessons.parameters.start()
    cuts = cuts_of(lessons)
    trainer = BlockTrainer(lessons, cuts, values)
    end = trainer.cycle(6, 0.01)
    assert end.whole
    assert end.loss < trainer.first.loss
    assert [point.number for point in trainer.checkpoints] == list(range(len(cuts.blocks) + 1))
    assert trainer.checkpoints[-1].held_back == end.loss
    again = BlockTrainer(lessons, cuts, values, each=False).cycle(6, 0.01)
    assert again.values.tobytes() == end.values.tobytes()
    first = cuts._replace(blocks=cuts.blocks[:1])
    places = lessons.parameters.places(first.blocks[0].names)
    changed = BlockTrainer(lessons, first, values).cycle(1, 0.01).values != values
    assert changed[places].any()
    assert not np.delete(changed, places).any()


def test_tensors_without_room_are_no_cuts_and_variants_take_what_is_left(lessons, monkeypatch):
    cuts = cuts_of(lessons)
    samples = len(lessons.learned)
    varied = Lessons.__new__(Lessons)
    varied.__dict__ = {**lessons.__dict__}
    varied.taught = lessons.taught.__class__(
        **{**lessons.taught.__dict__, "augmentation": Augmentation(True, 2)}
    )
    monkeypatch.setattr(block_training, "LIMIT", 3 * samples * cuts.largest)
    stream, copies = BlockTrainer(varied, cuts, lessons.parameters.start())._stream(32)
    assert (copies, len(stream.inputs)) == (3, 3 * samples)
    assert stream.expected is None
    _, copies = BlockTrainer(varied, cuts, lessons.parameters.start())._stream(5)
    assert copies == 2
    monkeypatch.setattr(block_training, "LIMIT", samples * cuts.largest - 1)
    assert cuts_of(lessons).largest < cuts.largest
    monkeypatch.setattr(block_training, "LIMIT", 1)
    assert len(cuts_of(lessons).blocks) == 1


def test_an_interrupt_ends_it_where_it_is(lessons, monkeypatch):
    asked = []
    gradient = BlockLessons.gradient

    def interrupted(self, values, chosen):
        asked.append(0)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return gradient(self, values, chosen)

    monkeypatch.setattr(BlockLessons, "gradient", interrupted)
    trainer = BlockTrainer(lessons, cuts_of(lessons), lessons.parameters.start())
    end = trainer.cycle(2, 0.01)
    assert trainer.is_over
    assert trainer.steps == 6
    assert not end.whole


WEIGHTS = {name: random_array(24, 24, seed=k) / 5 for k, name in enumerate("uvwa")}


def learned(nodes, data, shape, outputs=("y",), threads=1, ir_version=8, **options):
    """Compress a model to half of its memory; return the result and what it has learned."""
    read = {name for node in nodes for name in node.input}
    weights = {name: array for name, array in WEIGHTS.items() if name in read}
    model = model_of(nodes, weights, {"x": shape}, list(outputs), ir_version=ir_version)
    options = {"distil": 2, "refit": False, **options}
    found = compress(model, Budget(mem=0.5), data=data, threads=threads, **options)
    return found, found.report.calibration.distillation


@pytest.mark.parametrize("length", [1, 5])
def test_tensors_that_have_the_samples_elsewhere_run_one_at_a_time(length):
    """The sequence comes first, and the samples behind it, as PyTorch's transformers have it."""
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        make_node("MatMul", ["t", "v"], ["h"], "first"),
        make_node("Relu", ["h"], ["r"]),
        make_node("MatMul", ["r", "w"], ["z"], "second"),
        make_node("Transpose", ["z"], ["s"], perm=[1, 0, 2]),
        make_node("MatMul", ["s", "u"], ["y"], "third"),
    ]
    _, record = learned(nodes, {"x": random_array(60, length, 24, seed=3)}, ["N", length, 24])
    assert record.blocks == 3
    assert record.stages[0].passes == 2


def test_an_output_may_be_the_only_way_on():
    nodes = [
        make_node("MatMul", ["x", "v"], ["h"], "first"),
        make_node("Relu", ["h"], ["r"]),
        make_node("MatMul", ["r", "a"], ["y2"], "head"),
        make_node("Relu", ["y2"], ["q"]),
        make_node("MatMul", ["q", "w"], ["z"], "second"),
        make_node("Relu", ["z"], ["z2"]),
        make_node("MatMul", ["z2", "u"], ["y"], "third"),
    ]
    _, record = learned(nodes, {"x": random_array(60, 24, seed=3)}, ["N", 24], ["y2", "y"])
    assert record.blocks >= 2
    assert record.stages[0].passes == 2


def test_models_of_a_fixed_batch_learn_sample_by_sample():
    nodes = [
        make_node("MatMul", ["x", "v"], ["h"], "first"),
        make_node("Relu", ["h"], ["r"]),
        make_node("MatMul", ["r", "w"], ["y"], "second"),
    ]
    _, record = learned(nodes, {"x": random_array(60, 24, seed=3)}, [1, 24])
    assert record.blocks == 2
    assert record.steps > 0


def test_targets_whose_squares_overflow_teach_nothing_and_print_nothing():
    nodes = [
        make_node("MatMul", ["x", "v"], ["h"], "first"),
        make_node("Relu", ["h"], ["r"]),
        make_node("MatMul", ["r", "w"], ["y"], "second"),
    ]
    data = {"x": random_array(24, 24, seed=3) * np.float32(1e30)}
    _, record = learned(nodes, data, ["N", 24], distil=1)
    assert not record.kept


def test_weights_that_are_listed_as_inputs_are_not_asked_for():
    nodes = [
        make_node("MatMul", ["x", "v"], ["h"], "first"),
        make_node("Relu", ["h"], ["r"]),
        make_node("Add", ["r", "a"], ["s"]),
        make_node("MatMul", ["s", "w"], ["y"], "second"),
    ]
    data = {"x": random_array(60, 24, 24, seed=3)}
    _, record = learned(nodes, data, ["N", 24, 24], ir_version=3)
    assert record.blocks == 2
    assert record.stages[0].passes == 2


def test_a_number_for_a_whole_batch_is_a_cut_like_others():
    nodes = [
        make_node("MatMul", ["x", "v"], ["h"], "first"),
        make_node("Relu", ["h"], ["r"]),
        make_node("ReduceMean", ["r"], ["s"], keepdims=0),
        make_node("MatMul", ["x", "w"], ["z"], "second"),
        make_node("Mul", ["z", "s"], ["y"], "gate"),
    ]
    data = [{"x": random_array(5, 24, seed=k)} for k in range(40)]
    _, record = learned(nodes, data, [5, 24])
    assert record.stages[0].passes == 2


def test_the_bytes_are_the_same_on_any_number_of_threads():
    nodes = [
        make_node("Conv", ["x", "c"], ["h"], "first", pads=[1, 1, 1, 1]),
        make_node("Relu", ["h"], ["r"]),
        make_node("Conv", ["r", "d"], ["z"], "second", pads=[1, 1, 1, 1]),
        make_node("GlobalAveragePool", ["z"], ["p"]),
        make_node("Flatten", ["p"], ["y"]),
    ]
    weights = {"c": random_array(24, 3, 3, 3, seed=1), "d": random_array(24, 24, 3, 3, seed=2) / 9}
    model = model_of(nodes, weights, {"x": ["N", 3, 16, 16]}, ["y"])
    made = [
        compress(
            model, Budget(mem=0.4), data={"x": random_array(80, 3, 16, 16, seed=5)},
            distil=2, refit=False, threads=threads,
        ).model.SerializeToString()
        for threads in (1, 2)
    ]  # fmt: skip
    assert made[0] == made[1]


def test_a_stream_of_samples_of_several_shapes_declares_no_sizes():
    model = residual()
    inputs = [{"x": random_array(1, 8, seed=n)} for n in range(3)]
    tensors = [{"out0": random_array(n + 1, 8, seed=n)} for n in range(3)]
    stream = Stream(inputs, 16, (), "out0", tensors, tensors)
    (declared,) = stream.part(model, ["sum1"]).graph.input
    assert [axis.dim_value for axis in declared.type.tensor_type.shape.dim] == [0, 0]
    together = Stream(inputs, 16, ("out0",), "out0", tensors, tensors).part(model, ["sum1"])
    assert together.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 8
