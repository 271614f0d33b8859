"""Stand-ins of every form take the bytes of what they stand for, in 8 bits, too."""

from __future__ import annotations

import pytest

from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import read_weight
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.search.eight_bits import stand_in_eight_bits
from cobla_onnx.pipeline.search.stand_in import stand_in_model
from cobla_onnx.plan import Plan
from cobla_onnx.variants.low_rank.curve import LOW_RANK
from cobla_onnx.variants.registry import require_family, stand_in
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.writing import Writing
from tests.builders import small_network
from tests.latency.test_single_layer import several_kinds


@pytest.mark.parametrize("storage", ["cast", "qdq"])
@pytest.mark.parametrize("make", [small_network, several_kinds])
def test_stand_ins_of_all_forms_take_the_bytes_of_what_they_stand_for(make, storage):
    model, seen = make(), set()
    writing = Writing.into(model, storage)
    with open_session(model, Settings(precision=(16, 8, 6, 5, 4, 3, 2))) as session:
        variants = session.analysis.variants
    for each in variants:
        weight = read_weight(model, each.layer)
        for form, curve in zip(each.forms, each.curves.curves, strict=True):
            family, level = require_family(form.name), int(curve.levels[0])
            made = family.from_weights(each.layer, form, level, weight, None)
            real = rewrite(model, [family.replace(each.layer, form, made).written(writing)])
            other = rewrite(model, [stand_in(each.layer, form, level).written(writing)])
            assert stored_bytes(other) == stored_bytes(real), form.name
            assert [n.op_type for n in other.graph.node] == [n.op_type for n in real.graph.node]
            narrow = [stored_bytes(stand_in_eight_bits(m)) for m in (other, real)]
            assert narrow[0] == narrow[1], form.name
            seen.add(family.name)
    assert seen >= {LOW_RANK, "storage", "coded factors"}


def test_a_plan_that_changes_nothing_gives_the_model_itself():
    model = small_network()
    with open_session(model, Settings()) as session:
        assert stand_in_model(model, session.analysis, Plan(())) is model


def test_the_first_nodes_stay_in_floating_point_unless_all_would():
    weights = [
        {t.name for t in stand_in_eight_bits(small_network(), (), head).graph.initializer}
        for head in range(4)
    ]
    left = [{"w1", "w2", "w3"} & names for names in weights]
    assert left == [set(), {"w1"}, {"w1", "w2"}, set()]
