"""Moments of tied weights add up over readings; factors are as good as is found otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.calibration.heads import Curvature, importances
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.from_data import FactorsFromData, truncation_errors
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.low_rank.tied_factors import TiedFactorizer
from cobla_onnx.variants.low_rank.tied_moments import Sides, sides_of
from tests.tied import VOCABULARY, WIDTH, decoder, sentences


def matrix_scheme(shape: tuple[int, int]) -> ProductScheme:
    return ProductScheme("matrix", shape, 1, transposed=True, data_left=False)


def moment(size: int, generator: np.random.Generator) -> np.ndarray:
    vectors = generator.standard_normal((size, 3 * size)) * np.geomspace(3, 0.1, size)[:, None]
    return vectors @ vectors.T / size


@st.composite
def problems(draw):
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows, columns = draw(st.integers(4, 20)), draw(st.integers(3, 9))
    sides = draw(st.sampled_from(["lookup", "both", "columns", "rows"]))
    along = generator.dirichlet(np.ones(rows)) if sides == "lookup" else moment(rows, generator)
    across = moment(columns, generator)
    if sides == "columns":
        along = np.zeros(rows)
    if sides == "rows":
        across = np.zeros((columns, columns))
    weight = generator.standard_normal((rows, columns))
    outputs = None
    if along.ndim == 1 and draw(st.booleans()):
        outputs = generator.uniform(0.1, 3, rows)
        outputs /= outputs.mean()
    return weight, Sides(along, across, outputs), draw(st.integers(1, min(rows, columns) - 1))


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_factors_are_better_than_those_of_other_weights(problem):
    weight, sides, rank = problem
    solver = TiedFactorizer(matrix_scheme(weight.shape), weight, sides, min(weight.shape))
    assert solver.energy == pytest.approx(sides.error(weight), rel=1e-9)
    made = solver.factorize(rank)
    reached = sides.error(weight - made.left[0] @ made.right[0])
    assert solver.errors(np.array([0, rank])) == pytest.approx([solver.energy, reached], rel=1e-6)
    begin = solver._begin.factorize(rank)
    assert reached <= sides.error(weight - begin.left[0] @ begin.right[0]) * (1 + 1e-9)
    weights = sides.importance[:, None] * np.diagonal(sides.second[0])
    exact = sides.each_row[:, None] + np.diagonal(sides.columns) * (
        1 if sides.outputs is None else sides.outputs[:, None]
    )
    np.testing.assert_allclose(weights.sum(axis=1), exact.sum(axis=1))
    np.testing.assert_allclose(weights.sum(axis=0), exact.sum(axis=0))
    # Neither factor alone can be improved upon: J is a quadratic function of each.
    generator = np.random.default_rng(0)
    right = made.right[0] * (1 + 1e-3 * generator.standard_normal(made.right[0].shape))
    assert sides.error(weight - made.left[0] @ right) >= reached * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(problem=problems())
def test_with_readings_of_one_side_the_closed_form_is_the_best(problem):
    weight, sides, rank = problem
    one = Sides(np.zeros(len(weight)), sides.columns + 1e-3 * np.eye(weight.shape[1]))
    solver = TiedFactorizer(matrix_scheme(weight.shape), weight, one, rank)
    tail = np.square(solver.singular_values[rank:]).sum()
    assert solver.errors(np.array([rank]))[0] == pytest.approx(tail, rel=1e-6, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(problem=problems())
def test_full_rank_is_exact_and_ranks_descend(problem):
    weight, sides, _ = problem
    full = min(weight.shape)
    solver = TiedFactorizer(matrix_scheme(weight.shape), weight, sides, full)
    made = solver.factorize(full)
    np.testing.assert_allclose(made.left[0] @ made.right[0], weight, atol=1e-6)
    errors = truncation_errors(solver)
    assert errors.shape == (full + 1,)
    assert errors[0] == 1
    assert errors[-1] == 0
    assert (np.diff(errors) <= 0).all()


def test_a_weight_of_zeros_has_no_error():
    weight = np.zeros((6, 4))
    solver = TiedFactorizer(matrix_scheme((6, 4)), weight, Sides(np.zeros(6), np.zeros((4, 4))), 4)
    assert not truncation_errors(solver).any()
    made = solver.factorize(2)
    assert not (made.left @ made.right).any()


@pytest.mark.parametrize("head", ["transpose", "gemm"])
def test_errors_are_those_of_the_outputs_of_both_readings(head):
    model, data = decoder(head), sentences(30)
    (layer, *_) = find_layers(model).layers
    seen = Seen(model, [layer], lambda: [data])
    weight = read_weight(model, layer)
    sides = sides_of(seen, layer, weight)
    assert sides.error(weight) == pytest.approx(1)
    # The tensors that both readings multiply, in one run.
    reads = {use.data for use in layer.uses if use.data != "ids"}
    values = run_session(open_session(model, 1, sorted(reads)), data)
    (vectors,) = (values[name].reshape(-1, WIDTH).astype(np.float64) for name in reads)
    change = np.random.default_rng(1).standard_normal(weight.shape)

    def lost(matrix: np.ndarray) -> tuple[float, float]:
        return np.square(matrix[data["ids"]]).mean(), np.square(vectors @ matrix.T).mean()

    parts = np.divide(lost(change), lost(weight.astype(np.float64))).mean()
    # Unread rows count a little, and moments are drawn towards the identity.
    assert sides.error(change) == pytest.approx(parts, rel=0.25)


def test_data_makes_the_factors_of_a_decoder_better():
    model, data = decoder(), sentences(60)
    (layer, *_) = find_layers(model).layers
    seen = Seen(model, [layer], lambda: [data])
    weight = read_weight(model, layer)
    sides = sides_of(seen, layer, weight)
    for rank in (4, 8, 16):
        made = FactorsFromData(seen).approximate(layer, matrix_scheme(layer.shape), [rank])[0]
        plain = factorize(weight[None], rank)
        others = sides.error(weight - plain.left[0] @ plain.right[0])
        assert sides.error(weight - made.weight) < 0.8 * others


def test_weights_of_the_outputs_in_the_loss_count():
    """Those of the classes, as the likelihood of tokens needs them."""
    model, data = decoder(), sentences(30)
    (layer, *_) = find_layers(model).layers
    classes = Curvature(2, 3, True, np.linspace(0.5, 1.5, VOCABULARY))
    importance = importances(model, find_layers(model).layers, {"y": classes})
    assert importance["tokens"] == pytest.approx(classes.weights)
    seen = Seen(model, [layer], lambda: [data], importance=importance)
    weight = read_weight(model, layer)
    sides = sides_of(seen, layer, weight)
    assert sides.outputs is importance["tokens"]
    assert sides.error(weight) == pytest.approx(1)
    known = Seen(model, [layer], lambda: [data])
    made = [
        FactorsFromData(s).approximate(layer, matrix_scheme(layer.shape), [6])[0]
        for s in (seen, known)
    ]
    errors = [sides.error(weight - each.weight) for each in made]
    assert errors[0] < errors[1]
