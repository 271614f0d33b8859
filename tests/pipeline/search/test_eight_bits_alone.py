"""The model in 8 bits without ranks is made once, as long as its times say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import pytest

from cobla_onnx import Budget
from cobla_onnx.options import Settings
from cobla_onnx.pipeline import session
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.search.eight_bit_search import EightBits
from cobla_onnx.pipeline.search.eight_bits_alone import EightBitsAlone
from cobla_onnx.report.arithmetic import ArithmeticReport
from tests.builders import random_array, small_network


def answers(
    ratios: Sequence[float], asked: Sequence[tuple[tuple[int | None, int | None], float | None]]
) -> list[tuple[list[bool], bool]]:
    """What a model's maker was told for each budget, and whether it was asked at all."""
    kept, made = EightBitsAlone(), list[list[bool]]()

    def make(is_fast: Callable[[onnx.ModelProto], bool]) -> EightBits:
        made.append([is_fast(model) for model in models])
        return EightBits(small_network(), small_network(), report)

    report = ArithmeticReport.__new__(ArithmeticReport)
    models = [onnx.ModelProto(producer_version=str(ratio)) for ratio in ratios]
    found = []
    for key, latency in asked:
        before = len(made)
        kept.once(key, latency, lambda model: float(model.producer_version), make)
        found.append((made[-1], len(made) > before))
    return found


def test_it_is_made_again_where_a_time_would_say_otherwise():
    one = (None, 0)
    said = answers([0.31, 0.4], [(one, 0.6), (one, 0.45), (one, 0.35), (one, 0.32), (one, 0.3)])
    assert said == [
        ([True, True], True),
        ([True, True], False),
        ([True, False], True),
        ([True, False], False),
        ([False, False], True),
    ]


@pytest.mark.parametrize("other", [((None, 1), 0.6), ((2000, 0), 0.6), ((None, 0), None)])
def test_it_is_made_again_for_what_else_it_depends_on(other):
    said = answers([0.31], [((None, 0), 0.6), other])
    assert [made for _, made in said] == [True, True]


def test_without_a_latency_all_is_fast_enough():
    said = answers([5.0], [((None, None), None), ((None, None), None)])
    assert said == [([True], True), ([True], False)]


def test_budgets_that_end_at_the_same_model_share_it(monkeypatch):
    made, make = [], session.in_eight_bits

    def counted(*given):
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(session, "in_eight_bits", counted)
    model = small_network()
    # Not sorted, so that what is written is put back in the order of the file.
    nodes = [model.graph.node[place] for place in (1, 0, *range(2, len(model.graph.node)))]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    settings = Settings(data={"x": random_array(24, 3, 12, 12)}, arithmetic="int8", threads=1)
    with open_session(model, settings) as opened:
        first, second = (opened.compress(Budget(mac=mac)) for mac in (1.0, 1.0))
        assert len(made) == 1
        opened.compress(Budget(mac=0.4))
        assert len(made) == 2
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert first.model is not second.model
    assert first.report.arithmetic == second.report.arithmetic
