"""Losses in the graph are those of calibration, for every kind of measure."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.losses import write_losses
from cobla_onnx.autodiff.measures import KINDS, LossKind, Measure
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.errors import UsageError

DOUBLE = TensorProto.DOUBLE
Arrays = dict[str, np.ndarray]


def in_the_graph(measures: dict[str, Measure], expected: Arrays, actual: Arrays) -> Arrays:
    """Losses, and derivatives by the names of the outputs, in double precision."""
    g = Emitter({*actual, *expected}, DOUBLE)
    written = write_losses(g, measures, {name: actual[name].shape for name in measures})
    feeds = dict(actual)
    feeds |= {written.targets[name]: expected[name] for name in measures}
    feeds |= {name: np.square(expected[q]).mean() for q, name in written.powers.items()}
    feeds |= {m.mask: expected[m.mask] for m in measures.values() if m.mask}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feeds.items()
    ]
    results = {"loss": written.loss} | written.seeds
    shapes = [(written.samples,), *(actual[name].shape for name in written.seeds)]
    outputs = [
        helper.make_tensor_value_info(name, DOUBLE, shape)
        for name, shape in zip(results.values(), shapes, strict=True)
    ]
    graph = helper.make_graph(g.nodes, "losses", inputs, outputs, g.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    # Numpy warns of infinities, which are a case here.
    with np.errstate(divide="ignore", invalid="ignore"):
        values = ReferenceEvaluator(model).run(list(results.values()), feeds)
    return dict(zip(results, values, strict=True))


def distributions(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = generator.uniform(0.1, 1.0, shape)
    return values / values.sum(axis=1, keepdims=True)


def targets_and_outputs(
    measure: Measure, shape: tuple[int, ...], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A target and an output that suit a measure; where it is labelled, some do not count."""
    kind = measure.kind
    if kind.startswith("binary"):
        labels = generator.integers(-1 if measure.labelled else 0, 2, shape)
        actual = generator.normal(size=shape)
        return labels.astype(float), actual if measure.of_logits else 1 / (1 + np.exp(-actual))
    if not measure.has_classes:
        return generator.normal(size=shape), generator.normal(size=shape)
    expected = distributions(generator, shape)
    actual = generator.normal(size=shape) if measure.of_logits else distributions(generator, shape)
    if kind == "logits":
        expected = np.log(expected)
    if measure.labelled:
        expected = (expected == expected.max(axis=1, keepdims=True)).astype(float)
        expected *= generator.integers(0, 2, (shape[0], 1, *shape[2:]))
    return expected, actual


@st.composite
def cases(draw: st.DrawFn, kind: LossKind) -> tuple[Measure, Arrays, Arrays]:
    sizes = st.integers(2, 4)
    features = draw(sizes)
    further = () if kind == "either" else draw(st.sampled_from([(), (2,), (3, 2)]))
    shape = (draw(st.integers(1, 4)), features, *further)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axis: int | None = None if kind.startswith("binary") else 1
    scale = None
    if kind == "either" or (kind == "mse" and draw(st.booleans())):
        axis = None if kind == "mse" and draw(st.booleans()) else 1
        scale = tuple(generator.uniform(0, 2, 1 if axis is None else features).tolist())
    labelled = kind.startswith(("ce", "binary")) and draw(st.booleans())
    # The mask's axes are the output's first two, of which neither may hold the features.
    masked = axis is None and (kind.startswith("binary") or scale is not None)
    mask = "mask" if masked and draw(st.booleans()) else None
    measure = Measure(
        kind, axis, scale, spread=draw(st.floats(0.5, 3)), mask=mask, labelled=labelled
    )
    expected, actual = targets_and_outputs(measure, shape, generator)
    given = {"y": expected}
    if mask:
        given[mask] = generator.integers(0, 2, shape[:2])
    return measure, given, {"y": actual}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_derivatives_are_those_of_calibration(kind: LossKind) -> None:
    @given(cases(kind), st.integers(0, 2**32 - 1))
    @settings(max_examples=40)
    def check(case: tuple[Measure, Arrays, Arrays], seed: int) -> None:
        measure, expected, actual = case
        found = in_the_graph({"y": measure}, expected, actual)
        losses = sample_losses({"y": measure}, expected, actual)
        np.testing.assert_allclose(found["loss"], losses, rtol=1e-9, atol=1e-12)
        y, step = actual["y"], 1e-6
        direction = np.random.default_rng(seed).normal(size=y.shape)
        ends = [
            sample_losses({"y": measure}, expected, {"y": y + sign * step * direction}).sum()
            for sign in (1, -1)
        ]
        slope = (found["y"] * direction).sum()
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)

    check()


@given(st.sampled_from(["logits", "ce-logits", "probabilities", "mse"]), st.integers(0, 99))
@settings(max_examples=40)
def test_a_mask_leaves_padding_out_of_a_sequence(kind: LossKind, seed: int) -> None:
    """Axes (sample, place, class), as of language models."""
    generator = np.random.default_rng(seed)
    scale = (0.5, 1.0, 2.0) if kind == "mse" else None
    measure = Measure(kind, 2, scale, mask="mask")
    q, p = (generator.uniform(0.1, 1, (3, 4, 3)) for _ in range(2))
    if not measure.of_logits:
        q, p = (v / v.sum(axis=2, keepdims=True) for v in (q, p))
    elif kind.startswith("ce"):
        p /= p.sum(axis=2, keepdims=True)
    expected = {"y": p, "mask": generator.integers(0, 2, (3, 4))}
    found = in_the_graph({"y": measure}, expected, {"y": q})
    losses = sample_losses({"y": measure}, expected, {"y": q})
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-9)
    assert not found["y"][expected["mask"] == 0].any()


@pytest.mark.parametrize("kind", ["logits", "mse"])
def test_common_infinities_cost_nothing(kind: LossKind) -> None:
    q, p = (np.random.default_rng(seed).normal(size=(3, 4)) for seed in (0, 1))
    q[:, 2] = p[:, 2] = -np.inf
    measure = Measure(kind, 1, (1.0,) * 4 if kind == "mse" else None, suppressed=True)
    found = in_the_graph({"y": measure}, {"y": p}, {"y": q})
    losses = sample_losses({"y": measure}, {"y": p}, {"y": q})
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-9)
    assert not found["y"][:, 2].any()


def test_an_output_that_is_not_batched_adds_its_mean_to_each_sample() -> None:
    generator = np.random.default_rng(0)
    measures = {"a": Measure("logits"), "b": Measure("mse", None)}
    expected = {"a": generator.normal(size=(2, 3)), "b": generator.normal(size=(6, 3))}
    actual = {name: generator.normal(size=value.shape) for name, value in expected.items()}
    found = in_the_graph(measures, expected, actual)
    losses = sample_losses(measures, expected, actual)
    assert losses.shape == (2,)
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-9)
    for name, value in actual.items():
        step = 1e-6 * generator.normal(size=value.shape)
        ends = [
            sample_losses(measures, expected, actual | {name: value + sign * step}).sum()
            for sign in (1, -1)
        ]
        slope = (found[name] * step).sum()
        assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-5, abs=1e-12)


def test_classes_along_an_axis_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"output 'y' of shape \[3\].*choose the loss 'mse'"):
        write_losses(Emitter({"y"}, DOUBLE), {"y": Measure("logits")}, {"y": (3,)})
