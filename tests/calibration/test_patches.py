"""What a layer multiplies, against what onnxruntime gives for it."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx.calibration.patches import patch_of
from cobla_onnx.calibration.positions import (
    LEAST_OF_MANY,
    choose_positions,
    enough_positions,
    sample_seeds,
)
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.calibration.sums import MomentSum
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.operators.transposed_convolution import TransposedPatch
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from tests.builders import model_of, random_array
from tests.spectra import spectrum


def check(node, weight, data):
    model = model_of([node], {"w": weight}, {"x": list(data.shape)}, ["y"])
    output = run_session(open_session(model, 1), {"x": data})["y"]
    (layer,) = find_layers(model).layers
    patch = patch_of(model, layer, layer.uses[0])
    vectors = np.concatenate(list(patch.vectors(data)), axis=2)
    rows = schemes_for(layer)[0].rows_of(read_weight(model, layer))
    expected = patch.outputs(output)
    assert patch.positions(data) == expected.shape[2]
    np.testing.assert_allclose(rows @ vectors, expected, rtol=1e-4, atol=1e-4)
    some = np.arange(expected.shape[2])[::2]
    chosen = np.concatenate(list(patch.vectors(data, some)), axis=2)
    np.testing.assert_array_equal(chosen, vectors[:, :, some])


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(), (1,), (1, 1), (3,), (1, 3), (2, 1), (2, 3)]),
    st.sampled_from([(), (1,), (3,), (2, 3), (2, 1), (1, 3), (5, 1, 3), (5, 2, 3)]),
    st.booleans(),
)
def test_stacks_broadcast_as_products_do(lead, batch, right):
    try:
        np.broadcast_shapes(lead, batch)
    except ValueError:
        assume(False)
    names = ["x", "w"] if right else ["w", "x"]
    weight = random_array(*lead, *((6, 5) if right else (5, 4)))
    check(helper.make_node("MatMul", names, ["y"], "m"), weight, random_array(*batch, 4, 6))


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.sampled_from(["pads", "more", "SAME_UPPER", "SAME_LOWER", "VALID", "shape"]),
    st.integers(0, 1),
)
def test_transposed_convolutions_are_seen_exactly(kernel, strides, dilations, how, pad):
    values = {"strides": strides, "dilations": dilations}
    spans = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = [min(pad, span) for span in spans]
    if how in ("pads", "more"):
        values["pads"] = [*pads, *(0 for _ in pads)]
        if how == "more":
            values["output_padding"] = [s - 1 for s in strides]
    elif how == "shape":
        places = zip(strides, spans, pads, strict=True)
        values["output_shape"] = [3 * s + span + 1 - p for s, span, p in places]
    else:
        values["auto_pad"] = how
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", **values)
    check(node, random_array(3, 4, *kernel), random_array(2, 3, 4, 4))


def test_few_of_many_positions_give_the_moment_and_do_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr("cobla_onnx.calibration.positions.NUMBERS", 1)
    monkeypatch.setattr("cobla_onnx.calibration.positions.LEAST", 500)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c", pads=[1] * 4)
    model = model_of([node], {"w": random_array(4, 3, 3, 3)}, {"x": ["N", 3, 60, 60]}, ["y"])
    (layer,) = find_layers(model).layers
    patch = patch_of(model, layer, layer.uses[0])
    data = random_array(4, 3, 60, 60)

    def vectors(part):
        chosen = choose_positions(patch, part, sample_seeds({"x": part}))
        assert chosen.each == 500
        return np.concatenate(list(patch.vectors(part, chosen.index, chosen.each)), axis=2)[0]

    together = vectors(data)
    np.testing.assert_array_equal(together, np.hstack([vectors(data[i : i + 1]) for i in range(4)]))
    every = np.concatenate(list(patch.vectors(data)), axis=2)[0]
    whole, some = (v @ v.T / v.shape[1] for v in (every, together))
    assert np.linalg.norm(whole - some) < 0.2 * np.linalg.norm(whole)


@given(size=st.integers(1, 30), samples=st.integers(1, 10_000), vectors=st.integers(1, 200))
def test_many_samples_give_enough_positions_together(size, samples, vectors):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    model = model_of([node], {"w": random_array(size, 2)}, {"x": ["N", 9, size]}, ["y"])
    (layer,) = find_layers(model).layers
    each = enough_positions(patch_of(model, layer, layer.uses[0]), samples, vectors)
    assert each >= LEAST_OF_MANY
    assert samples * each >= vectors * size
    assert each == LEAST_OF_MANY or samples * (each - 1) < vectors * size


@given(most=st.integers(1, 150), side=st.integers(1, 12), count=st.integers(1, 3))
def test_no_more_positions_are_chosen_than_are_asked_for(most, side, count):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c")
    shape = (count, 2, side, side)
    model = model_of([node], {"w": random_array(4, 2, 1, 1)}, {"x": list(shape)}, ["y"])
    (layer,) = find_layers(model).layers
    patch, data = patch_of(model, layer, layer.uses[0]), random_array(*shape)
    chosen = choose_positions(patch, data, sample_seeds({"x": data}), most)
    assert chosen.each == min(most, side**2)
    if most < side**2:
        assert chosen.share == most / side**2
        assert (np.bincount(chosen.index // side**2, minlength=count) == most).all()
        assert (np.diff(chosen.index) > 0).all()
    else:
        assert chosen.index is None


def test_a_layer_seen_by_its_outputs_with_a_suppressed_one():
    """A bias of minus infinity makes an output say nothing; the others are seen as without it."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"], "wide"),
        helper.make_node("Softmax", ["a"], ["y"]),
    ]
    bias = random_array(6, seed=3)
    bias[2] = -np.inf
    weights = {"w": random_array(20, 6, seed=1), "b": bias}
    x = random_array(60, 20)
    model = model_of(nodes, weights, {"x": ["N", 20]}, ["y"])
    (layer,) = find_layers(model).layers
    (scheme,) = schemes_for(layer)
    with closing(Seen(model, [layer], lambda: [{"x": x[:30]}, {"x": x[30:]}], wide=4)) as seen:
        assert seen.is_wide(layer)
        found = spectrum(FactorsFromData(seen), layer, scheme, weights["w"], 5)
        assert found is not None
        assert np.isfinite(found[0]).all()
        assert np.isfinite(found[1]).all()
        (half, most) = FactorsFromData(seen).approximate(layer, scheme, [3, 5])
    others = np.delete(np.arange(6), 2)
    whole = x @ weights["w"]
    # By the weight alone the suppressed output takes as many directions as any other.
    u, s, v = np.linalg.svd(weights["w"], full_matrices=False)
    for found, rank in ((half, 3), (most, 5)):
        plain = (u[:, :rank] * s[:rank]) @ v[:rank]
        lost, without = (
            np.square((x @ weight - whole)[:, others]).sum() for weight in (found.weight, plain)
        )
        assert lost < 0.9 * without


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.integers(0, 2),
    st.sampled_from([None, 3, 11]),
)
def test_zeros_between_are_left_out_of_sums_and_make_no_difference(
    kernel, strides, dilations, pad, each
):
    spans = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple(min(pad, span) for span in spans) * 2
    patch = TransposedPatch("x", 2, kernel, strides, dilations, pads, (0, 0), None)
    data = random_array(2, 2, 4, 3)
    whole = patch.positions(data) // 2
    chosen = None
    if each is not None:
        draws = np.random.default_rng(0)
        each = min(each, whole)
        parts = [np.sort(draws.permutation(whole)[:each]) + k * whole for k in range(2)]
        chosen = np.concatenate(parts)
    each = each or whole
    dense = MomentSum(1, patch.size)
    sparse = MomentSum(1, patch.size, patch.parts)
    phases, done = patch.phases(data, chosen), 0
    for vectors in patch.vectors(data, chosen, each):
        dense.add(vectors, each)
        sparse.add(vectors, each, phases=phases[done : done + vectors.shape[2]])
        done += vectors.shape[2]
    assert done == len(phases)
    one, other = dense.moment(), sparse.moment()
    np.testing.assert_allclose(one.second, other.second, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one.effective, other.effective, rtol=1e-6)
    assert one.count == other.count
