"""Part of a problem: its answers and losses are those of the whole one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.allocation import Choice, OutputError
from cobla_onnx.allocation.problem import LayerCurves, VariantCurve
from cobla_onnx.allocation.subproblem import Subproblem


def curve(scheme: str, most: int) -> VariantCurve:
    levels = np.arange(1, most)
    return VariantCurve("any", scheme, levels, {"mem": 10 * levels}, np.linspace(1, 0, most + 1))


@st.composite
def problems(draw: st.DrawFn) -> list[LayerCurves]:
    layers = draw(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=5))
    most = st.integers(2, 9)
    return [
        LayerCurves(str(i), {"mem": 99}, tuple(curve(s, draw(most)) for s in sorted(schemes)))
        for i, schemes in enumerate(layers)
    ]


@given(problems(), st.sets(st.sampled_from("abcd")), st.data())
def test_answers_and_losses_are_those_of_the_whole_problem(
    whole: list[LayerCurves], wanted: set[str], data: st.DataObject
) -> None:
    losses = OutputError(
        [[np.linspace(1.0 + k, 0.0, c.most + 1) for k, c in enumerate(x.curves)] for x in whole]
    )
    part = Subproblem.keeping(whole, lambda c: c.scheme in wanted)
    assert all(c.scheme in wanted for layer in part.layers for c in layer.curves)

    found: list[Choice | None] = []
    for layer in part.layers:
        number = data.draw(st.none() | st.integers(0, len(layer.curves) - 1))
        levels = [] if number is None else layer.curves[number].levels.tolist()
        found.append(None if number is None else Choice(number, data.draw(st.sampled_from(levels))))
    answer = part.choices(found, whole)

    of_part = {
        layer.name: (layer, choice) for layer, choice in zip(part.layers, found, strict=True)
    }
    its = part.losses(losses)
    for i, (layer, choice) in enumerate(zip(whole, answer, strict=True)):
        inside, original = of_part.get(layer.name, (layer, None))
        assert (choice is None) == (original is None)
        if choice is not None and original is not None:
            assert layer.curves[choice.curve] is inside.curves[original.curve]
            assert choice.level == original.level
            place = part.places.index(i)
            assert its.curve(place, original.curve) is losses.curve(i, choice.curve)
