"""Rounding of two factors, with and without data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.variants.coded_factors.form import CodedScheme
from cobla_onnx.variants.coded_factors.pair import (
    Alone,
    FromInputs,
    FromOutputs,
    RoundedPair,
    Target,
    round_pair,
)
from cobla_onnx.variants.coded_factors.prediction import errors_in_bits, rounding_energies
from cobla_onnx.variants.coded_factors.units import factor_distortion
from cobla_onnx.variants.low_rank.matricisation import ConvScheme, Scheme
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.low_rank.weighted_svd import OutputFactorizer, WeightedFactorizer
from cobla_onnx.variants.storage.compensation import unavoidable
from tests.variants.storage.test_rounding import correlated

SHAPE = (12, 8, 3, 3)
SCHEMES: dict[str, ConvScheme] = {
    name: ConvScheme(name, SHAPE, 1, axes)
    for name, axes in {
        "channel": (0, 1),
        "input": (),
        "spatial-hw": (0,),
        "spatial-wh": (1,),
    }.items()
}


def lost(scheme: Scheme, weight: np.ndarray, pair: RoundedPair, second: np.ndarray) -> float:
    """Squared error of the outputs, relative to their energy."""
    change, rows = scheme.rows_of(weight - pair.weight), scheme.rows_of(weight)
    energy = np.einsum("gos,gst,got->", rows, second, rows)
    return float(np.einsum("gos,gst,got->", change, second, change) / energy)


def some_layer(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE).astype(np.float32), correlated(rng, 1, 72)


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    bits=st.sampled_from([3, 4, 6, 8]),
    seed=st.integers(0, 99),
)
def test_the_predicted_error_is_about_the_real_one(name: str, bits: int, seed: int) -> None:
    scheme, (weight, second) = SCHEMES[name], some_layer(seed)
    most = min(scheme.matrix_shape()[1:])
    rank = most // 2
    solver = WeightedFactorizer(scheme, weight, second, rank)
    truncated = np.linspace(1, 0, most + 1)
    truncated[rank] = solver.errors(np.array([rank]))[0] / solver.energy
    unmade, inputs = unavoidable(solver.own), solver.own.shape[1]
    energies = rounding_energies(solver.components(), unmade, inputs, scheme.offsets)
    relative = energies[0] / solver.energy, energies[1] / solver.energy
    distortion = factor_distortion(bits)
    errors = errors_in_bits(truncated, relative, (distortion, distortion))
    pair = round_pair(
        CodedScheme(scheme, bits), solver.factorize(rank), FromInputs(scheme, weight, second)
    )
    assert errors[rank] == pytest.approx(lost(scheme, weight, pair, second), rel=0.5)
    assert errors[0] == 1
    assert errors[-1] == 0
    assert np.all(np.diff(errors) <= 0)


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(sorted(SCHEMES)), seed=st.integers(0, 99), bits=st.integers(2, 6))
def test_more_bits_lose_less_and_many_lose_what_truncation_does(
    name: str, seed: int, bits: int
) -> None:
    scheme, (weight, second) = SCHEMES[name], some_layer(seed)
    solver = WeightedFactorizer(scheme, weight, second, 4)
    factors, target = solver.factorize(4), FromInputs(scheme, weight, second)
    few, more, half = (
        lost(scheme, weight, round_pair(CodedScheme(scheme, b), factors, target), second)
        for b in (bits, 8, 16)
    )
    assert more <= few * 1.02
    bare = solver.errors(np.array([4]))[0] / solver.energy
    assert half == pytest.approx(bare, rel=1e-2)
    assert more == pytest.approx(bare, rel=2e-2)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bits", [3, 5])
def test_without_data_the_error_is_that_of_the_weight(name: str, bits: int) -> None:
    """Inputs that are alike and independent are no data: both targets round about as well."""
    scheme, (weight, _) = SCHEMES[name], some_layer(1)
    stack = scheme.matrix(weight).astype(np.float64)
    rank, same = min(stack.shape[1:]) // 2, np.eye(72)[None]
    form, factors = CodedScheme(scheme, bits), factorize(stack, rank)
    targets: list[Target] = [Alone(scheme, weight), FromInputs(scheme, weight, same)]
    alone, seen = (lost(scheme, weight, round_pair(form, factors, t), same) for t in targets)
    assert alone == pytest.approx(seen, rel=0.2)


def test_layers_that_are_seen_by_their_outputs() -> None:
    scheme, (weight, second) = SCHEMES["channel"], some_layer(2)
    rows = scheme.rows_of(weight).astype(np.float64)
    outputs = rows @ second @ rows.swapaxes(1, 2)
    importance = np.random.default_rng(0).uniform(0.5, 2, (1, 12))
    for weights in (None, importance):
        flat = None if weights is None else weights.reshape(-1)
        solver = OutputFactorizer(scheme, weight, outputs, 8, flat)
        pair = round_pair(
            CodedScheme(scheme, 6), solver.factorize(6), FromOutputs(outputs, weights)
        )
        bare = float(solver.errors(np.array([6]))[0] / solver.energy)
        assert lost(scheme, weight, pair, second) < 1.5 * bare + 0.01


def test_a_layer_of_zeros_stays_one() -> None:
    scheme, second = SCHEMES["spatial-hw"], some_layer(0)[1]
    weight = np.zeros(SHAPE, np.float32)
    factors = WeightedFactorizer(scheme, weight, second, 3).factorize(3)
    pair = round_pair(CodedScheme(scheme, 4), factors, FromInputs(scheme, weight, second))
    assert not pair.weight.any()
